// Attention on Hopper's tensor cores (wgmma), scores never in memory. bf16 in and out, f32 between. With CAUSAL 1 positions see
// those before them and themselves, with 0 all.
//
// Compiled for one head dimension, HEAD_DIM, a multiple of 64 up to 256. Tiles lie in shared memory as panels of 64 columns
// (128 bytes a row) in the 128-byte swizzle that wgmma reads: 16-byte chunk c of row r is at chunk c ^ (r % 8).

#define PANELS (HEAD_DIM / 64)
#define LOG2E 1.4426950408889634f

typedef unsigned long long u64;

__device__ __forceinline__ u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

// A wgmma operand at `address`: `leading` and `stride` are byte distances as the instruction means them.
__device__ __forceinline__ u64 descriptor(u32 address, u32 leading, u32 stride) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)(leading >> 4) << 16 | (u64)(stride >> 4) << 32 | (u64)1 << 62;
}
// Sum over the columns of a row: K-major, eight rows are 1024 bytes.
__device__ __forceinline__ u64 along_rows(u32 address) { return descriptor(address, 16, 1024); }
// Sum over the rows: the operand's other dimension is contiguous. One panel wide, so `leading` does not matter.
__device__ __forceinline__ u64 along_columns(u32 address) { return descriptor(address, 1024, 1024); }

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

#define ACCUMULATORS(d)                                                                                                     \
    "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]),  \
        "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]),             \
        "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]),             \
        "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define PLACES                                                                                                              \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, "  \
    "%25, %26, %27, %28, %29, %30, %31}"

