// What all kernels share: the task, cells of eight elements, reductions, error sums, and grids as they are stored.
// Nothing may be fused or reordered where codes are made: the bytes are those of the NumPy reference.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// One of many small tensors: where its share of the task's arrays begins, and its shape.
struct Part {
    long long x, packed, grid;  // in bytes, bytes and grids
    int rows, cols, row_bytes, row_grids, is_aligned;
    u32 first_coder;   // block that makes codes of it
    u32 first_finder;  // block, or warp, that finds grids of it
    u32 unused;
};
static_assert(sizeof(Part) == 8 * 3 + 4 * 8, "work.py lays out the same fields");

// What one launch works on; `work.py` lays out the same fields. Pointers that a kernel does not use are null.
struct Task {
    const void* x;       // weights, (rows, cols) without gaps
    const void* y;       // what they are compared with
    u8* packed;          // (rows, row_bytes)
    void* scale;         // a grid's scale, in its stored dtype
    u8* zero;            // its zero point; null where the scheme implies it
    double* sums;        // (blocks, 5): x², y², xy, d², largest |d|
    float* out;          // (rows, cols)
    u64* counts;         // (65536,) elements by the upper half of their pattern
    u64* remainders;     // (65536,) the sum of their lower halves
    u32* extremes;       // (2,) the complement of the smallest pattern in order, and the largest
    const float* starts; // (start_count, 3): clips of the low and the high end, and how many steps may follow
    const Part* parts;   // of many tensors
    const u32* coders;   // which part each block makes codes of
    const u32* finders;  // and which one each block, or warp, finds grids of
    long long rows, cols, row_bytes;
    int group;       // columns from one group to the next
    int row_grids;   // grids of a row; 0 where one serves all rows
    int start_count;
    int symmetric;
    int scale_kind;  // 0 F32, 1 F16, 2 BF16
    int is_aligned;  // whether every row begins at a multiple of 16 bytes
    float divisor, top, implied;
    int finds;       // whether `quantize` makes the grids of its groups' ranges; else they are there
};
static_assert(sizeof(Task) == 8 * 17 + 4 * 10, "work.py lays out the same fields");

constexpr int WARP = 32, THREADS = 256, WARPS = THREADS / WARP;
constexpr u32 ALL = 0xffffffffu;
constexpr int CELL = 8;                  // elements of a lane: their codes fill whole bytes at every width
constexpr int TILE = CELL * WARP;        // elements of a warp
constexpr int TILES_AHEAD = 2;           // tiles that a warp loads before it uses the first
constexpr int PASSES = 4;
constexpr int BLOCK_TILES = WARPS * TILES_AHEAD * PASSES;
// Adding and subtracting it rounds a float32 below 2**22 half to even; larger ones end at the clamp anyway.
constexpr float ROUNDER = 12582912.0f;

__device__ inline float infinity() { return __uint_as_float(0x7f800000u); }

// --- dtypes ---

struct F32 {
    u32 bits;
};
struct F16 {
    u16 bits;
};
struct BF16 {
    u16 bits;
};

__device__ inline float widen(F32 value) { return __uint_as_float(value.bits); }
__device__ inline float widen(BF16 value) { return __uint_as_float((u32)value.bits << 16); }
__device__ inline float widen(F16 value) {
#ifdef __CUDA_ARCH__
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
#else
    const u32 magnitude = (value.bits & 0x7fffu) << 13, sign = (u32)(value.bits & 0x8000u) << 16;
    if (magnitude >= 0x0f800000u) return __uint_as_float(sign | 0x70000000u | magnitude);
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude) * 0x1p112f));
#endif
}

// Eight elements as they lie in memory.
template <class X>
struct Cell {
    static constexpr int WORDS = CELL * sizeof(X) / 4;
    u32 words[WORDS];

    __device__ float operator[](int i) const {
        if constexpr (sizeof(X) == 4) return widen(X{words[i]});
        else return widen(X{(u16)(words[i / 2] >> (i % 2 * 16))});
    }
};

