"""What llama.cpp calls a layer of a transformer; its inputs are the same, whatever it does to the rows."""

from __future__ import annotations

import re

#: Where the layers of a block begin in a model's own names, by any of these: `model.layers.7.`, `encoder.layer.7.`.
_BLOCK = re.compile(r"(?:^|\.)(?:layers|layer|blocks|h)\.(\d+)\.(.+)$")

#: From what is left of a layer's name in its block to what GGUF files call it.
_LAYERS = {
    # Llama, Mistral, Qwen, Gemma, SmolLM and their like
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate_up_proj": "ffn_up",
    # BERT and its like
    "attention.self.query": "attn_q", "attention.self.key": "attn_k", "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output", "intermediate.dense": "ffn_up", "output.dense": "ffn_down",
}  # fmt: skip


def gguf_name(layer: str) -> str | None:
    """`blk.7.attn_q` for `model.layers.7.self_attn.q_proj`; None where there is no name for it."""
    found = _BLOCK.search(layer)
    name = _LAYERS.get(found[2]) if found else None
    return f"blk.{found[1]}.{name}" if found and name else None
