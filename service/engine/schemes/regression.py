"""Least squares of a group's elements on its codes, as grids with a zero point are fitted."""

from __future__ import annotations

from typing import Any, NamedTuple

from service.engine.schemes.base import AnyArray


class Regression(NamedTuple):
    """Means of codes and elements, and the slope of elements on codes as a fraction; all (...,)."""

    q_mean: AnyArray
    x_mean: AnyArray
    numerator: AnyArray
    denominator: AnyArray


def regression(xp: Any, x: AnyArray, codes: AnyArray, weights: AnyArray | None) -> Regression:
    """Of x (..., g) on codes (..., g), each element counting as much as its weight; where none counts all is 0."""
    w = 1.0 if weights is None else weights
    q = xp.astype(codes, xp.float32)
    total = xp.sum(w + xp.zeros_like(q), axis=-1)
    total = xp.where(total > 0, total, 1.0)
    q_mean = xp.sum(w * q, axis=-1) / total
    x_mean = xp.sum(w * x, axis=-1) / total
    dq = q - q_mean[..., None]
    numerator, denominator = xp.sum(w * dq * (x - x_mean[..., None]), axis=-1), xp.sum(w * dq * dq, axis=-1)
    return Regression(q_mean, x_mean, numerator, denominator)
