"""What other libraries make of the weights of a layer, read back, with the bits that they take for it."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.published_gptq import as_published
from bench.quality_layers import Layer
from service.engine.schemes.integer import IntegerScheme
from service.engine.tensors import FloatArray

#: ggml's number of each type and the suffix of the function that reads it back.
GGML = {
    "Q4_0": (2, "q4_0"), "Q4_1": (3, "q4_1"), "Q5_0": (6, "q5_0"), "Q5_1": (7, "q5_1"), "Q8_0": (8, "q8_0"),
    "Q2_K": (10, "q2_K"), "Q3_K": (11, "q3_K"), "Q4_K": (12, "q4_K"), "Q5_K": (13, "q5_K"), "Q6_K": (14, "q6_K"),
    "IQ2_XXS": (16, "iq2_xxs"), "IQ2_XS": (17, "iq2_xs"), "IQ2_S": (22, "iq2_s"), "IQ3_XXS": (18, "iq3_xxs"),
    "IQ3_S": (21, "iq3_s"), "IQ4_NL": (20, "iq4_nl"), "IQ4_XS": (23, "iq4_xs"),
}  # fmt: skip
#: The weights of columns: none, 1 for all of them (which has other code search than none), the mean squares.
WAYS = ("", "weights of 1", "E[x²]")


class Unfit(Exception):
    """A format cannot hold a tensor of this shape."""


@dataclass(frozen=True, slots=True)
class Restored:
    """Weights as they read back, (rows, cols), and the bits in which they are stored, everything counted."""

    weights: FloatArray
    bits: float


@dataclass(frozen=True, slots=True)
class Ggml:
    """A type of llama.cpp; super-blocks go on from row to row where one does not fill whole ones."""

    kind: str
    way: str

    @property
    def is_calibrated(self) -> bool:
        """Whether it has seen inputs."""
        return self.way == WAYS[2]

    def restore(self, layer: Layer) -> Restored:
        """Quantize and read back."""
        library, (number, suffix) = _ggml(), GGML[self.kind]
        block, nbytes = library.ggml_blck_size(number), library.ggml_type_size(number)
        rows, cols = layer.weights.shape
        together = math.lcm(cols, block) // cols
        if rows % together:
            raise Unfit
        library.ggml_quantize_init(number)
        importance = None
        if self.way:
            weights = layer.inputs.weights if self.is_calibrated else np.ones(cols, np.float32)
            importance = np.tile(np.asarray(weights, np.float32), together)
        stored, read = np.zeros(layer.weights.size // block * nbytes, np.uint8), np.empty_like(layer.weights)
        library.ggml_quantize_chunk(
            number, layer.weights.ctypes.data, stored.ctypes.data, 0, rows // together, cols * together,
            None if importance is None else importance.ctypes.data,
        )  # fmt: skip
        back = getattr(library, f"dequantize_row_{suffix}")
        back.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        back(stored.ctypes.data, read.ctypes.data, read.size)
        return Restored(read, 8.0 * stored.nbytes)


@dataclass(frozen=True, slots=True)
class Hqq:
    """HQQ with scales and zero points of 16 bits; 3 bits count as 3, though it packs ten codes to 32 bits."""

    nbits: int
    group: int

    def restore(self, layer: Layer) -> Restored:
        """Quantize and read back."""
        import torch
        from hqq.core.quantize import Quantizer

        x = torch.from_numpy(layer.weights)
        if x.numel() % self.group:
            raise Unfit
        codes, meta = Quantizer.quantize(
            x, nbits=self.nbits, group_size=self.group, axis=1, device="cpu", compute_dtype=torch.float32, bitpack=False
        )
        scale, zero = (meta[part].half().float() for part in ("scale", "zero"))
        read = ((codes.float() - zero) * scale).reshape(x.shape)
        return Restored(read.numpy(), x.numel() * (self.nbits + 32 / self.group))


@dataclass(frozen=True, slots=True)
class BitsAndBytes:
    """NF4 or FP4 of bitsandbytes, with the largest magnitude of a block in 32 bits or quantized ("double")."""

    kind: str
    block: int
    is_double: bool

    def restore(self, layer: Layer) -> Restored:
        """Quantize and read back."""
        import torch
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        if layer.weights.size % self.block:
            raise Unfit
        # As rows of one block: those that begin within a block it reads back wrongly on the CPU.
        x = torch.from_numpy(layer.weights).reshape(-1, self.block)
        codes, state = quantize_4bit(
            x, blocksize=self.block, compress_statistics=self.is_double, quant_type=self.kind.lower()
        )
        parts = [codes, state.absmax] + ([state.state2.absmax] if self.is_double else [])
        nbytes = sum(part.numel() * part.element_size() for part in parts)
        return Restored(dequantize_4bit(codes, state).reshape(layer.weights.shape).numpy(), 8.0 * nbytes)


@dataclass(frozen=True, slots=True)
class PublishedGptq:
    """GPTQ as in the paper, with grids of the ranges of static groups."""

    nbits: int
    group: int

    def restore(self, layer: Layer) -> Restored:
        """Quantize and read back."""
        scheme = IntegerScheme(bits=self.nbits, group_size=self.group)
        rows, cols = layer.weights.shape
        _, read = as_published(layer.weights, scheme, layer.inputs)
        return Restored(read, 8.0 * scheme.stored_bytes(rows, cols))


Peer = Ggml | Hqq | BitsAndBytes | PublishedGptq


def peers() -> Iterator[tuple[str, bool, Peer]]:
    """Each by its name, whether it is calibrated, and itself."""
    for kind, (number, _) in GGML.items():
        for way in WAYS:
            if way or not _ggml().ggml_quantize_requires_imatrix(number):
                yield f"ggml {kind}{way and ', '}{way}", way == WAYS[2], Ggml(kind, way)
    for nbits in (2, 3, 4, 5, 6, 8):
        for group in (32, 64, 128):
            yield f"HQQ int{nbits} g{group}", False, Hqq(nbits, group)
    for kind, block, is_double in (("NF4", 64, False), ("NF4", 64, True), ("NF4", 32, True), ("FP4", 64, True)):
        yield f"bitsandbytes {kind} g{block}{', double' * is_double}", False, BitsAndBytes(kind, block, is_double)
    for nbits in (2, 3, 4, 8):
        for group in (32, 128):
            yield f"GPTQ as published int{nbits} g{group}", True, PublishedGptq(nbits, group)


def _ggml() -> Any:
    import libggml

    library = ctypes.CDLL(str(Path(libggml.__file__).parent / "lib64" / "libggml-base.so"))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    library.ggml_quantize_chunk.restype = library.ggml_type_size.restype = ctypes.c_size_t
    library.ggml_blck_size.restype = number
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    return library
