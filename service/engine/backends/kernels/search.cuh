// `Mse`: for each group the grid of least squared error, by alternating least squares from many starts.
// Lanes that share a group go through the same steps; groups of a warp each go their own way.
#pragma once
#include "common.cuh"

constexpr int HELD = 16;  // values of a lane

// Levels are counted from a center, so that little cancels in the fit, and like all sums in steps of the scale.
struct Sums {
    float rest, level, square, product;

    template <bool IS_TABLE>
    __device__ void add(float x, const Grid& grid, float center, float top, const Table& table) {
        const float value = fmaf(x, grid.inverse, -center);
        float on_grid;
        if constexpr (IS_TABLE) {
            on_grid = table.levels[table.index(value)];
        } else {
            const float lowest = ROUNDER - grid.zero - center, highest = ROUNDER + (top - grid.zero - center);
            on_grid = fminf(fmaxf(value + ROUNDER, lowest), highest) - ROUNDER;
        }
        const float r = value - on_grid;
        rest = fmaf(r, r, rest), level += on_grid;
        square = fmaf(on_grid, on_grid, square), product = fmaf(on_grid, r, product);
    }
};

// A group of at most 256 in the registers of a few lanes.
template <class X>
struct Held {
    float x[HELD];
    int mine, lanes;

    __device__ void load(const Task& task, const X* first, int count) {
        lanes = task.group / HELD;
        const int offset = threadIdx.x % lanes * HELD;
        mine = count - offset < 0 ? 0 : count - offset > HELD ? HELD : count - offset;
#pragma unroll
        for (int part = 0; part < HELD; part += CELL) {
            const int left = mine < part ? 0 : mine - part;
            const Cell<X> cell = load_cell(first + offset + part, left, task.is_aligned);
#pragma unroll
            for (int i = 0; i < CELL; i++) x[part + i] = cell[i];
        }
    }
    template <class Visit>
    __device__ void each(Visit visit) const {
#pragma unroll
        for (int i = 0; i < HELD; i++)
            if (i < mine) visit(x[i]);
    }
    __device__ float sum(float value) const { return sum_over(value, lanes); }
    __device__ Sums sum(const Sums& mine) const {
        return {sum(mine.rest), sum(mine.level), sum(mine.square), sum(mine.product)};
    }
    __device__ float least(float value) const { return least_over(value, lanes); }
    __device__ float largest(float value) const { return largest_over(value, lanes); }
    __device__ bool any(bool value) const { return __any_sync(ALL, value); }
};

// A row of any length, read again in every pass by a whole block.
template <class X>
struct Row {
    const X* x;
    long long cols;
    float4* parts;  // (WARPS,) of the block

    template <class Visit>
    __device__ void each(Visit visit) const {
        for (long long i = threadIdx.x; i < cols; i += THREADS) visit(widen(x[i]));
    }
    // Of the four numbers of all warps; every thread gets the result.
    template <class Combine>
    __device__ float4 over_warps(const float4& of_warp, Combine combine) const {
        if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = of_warp;
        __syncthreads();
        float4 all = parts[0];
        for (int i = 1; i < WARPS; i++) {
            const float4 part = parts[i];
            all = make_float4(combine(all.x, part.x), combine(all.y, part.y), combine(all.z, part.z),
                              combine(all.w, part.w));
        }
        __syncthreads();
        return all;
    }
    __device__ Sums sum(const Sums& mine) const {
        const float4 all = over_warps(make_float4(sum_over(mine.rest, WARP), sum_over(mine.level, WARP),
                                                  sum_over(mine.square, WARP), sum_over(mine.product, WARP)),
                                      [](float a, float b) { return a + b; });
        return {all.x, all.y, all.z, all.w};
    }
    __device__ float sum(float value) const { return sum(Sums{value, 0.0f, 0.0f, 0.0f}).rest; }
    __device__ float largest(float value) const {
        const float of_warp = largest_over(value, WARP);
        return over_warps(make_float4(of_warp, of_warp, of_warp, of_warp),
                          [](float a, float b) { return fmaxf(a, b); }).x;
    }
    __device__ float least(float value) const { return -largest(-value); }
    __device__ bool any(bool value) const { return value; }
};

// A grid with its center, error and sums.
struct Found {
    Grid grid;
    float center, error;
    Sums sums;
};