// d[64 x 64] += a[64 x 16] b[16 x 64], both in shared memory, summed along their rows.
__device__ __forceinline__ void wgmma_rows(float (&d)[32], u64 a, u64 b, int accumulate) {
    asm volatile("{.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " PLACES ", %32, %33, p, 1, 1, 0, 0;\n}"
                 : ACCUMULATORS(d)
                 : "l"(a), "l"(b), "r"(accumulate));
}
// d[64 x 64] += a[64 x 16] b[16 x 64]: a in registers, b's rows summed over.
__device__ __forceinline__ void wgmma_registers(float (&d)[32], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " PLACES
                 ", {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"
                 : ACCUMULATORS(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// A tile of `ROWS` rows from `first` on, rows beyond `end` zero, into panels of ROWS rows; asynchronously.
template <int ROWS, int THREADS>
__device__ __forceinline__ void load_tile(u32 to, const T *from, i64 pitch, int first, int end, int thread) {
    constexpr int CHUNKS = HEAD_DIM / 8;
#pragma unroll 4
    for (int i = thread; i < ROWS * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, column = i % CHUNKS;
        const u32 at = to + column / 8 * (ROWS * 128) + row * 128 + (((column % 8) ^ (row % 8)) * 16);
        const int bytes = first + row < end ? 16 : 0;
        const T *source = from + (bytes ? (i64)(first + row) * pitch + column * 8 : 0);
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(source), "r"(bytes));
    }
}
__device__ __forceinline__ void load_commit() { asm volatile("cp.async.commit_group;"); }
template <int LEFT> __device__ __forceinline__ void load_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT));
    // What threads wrote is to be read by wgmma, which goes another way to memory.
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ u32 pack2(float low, float high) {
    u32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

// out = softmax(scale q kT) v, and log2 of the sums of exponentials, [batch heads, seq]. Two warpgroups of 64 queries each;
// grid: blocks of 128 queries, heads. Strides count elements: batch, sequence, head.
extern "C" __global__ void __launch_bounds__(256, 1)
    flash_forward(const T *q, const T *k, const T *v, T *out, float *log_sums, const int *start, int seq, int heads,
                  float scale, i64 qb, i64 qs, i64 qh, i64 kb, i64 ks, i64 kh, i64 vb, i64 vs, i64 vh, i64 ob, i64 os, i64 oh) {
    constexpr int QUERIES = 128, KEYS = 64, TILE = KEYS * HEAD_DIM * 2;
    extern __shared__ char memory[];
    const u32 base = (shared_address(memory) + 1023) & ~1023u;
    const u32 q_tile = base, kv_tiles = base + QUERIES * HEAD_DIM * 2;
    const int thread = threadIdx.x, group = thread / 128, warp = thread % 128 / 32, lane = thread % 32;
    const int head = blockIdx.y % heads, batch = blockIdx.y / heads;
    // The last blocks have the most keys: they go first.
    const int first = (gridDim.x - 1 - blockIdx.x) * QUERIES;
    q += batch * qb + head * qh;
    k += batch * kb + head * kh;
    v += batch * vb + head * vh;

    const int last = CAUSAL ? min(first + QUERIES, seq) : seq;
    const int key_blocks = (last + KEYS - 1) / KEYS;
    int key_block = 0;
    if (start != nullptr) key_block = start[(i64)batch * seq + first] / KEYS;

    load_tile<QUERIES, 256>(q_tile, q, qs, first, seq, thread);
    load_tile<KEYS, 256>(kv_tiles, k, ks, key_block * KEYS, seq, thread);
    load_tile<KEYS, 256>(kv_tiles + TILE, v, vs, key_block * KEYS, seq, thread);
    load_commit();

    float o[PANELS][32], s[32], top[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY}, sum[2] = {0.f, 0.f};
#pragma unroll
    for (int p = 0; p < PANELS; p++)
#pragma unroll
        for (int i = 0; i < 32; i++) o[p][i] = 0.f;
    const int row = first + group * 64 + warp * 16 + lane / 4;
    int from[2] = {0, 0};
    if (start != nullptr) {
#pragma unroll
        for (int h = 0; h < 2; h++)
            if (row + 8 * h < seq) from[h] = start[(i64)batch * seq + row + 8 * h];
    }
    const float factor = scale * LOG2E;

    for (int stage = 0; key_block < key_blocks; key_block++, stage ^= 1) {
        const u32 k_tile = kv_tiles + stage * 2 * TILE, v_tile = k_tile + TILE;
        load_wait<0>();
        __syncthreads();
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 16; i++) {
            const u32 a = q_tile + i / 4 * (QUERIES * 128) + group * 64 * 128 + i % 4 * 32;
            const u32 b = k_tile + i / 4 * (KEYS * 128) + i % 4 * 32;
            wgmma_rows(s, along_rows(a), along_rows(b), i > 0);
        }
        wgmma_commit();
        // Asking for the next tiles costs a thousand cycles, in which the tensor cores are busy now.
        if (key_block + 1 < key_blocks) {
            const u32 next = kv_tiles + (stage ^ 1) * 2 * TILE;
            load_tile<KEYS, 256>(next, k, ks, (key_block + 1) * KEYS, seq, thread);
            load_tile<KEYS, 256>(next + TILE, v, vs, (key_block + 1) * KEYS, seq, thread);
            load_commit();
        }
        wgmma_wait();

        const int key = key_block * KEYS + lane % 4 * 2;
        const int seen = CAUSAL ? first + group * 64 : seq - 1;
        if (key_block * KEYS + KEYS - 1 > seen || start != nullptr) {
#pragma unroll
            for (int i = 0; i < 32; i++) {
                const int column = key + i / 4 * 8 + i % 2, h = i % 4 / 2;
                if (column > (CAUSAL ? row + 8 * h : seq - 1) || column < from[h]) s[i] = NEGATIVE_INFINITY;
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float most = top[h];
#pragma unroll
            for (int i = 0; i < 8; i++) most = fmaxf(most, fmaxf(s[4 * i + 2 * h], s[4 * i + 2 * h + 1]));
            most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
            most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
            // A row that has seen nothing yet keeps zero weights.
            const float shift = most == NEGATIVE_INFINITY ? 0.f : most * factor;
            const float shrink = exp2f(top[h] * factor - shift);
            top[h] = most;
            sum[h] *= shrink;
#pragma unroll
            for (int i = 0; i < 8; i++) {
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float &x = s[4 * i + 2 * h + j];
                    x = exp2f(x * factor - shift);
                    sum[h] += x;
                }
            }
#pragma unroll
            for (int p = 0; p < PANELS; p++)
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    o[p][4 * i + 2 * h] *= shrink;
                    o[p][4 * i + 2 * h + 1] *= shrink;
                }
        }
        u32 weights[4][4];
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) weights[i][j] = pack2(s[8 * i + 2 * j], s[8 * i + 2 * j + 1]);

        wgmma_fence();
#pragma unroll
        for (int p = 0; p < PANELS; p++)
#pragma unroll
            for (int i = 0; i < KEYS / 16; i++)
                wgmma_registers(o[p], weights[i], along_columns(v_tile + p * (KEYS * 128) + i * 16 * 128));
        wgmma_commit();
        wgmma_wait();
    }

#pragma unroll
    for (int h = 0; h < 2; h++) {
        sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 1);
        sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);
        const int position = row + 8 * h;
        if (position >= seq) continue;
        const float inverse = 1.f / sum[h];
        if (lane % 4 == 0) log_sums[(i64)blockIdx.y * seq + position] = top[h] * factor + log2f(sum[h]);
        T *to = out + batch * ob + (i64)position * os + head * oh + lane % 4 * 2;
#pragma unroll
        for (int p = 0; p < PANELS; p++)
