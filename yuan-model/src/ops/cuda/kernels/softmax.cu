// Rows of attention scores, one block a row: blockIdx.x is the query within the block of queries, blockIdx.y the head.
// Scores and results are [heads, queries, keys]; query i of the block is at position first + i and sees the keys before it
// and itself, from `start[batch, position]` on where that is given (a packed row's document); or all keys, without CAUSAL.

__device__ __forceinline__ int last_key(int position, int keys) { return CAUSAL ? position : keys - 1; }
__device__ __forceinline__ int first_key(const int *start, int heads, int seq, int head_offset, int position) {
    return start == nullptr ? 0 : start[(i64)((blockIdx.y + head_offset) / heads) * seq + position];
}

extern "C" __global__ void attention_softmax(const float *scores, T *out, const int *start, int first, int keys, int heads,
                                             int seq, int head_offset) {
    const int position = first + blockIdx.x, last = last_key(position, keys);
    const int from = first_key(start, heads, seq, head_offset, position);
    const i64 row = ((i64)blockIdx.y * gridDim.x + blockIdx.x) * keys;
    float top = NEGATIVE_INFINITY, sum = 0.f;
    for (int i = from + threadIdx.x; i <= last; i += blockDim.x) add_exponential(scores[row + i], top, sum);
    share_exponentials(top, sum);
    const float inverse = 1.f / sum;
    for (int i = threadIdx.x; i < keys; i += blockDim.x) {
        const bool seen = i >= from && i <= last;
        out[row + i] = round_to_type(seen ? __expf(scores[row + i] - top) * inverse : 0.f);
    }
}

// With p the probabilities and d_p their gradient: d_scores = scale * p * (d_p - sum(d_p p)). Writes p and d_scores as
// rows of `pitch` elements, heads `plane` apart.
extern "C" __global__ void attention_softmax_backward(const float *scores, const float *d_p, T *p_out, T *d_out,
                                                      const int *start, int first, int keys, int heads, int seq,
                                                      int head_offset, float scale, i64 pitch, i64 plane) {
    const int position = first + blockIdx.x, last = last_key(position, keys);
    const int from = first_key(start, heads, seq, head_offset, position);
    const i64 row = ((i64)blockIdx.y * gridDim.x + blockIdx.x) * keys;
    float top = NEGATIVE_INFINITY, sum = 0.f, along = 0.f;
    for (int i = from + threadIdx.x; i <= last; i += blockDim.x) {
        const float x = scores[row + i], d = d_p[row + i];
        if (x > top) {
            const float shrink = __expf(top - x);
            sum = sum * shrink + 1.f;
            along = along * shrink + d;
            top = x;
        } else {
            const float e = __expf(x - top);
            sum += e;
            along += e * d;
        }
    }
    const float all = block_max(top), shrink = top == all ? 1.f : __expf(top - all);
    sum = block_sum(sum * shrink);
    const float inverse = 1.f / sum;
    along = block_sum(along * shrink) * inverse;
    const i64 to = blockIdx.y * plane + (i64)position * pitch;
    for (int i = threadIdx.x; i < keys; i += blockDim.x) {
        const bool seen = i >= from && i <= last;
        const float p = seen ? __expf(scores[row + i] - all) * inverse : 0.f;
        p_out[to + i] = round_to_type(p);
        d_out[to + i] = round_to_type(seen ? scale * p * (d_p[row + i] - along) : 0.f);
    }
}
