// From packed codes back to numbers.
#include "common.cuh"

template <int BITS>
__device__ inline u64 load_codes(const Task& task, long long row, long long index) {
    const u8* const cell = task.packed + row * task.row_bytes + index * BITS;
    if constexpr (BITS == 2) return *(const u16*)cell;
    if constexpr (BITS == 4) return *(const u32*)cell;
    const long long left = task.row_bytes - index * BITS;
    u64 word = 0;
#pragma unroll
    for (int i = 0; i < BITS; i++)
        if (i < left) word |= (u64)cell[i] << 8 * i;
    return word;
}

__device__ inline void store_values(float* out, const float (&values)[CELL], int count, bool is_aligned) {
    if (count == CELL && is_aligned) {
        ((float4*)out)[0] = make_float4(values[0], values[1], values[2], values[3]);
        ((float4*)out)[1] = make_float4(values[4], values[5], values[6], values[7]);
        return;
    }
#pragma unroll
    for (int i = 0; i < CELL; i++)
        if (i < count) out[i] = values[i];
}

template <int BITS, bool IS_TABLE>
__device__ void dequantize(const Task& task) {
    __shared__ Table table;
    if constexpr (IS_TABLE) fill(table);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u32 row_tiles = (u32)((task.cols + TILE - 1) / TILE), tiles = (u32)task.rows * row_tiles;
    const u32 first = blockIdx.x * BLOCK_TILES + warp * (BLOCK_TILES / WARPS);
    for (u32 tile = first; tile < first + BLOCK_TILES / WARPS && tile < tiles; tile++) {
        const u32 row = tile / row_tiles, column = (tile - row * row_tiles) * TILE + lane * CELL;
        const int count = left_in_row(task.cols, column);
        if (!count) continue;
        const u64 word = load_codes<BITS>(task, row, column / CELL);
        const Grid grid = load_grid(task, grid_index(task, row, column));
        float values[CELL];
#pragma unroll
        for (int i = 0; i < CELL; i++) {
            const u32 code = (u32)(word >> i * BITS) & ((1u << BITS) - 1);
            values[i] = __fmul_rn(IS_TABLE ? table.levels[code % 16] : (float)code - grid.zero, grid.scale);
        }
        store_values(task.out + row * task.cols + column, values, count, task.is_aligned);
    }
}

#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS)
#define WIDTH(BITS, IS_TABLE, name) \
    KERNEL dequantize_##name(const __grid_constant__ Task task) { dequantize<BITS, IS_TABLE>(task); }

WIDTH(2, false, int2)
WIDTH(3, false, int3)
WIDTH(4, false, int4)
WIDTH(5, false, int5)
WIDTH(6, false, int6)
WIDTH(8, false, int8)
WIDTH(4, true, nf4)