#pragma unroll
            for (int i = 0; i < 8; i++)
                *(u32 *)(to + p * 64 + i * 8) = pack2(o[p][4 * i + 2 * h] * inverse, o[p][4 * i + 2 * h + 1] * inverse);
    }
}

// d[64 x 32] += a[64 x 16] b[16 x 32], both in shared memory, summed along their rows.
__device__ __forceinline__ void wgmma_rows_narrow(float (&d)[16], u64 a, u64 b, int accumulate) {
    asm volatile("{.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, p, 1, 1, 0, 0;\n}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
                   "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
                 : "l"(a), "l"(b), "r"(accumulate));
}
// d[64 x 64] += a[64 x 16] b[16 x 64] in shared memory, summed along a's rows and over b's.
__device__ __forceinline__ void wgmma_mixed(float (&d)[32], u64 a, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " PLACES ", %32, %33, 1, 1, 1, 0, 1;\n"
                 : ACCUMULATORS(d)
                 : "l"(a), "l"(b));
}

// The sums over a row of grad * out, [batch heads, seq]: a warp a row; grid: rows of [batch, seq, heads] by eight.
extern "C" __global__ void flash_delta(const T *grad, const T *out, float *delta, int rows, int seq, int heads, i64 gb, i64 gs,
                                       i64 gh, i64 ob, i64 os, i64 oh) {
    const int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    const int head = row % heads, position = row / heads % seq, batch = row / heads / seq;
    const T *g = grad + batch * gb + (i64)position * gs + head * gh, *o = out + batch * ob + (i64)position * os + head * oh;
    float sum = 0.f;
    for (int i = lane * 2; i < HEAD_DIM; i += 64) {
        const u32 x = *(const u32 *)(g + i), y = *(const u32 *)(o + i);
        sum += __uint_as_float(x << 16) * __uint_as_float(y << 16);
        sum += __uint_as_float(x & 0xffff0000u) * __uint_as_float(y & 0xffff0000u);
    }
    sum = warp_sum(sum);
    if (lane == 0) delta[((i64)batch * heads + head) * seq + position] = sum;
}

// Gradients for 64 keys and values, which meet the queries from their own position on, or all. The two warpgroups share the scores of
// 64 queries, half each; then the first adds up the values' gradient and the second the keys'. What the queries' gradient
// is a product of, scale * p * (dp - delta), goes to `d_scores`, [heads, keys, pitch], for the heads from `first_head` on;
// tiles before the diagonal up to a multiple of `align` queries are zeroed. Grid: blocks of 64 keys, heads.
extern "C" __global__ void __launch_bounds__(256, 1)
    flash_backward(const T *q, const T *k, const T *v, const T *grad, const float *log_sums, const float *delta, T *d_k,
                   T *d_v, T *d_scores, const int *start, int seq, int heads, int first_head, int align, float scale, i64 pitch,
                   i64 qb, i64 qs, i64 qh, i64 kb, i64 ks, i64 kh, i64 vb, i64 vs, i64 vh, i64 gb, i64 gs, i64 gh, i64 db,
                   i64 ds, i64 dh, i64 eb, i64 es, i64 eh) {
    constexpr int KEYS = 64, QUERIES = 64, TILE = 64 * HEAD_DIM * 2;
    extern __shared__ char memory[];
    const u32 base = (shared_address(memory) + 1023) & ~1023u;
    char *const place = memory + (base - shared_address(memory));
    const u32 k_tile = base, v_tile = base + TILE, stages = base + 2 * TILE;
    const u32 p_tile = base + 6 * TILE, s_tile = p_tile + KEYS * 128;
    float *const sums = (float *)(place + 6 * TILE + 2 * KEYS * 128), *const deltas = sums + QUERIES;
    const int thread = threadIdx.x, group = thread / 128, warp = thread % 128 / 32, lane = thread % 32;
    const int plane = first_head + blockIdx.y, head = plane % heads, batch = plane / heads;
    const int first = blockIdx.x * KEYS;
    q += batch * qb + head * qh;
    k += batch * kb + head * kh;
    v += batch * vb + head * vh;
    grad += batch * gb + head * gh;
    log_sums += (i64)plane * seq;
    delta += (i64)plane * seq;
    d_scores += ((i64)blockIdx.y * seq + first) * pitch;

    const int first_query = CAUSAL ? first : 0;
    for (int column = CAUSAL ? first / align * align : first; column < first; column += 64) {
        for (int i = thread; i < KEYS * 8; i += 256) {
            const V zero = {};
            if (first + i / 8 < seq) *(V *)(d_scores + i / 8 * pitch + column + i % 8 * 8) = zero;
        }
    }

    load_tile<KEYS, 256>(k_tile, k, ks, first, seq, thread);
    load_tile<KEYS, 256>(v_tile, v, vs, first, seq, thread);
    load_tile<QUERIES, 256>(stages, q, qs, first_query, seq, thread);
    load_tile<QUERIES, 256>(stages + TILE, grad, gs, first_query, seq, thread);
    load_commit();

    float d[PANELS][32], s[16], dp[16];
#pragma unroll
    for (int p = 0; p < PANELS; p++)
#pragma unroll
        for (int i = 0; i < 32; i++) d[p][i] = 0.f;
    const int row = warp * 16 + lane / 4;
    const float factor = scale * LOG2E;

    for (int query = first_query, stage = 0; query < seq; query += QUERIES, stage ^= 1) {
        // No later query sees these keys.
        if (start != nullptr && start[(i64)batch * seq + query] >= first + KEYS) break;
        const u32 q_tile = stages + stage * 2 * TILE, g_tile = q_tile + TILE;
        load_wait<0>();
        if (thread < QUERIES) {
            const bool real = query + thread < seq;
            sums[thread] = real ? log_sums[query + thread] : -NEGATIVE_INFINITY;
            deltas[thread] = real ? delta[query + thread] : 0.f;
        }
        __syncthreads();
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 16; i++) {
            const u32 at = i / 4 * (64 * 128) + i % 4 * 32, half = at + group * 32 * 128;
            wgmma_rows_narrow(s, along_rows(k_tile + at), along_rows(q_tile + half), i > 0);
        }
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 16; i++) {
            const u32 at = i / 4 * (64 * 128) + i % 4 * 32, half = at + group * 32 * 128;
            wgmma_rows_narrow(dp, along_rows(v_tile + at), along_rows(g_tile + half), i > 0);
        }
        wgmma_commit();
        if (query + QUERIES < seq) {
            const u32 next = stages + (stage ^ 1) * 2 * TILE;
            load_tile<QUERIES, 256>(next, q, qs, query + QUERIES, seq, thread);
            load_tile<QUERIES, 256>(next + TILE, grad, gs, query + QUERIES, seq, thread);
            load_commit();
        }
        wgmma_wait();

        const bool cut = CAUSAL && (query == first || start != nullptr);
