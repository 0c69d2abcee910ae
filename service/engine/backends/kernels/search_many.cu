// The search for many small tensors in one launch; each warp, or each block, looks up which one it works on.
#include "search.cuh"

#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS)
#define KIND(X, dtype, IS_TABLE, kind) \
    KERNEL search_groups_many_##dtype##_##kind(const __grid_constant__ Task all) { \
        const u32 warp = blockIdx.x * WARPS + threadIdx.x / WARP; \
        const Part& part = all.parts[all.finders[warp]]; \
        search_groups<X, IS_TABLE>(task_of(all, part), (warp - part.first_finder) * WARP + threadIdx.x % WARP); \
    } \
    KERNEL search_rows_many_##dtype##_##kind(const __grid_constant__ Task all) { \
        const Part& part = all.parts[all.finders[blockIdx.x]]; \
        search_row<X, IS_TABLE>(task_of(all, part), blockIdx.x - part.first_finder); \
    }
#define DTYPE(X, dtype) KIND(X, dtype, false, int) KIND(X, dtype, true, nf4)

DTYPE(F32, f32)
DTYPE(F16, f16)
DTYPE(BF16, bf16)