// The first `count` elements from x on; zeros are the rest.
template <class X>
__device__ inline Cell<X> load_cell(const X* x, int count, bool is_aligned) {
    Cell<X> cell;
    if (count >= CELL && is_aligned) {
        const uint4* vectors = (const uint4*)x;
#pragma unroll
        for (int i = 0; i < Cell<X>::WORDS / 4; i++) {
            const uint4 vector = vectors[i];
            cell.words[4 * i] = vector.x, cell.words[4 * i + 1] = vector.y;
            cell.words[4 * i + 2] = vector.z, cell.words[4 * i + 3] = vector.w;
        }
        return cell;
    }
#pragma unroll
    for (int i = 0; i < Cell<X>::WORDS; i++) {
        if constexpr (sizeof(X) == 4) {
            cell.words[i] = i < count ? x[i].bits : 0;
        } else {
            const u32 low = 2 * i < count ? x[2 * i].bits : 0, high = 2 * i + 1 < count ? x[2 * i + 1].bits : 0;
            cell.words[i] = low | high << 16;
        }
    }
    return cell;
}

// Elements from `column` on that are still of the row, at most one cell.
__device__ inline int left_in_row(long long cols, long long column) {
    const long long left = cols - column;
    return left < 0 ? 0 : left > CELL ? CELL : (int)left;
}

// --- reductions ---

__device__ inline float shuffled(float value, int other) { return __shfl_xor_sync(ALL, value, other); }
__device__ inline double shuffled(double value, int other) { return __shfl_xor_sync(ALL, value, other); }

// Over `lanes` neighbours, a power of two; every lane gets the result.
template <class T>
__device__ inline T sum_over(T value, int lanes) {
#pragma unroll
    for (int other = WARP / 2; other > 0; other /= 2)
        if (other < lanes) value += shuffled(value, other);
    return value;
}
__device__ inline float least_over(float value, int lanes) {
#pragma unroll
    for (int other = WARP / 2; other > 0; other /= 2)
        if (other < lanes) value = fminf(value, shuffled(value, other));
    return value;
}
__device__ inline float largest_over(float value, int lanes) {
#pragma unroll
    for (int other = WARP / 2; other > 0; other /= 2)
        if (other < lanes) value = fmaxf(value, shuffled(value, other));
    return value;
}

// --- errors ---

// What a comparison of x with y adds up to, in float64.
struct Tally {
    double xx = 0, yy = 0, xy = 0, dd = 0;
    float most = 0;

    // Squares of eight are first added in float32, where they neither overflow nor lose what counts.
    __device__ void add(const float (&x)[CELL], const float (&y)[CELL]) {
        float sx = 0, sy = 0, sd = 0, largest = 0;
#pragma unroll
        for (int i = 0; i < CELL; i++) {
            const float d = __fsub_rn(x[i], y[i]);
            sx = fmaf(x[i], x[i], sx), sy = fmaf(y[i], y[i], sy), sd = fmaf(d, d, sd);
            largest = fmaxf(largest, fabsf(d));
        }
        if (in_range(sx) && in_range(sy)) {
            xx += sx, yy += sy, dd += sd, xy += 0.5 * ((double)sx + sy - sd);
            most = fmaxf(most, largest);
        } else {
            add_exactly(x, y);
        }
    }

    __device__ static bool in_range(float squares) { return squares > 0x1p-60f && squares < 0x1p120f; }

    __device__ void add_exactly(const float (&x)[CELL], const float (&y)[CELL]) {
#pragma unroll
        for (int i = 0; i < CELL; i++) {
            const double a = x[i], b = y[i], d = a - b;
            xx += a * a, yy += b * b, xy += a * b, dd += d * d;
            most = fmaxf(most, (float)(d < 0 ? -d : d));
        }
    }
};

// The whole block's sums into its row; all threads call it.
__device__ inline void store_sums(const Tally& mine, double* sums) {
    __shared__ double parts[WARPS][5];
    const double of_warp[5] = {sum_over(mine.xx, WARP), sum_over(mine.yy, WARP), sum_over(mine.xy, WARP),
                               sum_over(mine.dd, WARP), (double)largest_over(mine.most, WARP)};
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    if (lane == 0) {
#pragma unroll
        for (int i = 0; i < 5; i++) parts[warp][i] = of_warp[i];
    }
    __syncthreads();
    if (threadIdx.x >= 5) return;
    double total = 0;
    for (int w = 0; w < WARPS; w++) {
        const double part = parts[w][threadIdx.x];
        total = threadIdx.x < 4 ? total + part : fmax(total, part);
    }
    sums[5 * (long long)blockIdx.x + threadIdx.x] = total;
}

// --- grids ---

struct Grid {
    float scale, zero, inverse;
};

// A positive float32 rounded half to even to what is left of its mantissa.
__device__ inline float without_last_bits(float value, int dropped) {
    const u32 pattern = __float_as_uint(value), odd = pattern >> dropped & 1;
    return __uint_as_float((pattern + odd + (1u << (dropped - 1)) - 1) >> dropped << dropped);
}

