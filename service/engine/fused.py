"""Layers that runtimes run as one: their weights have to be stored alike.

vLLM and SGLang stack the projections below (`packed_modules_mapping` of their models) and the experts of a layer into
one matrix each, and refuse to load a model in which the parts differ.
"""

from __future__ import annotations

import re

_STACKED = (
    (re.compile(r"(^|\.)(q|k|v)_proj(?=\.)"), r"\1qkv_proj"),
    (re.compile(r"(^|\.)(query|key|value)(?=\.)"), r"\1qkv"),
    (re.compile(r"(^|\.)(gate|up)_proj(?=\.)"), r"\1gate_up_proj"),
    (re.compile(r"(^|\.)(q_a_proj|kv_a_proj_with_mqa)(?=\.)"), r"\1qkv_a_proj"),
)
#: All that belongs to the experts of a layer is one operator.
_EXPERTS = re.compile(r"\.experts\.\d+\..*")


def fused_layer(name: str) -> str:
    """What the tensor of this name becomes a part of; tensors that are run on their own keep their names."""
    name = _EXPERTS.sub(".experts", name)
    for pattern, together in _STACKED:
        name = pattern.sub(together, name)
    return name