#pragma unroll
        for (int i = 0; i < 16; i += 2) {
            const int column = group * 32 + i / 4 * 8 + lane % 4 * 2, h = i % 4 / 2;
            float p[2], e[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                p[j] = exp2f(s[i + j] * factor - sums[column + j]);
                if (cut) {
                    const int key = first + row + 8 * h, position = query + column + j;
                    const int from = start != nullptr && position < seq ? start[(i64)batch * seq + position] : 0;
                    if (key > position || key < from) p[j] = 0.f;
                }
                e[j] = scale * p[j] * (dp[i + j] - deltas[column + j]);
            }
            const int r = row + 8 * h, chunk = group * 4 + i / 4;
            const u32 at = r * 128 + (chunk ^ (r % 8)) * 16 + lane % 4 * 4;
            *(u32 *)(place + (p_tile - base) + at) = pack2(p[0], p[1]);
            *(u32 *)(place + (s_tile - base) + at) = pack2(e[0], e[1]);
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncthreads();

        const u32 a_tile = group ? s_tile : p_tile, b_tile = group ? q_tile : g_tile;
        wgmma_fence();
#pragma unroll
        for (int p = 0; p < PANELS; p++)
#pragma unroll
            for (int i = 0; i < QUERIES / 16; i++)
                wgmma_mixed(d[p], along_rows(a_tile + i * 32), along_columns(b_tile + p * (64 * 128) + i * 16 * 128));
        wgmma_commit();
        for (int i = thread; i < KEYS * 8; i += 256) {
            const int r = i / 8, chunk = i % 8;
            const V word = *(const V *)(place + (s_tile - base) + r * 128 + (chunk ^ (r % 8)) * 16);
            if (first + r < seq) *(V *)(d_scores + r * pitch + query + chunk * 8) = word;
        }
        wgmma_wait();
    }

    T *const to = group ? d_k + batch * db + head * dh : d_v + batch * eb + head * eh;
    const i64 step = group ? ds : es;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int position = first + row + 8 * h;
        if (position >= seq) continue;
        T *at = to + (i64)position * step + lane % 4 * 2;
#pragma unroll
        for (int p = 0; p < PANELS; p++)
#pragma unroll
            for (int i = 0; i < 8; i++) *(u32 *)(at + p * 64 + i * 8) = pack2(d[p][4 * i + 2 * h], d[p][4 * i + 2 * h + 1]);
    }
}
