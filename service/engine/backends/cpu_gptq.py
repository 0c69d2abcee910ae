"""`Gptq` with kernels: what they are given, and what they need to work in.

Beside the Gram matrix two factors of its size are held while dampings are tried, and then one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from service.engine.backends.cpu_form import Form
from service.engine.inputs import LayerInputs
from service.engine.methods.base import Solution
from service.engine.methods.coded import LONGEST_GROUP
from service.engine.methods.descent import PASSES, TRIALS, BlockWalk, block_columns
from service.engine.methods.gptq import Gptq, trial_rows
from service.engine.methods.mse import Mse
from service.engine.methods.walk import Factor, damped
from service.engine.tensors import FloatArray

#: Calls a function on pieces (first, last) of so many rows or columns, all but the last a multiple of some.
Split = Callable[[Callable[[int, int], None], int, int], None]


class GptqRun:
    """Solves rows of one tensor; the factor is made once for all of them."""

    def __init__(self, form: Form, method: Gptq, inputs: LayerInputs, split: Split) -> None:
        # Imported here: whoever does without it need not load Numba.
        from service.engine.backends.cpu_kernels import cholesky, gptq, products, vector

        assert inputs.gram is not None, "the method needs it"
        self._cholesky, self._kernels = cholesky, gptq
        self._panel, self._lanes = products.PANEL, vector.LANES
        self._form, self._method, self._inputs, self._split = form, method, inputs, split
        self._gram = np.require(inputs.gram, np.float32, ["C", "W"])
        self._clips = np.array(Mse().starts(form.scheme), np.float32)
        searched = form.group <= LONGEST_GROUP
        moves = [move for move in TRIALS if not (move[1] and form.scheme.symmetric)] if searched else TRIALS[:1]
        self._trials = np.array(moves, np.float32)
        self._block = block_columns(form.group)

    def solve(self, x: FloatArray) -> Solution:
        """See `Gptq.solve`."""
        trial = trial_rows(self._form.cols)

        def loss(factor: Factor) -> float:
            return float(self._solved(trial, factor, 0)[1].sum())

        factor = self._method.factor(self._inputs, self._form.scheme, "cpu", self._factored, loss)
        # A read-only array would be another signature, and compiled for.
        return self._solved(np.require(x, requirements="W"), factor, self._method.sweeps)[0]

    def _walks(self, factor: Factor, sweeps: int) -> tuple[FloatArray, FloatArray, npt.NDArray[np.intp]]:
        """See `BlockWalk`: inverses and upper factors (blocks, block, block), orders (blocks, block)."""
        block, cols = self._block, self._form.cols if sweeps > 1 else 0
        count = -(-cols // block)
        inverses, uppers = (np.zeros((count, block, block), np.float32) for _ in range(2))
        orders = np.zeros((count, block), np.intp)
        for number, first in enumerate(range(0, cols, block)):
            n = min(block, cols - first)
            walk = BlockWalk.of(np, self._gram[first : first + n, first : first + n], factor.added)
            inverses[number, :n, :n], uppers[number, :n, :n] = walk.inverse, walk.factor.upper
            orders[number, :n] = walk.factor.order
        return inverses, uppers, orders

    def _factored(self, damping: float) -> Factor:
        """See `factored` of the method."""
        active = np.diagonal(self._gram)
        order, cols = np.argsort(active, stable=True), len(active)
        added = np.float32(damped(np, self._gram, damping))
        upper, pivots = np.empty((cols, cols), np.float32), np.empty(cols, np.float32)
        size = self._cholesky.BLOCK
        left, lower = np.empty((size, cols), np.float32), np.zeros((size, size), np.float32)
        shared = self._gram, order, added, upper, pivots

        def scratch() -> tuple[FloatArray, FloatArray]:
            return np.empty((cols, self._panel), np.float32), np.empty((size, self._panel), np.float32)

        for first in range(0, cols, size):
            stop = min(first + size, cols)
            self._cholesky.factor_block(*shared, first, stop, left, lower, *scratch())

            def fill(start: int, end: int, first: int = first, stop: int = stop) -> None:
                place = first, stop, left, lower, stop + start, stop + end
                self._cholesky.factor_columns(*shared, *place, *scratch())

            if stop < cols:
                self._split(fill, cols - stop, self._panel)
        seen = np.empty(cols, np.float32)
        seen[order] = np.sqrt(pivots * active[order])
        return Factor(order, upper, seen, float(added))

    def _solved(self, x: FloatArray, factor: Factor, sweeps: int) -> tuple[Solution, npt.NDArray[np.float64]]:
        """The solution, and the output error of each row after the walk and the descent."""
        kernels, form, panel = self._kernels, self._form, self._panel
        rows, groups = len(x), form.scheme.groups(form.cols)
        found = Solution(np.empty(x.shape, np.uint8), *(np.empty((rows, groups), np.float32) for _ in range(2)))
        errors = np.empty(rows)
        key = ("gptq", "walks", self._block, factor.added, sweeps > 1)
        walks = self._inputs.once(key, lambda: self._walks(factor, sweeps))
        plain_counts, counts = self._inputs.weights, LayerInputs(form.cols, mean_square=factor.seen).weights

        def fill(first: int, last: int) -> None:
            panels = np.empty((kernels.PANELS, form.cols, panel), np.float32)
            parts = np.empty((kernels.PARTS, self._block, panel), np.float32)
            lots = np.empty((kernels.LOTS, max(form.group, self._block), self._lanes), np.float32)
            small = np.empty((kernels.SMALL, self._lanes), np.float32)
            grids, totals = np.empty((6, groups, panel), np.float32), np.empty((2, panel))
            for start in range(first, last, panel):
                stop = min(start + panel, last)
                kernels.solve_rows(
                    x, start, stop, self._gram.ctypes.data, factor.upper.ctypes.data, factor.order, walks,
                    plain_counts, counts, self._clips, Mse().max_iterations, self._trials, PASSES,
                    sweeps,
                    self._block, form.group, form.codebook, form.numbers(), found.codes, found.scale, found.zero,
                    panels, parts, lots, small, grids, totals,
                )  # fmt: skip
                errors[start:stop] = totals[1, : stop - start]

        self._split(fill, rows, panel)
        return found, errors