// `Scheme.store_scale`.
__device__ inline float stored_scale(float scale, int kind) {
    if (scale == 0.0f) return 1.0f;
    if (kind == 0) return fminf(fmaxf(scale, 0x1p-126f), 0x1.fffffep127f);
    if (kind == 2) return without_last_bits(fminf(fmaxf(scale, 0x1p-126f), 0x1.fep127f), 16);
    const float clamped = fminf(fmaxf(scale, 0x1p-24f), 65504.0f);
    // Between 1/2 and 1 a float32 has just the step of a subnormal half.
    return clamped < 0x1p-14f ? __fsub_rn(__fadd_rn(clamped, 0.5f), 0.5f) : without_last_bits(clamped, 13);
}

__device__ inline float zero_point(const Task& task, float offset, float inverse) {
    if (task.symmetric) return task.implied;
    return fminf(fmaxf(rintf(__fmul_rn(offset, inverse)), 0.0f), task.top);
}

// `Scheme.grid`, of a range that includes 0.
__device__ inline Grid make_grid(const Task& task, float low, float high) {
    const float range = task.symmetric ? fmaxf(-low, high) : __fsub_rn(high, low);
    Grid grid;
    grid.scale = stored_scale(__fdiv_rn(range, task.divisor), task.scale_kind);
    grid.inverse = __fdiv_rn(1.0f, grid.scale);
    grid.zero = zero_point(task, -low, grid.inverse);
    return grid;
}

__device__ inline void store_grid(const Task& task, long long index, const Grid& grid) {
    const u32 pattern = __float_as_uint(grid.scale);
    if (task.scale_kind == 0) ((float*)task.scale)[index] = grid.scale;
    else if (task.scale_kind == 2) ((u16*)task.scale)[index] = (u16)(pattern >> 16);
    else if (grid.scale < 0x1p-14f) ((u16*)task.scale)[index] = (u16)(grid.scale * 0x1p24f);
    else ((u16*)task.scale)[index] = (u16)((pattern >> 13) - (112u << 10));
    if (task.zero) task.zero[index] = (u8)grid.zero;
}

__device__ inline Grid load_grid(const Task& task, long long index) {
    Grid grid;
    if (task.scale_kind == 0) grid.scale = ((const float*)task.scale)[index];
    else if (task.scale_kind == 2) grid.scale = widen(((const BF16*)task.scale)[index]);
    else grid.scale = widen(((const F16*)task.scale)[index]);
    grid.inverse = __fdiv_rn(1.0f, grid.scale);
    grid.zero = task.zero ? (float)task.zero[index] : task.implied;
    return grid;
}

// Which grid the elements from `column` of a row on have.
__device__ inline long long grid_index(const Task& task, long long row, long long column) {
    return task.row_grids ? row * task.row_grids + (task.row_grids == 1 ? 0 : column / task.group) : 0;
}

// The task of one of many tensors.
__device__ inline Task task_of(const Task& all, const Part& part) {
    Task task = all;
    task.x = (const u8*)all.x + part.x;
    task.packed = all.packed + part.packed;
    task.scale = (u8*)all.scale + part.grid * (all.scale_kind ? 2 : 4);
    task.zero = all.zero ? all.zero + part.grid : nullptr;
    task.rows = part.rows, task.cols = part.cols, task.row_bytes = part.row_bytes, task.row_grids = part.row_grids;
    task.is_aligned = part.is_aligned;
    return task;
}

// --- the table of NF4 ---

struct Table {
    float levels[16], midpoints[16];

    // Number of midpoints below t: a guess that is right or one short, and a comparison.
    __device__ int index(float t) const {
        const float near = fminf(fmaxf(t, -1.0f), 1.0f);
        const int guess = (int)fmaf(near, fmaf(fabsf(near), -5.5f, 12.9f), 7.25f);
        return guess + (t > midpoints[guess]);
    }
};

__constant__ float NF4_LEVELS[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f,
};

// Fills the block's table; all threads call it.
__device__ inline void fill(Table& table) {
    const int i = threadIdx.x;
    if (i < 16) {
        table.levels[i] = NF4_LEVELS[i];
        table.midpoints[i] = i < 15 ? (float)(((double)NF4_LEVELS[i] + NF4_LEVELS[i + 1]) / 2) : infinity();
    }
    __syncthreads();
}
