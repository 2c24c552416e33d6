// Operations on rows, one block a row. `width` counts vectors of eight elements.

// y = weight * x / sqrt(mean(x^2) + epsilon)
extern "C" __global__ void rms_norm(const V *x, const float *weight, V *y, int width, float epsilon) {
    const i64 row = (i64)blockIdx.x * width;
    float sum = 0.f, a[8];
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        unpack(x[row + i], a);
#pragma unroll
        for (int j = 0; j < 8; j++) sum += a[j] * a[j];
    }
    const float inverse = rsqrtf(block_sum(sum) / (8.f * width) + epsilon);
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        unpack(x[row + i], a);
#pragma unroll
        for (int j = 0; j < 8; j++) a[j] *= inverse * weight[8 * i + j];
        y[row + i] = pack(a);
    }
}

// With n the normalised row, r its inverse root and g = grad * weight: dx = r (g - n mean(g n)). Blocks go over the rows
// in turn and leave what each adds to the weight's gradient in `partial`, [blocks, 8 width]. A thread has one vector of
// every row.
extern "C" __global__ void rms_norm_backward(const V *x, const float *weight, const V *grad, V *dx, float *partial,
                                             int rows, int width, float epsilon) {
    float w[8] = {}, d_weight[8] = {}, a[8] = {}, g[8] = {};
    const bool mine = threadIdx.x < width;
#pragma unroll
    for (int j = 0; j < 8; j++) w[j] = mine ? weight[8 * threadIdx.x + j] : 0.f;
    for (i64 r = blockIdx.x; r < rows; r += gridDim.x) {
        const i64 at = r * width + threadIdx.x;
        if (mine) {
            unpack(x[at], a);
            unpack(grad[at], g);
        }
        float squares = 0.f, along = 0.f;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            squares += a[j] * a[j];
            along += a[j] * g[j] * w[j];
        }
        const float inverse = rsqrtf(block_sum(squares) / (8.f * width) + epsilon);
        along = block_sum(along) * inverse * inverse / (8.f * width);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            d_weight[j] += g[j] * a[j] * inverse;
            a[j] = inverse * (g[j] * w[j] - a[j] * along);
        }
        if (mine) dx[at] = pack(a);
    }
    if (!mine) return;
#pragma unroll
    for (int j = 0; j < 8; j++) partial[((i64)blockIdx.x * width + threadIdx.x) * 8 + j] = d_weight[j];
}

// Column sums of [rows, width], `width` in single elements, in a fixed order: 32 columns a block, its eight warps every
// eighth row.
extern "C" __global__ void column_sums(const float *x, float *y, int rows, int width) {
    __shared__ float parts[8][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
    float sum = 0.f;
    if (column < width)
        for (int r = warp; r < rows; r += 8) sum += x[(i64)r * width + column];
    parts[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || column >= width) return;
    for (int w = 1; w < 8; w++) sum += parts[w][lane];
    y[column] = sum;
}

// y[r] = x[index[r]]
extern "C" __global__ void gather_rows(const V *x, const int *index, V *y, int width) {
    const i64 from = (i64)index[blockIdx.x] * width, to = (i64)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) y[to + i] = x[from + i];
}

// y[r] = table[ids[r]], rounded
extern "C" __global__ void embed(const float *table, const int *ids, V *y, int width) {
    const float *from = table + (i64)ids[blockIdx.x] * 8 * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float a[8];
#pragma unroll
        for (int j = 0; j < 8; j++) a[j] = from[8 * i + j];
        y[(i64)blockIdx.x * width + i] = pack(a);
    }
}

// With `order` sorting the rows by id, rows of one id as they come: the first of each id adds them all up, in order.
extern "C" __global__ void embed_backward(const V *grad, const int *ids, const int *order, float *table, int rows, int width) {
    const int id = ids[order[blockIdx.x]];
    if (blockIdx.x > 0 && ids[order[blockIdx.x - 1]] == id) return;
    int end = blockIdx.x + 1;
    while (end < rows && ids[order[end]] == id) end++;
    float *to = table + (i64)id * 8 * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float sum[8] = {}, a[8];
        for (int r = blockIdx.x; r < end; r++) {
            unpack(grad[(i64)order[r] * width + i], a);
#pragma unroll
            for (int j = 0; j < 8; j++) sum[j] += a[j];
        }
#pragma unroll
        for (int j = 0; j < 8; j++) to[8 * i + j] = sum[j];
    }
}

