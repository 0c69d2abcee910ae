"""GPTQ as in the paper (Frantar et al. 2022), straight from its text: what ours is held against."""

from __future__ import annotations

import numpy as np

from service.engine.inputs import LayerInputs
from service.engine.methods.base import Solution
from service.engine.methods.minmax import MinMax
from service.engine.schemes.integer import IntegerScheme
from service.engine.tensors import FloatArray


def as_published(x: FloatArray, scheme: IntegerScheme, inputs: LayerInputs) -> tuple[Solution, FloatArray]:
    """Minmax grids, a damping of 1%, activation order, the inverse's factor, no lazy batches; for x (rows, cols).

    The second is what the codes stand for. `inputs` have a Gram matrix.
    """
    start = MinMax().solve(np, x, scheme, inputs)
    assert inputs.gram is not None, "the method needs it"
    gram = inputs.gram.astype(np.float64)
    order = np.argsort(-np.diagonal(gram), kind="stable")
    damped = gram[np.ix_(order, order)] + 0.01 * np.diagonal(gram).mean() * np.eye(len(gram))
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    left, codes, read = x[:, order].astype(np.float64), np.empty_like(start.codes), np.empty_like(x)
    for step, column in enumerate(order):
        group = column // scheme.width if scheme.width else 0
        grid = start.scale[:, group], start.zero[:, group]
        q = scheme.encode(np, left[:, step : step + 1].astype(np.float32), *grid)
        codes[:, column], read[:, column] = q[:, 0], scheme.decode(np, q, *grid)[:, 0]
        error = (left[:, step] - read[:, column]) / upper[step, step]
        left[:, step:] -= error[:, None] * upper[step, step:]
    return Solution(codes, start.scale, start.zero), read
