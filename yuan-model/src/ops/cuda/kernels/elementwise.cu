// Operations without a sum. Widths count vectors of eight elements.

// silu(gate) * up of rows [gate | up], each half `width`
extern "C" __global__ void swiglu(const V *x, V *y, i64 count, int width) {
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) {
        const i64 row = i / width, column = i - row * width;
        float gate[8], up[8];
        unpack(x[row * 2 * width + column], gate);
        unpack(x[row * 2 * width + width + column], up);
#pragma unroll
        for (int j = 0; j < 8; j++) gate[j] = gate[j] / (1.f + __expf(-gate[j])) * up[j];
        y[i] = pack(gate);
    }
}

extern "C" __global__ void swiglu_backward(const V *x, const V *grad, V *dx, i64 count, int width) {
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) {
        const i64 row = i / width, column = i - row * width;
        const i64 at = row * 2 * width + column;
        float gate[8], up[8], g[8];
        unpack(x[at], gate);
        unpack(x[at + width], up);
        unpack(grad[i], g);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float sigmoid = 1.f / (1.f + __expf(-gate[j])), silu = gate[j] * sigmoid;
            gate[j] = g[j] * up[j] * (sigmoid * (1.f + gate[j] * (1.f - sigmoid)));
            up[j] = g[j] * silu;
        }
        dx[at] = pack(gate);
        dx[at + width] = pack(up);
    }
}

// y_t = current_t + previous_(t-1) of rows [previous | current], each half `width`, in sequences of `seq` rows
extern "C" __global__ void add_previous(const V *x, V *y, i64 count, int width, int seq) {
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) {
        const i64 row = i / width, column = i - row * width;
        float current[8], previous[8];
        unpack(x[row * 2 * width + width + column], current);
        if (row % seq != 0) {
            unpack(x[(row - 1) * 2 * width + column], previous);
#pragma unroll
            for (int j = 0; j < 8; j++) current[j] += previous[j];
        }
        y[i] = pack(current);
    }
}

extern "C" __global__ void add_previous_backward(const V *grad, V *dx, i64 count, int width, int seq) {
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) {
        const i64 row = i / width, column = i - row * width;
        dx[row * 2 * width + width + column] = grad[i];
        V next = {};
        if (row % seq != seq - 1) next = grad[i + width];
        dx[row * 2 * width + column] = next;
    }
}

// Rotates the first 2 * pairs of `width` vectors of every head: x is [batch, seq, heads, head_dim] with strides, y the same
// shape with other strides, cos and sin [batch or 1, seq, pairs]. Strides count elements.
extern "C" __global__ void rotate(const T *x, const V *cos, const V *sin, T *y, i64 count, int seq, int heads, int width,
                                  int pairs, i64 xb, i64 xs, i64 xh, i64 yb, i64 ys, i64 yh, i64 table) {
    const int rest = width - 2 * pairs, items = pairs + rest;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) {
        const int item = i % items;
        const i64 head = i / items, token = head / heads;
        const int h = head % heads, s = token % seq;
        const i64 b = token / seq;
        const V *from = (const V *)(x + b * xb + s * xs + h * xh);
        V *to = (V *)(y + b * yb + s * ys + h * yh);
        if (item >= pairs) {
            to[item + pairs] = from[item + pairs];
            continue;
        }
        float first[8], second[8], c[8], d[8], out[8];
        unpack(from[item], first);
        unpack(from[pairs + item], second);
        unpack(cos[b * table + (i64)s * pairs + item], c);
        unpack(sin[b * table + (i64)s * pairs + item], d);
#pragma unroll
        for (int j = 0; j < 8; j++) out[j] = first[j] * c[j] - second[j] * d[j];
        to[item] = pack(out);
#pragma unroll
        for (int j = 0; j < 8; j++) out[j] = second[j] * c[j] + first[j] * d[j];
        to[pairs + item] = pack(out);
    }
}
