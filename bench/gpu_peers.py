"""What others do on the same card with the same weights: the libraries that can be imported there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bench.common import Samples, measure
from bench.peers import GROUP, PEERS, Array, Peer, torch_tensor

#: Those of `peers` that also compute on a GPU.
ON_GPUS = ("torch", "torchao", "hqq")


def _bitsandbytes(x: Array, device: str) -> Callable[[], object]:
    from bitsandbytes.functional import quantize_4bit

    weights = torch_tensor(x, device)
    return lambda: quantize_4bit(weights, blocksize=GROUP // 2, quant_type="nf4")


GPU_PEERS = (*(p for p in PEERS if p.package in ON_GPUS), Peer("bitsandbytes: NF4", "bitsandbytes", _bitsandbytes))


def measured(peers: Sequence[Peer], x: Array, device: str, repeats: int) -> Iterator[tuple[Peer, int, Samples | None]]:
    """Each peer with the bytes that it gets and the seconds of a call; None where it is absent or cannot run."""
    for peer in peers:
        part = x[: len(x) // peer.share]
        yield peer, part.nbytes, _samples(peer, part, device, repeats)


def _samples(peer: Peer, x: Array, device: str, repeats: int) -> Samples | None:
    try:
        call = peer.prepare(x, device)
        return measure(lambda: _waited_for(call, device), repeats=repeats)
    except (ImportError, RuntimeError, AttributeError, AssertionError):  # absent, without CUDA, or not for this card
        return None


def _waited_for(call: Callable[[], Any], device: str) -> None:
    import torch

    call()
    if device != "cpu":
        torch.cuda.synchronize()
