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

#: Panels of all columns: weights, values, their errors, and the values of the plain solution.
PANELS = 4
WEIGHTS, VALUES, ERRORS, PLAIN = range(PANELS)
#: Panels of a block's columns: what is left to make up for, what a group would have to, and minus its changes; of a
#: walk through the block what it heads for, that with what errors add, and these; values and what was left before it.
PARTS = 8
_REST_PART, _H_PART, _MINUS, _TARGET, _WANTED, _LOST, _BEFORE, _LEFT_PART = range(PARTS)
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
def _code_column(wanted, g, codebook, form, weight, scale, zero, small, value, error):
    """Code a column of group g as wanted, to `value`; what the weight loses to `error`. All addresses of columns."""
    grid = address_of(small)
    for lane in range(0, PANEL, LANES):
        at = 4 * lane
        move_grid(_at(scale, g, lane), _at(zero, g, lane), 1.0, 0.0, grid, *form)
        if codebook:
            code_nf4(wanted + at, grid, weight + at, value + at, error + at)
        else:
            code_integer(wanted + at, grid, weight + at, value + at, error + at)


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
            column, error = order[j], _at(errors, j, 0)
            weight, value = _at(weights, column, 0), _at(values, column, 0)
            _code_column(place, column // group, codebook, form, weight, scale, zero, small, value, error)


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
    rest, h, minus = parts[_REST_PART], parts[_H_PART], parts[_MINUS]
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
def _improve_groups(
    gram, first, n, span, group, trials, passes, codebook, form, panels, parts, lots, scale, zero, small
):  # fmt: skip
    """All groups of a block of n columns, or parts of one, `span` columns at a time."""
    cols = panels.shape[1]
    rest, minus = parts[_REST_PART], address_of(parts[_MINUS])
    for start in range(0, n, span):
        count = min(span, n - start)
        _improve(
            gram, first, start, count, group, trials, passes, codebook, form, panels, parts, lots, scale, zero, small
        )
        after = start + count
        factors = gram + 4 * ((first + after) * cols + first + start)
        add_products(factors, cols, minus, count, _at(rest, after, 0), n - after)


@njit(nogil=True)
def _rewalk(first, n, group, inverse, upper, order, codebook, form, panels, parts, scale, zero, small):
    """Walk through a block towards what would make up for all that is left; minus its changes go to _LOST."""
    weights, values, errors = panels[WEIGHTS], panels[VALUES], panels[ERRORS]
    target, wanted, lost, coded = parts[_TARGET], parts[_WANTED], parts[_LOST], parts[_MINUS]
    target[:n] = values[first : first + n]
    add_products(address_of(inverse), inverse.shape[1], address_of(parts[_REST_PART]), n, address_of(target), n)
    wanted[:n] = target[:n]
    for p in range(n - 1, -1, -1):
        j = order[p]
        place, weight, value, error = _at(wanted, j, 0), _at(target, j, 0), _at(coded, j, 0), _at(lost, p, 0)
        add_products(address_of(upper[p]) + 4 * (p + 1), upper.shape[1], _at(lost, p + 1, 0), n - 1 - p, place, 1)
        _code_column(place, (first + j) // group, codebook, form, weight, scale, zero, small, value, error)
    lost[:n] = values[first : first + n] - coded[:n]
    values[first : first + n] = coded[:n]
    errors[first : first + n] = weights[first : first + n] - coded[:n]


@njit(nogil=True)
def _undo(gram, first, n, group, panels, parts, scale, zero, saved):
    """Put back what a block was, in the rows in which it has not gained."""
    weights, values, errors = panels[WEIGHTS], panels[VALUES], panels[ERRORS]
    cols, g, last = weights.shape[0], first // group, (first + n - 1) // group + 1
    rest, lost, before, left = parts[_REST_PART], parts[_LOST], parts[_BEFORE], parts[_LEFT_PART]
    lost[:n] = before[:n] - values[first : first + n]
    rest[:n] = left[:n]
    inner = gram + 4 * (first * cols + first)
    add_products(inner, cols, address_of(lost), n, address_of(rest), n)
    for lane in range(PANEL):
        change = np.float32(0.0)
        for j in range(n):
            change += lost[j, lane] * (left[j, lane] + rest[j, lane])
        if not change < 0:
            values[first : first + n, lane] = before[:n, lane]
            errors[first : first + n, lane] = weights[first : first + n, lane] - before[:n, lane]
            scale[g:last, lane], zero[g:last, lane] = saved[0, : last - g, lane], saved[1, : last - g, lane]


@njit(nogil=True)
def _sweep(
    gram, block, group, walks, rewalks, trials, passes, codebook, form, panels, parts, lots, scale, zero, saved, small
):  # fmt: skip
    """Once over all columns, by blocks, each of which is walked through before if it `rewalks`."""
    inverses, uppers, orders = walks
    cols, span = panels.shape[1], min(group, block)
    rest = parts[_REST_PART]
    for first in range(0, cols, block):
        n, number = min(block, cols - first), first // block
        rest[:n] = np.float32(0.0)
        add_products(gram + 4 * first * cols, cols, address_of(panels[ERRORS]), cols, address_of(rest), n)
        if rewalks:
            g, last = first // group, (first + n - 1) // group + 1
            parts[_BEFORE, :n], parts[_LEFT_PART, :n] = panels[VALUES, first : first + n], rest[:n]
            saved[0, : last - g], saved[1, : last - g] = scale[g:last], zero[g:last]
            walk = inverses[number], uppers[number], orders[number]
            _rewalk(first, n, group, *walk, codebook, form, panels, parts, scale, zero, small)
            inner = gram + 4 * (first * cols + first)
            add_products(inner, cols, address_of(parts[_LOST]), n, address_of(rest), n)
        _improve_groups(
            gram, first, n, span, group, trials, passes, codebook, form, panels, parts, lots, scale, zero, small
        )
        if rewalks:
            _undo(gram, first, n, group, panels, parts, scale, zero, saved)


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


@kernel
def solve_rows(
    x, first, last, gram, upper, order, walks, plain_counts, counts, clips, iterations, trials, passes, sweeps,
    block, group, codebook, form, codes, scales, zeros, panels, parts, lots, small, grids, totals,
):  # fmt: skip
    """Solve rows [first, last) of x, PANEL of them at most; see `Gptq.solve`.

    gram, upper   addresses of (cols, cols) float32
    walks         by block: inverse and upper factor (blocks, block, block), order (blocks, block); see `BlockWalk`
    counts        by column, what its squared error counts where a grid is begun, and for the plain solution
    block         columns of a block, a multiple of the group or the whole of it
    panels, ...   working memory: (PANELS, cols, PANEL), (PARTS, block, PANEL), (LOTS, group or block, LANES),
                  (SMALL, LANES), (6, groups, PANEL) float32 and (2, PANEL) float64
    """
    weights, values, errors, plain = panels[WEIGHTS], panels[VALUES], panels[ERRORS], panels[PLAIN]
    cols, rows = x.shape[1], last - first
    _load(x, first, rows, weights)
    _start_grids(weights, plain_counts, group, clips, iterations, codebook, form, lots, small, grids[0], grids[1])
    for j in range(cols):
        weight, value, error = _at(weights, j, 0), _at(plain, j, 0), _at(errors, j, 0)
        _code_column(weight, j // group, codebook, form, weight, grids[0], grids[1], small, value, error)
    _output_errors(gram, block, errors, parts[0], totals[0])
    scale, zero = grids[2], grids[3]
    _start_grids(weights, counts, group, clips, iterations, codebook, form, lots, small, scale, zero)
    _walk(upper, order, block, group, codebook, form, panels, parts[0], scale, zero, small)
    errors[:] = weights - values
    for sweep in range(sweeps):
        _sweep(
            gram, block, group, walks, sweep > 0, trials, passes, codebook, form, panels, parts, lots, scale, zero,
            grids[4:], small,
        )  # fmt: skip
    _output_errors(gram, block, errors, parts[0], totals[1])
    for row in range(rows):
        if totals[1, row] < totals[0, row]:
            _store(values, group, scale, zero, codebook, first + row, row, codes, scales, zeros)
        else:
            _store(plain, group, grids[0], grids[1], codebook, first + row, row, codes, scales, zeros)
