"""`Gptq` with kernels: what they are given, and what they need to work in."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from service.engine.inputs import LayerInputs
from service.engine.methods.base import Solution
from service.engine.methods.descent import BLOCK, LONGEST_GROUP, PASSES, TRIALS
from service.engine.methods.gptq import Factor, Gptq
from service.engine.methods.mse import Mse
from service.engine.schemes.base import Scheme
from service.engine.tensors import FloatArray

if TYPE_CHECKING:
    from service.engine.backends.cpu import Form

#: Calls a function on pieces (first, last) of so many rows, each a multiple of a number of rows but the last.
Split = Callable[[Callable[[int, int], None], int, int], None]


def solve(x: FloatArray, form: Form, method: Gptq, inputs: LayerInputs, split: Split) -> Solution:
    """See `Gptq.solve`, of x (rows, cols)."""
    from service.engine.backends.cpu_kernels import gptq as kernels
    from service.engine.backends.cpu_kernels.products import PANEL
    from service.engine.backends.cpu_kernels.vector import LANES

    assert inputs.gram is not None, "the method needs it"
    gram, scheme, groups = inputs.gram, form.scheme, form.row_groups
    factor = inputs.once((method, scheme), lambda: _factor(method, scheme, gram))
    mse = Mse()
    clips = np.array(mse.starts(scheme), np.float32)
    searched = form.group <= LONGEST_GROUP
    trials = [move for move in TRIALS if not (move[1] and scheme.symmetric)] if searched else TRIALS[:1]
    block = max(BLOCK, form.group) if searched else BLOCK
    counts = LayerInputs(inputs.cols, mean_square=factor.seen).weights
    found = Solution(
        np.empty(x.shape, np.uint8), np.empty((len(x), groups), np.float32), np.empty((len(x), groups), np.float32)
    )

    def fill(first: int, last: int) -> None:
        panels = np.empty((kernels.PANELS, form.cols, PANEL), np.float32)
        parts = np.empty((kernels.PARTS, block, PANEL), np.float32)
        lots = np.empty((kernels.LOTS, max(form.group, block), LANES), np.float32)
        small = np.empty((kernels.SMALL, LANES), np.float32)
        grids, totals = np.empty((4, groups, PANEL), np.float32), np.empty((2, PANEL))
        for start in range(first, last, PANEL):
            kernels.solve_rows(
                x, start, min(start + PANEL, last), gram.ctypes.data, factor.upper.ctypes.data, factor.order,
                inputs.weights, counts, clips, mse.max_iterations, np.array(trials, np.float32), PASSES,
                method.sweeps, block, form.group, form.codebook, form.numbers(), found.codes, found.scale, found.zero,
                panels, parts, lots, small, grids, totals,
            )  # fmt: skip

    split(fill, len(x), PANEL)
    return found


def _factor(method: Gptq, scheme: Scheme, gram: FloatArray) -> Factor:
    """With its rows one after the other in memory."""
    found = method.factor(np, gram, scheme)
    return Factor(np.ascontiguousarray(found.order, np.int64), np.ascontiguousarray(found.upper), found.seen)
