"""What others do with the same weights: the obvious NumPy, and the libraries that can be imported here.

Each quantizer takes float weights (rows, cols), packs what it makes, and measures no error.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from bench.common import cores

GROUP = 128
#: Elements that ggml converts to float32 at once: they fit the cache, as its own tool does not manage.
CONVERTED = 1 << 16

Array = np.ndarray[Any, Any]
#: Prepares the weights in the library's own form, on a device that torch knows, and returns what is to be timed.
Prepare = Callable[[Array, str], Callable[[], object]]


@dataclass(frozen=True, slots=True)
class Peer:
    """Something to compare with; `prepare` raises ImportError where its library is absent.

    One that would take minutes gets a `share`-th of the weights.
    """

    name: str
    package: str
    prepare: Prepare
    share: int = 1


def naive_int4(x: Array) -> Array:
    """The quantizer that anybody would write first: int4, groups of 128, with zero points."""
    groups = x.astype(np.float32).reshape(-1, GROUP)
    lo, hi = np.minimum(groups.min(1), 0)[:, None], np.maximum(groups.max(1), 0)[:, None]
    scale = np.where(hi > lo, (hi - lo) / 15, 1)
    codes = np.clip(np.rint(groups / scale) + np.rint(-lo / scale), 0, 15).astype(np.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4


def _numpy(x: Array, _: str) -> Callable[[], object]:
    return lambda: naive_int4(x)


def torch_tensor(x: Array, device: str) -> Any:
    """The weights as torch has them, not copied on the CPU."""
    import torch

    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(x).to(device)


def _torch(x: Array, device: str) -> Callable[[], object]:
    import torch

    weights = torch_tensor(x, device)

    def run() -> Any:
        groups = weights.float().reshape(-1, GROUP)
        lo, hi = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
        scale = ((hi - lo) / 15).clamp(min=1e-8)
        codes = (torch.round(groups / scale) + torch.round(-lo / scale)).clamp(0, 15).to(torch.uint8)
        return codes[:, ::2] | codes[:, 1::2] << 4

    return run


def _compressed_tensors(x: Array, device: str) -> Callable[[], object]:
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    weights = torch_tensor(x, device)
    args = QuantizationArgs(num_bits=4, symmetric=False, strategy=QuantizationStrategy.GROUP, group_size=GROUP)

    def run() -> Any:
        groups = weights.reshape(weights.shape[0], -1, GROUP)
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        return pack_to_int32(quantize(weights, scale, zero, args, dtype=torch.int8), 4)

    return run


def _gguf(kind: str) -> Prepare:
    def prepare(x: Array, _: str) -> Callable[[], object]:
        from gguf import GGMLQuantizationType, quants

        chosen = GGMLQuantizationType[kind]
        return lambda: quants.quantize(x.astype(np.float32, copy=False), chosen)

    return prepare


def _ggml(kind: int, block: int, block_bytes: int) -> Prepare:
    """The C library, on rows divided among threads as its own tool divides them."""

    def prepare(x: Array, _: str) -> Callable[[], object]:
        import libggml

        library = ctypes.CDLL(str(Path(libggml.__file__).parent / "lib64" / "libggml-base.so"))
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
        library.ggml_quantize_chunk.restype = ctypes.c_size_t
        library.ggml_quantize_init(kind)
        rows, cols = x.shape
        out = np.ones((rows, cols // block * block_bytes), np.uint8)
        step = max(1, CONVERTED // cols)

        def quantize(first: int, last: int) -> None:
            floats = np.empty((step, cols), np.float32)
            for row in range(first, last, step):
                count = min(step, last - row)
                part = x[row : row + count]
                if x.dtype != np.float32:
                    convert = library.ggml_fp16_to_fp32_row if x.dtype == np.float16 else library.ggml_bf16_to_fp32_row
                    convert(pointer(part.ctypes.data), pointer(floats.ctypes.data), number(part.size))
                    part = floats
                library.ggml_quantize_chunk(kind, part.ctypes.data, out[row:].ctypes.data, 0, count, cols, None)

        def run() -> Array:
            shares = [rows * i // cores() for i in range(cores() + 1)]
            with ThreadPoolExecutor(cores()) as pool:
                list(pool.map(quantize, shares[:-1], shares[1:]))
            return out

        return run

    return prepare


def _torchao(x: Array, device: str) -> Callable[[], object]:
    import torch
    from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine

    weights, block = torch_tensor(x, device), (1, GROUP)

    def run() -> Any:
        scale, zero = choose_qparams_affine(weights, MappingType.ASYMMETRIC, block, torch.uint8, 0, 15)
        return quantize_affine(weights, block, scale, zero, torch.uint8, 0, 15)

    return run


def _hqq(*, optimize: bool) -> Prepare:
    def prepare(x: Array, device: str) -> Callable[[], object]:
        import torch
        from hqq.core.quantize import Quantizer

        weights = torch_tensor(x, device)
        settings = {"nbits": 4, "group_size": GROUP, "axis": 1, "device": device, "compute_dtype": torch.float32}
        return lambda: Quantizer.quantize(weights, optimize=optimize, **settings)

    return prepare


PEERS = (
    Peer("NumPy, the obvious six lines: int4", "numpy", _numpy),
    Peer("torch eager, then nibbles packed: int4", "torch", _torch),
    Peer("compressed-tensors, quantize and pack: int4", "compressed-tensors", _compressed_tensors),
    Peer("torchao, not packed: int4", "torchao", _torchao),
    Peer("HQQ without its optimisation: int4", "hqq", _hqq(optimize=False)),
    Peer("HQQ: int4", "hqq", _hqq(optimize=True), share=8),
    Peer("ggml: Q4_0", "libggml-python", _ggml(2, 32, 18)),
    Peer("ggml: Q8_0", "libggml-python", _ggml(8, 32, 34)),
    Peer("ggml: Q4_K", "libggml-python", _ggml(12, 256, 144), share=8),
    Peer("gguf (Python): Q4_0", "gguf", _gguf("Q4_0")),
    Peer("gguf (Python): Q8_0", "gguf", _gguf("Q8_0")),
)


def prepared(x: Array) -> Iterator[tuple[Peer, Callable[[], object] | None]]:
    """Every peer with its call on x, or None where its library is absent."""
    for peer in PEERS:
        try:
            yield peer, peer.prepare(x[: x.shape[0] // peer.share], "cpu")
        except ImportError:
            yield peer, None