template <bool IS_TABLE, class Values>
__device__ inline Found visit(const Values& values, const Task& task, const Grid& grid, float mean,
                              const Table& table) {
    Found found;
    found.grid = grid;
    found.center = fminf(fmaxf(rintf(mean * grid.inverse), -grid.zero), task.top - grid.zero);
    if (task.symmetric) found.center = 0.0f;
    Sums mine = {};
    values.each([&](float x) { mine.template add<IS_TABLE>(x, grid, found.center, task.top, table); });
    found.sums = values.sum(mine);
    found.error = found.sums.rest * grid.scale * grid.scale;
    return found;
}

// `Scheme.refit`, from the sums of the codes held.
__device__ inline Grid refit(const Found& found, const Task& task, float mean, float size) {
    const Grid& held = found.grid;
    const float mean_level = task.symmetric ? 0.0f : found.sums.level * (1.0f / size);
    const float rests = size * (mean * held.inverse - found.center) - found.sums.level;
    const float spread = found.sums.square - mean_level * found.sums.level;
    const float fitted = spread + (found.sums.product - mean_level * rests);
    const bool is_usable = spread > 0.0f && fitted > 0.0f;
    Grid grid;
    grid.scale = stored_scale((is_usable ? held.scale * fitted : held.scale) / (is_usable ? spread : 1.0f),
                              task.scale_kind);
    grid.inverse = __fdiv_rn(1.0f, grid.scale);
    grid.zero = zero_point(task, (mean_level + found.center + held.zero) * grid.scale - mean, grid.inverse);
    return grid;
}

template <bool IS_TABLE, class Values>
__device__ Grid search(const Values& values, const Task& task, float size, bool is_there, const Table& table) {
    float low = 0.0f, high = 0.0f, total = 0.0f;
    values.each([&](float x) { low = fminf(low, x), high = fmaxf(high, x), total += x; });
    low = values.least(low), high = values.largest(high);
    const float mean = values.sum(total) / size;
    Grid next = make_grid(task, low * task.starts[0], high * task.starts[1]), best = next;
    Found held = {};
    float best_error = infinity(), steps = 0.0f;
    int start = 0;
    // A start is always held. A descent ends where the error does not fall, the fit stays where it is, or after the
    // steps that are allowed; then comes the next start.
    while (values.any(is_there && start < task.start_count)) {
        const Found found = visit<IS_TABLE>(values, task, next, mean, table);
        const bool is_kept = steps == 0.0f || found.error < held.error;
        if (is_kept) held = found;
        if (is_kept && held.error < best_error) best = held.grid, best_error = held.error;
        const Grid fit = refit(held, task, mean, size);
        const bool is_new = fit.scale != held.grid.scale || fit.zero != held.grid.zero;
        if (start >= task.start_count) continue;
        if (is_kept && is_new && steps < task.starts[3 * start + 2]) {
            steps += 1.0f, next = fit;
        } else if (++start < task.start_count) {
            steps = 0.0f;
            next = make_grid(task, low * task.starts[3 * start], high * task.starts[3 * start + 1]);
        }
    }
    return best;
}

// `thread` counts those of all blocks; a group has a few of them.
template <class X, bool IS_TABLE>
__device__ void search_groups(const Task& task, long long thread) {
    __shared__ Table table;
    if constexpr (IS_TABLE) fill(table);
    const int lanes = task.group / HELD;
    const long long index = thread / lanes;
    const bool is_there = index < task.rows * task.row_grids;
    const long long row = is_there ? index / task.row_grids : 0, column = (index - row * task.row_grids) * task.group;
    const long long left = task.cols - column;
    const int count = !is_there ? 0 : left < task.group ? (int)left : task.group;
    Held<X> values;
    values.load(task, (const X*)task.x + row * task.cols + (is_there ? column : 0), count);
    const Grid best = search<IS_TABLE>(values, task, (float)(count ? count : 1), is_there, table);
    if (is_there && threadIdx.x % lanes == 0) store_grid(task, index, best);
}

template <class X, bool IS_TABLE>
__device__ void search_row(const Task& task, u32 row) {
    __shared__ Table table;
    __shared__ float4 parts[WARPS];
    if constexpr (IS_TABLE) fill(table);
    const Row<X> values = {(const X*)task.x + row * task.cols, task.cols, parts};
    const Grid best = search<IS_TABLE>(values, task, (float)task.cols, true, table);
    if (threadIdx.x == 0) store_grid(task, row, best);
}
