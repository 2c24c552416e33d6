// A stable counting sort of (token, expert) pairs by expert, in three steps over chunks of blockDim.x pairs. Experts that
// are out of range would be out of bounds: the router gives none.

// Pairs of every expert in a chunk: histogram [chunks, experts].
extern "C" __global__ void count_pairs(const int *expert, int *histogram, int pairs, int experts) {
    extern __shared__ int counts[];
    for (int e = threadIdx.x; e < experts; e += blockDim.x) counts[e] = 0;
    __syncthreads();
    const int pair = blockIdx.x * blockDim.x + threadIdx.x;
    if (pair < pairs) atomicAdd(&counts[expert[pair]], 1);
    __syncthreads();
    for (int e = threadIdx.x; e < experts; e += blockDim.x) histogram[blockIdx.x * experts + e] = counts[e];
}

// One block. Turns the histogram into the first row of every chunk and expert; `totals` are the pairs of every expert.
extern "C" __global__ void scan_counts(int *histogram, int *totals, int chunks, int experts) {
    extern __shared__ int starts[];
    for (int e = threadIdx.x; e < experts; e += blockDim.x) {
        int sum = 0;
        for (int c = 0; c < chunks; c++) sum += histogram[c * experts + e];
        totals[e] = sum;
        starts[e] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        int sum = 0;
        for (int e = 0; e < experts; e++) {
            const int count = starts[e];
            starts[e] = sum;
            sum += count;
        }
    }
    __syncthreads();
    for (int e = threadIdx.x; e < experts; e += blockDim.x) {
        int at = starts[e];
        for (int c = 0; c < chunks; c++) {
            const int count = histogram[c * experts + e];
            histogram[c * experts + e] = at;
            at += count;
        }
    }
}

// Gives every pair its row: the chunk's first row of its expert, plus the pairs of that expert before it in the chunk.
extern "C" __global__ void place_pairs(const int *expert, const int *histogram, int *row_of_pair, int *pair_of_row,
                                       int pairs, int experts) {
    extern __shared__ int before[]; // [warps, experts]
    const int pair = blockIdx.x * blockDim.x + threadIdx.x;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    for (int i = threadIdx.x; i < warps * experts; i += blockDim.x) before[i] = 0;
    __syncthreads();
    const int mine = pair < pairs ? expert[pair] : -1;
    const u32 same = __match_any_sync(0xffffffffu, mine);
    const int rank = __popc(same & ((1u << lane) - 1));
    if (mine >= 0 && rank == 0) before[warp * experts + mine] = __popc(same);
    __syncthreads();
    for (int e = threadIdx.x; e < experts; e += blockDim.x) {
        int sum = 0;
        for (int w = 0; w < warps; w++) {
            const int count = before[w * experts + e];
            before[w * experts + e] = sum;
            sum += count;
        }
    }
    __syncthreads();
    if (mine < 0) return;
    const int row = histogram[blockIdx.x * experts + mine] + before[warp * experts + mine] + rank;
    row_of_pair[pair] = row;
    pair_of_row[row] = pair;
}

// One digit of every number, in the given order or as they come: (x / unit) % base.
extern "C" __global__ void digits(const int *numbers, const int *order, int *out, int count, int unit, int base) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = numbers[order == nullptr ? i : order[i]] / unit % base;
}

// out[i] = first[second[i]]
extern "C" __global__ void follow(const int *first, const int *second, int *out, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = first[second[i]];
}

// One block. Where the rows of each rank for each of `own` experts begin: as they arrive, rank by rank, then where they
// belong, expert by expert: starts [2, ranks * own], from counts [ranks, experts].
extern "C" __global__ void arrival_starts(const int *counts, int *starts, int ranks, int experts, int first, int own) {
    extern __shared__ int sizes[];
    const int segments = ranks * own;
    for (int i = threadIdx.x; i < segments; i += blockDim.x) sizes[i] = counts[i / own * experts + first + i % own];
    __syncthreads();
    if (threadIdx.x == 0) {
        int sum = 0;
        for (int i = 0; i < segments; i++) {
            starts[i] = sum;
            sum += sizes[i];
        }
    }
    if (threadIdx.x == 32) {
        int sum = 0;
        for (int e = 0; e < own; e++) {
            for (int r = 0; r < ranks; r++) {
                starts[segments + r * own + e] = sum;
                sum += sizes[r * own + e];
            }
        }
    }
}

// The place of every row that arrives, and the row at every place.
extern "C" __global__ void arrival_order(const int *starts, int *place_of_row, int *row_at_place, int segments, int rows) {
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    // The last segment that begins at the row or before it: empty ones begin where the next one does.
    int low = 0, high = segments;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (starts[middle] <= row) low = middle;
        else high = middle;
    }
    // Where nothing arrives one row stands for it, in its own place.
    const int place = min(starts[segments + low] + row - starts[low], rows - 1);
    place_of_row[row] = place;
    row_at_place[place] = row;
}
