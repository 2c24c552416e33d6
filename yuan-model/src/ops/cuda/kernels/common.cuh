// Shared by all kernels, and put before each of them. No header is needed: NVRTC alone compiles this.
//
// `T` is the element type of activations, chosen when a kernel is compiled; arithmetic is in f32.

typedef unsigned int u32;
typedef long long i64;

#ifdef BF16
typedef unsigned short T;
__device__ __forceinline__ float read(T x) { return __uint_as_float((u32)x << 16); }
__device__ __forceinline__ T round_to_type(float x) {
    T y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
// Eight elements, one 16-byte access.
struct alignas(16) V {
    u32 words[4];
};
__device__ __forceinline__ void unpack(const V &v, float *x) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = __uint_as_float(v.words[i] << 16);
        x[2 * i + 1] = __uint_as_float(v.words[i] & 0xffff0000u);
    }
}
__device__ __forceinline__ V pack(const float *x) {
    V v;
#pragma unroll
    for (int i = 0; i < 4; i++) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v.words[i]) : "f"(x[2 * i + 1]), "f"(x[2 * i]));
    return v;
}
#else
typedef float T;
__device__ __forceinline__ float read(T x) { return x; }
__device__ __forceinline__ T round_to_type(float x) { return x; }
struct alignas(16) V {
    float words[8];
};
__device__ __forceinline__ void unpack(const V &v, float *x) {
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = v.words[i];
}
__device__ __forceinline__ V pack(const float *x) {
    V v;
#pragma unroll
    for (int i = 0; i < 8; i++) v.words[i] = x[i];
    return v;
}
#endif

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, d));
    return x;
}

#define NEGATIVE_INFINITY __int_as_float(0xff800000)

// A warp's reduction carried to the block, its result known to all threads. Threads are a multiple of 32; `nothing` changes
// no result.
template <float (*WARP)(float)> __device__ __forceinline__ float block_reduce(float x, float nothing) {
    __shared__ float parts[32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    x = WARP(x);
    __syncthreads();
    if (lane == 0) parts[warp] = x;
    __syncthreads();
    return WARP(lane < warps ? parts[lane] : nothing);
}
__device__ __forceinline__ float block_sum(float x) { return block_reduce<warp_sum>(x, 0.f); }
__device__ __forceinline__ float block_max(float x) { return block_reduce<warp_max>(x, NEGATIVE_INFINITY); }

// Takes one more number into the largest of some, `top`, and the sum of their exponentials less it.
__device__ __forceinline__ void add_exponential(float x, float &top, float &sum) {
    if (x > top) {
        sum = sum * __expf(top - x) + 1.f;
        top = x;
    } else {
        sum += __expf(x - top);
    }
}
// The same two of all that the block's threads have seen.
__device__ __forceinline__ void share_exponentials(float &top, float &sum) {
    const float all = block_max(top);
    sum = block_sum(top == all ? sum : sum * __expf(top - all));
    top = all;
}
