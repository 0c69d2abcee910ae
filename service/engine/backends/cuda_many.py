"""Many small tensors in one launch: their arrays one after the other, and a table that says where each one's lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from service.engine.backends.cpu_arrays import error_sums
from service.engine.backends.cpu_form import Form
from service.engine.backends.cuda_pieces import (
    BLOCK_TILES,
    HELD,
    NAMES,
    SUMS,
    TILE,
    Host,
    Rows,
    plain,
    scheme_numbers,
    seen_shape,
    start_table,
)
from service.engine.backends.work import PART, THREADS, Launch, Work, as_bytes
from service.engine.methods.base import Method
from service.engine.methods.minmax import MinMax
from service.engine.methods.mse import Mse
from service.engine.schemes.base import SCALE_DTYPES, Scheme
from service.engine.tensors import Array, QuantizedRows

#: Lanes of a warp, and warps of a block.
WARP = 32
WARPS = THREADS // WARP
#: The kernels load so many bytes of weights at once, from addresses that are multiples of it.
VECTOR_BYTES = 16

Counts = npt.NDArray[np.int64]


class QuantizeMany(Rows):
    """See `Backend.quantize_many`. A piece is some of the tensors, which are all of one dtype."""

    unit = "tensors"

    def __init__(self, xs: Sequence[Array], scheme: Scheme, method: Method, host: Host) -> None:
        super().__init__(len(xs), host)
        self.xs, self.scheme, self.method = xs, scheme, method

    def work(self, first: int, last: int) -> Work:
        """See `Pieces.work`."""
        xs = [plain(x) for x in self.xs[first:last]]
        table = _Table(xs, self.scheme)
        inputs: dict[str, Array] = {"x": _one_after_the_other(xs), "parts": table.parts, "coders": table.coders}
        name, scheme = NAMES[xs[0].dtype], self.scheme
        launches = [Launch("quantize_many", f"quantize_many_{name}_{scheme.id}", len(table.coders))]
        finds = scheme.granularity == "group" and isinstance(self.method, MinMax)
        if not finds:
            launches.insert(0, self._grid_launch(name, table, inputs))
        numbers = {"group": table.form.group, "finds": finds, "start_count": len(inputs.get("starts", ()))}
        return Work(tuple(launches), inputs, self._outputs(table), scheme_numbers(table.form) | numbers)

    def done(self, first: int, last: int, work: Work) -> None:
        """See `Pieces.done`."""
        parts: npt.NDArray[np.void] = work.inputs["parts"]  # type: ignore[assignment]
        found = work.outputs
        ends = (("packed", found["packed"].size), ("grid", found["scale"].size), ("first_coder", len(found["sums"])))
        places = (_slices(parts[name].tolist(), end) for name, end in ends)
        tensors = zip(self.xs[first:last], *places, strict=True)
        self.found[first] = [self._rows(x, found, *places) for x, *places in tensors]

    def on_host(self, first: int, last: int) -> None:
        """See `Pieces.on_host`."""
        self.found[first] = self.host().quantize_many(self.xs[first:last], self.scheme, self.method)

    def result(self) -> list[QuantizedRows]:
        """Each tensor's."""
        return [q for found in self.in_order() for q in found]

    def _grid_launch(self, name: str, table: _Table, inputs: dict[str, Array]) -> Launch:
        """What finds the grids before there are codes."""
        by_rows = self.scheme.granularity == "channel"
        inputs["finders"] = table.rows_owners() if by_rows else table.warp_owners()
        if not isinstance(self.method, Mse):
            return Launch("quantize_many", f"find_rows_many_{name}", len(inputs["finders"]))
        inputs["starts"] = start_table(self.method, self.scheme)
        kind = "nf4" if table.form.codebook else "int"
        if by_rows:
            return Launch("search_many", f"search_rows_many_{name}_{kind}", len(inputs["finders"]))
        return Launch("search_many", f"search_groups_many_{name}_{kind}", len(inputs["finders"]) // WARPS)

    def _outputs(self, table: _Table) -> dict[str, Array]:
        outputs: dict[str, Array] = {
            "packed": np.empty(table.packed_bytes, np.uint8),
            "scale": np.empty(table.grids, SCALE_DTYPES[self.scheme.scale_dtype]),
            "sums": np.empty((len(table.coders), SUMS)),
        }
        return outputs if self.scheme.symmetric else outputs | {"zero": np.empty(table.grids, np.uint8)}

    def _rows(self, x: Array, found: Mapping[str, Array], packed: slice, grids: slice, blocks: slice) -> QuantizedRows:
        rows, cols = x.shape
        return QuantizedRows(
            scheme=self.scheme,
            cols=cols,
            packed=found["packed"][packed].reshape(rows, -1),  # type: ignore[arg-type]
            scale=found["scale"][grids].reshape(rows, -1),
            zero_point=found["zero"][grids].reshape(rows, -1) if "zero" in found else None,  # type: ignore[arg-type]
            errors=error_sums(x.size, found["sums"][blocks]),  # type: ignore[arg-type]
        )


class _Table:
    """Where each of some tensors begins in arrays that hold all of them, and which blocks work on it."""

    def __init__(self, xs: Sequence[Array], scheme: Scheme) -> None:
        forms = [Form(scheme, *x.shape) for x in xs]
        self.form = forms[0]
        shapes = [seen_shape(form.rows, form) for form in forms]
        self.parts = np.zeros(len(xs), PART)
        for name in ("rows", "cols", "row_bytes", "row_grids"):
            self.parts[name] = [shape[name] for shape in shapes]
        rows, cols, row_bytes, row_grids = (
            self.parts[name].astype(np.int64) for name in ("rows", "cols", "row_bytes", "row_grids")
        )
        self._rows, self._grids = rows, rows * row_grids
        self.parts["is_aligned"] = cols * xs[0].itemsize % VECTOR_BYTES == 0
        self.parts["x"] = _begins(_places(xs))
        self.parts["packed"] = _begins(rows * row_bytes)
        self.parts["grid"] = _begins(self._grids)
        coders = -(-rows * -(-cols // TILE) // BLOCK_TILES)
        self.parts["first_coder"] = _begins(coders)
        self.coders = _owners(coders)
        self.packed_bytes, self.grids = int((rows * row_bytes).sum()), int(self._grids.sum())

    def rows_owners(self) -> npt.NDArray[np.uint32]:
        """Whose row each block finds a grid of."""
        self.parts["first_finder"] = _begins(self._rows)
        return _owners(self._rows)

    def warp_owners(self) -> npt.NDArray[np.uint32]:
        """Whose groups each warp searches; as many as there are in whole blocks."""
        warps = -(-self._grids * (self.form.group // HELD) // WARP)
        self.parts["first_finder"] = _begins(warps)
        warps[-1] += -warps.sum() % WARPS  # they find that the last tensor has nothing left for them
        return _owners(warps)


def _places(xs: Sequence[Array]) -> Counts:
    """Bytes that each one takes in a row of all."""
    return np.array([-(-x.nbytes // VECTOR_BYTES) * VECTOR_BYTES for x in xs], np.int64)


def _one_after_the_other(xs: Sequence[Array]) -> Array:
    places = _places(xs)
    joined = np.empty(int(places.sum()), np.uint8)
    for start, x in zip(_begins(places).tolist(), xs, strict=True):
        joined[start : start + x.nbytes] = as_bytes(x)
    return joined


def _begins(counts: Counts) -> Counts:
    return np.cumsum(counts) - counts


def _owners(counts: Counts) -> npt.NDArray[np.uint32]:
    return np.repeat(np.arange(len(counts), dtype=np.uint32), counts)


def _slices(begins: Sequence[int], end: int) -> Iterator[slice]:
    return (slice(first, last) for first, last in zip(begins, [*begins[1:], end], strict=True))
