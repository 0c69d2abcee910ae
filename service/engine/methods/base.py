"""What a method is: the way from weights to the codes, scales and zero points of a scheme."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from service.engine.decode import regions, row_tiles
from service.engine.inputs import LayerInputs
from service.engine.schemes.base import AnyArray, Scheme

#: What there may be of a low-rank part.
MIN_RANK, MAX_RANK = 16, 128


@dataclass(frozen=True, slots=True)
class Solution:
    """Rows of a tensor as a method has them: codes uint8 (rows, cols), scale and zero float32 (rows, groups)."""

    codes: AnyArray
    scale: AnyArray
    zero: AnyArray


class Method(BaseModel):
    """Base of all methods. Frozen, hashable, and equal when their parameters are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: The public name; also the module's.
    id: ClassVar[str]
    #: Fields of `LayerInputs` without which it cannot work.
    needs: ClassVar[tuple[str, ...]] = ()
    #: Whether the error of a column counts by the mean square of its inputs, where that is known.
    is_weighted: ClassVar[bool] = True
    #: Whether the weights it is given are to be scaled column by column before, and the layer's inputs divided.
    scales_inputs: ClassVar[bool] = False

    @property
    def low_rank(self) -> int:
        """The rank of what is taken from the weights before, to be stored beside the codes; 0 where there is none."""
        return 0

    @property
    def quantizes_as(self) -> Method:
        """The method by which rows are quantized when all that comes before is done."""
        return self

    @abstractmethod
    def find(self, xp: Any, x: AnyArray, scheme: Scheme, weights: AnyArray | None = None) -> tuple[AnyArray, AnyArray]:
        """Scale and zero point (...,), float32 as stored, for groups x (..., g) float32.

        `weights` (broadcastable to x) say how much the squared error of each element counts.
        """

    def held_bytes(self, cols: int) -> int:
        """Bytes that it holds of a tensor of so many columns for its whole run, beside the rows at work."""
        del cols
        return 0

    def solve(self, xp: Any, x: AnyArray, scheme: Scheme, inputs: LayerInputs) -> Solution:
        """Codes and grids of whole rows x (rows, cols) float32 that are fed `inputs`.

        The granularity is not `tensor`. By default each group goes through `find` on its own, and
        its codes are the nearest; a method that weighs groups against each other has its own way.
        """
        rows, cols = x.shape
        codes = xp.empty((rows, cols), dtype=xp.uint8)
        scale = xp.empty((scheme.scale_rows(rows), scheme.groups(cols)), dtype=xp.float32)
        zero = xp.empty_like(scale)
        weights = xp.asarray(inputs.weights) if self.is_weighted and inputs.weights is not None else None
        multiple = scheme.row_multiple if scheme.granularity == "block" else 1
        for tile in row_tiles(rows, cols, multiple):
            some, count = x[tile, :], tile.stop - tile.start
            first = scheme.scale_rows(tile.start)
            for region in regions(scheme, count, cols):
                part = region.groups_of(xp, some)
                counts_for = None
                if weights is not None:
                    counts_for = region.groups_of(xp, xp.broadcast_to(weights, (count, cols)))
                place = slice(first + region.scale_rows.start, first + region.scale_rows.stop), region.scale_columns
                scale[place], zero[place] = self.find(xp, part, scheme, counts_for)
                region.put(xp, scheme.encode(xp, part, scale[place], zero[place]), codes[tile, :])
        return Solution(codes, scale, zero)
