"""The low-rank part of a layer: W ≈ Q + U D, where Q are codes, U (rows, r) and D (r, cols) have 16 bits.

The error that counts is that of the layer's output, (W - Q - U D) G (W - Q - U D)ᵀ, with the Gram matrix G of its
inputs where it is known, else their mean squares on its diagonal, else 1. D is the same for all rows: of the weights'
own best part of that rank (in this metric their singular vectors), found by subspace iteration in a few passes over
blocks of rows, of which each adds to sums of the size of D. With D held, each row has a best U for itself, by least
squares. So U is found once for the weights, and again for what the codes have left of them: the second is most of what
is gained, for it takes the error of rounding back in the directions that are fed most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from service.engine.backends.base import Backend, Grid
from service.engine.backends.output_error import with_output
from service.engine.inputs import LayerInputs
from service.engine.methods.base import Method
from service.engine.schemes.base import Scheme
from service.engine.tensors import Array, FloatArray, HalfArray, QuantizedRows, add_low_rank

#: Gives all rows of a tensor, in blocks (rows, cols), each time that it is called.
Pass = Callable[[], Iterable[Array]]
Floats = npt.NDArray[np.float64]

#: Passes over the weights, and directions that are followed beside those wanted, so that so few passes do.
PASSES, SPARE = 4, 8
#: How often a row is quantized: what U takes up of the first codes' error leaves something else to quantize.
ROUNDS = 2
#: Directions whose share of the squared output is smaller are left out.
SMALLEST_SHARE = 1e-9
#: The largest number of 16 bits.
LARGEST = 65504.0


@dataclass(frozen=True, eq=False, slots=True)
class LowRank:
    """D as it is stored, `down` (r, cols), and `solve` (cols, r): U of rows x is x @ solve."""

    down: HalfArray
    solve: FloatArray
    inputs: LayerInputs | None = None

    @classmethod
    def of(cls, down: HalfArray, inputs: LayerInputs | None) -> LowRank:
        """With U by least squares over the inputs."""
        wide = down.astype(np.float32)
        fed = _weighed(wide, inputs)
        inverse = np.linalg.pinv(_product(fed, wide), rcond=SMALLEST_SHARE, hermitian=True)
        return cls(down, np.ascontiguousarray((inverse @ fed).T, np.float32), inputs)

    def apply(self, x: Array) -> FloatArray:
        """Rows as they are to be quantized at first."""
        rows = x.astype(np.float32)
        return self._without(rows, self._up(rows))

    def quantize(self, x: Array, scheme: Scheme, method: Method, grid: Grid | None, backend: Backend) -> QuantizedRows:
        """`backend.quantize` of what is left of rows x (rows, cols), with their `up`; the errors are of x itself."""
        rows = x.astype(np.float32)
        up = self._up(rows)
        for _ in range(ROUNDS):
            coded = backend.quantize(self._without(rows, up), scheme, method, grid, _without_gram(self.inputs))
            if not coded.errors.finite:
                return replace(coded, up=up)
            read = backend.dequantize(coded)
            up = self._up(rows - read)
        add_low_rank(read, up, self.down)
        errors = backend.compare(x, read)
        if self.inputs is not None and self.inputs.gram is not None:
            errors = with_output(errors, x, read, self.inputs.gram)
        return replace(coded, errors=errors, up=up)

    def gains(self, x: Array, scheme: Scheme, method: Method, backend: Backend) -> bool:
        """Whether rows x (rows, cols) of the layer lose less with it than without."""
        rows = x.astype(np.float32)
        if not np.isfinite(rows).all():
            return False  # the run itself tells of it
        grids = [_grid(each, scheme, method, backend) for each in (self.apply(rows), rows)]
        mine = self.quantize(rows, scheme, method, grids[0], backend)
        plain = backend.quantize(rows, scheme, method, grids[1], _without_gram(self.inputs))
        read = backend.dequantize(mine)
        assert mine.up is not None, "it has just been made"
        add_low_rank(read, mine.up, self.down)
        return self._lost(rows - read) < self._lost(rows - backend.dequantize(plain))

    def _up(self, rows: FloatArray) -> HalfArray:
        """The best U (rows, r) for these rows, as it is stored."""
        with np.errstate(over="ignore", invalid="ignore"):
            up: HalfArray = np.clip(rows @ self.solve, -LARGEST, LARGEST).astype(np.float16)
        return up

    def _without(self, rows: FloatArray, up: HalfArray) -> FloatArray:
        """What U D leaves of these rows."""
        with np.errstate(over="ignore", invalid="ignore"):
            left = rows.copy()
            add_low_rank(left, -up, self.down)
            return left

    def _lost(self, error: FloatArray) -> float:
        return float(np.einsum("ij,ij->", _weighed(error, self.inputs), error, dtype=np.float64))


def find_down(read: Pass, rows: int, cols: int, rank: int, inputs: LayerInputs | None) -> HalfArray | None:
    """D (at most `rank`, cols) of a tensor (rows, cols), or None where there is none to be had.

    So it is of weights that are not finite, and of layers whose inputs are all zero.
    """
    wanted = min(rank + SPARE, rows, cols)
    found: FloatArray | None = np.random.default_rng(0).standard_normal((wanted, cols), np.float32)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        for _ in range(PASSES):
            found = None if found is None else _directions(_projected(read(), found, inputs), inputs)
        if found is None:
            return None
        found = found[:rank]
        # Both parts about as large: U then has columns of 1 / balance / sqrt(rows).
        size = np.sqrt(np.square(found, dtype=np.float64).mean(axis=1))
        balance = np.sqrt(1 / np.sqrt(rows) / size)
        halves = (found * balance[:, None]).astype(np.float16)
    return halves if np.isfinite(halves).all() and (halves != 0).any(axis=1).all() else None


def _projected(blocks: Iterable[Array], down: FloatArray, inputs: LayerInputs | None) -> FloatArray | None:
    """W projected on the span of U = W G Dᵀ, for D (k, cols): as many rows as that has directions."""
    back = np.ascontiguousarray(_weighed(down, inputs).T)
    squares: Floats = np.zeros((len(down), len(down)))
    crossed: Floats = np.zeros(down.shape)
    for block in blocks:
        rows = block.astype(np.float32)
        up = rows @ back
        squares += up.T.astype(np.float64) @ up
        crossed += up.T @ rows
    if not (np.isfinite(squares).all() and np.isfinite(crossed).all()):
        return None
    values, vectors = _largest(squares)
    return None if not values.size else ((vectors / np.sqrt(values)).T @ crossed).astype(np.float32)


def _directions(down: FloatArray | None, inputs: LayerInputs | None) -> FloatArray | None:
    """The rows of D (k, cols) turned and scaled so that D G Dᵀ is 1, the largest first."""
    if down is None:
        return None
    squares = _product(_weighed(down, inputs), down)
    values, vectors = _largest(squares) if np.isfinite(squares).all() else (np.empty(0), np.empty(0))
    return None if not values.size else ((vectors / np.sqrt(values)).T @ down).astype(np.float32)


def _largest(squares: Floats) -> tuple[Floats, Floats]:
    """Eigenvalues of a symmetric matrix that count, the largest first, and their vectors as columns."""
    values, vectors = np.linalg.eigh((squares + squares.T) / 2)
    count = int((values > SMALLEST_SHARE * max(values[-1], 0.0)).sum()) if values[-1] > 0 else 0
    return values[::-1][:count], vectors[:, ::-1][:, :count]


def _weighed(rows: FloatArray, inputs: LayerInputs | None) -> FloatArray:
    """Rows times the metric: the Gram matrix, or what is known of it."""
    if inputs is None or inputs.weights is None:
        return rows
    return rows @ inputs.gram if inputs.gram is not None else rows * inputs.weights


def _product(fed: FloatArray, down: FloatArray) -> Floats:
    return fed.astype(np.float64) @ down.T.astype(np.float64)


def _without_gram(inputs: LayerInputs | None) -> LayerInputs | None:
    """The inputs as far as they matter to codes; of the output is measured what is made of all parts."""
    if inputs is None or inputs.gram is None:
        return inputs
    return inputs.once("without_gram", partial(LayerInputs, inputs.cols, mean_square=inputs.mean_square))


def _grid(x: FloatArray, scheme: Scheme, method: Method, backend: Backend) -> Grid | None:
    return backend.tensor_grid(backend.observe(x), scheme, method) if scheme.takes_pass else None
