// How far one tensor is from another, and what has to be known of one to find a single grid for it.
// Both see a tensor as one row.
#include "common.cuh"

constexpr int THREAD_CELLS = BLOCK_TILES / WARPS;

template <class X, class Y>
__device__ void compare(const Task& task) {
    Tally tally;
#pragma unroll 4
    for (int i = 0; i < THREAD_CELLS; i++) {
        const long long at = (((long long)blockIdx.x * THREAD_CELLS + i) * THREADS + threadIdx.x) * CELL;
        const int count = left_in_row(task.cols, at);
        const Cell<X> a = load_cell((const X*)task.x + at, count, true);
        const Cell<Y> b = load_cell((const Y*)task.y + at, count, true);
        float x[CELL], y[CELL];
#pragma unroll
        for (int k = 0; k < CELL; k++) x[k] = a[k], y[k] = b[k];
        tally.add(x, y);
    }
    store_sums(tally, task.sums);
}

// A pattern such that larger numbers have larger ones.
__device__ inline u32 in_order(u32 pattern) { return pattern >> 31 ? ~pattern : pattern | 0x80000000u; }

// Within a bin numbers differ in the lower halves of their patterns alone, so a bin's sum follows from that of its
// lower halves: whole numbers, which add up to the same in any order.
template <class X>
__device__ void observe(const Task& task) {
    __shared__ u32 extremes[2];
    if (threadIdx.x < 2) extremes[threadIdx.x] = 0;
    __syncthreads();
    u32 least = 0, largest = 0;
    for (int i = 0; i < THREAD_CELLS; i++) {
        const long long at = (((long long)blockIdx.x * THREAD_CELLS + i) * THREADS + threadIdx.x) * CELL;
        const int count = left_in_row(task.cols, at);
        const Cell<X> cell = load_cell((const X*)task.x + at, count, true);
#pragma unroll
        for (int k = 0; k < CELL; k++) {
            if (k >= count) continue;
            const u32 pattern = __float_as_uint(cell[k]);
            atomicAdd(&task.counts[pattern >> 16], (u64)1);
            if (pattern & 0xffffu) atomicAdd(&task.remainders[pattern >> 16], (u64)(pattern & 0xffffu));
            least = max(least, ~in_order(pattern)), largest = max(largest, in_order(pattern));
        }
    }
    atomicMax(&extremes[0], least);
    atomicMax(&extremes[1], largest);
    __syncthreads();
    if (threadIdx.x < 2) atomicMax(&task.extremes[threadIdx.x], extremes[threadIdx.x]);
}

#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS)
#define PAIR(X, x, Y, y) KERNEL compare_##x##_##y(const __grid_constant__ Task task) { compare<X, Y>(task); }
#define DTYPE(X, x) \
    KERNEL observe_##x(const __grid_constant__ Task task) { observe<X>(task); } \
    PAIR(X, x, F32, f32) PAIR(X, x, F16, f16) PAIR(X, x, BF16, bf16)

DTYPE(F32, f32)
DTYPE(F16, f16)
DTYPE(BF16, bf16)
