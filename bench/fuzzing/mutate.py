"""Spoils valid inputs: bytes changed, removed, repeated, put in, and JSON and numbers changed where they stand."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from typing import Any

MAX_BYTES = 1 << 16
#: What limits are made of.
NUMBERS = (
    0,
    1,
    2,
    7,
    127,
    128,
    255,
    256,
    65535,
    1 << 31,
    (1 << 31) - 1,
    1 << 32,
    1 << 60,
    (1 << 63) - 1,
    (1 << 64) - 1,
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    1 << 60,
    1 << 64,
    1e400,
    0.5,
    "",
    "a",
    "F32",
    "I64",
    [],
    {},
    [1],
    [0, 0],
    {"a": 1},
)


def mutate(rng: random.Random, data: bytes, pool: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    """A spoilt copy; `pool` are other inputs to take pieces of."""
    if rng.random() < 0.4 and (changed := _mutate_json(rng, data)) is not None:
        return changed
    out = bytearray(data)
    for _ in range(1 << rng.randrange(4)):
        _spoil(rng, out, pool, tokens)
    return bytes(out[:MAX_BYTES])


def _spoil(rng: random.Random, out: bytearray, pool: Sequence[bytes], tokens: Sequence[bytes]) -> None:
    at = _place(rng, len(out))
    kind = rng.randrange(8)
    if kind == 0 and out:
        out[at] = rng.randrange(256)
    elif kind == 1 and out:
        out[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        del out[at : at + (1 << rng.randrange(6))]
    elif kind == 3:
        out[at:at] = rng.randbytes(1 << rng.randrange(4))
    elif kind == 4:
        out[at:at] = out[at : at + (1 << rng.randrange(8))]
    elif kind == 5 and tokens:
        token = rng.choice(tokens)
        end = at + len(token) if rng.random() < 0.5 else at
        out[at:end] = token
    elif kind == 6:
        width = rng.choice((1, 2, 4, 8))
        number = rng.choice(NUMBERS) + rng.randint(-1, 1)
        out[at : at + width] = (number % (1 << 8 * width)).to_bytes(width, "little")
    else:
        other = rng.choice(pool)
        start = _place(rng, len(other))
        out[at : at + 64] = other[start : start + rng.randrange(1, 64)]


def _place(rng: random.Random, size: int) -> int:
    """Mostly near the ends, where headers and footers lie."""
    if not size:
        return 0
    where = rng.random()
    if where < 0.35:
        return rng.randrange(min(size, 64))
    if where < 0.6:
        return size - 1 - rng.randrange(min(size, 512))
    return rng.randrange(size)


def _mutate_json(rng: random.Random, data: bytes) -> bytes | None:
    """The input with a value of its JSON changed: a safetensors header, or JSON behind a byte or two."""
    start = data.find(b"{")
    if not 0 <= start <= 8:
        return None
    length = int.from_bytes(data[:8], "little") if start == 8 else len(data) - start
    try:
        value = json.loads(data[start : start + length])
    except (ValueError, RecursionError):
        return None
    for _ in range(rng.randint(1, 3)):
        _change(rng, value)
    text = json.dumps(value).encode()
    if start != 8:
        return data[:start] + text
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _change(rng: random.Random, node: Any) -> None:
    """Change one value somewhere in a tree."""
    while isinstance(node, dict | list) and node:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        inner = node[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.8:
            node = inner
            continue
        _replace(rng, node, key)
        return


def _replace(rng: random.Random, node: Any, key: Any) -> None:
    kind = rng.randrange(4)
    if kind == 0:
        del node[key]
    elif kind == 1 and type(node[key]) is int:
        node[key] = rng.choice((node[key] + rng.randint(-8, 8), rng.choice(NUMBERS), -node[key]))
    elif kind == 2 and isinstance(node, dict):
        node[rng.choice((*node, "x", "__metadata__"))] = copy.deepcopy(node[key])
    else:
        node[key] = copy.deepcopy(rng.choice(VALUES))
