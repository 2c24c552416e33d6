// Operations of the image tower. `width` counts vectors of eight elements.

// y = weight * (x - mean(x)) / sqrt(var(x) + epsilon) + bias, one block a row
extern "C" __global__ void layer_norm(const V *x, const float *weight, const float *bias, V *y, int width, float epsilon) {
    const i64 row = (i64)blockIdx.x * width;
    float sum = 0.f, squares = 0.f, a[8];
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        unpack(x[row + i], a);
#pragma unroll
        for (int j = 0; j < 8; j++) sum += a[j];
    }
    const float mean = block_sum(sum) / (8.f * width);
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        unpack(x[row + i], a);
#pragma unroll
        for (int j = 0; j < 8; j++) squares += (a[j] - mean) * (a[j] - mean);
    }
    const float inverse = rsqrtf(block_sum(squares) / (8.f * width) + epsilon);
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        unpack(x[row + i], a);
#pragma unroll
        for (int j = 0; j < 8; j++) a[j] = (a[j] - mean) * inverse * weight[8 * i + j] + bias[8 * i + j];
        y[row + i] = pack(a);
    }
}

// With n the standardised row, r its inverse deviation and g = grad * weight: dx = r (g - mean(g) - n mean(g n)). Blocks go
// over the rows in turn and leave what each adds to the gradients of weight and bias in `partial`, [blocks, 2, 8 width]. A
// thread has one vector of every row.
extern "C" __global__ void layer_norm_backward(const V *x, const float *weight, const V *grad, V *dx, float *partial,
                                               int rows, int width, float epsilon) {
    float w[8] = {}, d_weight[8] = {}, d_bias[8] = {}, a[8] = {}, g[8] = {};
    const bool mine = threadIdx.x < width;
    const float count = 8.f * width;
#pragma unroll
    for (int j = 0; j < 8; j++) w[j] = mine ? weight[8 * threadIdx.x + j] : 0.f;
    for (i64 r = blockIdx.x; r < rows; r += gridDim.x) {
        const i64 at = r * width + threadIdx.x;
        if (mine) {
            unpack(x[at], a);
            unpack(grad[at], g);
        }
        float sum = 0.f, squares = 0.f, whole = 0.f, along = 0.f;
#pragma unroll
        for (int j = 0; j < 8; j++) sum += mine ? a[j] : 0.f;
        const float mean = block_sum(sum) / count;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            a[j] = mine ? a[j] - mean : 0.f;
            squares += a[j] * a[j];
            whole += g[j] * w[j];
            along += g[j] * w[j] * a[j];
        }
        const float inverse = rsqrtf(block_sum(squares) / count + epsilon);
        whole = block_sum(whole) / count;
        along = block_sum(along) * inverse / count;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float n = a[j] * inverse;
            d_weight[j] += g[j] * n;
            d_bias[j] += g[j];
            a[j] = inverse * (g[j] * w[j] - whole - n * along);
        }
        if (mine) dx[at] = pack(a);
    }
    if (!mine) return;
    float *const to = partial + ((i64)blockIdx.x * 2 * width + threadIdx.x) * 8;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        to[j] = d_weight[j];
        to[8 * width + j] = d_bias[j];
    }
}

// The share of the normal distribution below x.
__device__ __forceinline__ float below(float x) { return 0.5f * (1.f + erff(x * 0.70710678118654752f)); }

extern "C" __global__ void gelu(const V *x, V *y, i64 count, int width) {
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) {
        float a[8];
        unpack(x[i], a);
#pragma unroll
        for (int j = 0; j < 8; j++) a[j] *= below(a[j]);
        y[i] = pack(a);
    }
}

// grad * (below(x) + x density(x))
extern "C" __global__ void gelu_backward(const V *x, const V *grad, V *dx, i64 count, int width) {
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) {
        float a[8], g[8];
        unpack(x[i], a);
        unpack(grad[i], g);
#pragma unroll
        for (int j = 0; j < 8; j++)
            g[j] *= below(a[j]) + a[j] * 0.39894228040143268f * __expf(-0.5f * a[j] * a[j]);
        dx[i] = pack(g);
    }
}

// y = x + bias for every row
extern "C" __global__ void add_bias(const V *x, const V *bias, V *y, i64 count, int width) {
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) {
        float a[8], b[8];
        unpack(x[i], a);
        unpack(bias[i % width], b);
#pragma unroll
        for (int j = 0; j < 8; j++) a[j] += b[j];
        y[i] = pack(a);
    }
}

// y = x + branch * scale for every row
extern "C" __global__ void add_scaled(const V *x, const V *branch, const V *scale, V *y, i64 count, int width) {
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) {
        float a[8], b[8], s[8];
        unpack(x[i], a);
        unpack(branch[i], b);
        unpack(scale[i % width], s);
#pragma unroll
        for (int j = 0; j < 8; j++) a[j] += b[j] * s[j];
        y[i] = pack(a);
    }
}

// Blocks go over the rows in turn and leave the sum of theirs in `partial`, [blocks, 8 width]. With `branch`, a row counts
// times the branch's, and d_branch = grad * scale.
extern "C" __global__ void sum_rows(const V *grad, const V *branch, const V *scale, V *d_branch, float *partial, int rows,
                                    int width) {
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float sum[8] = {}, g[8], b[8], s[8];
        if (branch != nullptr) unpack(scale[i], s);
        for (i64 r = blockIdx.x; r < rows; r += gridDim.x) {
            unpack(grad[r * width + i], g);
            if (branch == nullptr) {
#pragma unroll
                for (int j = 0; j < 8; j++) sum[j] += g[j];
                continue;
            }
            unpack(branch[r * width + i], b);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                sum[j] += g[j] * b[j];
                g[j] *= s[j];
            }
            d_branch[r * width + i] = pack(g);
        }
#pragma unroll
        for (int j = 0; j < 8; j++) partial[((i64)blockIdx.x * width + i) * 8 + j] = sum[j];
    }
}