// y[r] = sum of x[index[r * copies + j]] over j
extern "C" __global__ void gather_sum(const V *x, const int *index, V *y, int width, int copies) {
    const i64 to = (i64)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float sum[8] = {}, a[8];
        for (int j = 0; j < copies; j++) {
            unpack(x[(i64)index[blockIdx.x * copies + j] * width + i], a);
#pragma unroll
            for (int l = 0; l < 8; l++) sum[l] += a[l];
        }
        y[to + i] = pack(sum);
    }
}

// y[t] = sum over j of weights[t, j] * x[row[t, j]]
extern "C" __global__ void combine_rows(const V *x, const T *weights, const int *row, V *y, int width, int top_k) {
    const i64 pair = (i64)blockIdx.x * top_k;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float sum[8] = {}, a[8];
        for (int j = 0; j < top_k; j++) {
            const float weight = read(weights[pair + j]);
            unpack(x[(i64)row[pair + j] * width + i], a);
#pragma unroll
            for (int l = 0; l < 8; l++) sum[l] += weight * a[l];
        }
        y[(i64)blockIdx.x * width + i] = pack(sum);
    }
}

// d_x[row[t, j]] = weights[t, j] * grad[t], d_weights[t, j] = x[row[t, j]] . grad[t]
extern "C" __global__ void combine_rows_backward(const V *x, const T *weights, const int *row, const V *grad, V *d_x,
                                                 T *d_weights, int width, int top_k) {
    const i64 pair = (i64)blockIdx.x * top_k;
    float a[8], g[8];
    for (int j = 0; j < top_k; j++) {
        const float weight = read(weights[pair + j]);
        const i64 at = (i64)row[pair + j] * width;
        float dot = 0.f;
        for (int i = threadIdx.x; i < width; i += blockDim.x) {
            unpack(x[at + i], a);
            unpack(grad[(i64)blockIdx.x * width + i], g);
#pragma unroll
            for (int l = 0; l < 8; l++) {
                dot += a[l] * g[l];
                a[l] = weight * g[l];
            }
            d_x[at + i] = pack(a);
        }
        dot = block_sum(dot);
        if (threadIdx.x == 0) d_weights[pair + j] = round_to_type(dot);
    }
}

// The largest of a row of logits and the sum of their exponentials less it.
__device__ __forceinline__ void row_exponentials(const float *row, int width, float &top, float &sum) {
    top = NEGATIVE_INFINITY, sum = 0.f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) add_exponential(row[i], top, sum);
    share_exponentials(top, sum);
}

// logits of one row in f32, `width` in single elements: loss = log sum exp - logit[label]
extern "C" __global__ void cross_entropy(const float *logits, const int *labels, float *losses, int width) {
    const float *row = logits + (i64)blockIdx.x * width;
    float top, sum;
    row_exponentials(row, width, top, sum);
    if (threadIdx.x == 0) losses[blockIdx.x] = top + logf(sum) - row[labels[blockIdx.x]];
}

// d_logits = scale * grad * (softmax(logits) - onehot(label)), in the type of activations
extern "C" __global__ void cross_entropy_backward(const float *logits, const int *labels, const float *grad, T *d_logits,
                                                  int width, float scale) {
    const float *row = logits + (i64)blockIdx.x * width;
    float top, sum;
    row_exponentials(row, width, top, sum);
    const float factor = scale * grad[blockIdx.x], inverse = 1.f / sum;
    const int label = labels[blockIdx.x];
    T *out = d_logits + (i64)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        out[i] = round_to_type(factor * (__expf(row[i] - top) * inverse - (i == label ? 1.f : 0.f)));
    }
}
