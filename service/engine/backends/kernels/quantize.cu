// Codes of rows that all belong to one tensor.
#include "quantize.cuh"

#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS)
#define WIDTH(X, dtype, BITS, IS_TABLE, name) \
    KERNEL quantize_##dtype##_##name(const __grid_constant__ Task task) { quantize<X, BITS, IS_TABLE>(task, blockIdx.x); }
#define DTYPE(X, dtype) \
    KERNEL find_rows_##dtype(const __grid_constant__ Task task) { find_row<X>(task, blockIdx.x); } \
    WIDTH(X, dtype, 2, false, int2) WIDTH(X, dtype, 3, false, int3) WIDTH(X, dtype, 4, false, int4) \
    WIDTH(X, dtype, 5, false, int5) WIDTH(X, dtype, 6, false, int6) WIDTH(X, dtype, 8, false, int8) \
    WIDTH(X, dtype, 4, true, nf4)

DTYPE(F32, f32)
DTYPE(F16, f16)
DTYPE(BF16, bf16)
