"""How the kernels know what they compute: groups in a row, a scheme in numbers, and what there are kernels for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from service.engine.backends.base import Grid
from service.engine.inputs import LayerInputs
from service.engine.methods.base import Method
from service.engine.methods.minmax import MinMax
from service.engine.methods.mse import Mse
from service.engine.schemes.base import SCALE_DTYPES, Scheme
from service.engine.schemes.codebook import CodebookScheme
from service.engine.schemes.float8 import Float8E4M3, Float8E5M2
from service.engine.schemes.integer import IntegerScheme
from service.engine.schemes.microscaling import Fp4, Mx, NvFp4
from service.engine.schemes.table import TableScheme
from service.engine.tensors import FloatArray

#: Elements of a tile: its errors are summed up on their own, so that sums do not depend on the threads.
TILE_ELEMENTS = 1 << 16
#: Longest group that `Mse` has a kernel for: sixteen of them are held at once.
SEARCH_ELEMENTS = 1 << 18
#: As `cpu_kernels.minifloats` numbers what codes stand for; of schemes of several widths, by these.
TABLES: dict[tuple[type[Scheme], int | None], int] = {
    (IntegerScheme, None): 0,
    (CodebookScheme, None): 1,
    (Fp4, None): 2,
    (Mx, 4): 2,
    (NvFp4, None): 2,
    (Float8E4M3, None): 3,
    (Mx, 8): 3,
    (Float8E5M2, None): 4,
}


@dataclass(frozen=True, slots=True)
class Form:
    """How groups lie in a row, and the numbers by which the kernels know a scheme.

    `tensor_rows` is there when the rows are those of several tensors, as many of each.
    """

    scheme: Scheme
    rows: int
    cols: int
    tensor_rows: int | None = None

    @property
    def group(self) -> int:
        """Columns from one group to the next."""
        return self.scheme.width or self.cols

    @property
    def row_groups(self) -> int:
        """Groups of a row; 0 where one grid serves all rows."""
        return 0 if self.scheme.granularity == "tensor" else self.scheme.groups(self.cols)

    @property
    def grids(self) -> int:
        """Number of scales."""
        return self.rows * self.row_groups or 1

    @property
    def codebook(self) -> bool:
        """Whether codes index a table."""
        return isinstance(self.scheme, CodebookScheme)

    @property
    def table(self) -> int | None:
        """The table of levels as the kernels number it; None where they have none."""
        # A subclass may mean something else, so only these very classes count.
        return TABLES.get((type(self.scheme), self.scheme.bits if type(self.scheme) is Mx else None))

    @property
    def tile_rows(self) -> int:
        """Rows whose errors are summed up together."""
        return self.tensor_rows or max(1, TILE_ELEMENTS // self.cols)

    def numbers(self) -> tuple[np.float32, np.float32, np.float32, bool, int, np.float32]:
        """See `cpu_kernels.grids.Form`."""
        scheme = self.scheme
        kind = list(SCALE_DTYPES).index(scheme.scale_dtype)
        divisor: float = 1
        if isinstance(scheme, TableScheme):
            divisor = float(scheme.divisor)
        elif isinstance(scheme, IntegerScheme):
            divisor = scheme.middle - 1 if scheme.symmetric else scheme.top
        top = (1 << scheme.bits) - 1
        under = np.float32(1.0) if scheme.tensor_divisor is None else scheme.tensor_divisor
        return np.float32(divisor), np.float32(top), np.float32(scheme.implied_zero), scheme.symmetric, kind, under


def column_weights(method: Method, inputs: LayerInputs | None) -> FloatArray | None:
    """What the errors of columns count, if that is to make a difference."""
    return inputs.weights if inputs is not None and method.is_weighted else None


def has_kernel(form: Form, method: Method, grid: Grid | None) -> bool:
    """Whether the kernels compute what the method means."""
    if form.table is None:
        return False
    if form.scheme.granularity == "tensor":
        return grid is not None
    searched = type(method) is Mse and form.group <= SEARCH_ELEMENTS
    return searched or type(method) is MinMax


def is_measured_alike(method: Method, inputs: LayerInputs | None) -> bool:
    """Whether the method is one that has kernels, in which every element counts alike."""
    return type(method) is MinMax or (type(method) is Mse and column_weights(method, inputs) is None)
