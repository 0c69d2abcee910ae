// Codes on their grids, packed, and what they lose: one read of the weights, one write of the codes.
#pragma once
#include "common.cuh"

// Eight codes of BITS bits in the low bits of a word, and the values that they stand for.
template <int BITS, bool IS_TABLE>
__device__ inline u64 encode(const float (&x)[CELL], const Grid& grid, float top, const Table& table,
                             float (&values)[CELL]) {
    u32 halves[2] = {0, 0};
    const float lowest = __fadd_rn(-grid.zero, ROUNDER), highest = __fadd_rn(top - grid.zero, ROUNDER);
    const u32 offset = (u32)grid.zero - __float_as_uint(ROUNDER);
#pragma unroll
    for (int i = 0; i < CELL; i++) {
        const float t = __fmul_rn(x[i], grid.inverse);
        u32 code;
        if constexpr (IS_TABLE) {
            code = table.index(t);
            values[i] = __fmul_rn(table.levels[code], grid.scale);
        } else {
            // clamp(rint(t) + z) - z: the clamp's ends are moved by z instead of the number.
            const float steps = fminf(fmaxf(__fadd_rn(t, ROUNDER), lowest), highest);
            code = __float_as_uint(steps) + offset;
            values[i] = __fmul_rn(__fsub_rn(steps, ROUNDER), grid.scale);
        }
        halves[i / 4] |= code << (i % 4 * BITS);
    }
    return (u64)halves[1] << (4 * BITS) | halves[0];
}

// Codes of widths that share no power of two with a byte: four lanes make BITS words of their cells. All lanes call it.
template <int BITS>
__device__ inline void store_quad(u8* cell, u64 word, bool is_inside) {
    const int lane = threadIdx.x % WARP, first = lane & ~3;
    const bool is_quad_inside = (__ballot_sync(ALL, is_inside) >> first & 15) == 15;
    u32* const words = (u32*)(cell - (lane - first) * BITS);
#pragma unroll
    for (int turn = 0; turn * 4 < BITS; turn++) {
        const int k = lane - first + 4 * turn, from = 4 * k / BITS, shift = 32 * k - 8 * BITS * from;
        const u64 low = __shfl_sync(ALL, word, (first + from) % WARP);
        const u64 high = __shfl_sync(ALL, word, (first + from + 1) % WARP);
        if (is_quad_inside && k < BITS) words[k] = (u32)(low >> shift | (shift ? high << (8 * BITS - shift) : high << 8 * BITS));
    }
    if (!is_inside || is_quad_inside) return;
#pragma unroll
    for (int i = 0; i < BITS; i++) cell[i] = (u8)(word >> 8 * i);
}

// The last cell of a row, and the zeros behind it.
__device__ inline void store_end(u8* cell, u64 word, long long nbytes) {
    for (int i = 0; i < nbytes; i++) cell[i] = i < 8 ? (u8)(word >> 8 * i) : 0;
}

// `count` codes at cell number `index` of a row; all lanes call it.
template <int BITS>
__device__ inline void store_codes(const Task& task, long long row, long long index, int count, u64 word) {
    u8* const cell = task.packed + row * task.row_bytes + index * BITS;
    const bool is_last = count > 0 && (index + 1) * CELL >= task.cols, is_inside = count == CELL && !is_last;
    if constexpr (BITS == 2) {
        if (is_inside) *(u16*)cell = (u16)word;
    } else if constexpr (BITS == 4) {
        if (is_inside) *(u32*)cell = (u32)word;
    } else if constexpr (BITS == 8) {
        if (is_inside) ((u32*)cell)[0] = (u32)word, ((u32*)cell)[1] = (u32)(word >> 32);
    } else {
        store_quad<BITS>(cell, word, is_inside);
    }
    if (is_last) {
        if (count < CELL) word &= ((u64)1 << count * BITS) - 1;
        store_end(cell, word, task.row_bytes - index * BITS);
    }
}

template <class X, int BITS, bool IS_TABLE>
__device__ void quantize(const Task& task, u32 block) {
    __shared__ Table table;
    if constexpr (IS_TABLE) fill(table);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, group_lanes = task.group / CELL;
    const u32 row_tiles = (u32)((task.cols + TILE - 1) / TILE), tiles = (u32)task.rows * row_tiles;
    Tally tally;
#pragma unroll 1
    for (int pass = 0; pass < PASSES; pass++) {
        const u32 first = block * BLOCK_TILES + (pass * WARPS + warp) * TILES_AHEAD;
        Cell<X> cells[TILES_AHEAD];
        u32 rows[TILES_AHEAD], columns[TILES_AHEAD];
        int counts[TILES_AHEAD];
#pragma unroll
        for (int i = 0; i < TILES_AHEAD; i++) {
            const u32 row = rows[i] = (first + i) / row_tiles;
            columns[i] = (first + i - row * row_tiles) * TILE + lane * CELL;
            counts[i] = first + i < tiles ? left_in_row(task.cols, columns[i]) : 0;
            cells[i] = load_cell((const X*)task.x + row * task.cols + columns[i], counts[i], task.is_aligned);
        }
#pragma unroll
        for (int i = 0; i < TILES_AHEAD; i++) {
            float x[CELL], values[CELL];
#pragma unroll
            for (int k = 0; k < CELL; k++) x[k] = cells[i][k];
            Grid grid = {1.0f, task.implied, 1.0f};
            if (task.finds) {  // groups of 16 to 256
                float low = 0.0f, high = 0.0f;
#pragma unroll
                for (int k = 0; k < CELL; k++) low = fminf(low, x[k]), high = fmaxf(high, x[k]);
                grid = make_grid(task, least_over(low, group_lanes), largest_over(high, group_lanes));
                if (counts[i] && columns[i] % task.group == 0)
                    store_grid(task, grid_index(task, rows[i], columns[i]), grid);
            } else if (counts[i]) {
                grid = load_grid(task, grid_index(task, rows[i], columns[i]));
            }
            const u64 word = encode<BITS, IS_TABLE>(x, grid, task.top, table, values);
            store_codes<BITS>(task, rows[i], columns[i] / CELL, counts[i], word);
            tally.add(x, values);
        }
    }
    store_sums(tally, task.sums);
}

// The grid of a row's range; a block has a row.
template <class X>
__device__ void find_row(const Task& task, u32 row) {
    __shared__ float lows[WARPS], highs[WARPS];
    const X* const x = (const X*)task.x + row * task.cols;
    float low = 0.0f, high = 0.0f;
    for (long long column = threadIdx.x * CELL; column < task.cols; column += THREADS * CELL) {
        const Cell<X> cell = load_cell(x + column, left_in_row(task.cols, column), task.is_aligned);
#pragma unroll
        for (int i = 0; i < CELL; i++) low = fminf(low, cell[i]), high = fmaxf(high, cell[i]);
    }
    low = least_over(low, WARP), high = largest_over(high, WARP);
    if (threadIdx.x % WARP == 0) lows[threadIdx.x / WARP] = low, highs[threadIdx.x / WARP] = high;
    __syncthreads();
    if (threadIdx.x) return;
    for (int i = 0; i < WARPS; i++) low = fminf(low, lows[i]), high = fmaxf(high, highs[i]);
    store_grid(task, row, make_grid(task, low, high));
}
