"""Super-scales, spreads and codes of least squared error for super-blocks of groups.

From what each group would have alone, a few super-scales and spreads are tried; the best super-scale for each spread is
a start. Then, in turn, every group takes the best of its own and the neighbouring codes, and super-scale and spread are
fitted to all elements by least squares with the codes of everything held.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from service.engine.schemes.base import AnyArray

if TYPE_CHECKING:
    from service.engine.schemes.nested import NestedScheme

#: Parts of the largest scale that are tried as the super-scale; and of the largest spread, with a descent from each.
SUPER_PARTS = (1.0, 0.96, 0.92, 0.88, 0.84)
SPREAD_PARTS = (1.0, 0.82, 0.66, 0.52)
#: Rounds of a descent.
ROUNDS = 4
#: Steps of scale and zero code to the neighbours.
NEIGHBOURS = tuple((i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j)

#: Super-scale and spread (..., 1), scale and zero codes (..., groups), and what is lost, (...,).
_State = tuple[AnyArray, AnyArray, AnyArray, AnyArray, AnyArray]


def settle_supers(
    xp: Any, x: AnyArray, scheme: NestedScheme, scale: AnyArray, zero: AnyArray, weights: AnyArray | None
) -> tuple[AnyArray, AnyArray]:
    """Scales and zero points (..., groups) for super-blocks x (..., groups, g), from those that groups have alone."""
    block = _Blocks(xp, x, scheme, weights)
    best = block.naive()
    for part in SPREAD_PARTS:
        best = block.better(best, block.descent(block.start(scale, zero, part), scale, zero))
    return scheme.under(*best[:4])


class _Blocks:
    """Super-blocks, and how good a state is for them."""

    def __init__(self, xp: Any, x: AnyArray, scheme: NestedScheme, weights: AnyArray | None) -> None:
        self.xp, self.x, self.scheme, self.weights = xp, x, scheme, weights

    def naive(self) -> _State:
        """What ranges alone give."""
        xp, scheme = self.xp, self.scheme
        counted = self.x if self.weights is None else xp.where(self.weights > 0, self.x, 0.0)
        lo, hi = xp.minimum(xp.min(counted, axis=-1), 0), xp.maximum(xp.max(counted, axis=-1), 0)
        scale, zero = scheme.free.grid(xp, lo, hi)
        over = scheme.store_super(xp, xp.max(scale, axis=-1, keepdims=True))
        return self._under(scale, zero, over, scheme.spread_of(xp, zero))

    def start(self, scale: AnyArray, zero: AnyArray, spread_part: float) -> _State:
        """The best super-scale for a part of the whole spread."""
        xp, scheme = self.xp, self.scheme
        largest, spread = xp.max(scale, axis=-1, keepdims=True), scheme.spread_of(xp, zero)
        spread = xp.round(spread * spread_part)
        states = (self._under(scale, zero, scheme.store_super(xp, largest * part), spread) for part in SUPER_PARTS)
        best = next(states)
        for state in states:
            best = self.better(best, state)
        return best

    def better(self, one: _State, other: _State) -> _State:
        """Of each super-block the state that loses less."""
        xp, less = self.xp, other[4] < one[4]
        chosen = [xp.where(less[..., None], b, a) for a, b in zip(one[:4], other[:4], strict=True)]
        return (*chosen, xp.where(less, other[4], one[4]))

    def descent(self, state: _State, scale: AnyArray, zero: AnyArray) -> _State:
        """The best on the way; `scale` and `zero` say which groups keep the largest codes."""
        xp = self.xp
        distance = xp.abs(zero - self.scheme.half)
        keeps_scale = scale == xp.max(scale, axis=-1, keepdims=True)
        keeps_zero = distance == xp.max(distance, axis=-1, keepdims=True)
        best = state
        for _ in range(ROUNDS):
            over, spread, c, k, _ = state
            c, k, error = self._neighbours(over, spread, c, k, keeps_scale, keeps_zero)
            best = self.better(best, (over, spread, c, k, error))
            state = (*self._fit(over, spread, c, k), c, k, error)
        return best

    def _under(self, scale: AnyArray, zero: AnyArray, over: AnyArray, spread: AnyArray) -> _State:
        c, k = self.scheme.codes_under(self.xp, scale, zero, over, spread)
        return over, spread, c, k, self.xp.sum(self._errors(over, spread, c, k), axis=-1)

    def _errors(self, over: AnyArray, spread: AnyArray, c: AnyArray, k: AnyArray) -> AnyArray:
        """Of each group, (..., groups)."""
        xp, scheme = self.xp, self.scheme
        scale, zero = scheme.under(over, spread, c, k)
        d = self.x - scheme.decode(xp, scheme.encode(xp, self.x, scale, zero), scale, zero)
        return xp.sum(d * d if self.weights is None else self.weights * d * d, axis=-1)

    def _neighbours(
        self, over: AnyArray, spread: AnyArray, c: AnyArray, k: AnyArray, keeps_scale: AnyArray, keeps_zero: AnyArray
    ) -> tuple[AnyArray, AnyArray, AnyArray]:
        """The best codes of each group within a step, and what the super-block then loses."""
        xp, most, farthest = self.xp, self.scheme.largest_scale_code, self.scheme.largest_zero_code
        best_c, best_k, best = c, k, self._errors(over, spread, c, k)
        for scale_step, zero_step in NEIGHBOURS:
            near_c = xp.where(keeps_scale, c, xp.clip(c + scale_step, 0, most))
            near_k = xp.where(keeps_zero, k, xp.clip(k + zero_step, -farthest, farthest))
            error = self._errors(over, spread, near_c, near_k)
            less = error < best
            best_c, best_k = xp.where(less, near_c, best_c), xp.where(less, near_k, best_k)
            best = xp.where(less, error, best)
        return best_c, best_k, xp.sum(best, axis=-1)

    def _fit(self, over: AnyArray, spread: AnyArray, c: AnyArray, k: AnyArray) -> tuple[AnyArray, AnyArray]:
        """Super-scale and spread of least squared error with all codes held: x on (q - half) * c, and on c * k."""
        xp, scheme = self.xp, self.scheme
        scale, zero = scheme.under(over, spread, c, k)
        q = xp.astype(scheme.encode(xp, self.x, scale, zero), xp.float32) - scheme.half
        part = c / scheme.largest_scale_code
        slope = q * part[..., None]
        shift = (-part * k)[..., None] + xp.zeros_like(q)
        w = xp.ones_like(q) if self.weights is None else self.weights
        ss, st, tt, sx, tx = (
            xp.sum(w * a * b, axis=(-2, -1))[..., None]
            for a, b in ((slope, slope), (slope, shift), (shift, shift), (slope, self.x), (shift, self.x))
        )
        determinant = ss * tt - st * st
        usable = determinant > 1e-6 * ss * tt
        safe = xp.where(usable, determinant, 1.0)
        fitted, moved = (sx * tt - tx * st) / safe, (tx * ss - sx * st) / safe
        usable = usable & (fitted > 0) & (moved > 0)
        unit = scheme.spread_unit
        wanted = xp.round(moved / (xp.where(usable, fitted, 1.0) * unit))
        return (
            xp.where(usable, scheme.store_super(xp, fitted), over),
            xp.where(usable, xp.clip(wanted, 1, 255), spread),
        )
