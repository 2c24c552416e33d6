// Updates of flat f32 tensors.

struct alignas(16) F4 {
    float at[4];
};

struct AdamW {
    float grad_scale, beta_1, beta_2, decay, rate, root_scale, epsilon;

    // `rate` and `root_scale` hold the bias corrections, `decay` is one less rate times weight decay.
    __device__ __forceinline__ void update(float &p, float g, float &first, float &second) const {
        g *= grad_scale;
        first = beta_1 * first + (1.f - beta_1) * g;
        second = beta_2 * second + (1.f - beta_2) * g * g;
        p = decay * p - rate * first / (sqrtf(second * root_scale) + epsilon);
    }
};

// One AdamW update; see `AdamWStep`. Four elements at a time, the last few one by one.
extern "C" __global__ void adamw(const float *param, const float *grad, const float *m1, const float *m2, float *param_out,
                                 float *m1_out, float *m2_out, i64 count, float grad_scale, float beta_1, float beta_2,
                                 float decay, float rate, float root_scale, float epsilon) {
    const AdamW step = {grad_scale, beta_1, beta_2, decay, rate, root_scale, epsilon};
    const i64 first_item = (i64)blockIdx.x * blockDim.x + threadIdx.x, stride = (i64)gridDim.x * blockDim.x;
    for (i64 i = first_item; i < count / 4; i += stride) {
        F4 p = ((const F4 *)param)[i], first = ((const F4 *)m1)[i], second = ((const F4 *)m2)[i];
        const F4 g = ((const F4 *)grad)[i];
#pragma unroll
        for (int j = 0; j < 4; j++) step.update(p.at[j], g.at[j], first.at[j], second.at[j]);
        ((F4 *)param_out)[i] = p;
        ((F4 *)m1_out)[i] = first;
        ((F4 *)m2_out)[i] = second;
    }
    for (i64 i = count / 4 * 4 + first_item; i < count; i += stride) {
        float p = param[i], first = m1[i], second = m2[i];
        step.update(p, grad[i], first, second);
        param_out[i] = p;
        m1_out[i] = first;
        m2_out[i] = second;
    }
}

// Sums of squares of what each block visits; `count` in single elements.
extern "C" __global__ void squares(const float *x, float *partial, i64 count) {
    const i64 first = (i64)blockIdx.x * blockDim.x + threadIdx.x, stride = (i64)gridDim.x * blockDim.x;
    float sum = 0.f;
    for (i64 i = first; i < count / 4; i += stride) {
        const F4 v = ((const F4 *)x)[i];
#pragma unroll
        for (int j = 0; j < 4; j++) sum += v.at[j] * v.at[j];
    }
    for (i64 i = count / 4 * 4 + first; i < count; i += stride) sum += x[i] * x[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// One block: the sum of `count` numbers.
extern "C" __global__ void total(const float *partial, float *sum, int count) {
    float x = 0.f;
    for (int i = threadIdx.x; i < count; i += blockDim.x) x += partial[i];
    x = block_sum(x);
    if (threadIdx.x == 0) sum[0] = x;
}
