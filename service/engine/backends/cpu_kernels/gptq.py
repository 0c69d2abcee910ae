"""`Gptq` on a panel of rows: the walk, and the descent after it, as the modules of the method have them.

The rows of a panel lie transposed, so that a column of theirs is a few vectors, and nothing that a row does depends on
the others beside it. Errors reach other columns in products of the Gram matrix, or of its factor, with the panel.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from service.engine.backends.cpu_kernels.caching import kernel
from service.engine.backends.cpu_kernels.products import PANEL, PANEL_BYTES, add_products
from service.engine.backends.cpu_kernels.spans import address_of
from service.engine.backends.cpu_kernels.trials import (
    GRID,
    SUMS,
    VECTOR,
    code_integer,
    code_nf4,
    error_of,
    fit_level_integer,
    fit_level_nf4,
    fit_scale,
    float_at,
    keep_better,
    move_grid,
    range_grid,
    refit_grid,
    set_levels,
    subtract_products,
    weigh_integer,
    weigh_nf4,
    widest,
)
from service.engine.backends.cpu_kernels.vector import LANES
from service.engine.schemes.codebook import NF4_MIDPOINTS

#: Panels of all columns: weights, values, their errors, and the best values yet.
PANELS = 4
WEIGHTS, VALUES, ERRORS, BEST = range(PANELS)
#: Panels of a block's columns: what is wanted or left, what a group would have to make up for, and minus its changes.
PARTS = 3
#: Lots of a group: weights, levels, rest, rest before, h, values before and best values.
LOTS = 7
_X, _LEVELS, _REST, _LEFT, _H, _OLD, _BEST = range(LOTS)
#: Vectors of a group's search: grid, best grid, errors, change, range, sums.
_GRID, _BEST_GRID = 0, GRID
_ERROR = 2 * GRID
_CHANGE, _LOW, _HIGH, _SUMS = _ERROR + 2, _ERROR + 3, _ERROR + 4, _ERROR + 5
SMALL = _SUMS + SUMS


@njit(nogil=True)
def _at(array, column, lane):
    """Address of a vector of a panel or lot."""
    return address_of(array) + 4 * (column * array.shape[1] + lane)


@njit(nogil=True)
def _copy(source, first, lane, count, target, at):
    """A vector of `count` columns of a panel into a lot, or the other way."""
    for j in range(count):
        for i in range(LANES):
            target[j, at + i] = source[first + j, lane + i]


@njit(nogil=True)
def _load(x, first, count, panel):
    """Rows as columns; where there are too few, the last again."""
    for row in range(PANEL):
        source = x[first + min(row, count - 1)]
        for column in range(source.size):
            panel[column, row] = source[column]


@njit(nogil=True)
def _start_grids(weights, counts, group, clips, iterations, codebook, form, lots, small, scale, zero):
    """`Mse` for each group of a panel, each column of which counts as often as said."""
    cols = weights.shape[0]
    x, vectors = address_of(lots[_X]), address_of(small)
    grid, best, error = vectors, vectors + VECTOR * _BEST_GRID, vectors + VECTOR * _ERROR
    low, high, sums = vectors + VECTOR * _LOW, vectors + VECTOR * _HIGH, vectors + VECTOR * _SUMS
    for at in range(0, cols, group):
        n, share = min(group, cols - at), address_of(counts) + 4 * at
        for lane in range(0, PANEL, LANES):
            _copy(weights, at, lane, n, lots[_X], 0)
            widest(x, n, low, high)
            small[_ERROR + 1] = np.inf
            range_grid(low, high, 1.0, 1.0, best, *form)
            for start in range(clips.shape[0]):
                range_grid(low, high, clips[start, 0], clips[start, 1], grid, *form)
                small[_ERROR] = np.inf
                for _ in range(iterations + 1):
                    if codebook:
                        weigh_nf4(x, share, n, grid, sums)
                    else:
                        weigh_integer(x, share, n, grid, sums)
                    if not refit_grid(sums, grid, error, best, *form):
                        break
            _copy(small, _BEST_GRID, 0, 1, scale[at // group : at // group + 1], lane)
            _copy(small, _BEST_GRID + 2, 0, 1, zero[at // group : at // group + 1], lane)


@njit(nogil=True)
def _code_column(wanted, column, group, codebook, form, weights, scale, zero, small, values, errors, place):
    """Code a column as wanted (an address of a panel's column); its error goes to `place` of `errors`."""
    grid, g = address_of(small), column // group
    for lane in range(0, PANEL, LANES):
        move_grid(_at(scale, g, lane), _at(zero, g, lane), 1.0, 0.0, grid, *form)
        where = wanted + 4 * lane, grid, _at(weights, column, lane), _at(values, column, lane)
        if codebook:
            code_nf4(*where, _at(errors, place, lane))
        else:
            code_integer(*where, _at(errors, place, lane))


@njit(nogil=True)
def _walk(upper, order, block, group, codebook, form, panels, wanted, scale, zero, small):
    """GPTQ's: from the last column of the order to the first."""
    weights, values, errors = panels[WEIGHTS], panels[VALUES], panels[ERRORS]
    cols = weights.shape[0]
    for stop in range(cols, 0, -block):
        first = max(0, stop - block)
        for j in range(first, stop):
            wanted[j - first] = weights[order[j]]
        target = address_of(wanted)
        factors = upper + 4 * (first * cols + stop)
        add_products(factors, cols, address_of(errors) + PANEL_BYTES * stop, cols - stop, target, stop - first)
        for j in range(stop - 1, first - 1, -1):
            place = target + PANEL_BYTES * (j - first)
            factors = upper + 4 * (j * cols + j + 1)
            add_products(factors, cols, address_of(errors) + PANEL_BYTES * (j + 1), stop - 1 - j, place, 1)
            _code_column(place, order[j], group, codebook, form, weights, scale, zero, small, values, errors, j)


@njit(nogil=True, error_model="numpy")
def _try_grids(gram, cols, n, grids, trials, passes, codebook, form, lots, small):
    """The best of several grids for a lot, each with its codes; the first is what the lot has."""
    x, levels, rest, left, h, old, best = [address_of(lots[i]) for i in range(LOTS)]
    vectors = address_of(small)
    grid, best_grid = vectors, vectors + VECTOR * _BEST_GRID
    error, change = vectors + VECTOR * _ERROR, vectors + VECTOR * _CHANGE
    error_of(old, left, h, n, error)
    lots[_BEST, :n] = lots[_OLD, :n]
    move_grid(grids[0], grids[1], 1.0, 0.0, best_grid, *form)
    for trial in range(trials.shape[0]):
        move_grid(grids[0], grids[1], trials[trial, 0], trials[trial, 1], grid, *form)
        lots[_LEVELS, :n], lots[_REST, :n] = lots[_OLD, :n], lots[_LEFT, :n]
        set_levels(levels, n, grid)
        for _ in range(passes):
            moved = False
            for j in range(n):
                row = gram + 4 * j * cols
                fed = float_at(row + 4 * j)
                inverse = np.float32(1.0) / fed if fed > 0 else np.float32(0.0)
                where = levels + VECTOR * j, rest + VECTOR * j, x + VECTOR * j
                if codebook:
                    changes = fit_level_nf4(*where, inverse, grid, change)
                else:
                    changes = fit_level_integer(*where, inverse, grid, change)
                if changes:
                    moved = True
                    subtract_products(rest, change, row, n)
            if not moved:
                break
            if trials.shape[0] > 1:
                fit_scale(levels, rest, h, n, grid, *form)
        keep_better(levels, rest, h, n, grid, error, best, best_grid)


@njit(nogil=True)
def _improve(gram, first, start, n, group, trials, passes, codebook, form, panels, parts, lots, scale, zero, small):
    """Better codes and grids for a group, or a part of one, `start` columns into a block at column `first`."""
    weights, values, errors = panels[WEIGHTS], panels[VALUES], panels[ERRORS]
    cols, at = weights.shape[0], first + start
    g, inner = at // group, gram + 4 * (at * cols + at)
    rest, h, minus = parts[0], parts[1], parts[2]
    h[:n] = rest[start : start + n]
    add_products(inner, cols, _at(values, at, 0), n, address_of(h), n)
    for lane in range(0, PANEL, LANES):
        _copy(weights, at, lane, n, lots[_X], 0)
        _copy(values, at, lane, n, lots[_OLD], 0)
        _copy(rest, start, lane, n, lots[_LEFT], 0)
        _copy(h, 0, lane, n, lots[_H], 0)
        grids = _at(scale, g, lane), _at(zero, g, lane)
        _try_grids(inner, cols, n, grids, trials, passes, codebook, form, lots, small)
        for j in range(n):
            for i in range(LANES):
                minus[j, lane + i] = lots[_OLD, j, i] - lots[_BEST, j, i]
                values[at + j, lane + i] = lots[_BEST, j, i]
                errors[at + j, lane + i] = lots[_X, j, i] - lots[_BEST, j, i]
        _copy(small, _BEST_GRID, 0, 1, scale[g : g + 1], lane)
        _copy(small, _BEST_GRID + 2, 0, 1, zero[g : g + 1], lane)


@njit(nogil=True)
def _sweep(gram, block, span, group, trials, passes, codebook, form, panels, parts, lots, scale, zero, small):
    """Once over all columns, by blocks, and in these by spans of a group."""
    cols = panels.shape[1]
    rest, minus = parts[0], address_of(parts[2])
    for first in range(0, cols, block):
        stop = min(first + block, cols)
        rest[: stop - first] = np.float32(0.0)
        add_products(gram + 4 * first * cols, cols, address_of(panels[ERRORS]), cols, address_of(rest), stop - first)
        for start in range(0, stop - first, span):
            n = min(span, stop - first - start)
            _improve(
                gram, first, start, n, group, trials, passes, codebook, form, panels, parts, lots, scale, zero, small
            )
            after = start + n
            factors = gram + 4 * ((first + after) * cols + first + start)
            add_products(factors, cols, minus, n, _at(rest, after, 0), stop - first - after)


@njit(nogil=True)
def _output_errors(gram, block, errors, fed, total):
    """Of each row of a panel of errors, in float64."""
    cols = errors.shape[0]
    total[:] = 0.0
    for first in range(0, cols, block):
        n = min(block, cols - first)
        fed[:n] = np.float32(0.0)
        add_products(gram + 4 * first * cols, cols, address_of(errors), cols, address_of(fed), n)
        for j in range(n):
            for i in range(PANEL):
                total[i] += np.float64(fed[j, i]) * np.float64(errors[first + j, i])


@njit(nogil=True, error_model="numpy")
def _store(values, group, scale, zero, codebook, row, lane, codes, scales, zeros):
    """Codes and grids of one row."""
    for column in range(values.shape[0]):
        g = column // group
        t = values[column, lane] * (np.float32(1.0) / scale[g, lane])
        code = 0
        if codebook:
            for midpoint in NF4_MIDPOINTS:
                code += t > midpoint
        else:
            code = int(t + zero[g, lane] + np.float32(0.5))
        codes[row, column] = code
    for g in range(scale.shape[0]):
        scales[row, g], zeros[row, g] = scale[g, lane], zero[g, lane]


@njit(nogil=True)
def _keep(totals, values, best, grids):
    """Of each row the values and grids of less error."""
    for lane in range(PANEL):
        if totals[1, lane] < totals[0, lane]:
            totals[0, lane] = totals[1, lane]
            best[:, lane] = values[:, lane]
            grids[:2, :, lane] = grids[2:, :, lane]


@kernel
def solve_rows(
    x, first, last, gram, upper, order, plain_counts, counts, clips, iterations, trials, passes, rounds, sweeps,
    block, group, codebook, form, codes, scales, zeros, panels, parts, lots, small, grids, totals,
):  # fmt: skip
    """Solve rows [first, last) of x, PANEL of them at most; see `Gptq.solve`.

    gram, upper   addresses of (cols, cols) float32
    counts        by column, what its squared error counts where a grid is begun, and for the plain solution
    block         columns of a block, a multiple of the group or the whole of it
    panels, ...   working memory: (PANELS, cols, PANEL), (PARTS, block, PANEL), (LOTS, group or block, LANES),
                  (SMALL, LANES), (4, groups, PANEL) float32 and (2, PANEL) float64
    """
    weights, values, errors, best = panels[WEIGHTS], panels[VALUES], panels[ERRORS], panels[BEST]
    cols, rows = x.shape[1], last - first
    _load(x, first, rows, weights)
    _start_grids(weights, plain_counts, group, clips, iterations, codebook, form, lots, small, grids[0], grids[1])
    for j in range(cols):
        place = _at(weights, j, 0)
        _code_column(place, j, group, codebook, form, weights, grids[0], grids[1], small, best, errors, j)
    _output_errors(gram, block, errors, parts[0], totals[0])
    scale, zero = grids[2], grids[3]
    _start_grids(weights, counts, group, clips, iterations, codebook, form, lots, small, scale, zero)
    for _ in range(rounds):
        _walk(upper, order, block, group, codebook, form, panels, parts[0], scale, zero, small)
        errors[:] = weights - values
        for _ in range(sweeps):
            _sweep(
                gram, block, min(group, block), group, trials, passes, codebook, form, panels, parts, lots, scale, zero,
                small,
            )  # fmt: skip
        _output_errors(gram, block, errors, parts[0], totals[1])
        _keep(totals, values, best, grids)
    for row in range(rows):
        _store(best, group, grids[0], grids[1], codebook, first + row, row, codes, scales, zeros)
