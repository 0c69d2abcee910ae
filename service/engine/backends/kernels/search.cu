// The search for rows that all belong to one tensor.
#include "search.cuh"

#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS)
#define KIND(X, dtype, IS_TABLE, kind) \
    KERNEL search_groups_##dtype##_##kind(const __grid_constant__ Task task) { \
        search_groups<X, IS_TABLE>(task, (long long)blockIdx.x * THREADS + threadIdx.x); \
    } \
    KERNEL search_rows_##dtype##_##kind(const __grid_constant__ Task task) { search_row<X, IS_TABLE>(task, blockIdx.x); }
#define DTYPE(X, dtype) KIND(X, dtype, false, int) KIND(X, dtype, true, nf4)

DTYPE(F32, f32)
DTYPE(F16, f16)
DTYPE(BF16, bf16)
