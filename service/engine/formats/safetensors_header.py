"""The header of a safetensors file, read as what it is: input that may be hostile, and written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from json.encoder import encode_basestring
from pathlib import PurePosixPath
from typing import Any, NoReturn

from service.engine.tensors import DTYPE_BITS, TensorInfo
from service.errors import CorruptModel, UnknownDtype
from service.storage.model_files import OpenFile

#: Bytes before the JSON: its length, little endian.
PREFIX_BYTES = 8
#: The limit of the format's own library.
MAX_HEADER_BYTES = 100_000_000
#: Of lists, objects and their members in a file of JSON: each takes a hundred bytes of memory and more.
MAX_JSON_ITEMS = 5_000_000
#: What NumPy can index.
MAX_DIMENSIONS = 64
MAX_ELEMENTS = 1 << 59
LARGEST = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Header:
    """Tensors in the order of their bytes, `__metadata__`, and the header as it lies in the file."""

    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]
    json: bytes


def read_header(file: OpenFile) -> Header:
    """Parse and check a header against itself and the file's size; raises CorruptModel or UnknownDtype."""
    raw = _header_bytes(file)
    entries = _parse_header(raw, file.name)
    if not isinstance(entries, dict):
        _corrupt(file.name, "its header is not a JSON object")
    metadata = _metadata(entries.pop("__metadata__", {}), file.name)
    data_start = PREFIX_BYTES + len(raw)
    tensors = sorted(
        (_tensor(name, entry, file.name, data_start) for name, entry in entries.items()),
        key=lambda t: (t.offset, t.offset + t.nbytes, t.name),
    )
    _check_coverage(tensors, data_start, file)
    return Header(tuple(tensors), metadata, raw)


def parse_json(raw: bytes, name: PurePosixPath) -> Any:
    """JSON without duplicate keys, lone surrogates or constants that JSON does not have; else CorruptModel."""
    return _parse(raw, name, _unique)


def _parse_header(raw: bytes, name: PurePosixPath) -> Any:
    """As `parse_json`, and quickly where what was found is seen to be all that there is, under no key twice."""
    if b"\\u" not in raw:  # which also is the only way to write a surrogate
        found = _parse(raw, name, None)
        # Colons stand behind keys and in strings. Where a key has dropped another, some are missing.
        if isinstance(found, dict) and raw.count(b":") == _colons(found):
            return found
    return parse_json(raw, name)


def _colons(header: dict[str, Any]) -> int:
    """Those of a header's keys, and in its tensors' names and its metadata."""
    entries = [entry for entry in header.values() if isinstance(entry, dict)]
    metadata = header.get("__metadata__")
    texts = [*header, *(metadata if isinstance(metadata, dict) else ())]
    texts += [text for text in metadata.values() if isinstance(text, str)] if isinstance(metadata, dict) else []
    return len(header) + sum(map(len, entries)) + "".join(texts).count(":")


def _parse(raw: bytes, name: PurePosixPath, hook: Callable[[list[tuple[str, Any]]], Any] | None) -> Any:
    if (items := sum(map(raw.count, (b",", b"[", b"{")))) > MAX_JSON_ITEMS:
        _corrupt(name, f"its JSON has {items} items; at most {MAX_JSON_ITEMS} are read")
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=hook, parse_constant=_no_constant)
    except RecursionError:
        _corrupt(name, "its JSON is nested too deeply")
    except ValueError as error:
        _corrupt(name, f"it holds no valid JSON ({error})")


def build_header(
    entries: Iterable[tuple[str, str, tuple[int, ...], int, int]], metadata: Mapping[str, str], size: int
) -> bytes:
    """Length and JSON, filled up with spaces to `size` bytes; entries are (name, dtype, shape, start, end)."""
    described = json.dumps(dict(metadata), separators=(",", ":"), ensure_ascii=False)
    # Put together here: the encoder would take a list and two dictionaries for each, and other threads wait for it.
    members = [f'"__metadata__":{described}'] + [
        f'{encode_basestring(name)}:{{"dtype":"{dtype}","shape":[{",".join(map(str, shape))}],'
        f'"data_offsets":[{start},{end}]}}'
        for name, dtype, shape, start, end in entries
    ]
    text = f"{{{','.join(members)}}}".encode()
    return (size - PREFIX_BYTES).to_bytes(PREFIX_BYTES, "little") + text.ljust(size - PREFIX_BYTES)


def _header_bytes(file: OpenFile) -> bytes:
    if file.size < PREFIX_BYTES:
        _corrupt(file.name, f"it has {file.size} bytes, too few for a safetensors header")
    length = int.from_bytes(file.read(0, PREFIX_BYTES).tobytes(), "little")
    # Both are checked before anything of that size is allocated.
    if length > MAX_HEADER_BYTES:
        _corrupt(file.name, f"its header claims {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
    if length > file.size - PREFIX_BYTES:
        _corrupt(file.name, f"its header claims {length} bytes, but the file has {file.size}; it is truncated")
    return file.read(PREFIX_BYTES, length).tobytes()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} occurs twice")
    for key in found:
        key.encode()  # a lone surrogate has no UTF-8 form, and is a ValueError
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _metadata(value: Any, file: PurePosixPath) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        _corrupt(file, "its `__metadata__` is not an object of strings")
    return value


def _tensor(name: str, entry: Any, file: PurePosixPath, data_start: int) -> TensorInfo:
    try:
        dtype, sizes, ends = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError):
        _corrupt(file, "its entry has not `dtype`, `shape` and `data_offsets`", name)
    shape = _integers(sizes, "shape", file, name)
    if len(shape) > MAX_DIMENSIONS:
        _corrupt(file, f"its shape has {len(shape)} dimensions; at most {MAX_DIMENSIONS} are allowed", name)
    count = math.prod(shape)
    # A zero among them makes a tensor of no bytes, whose other sizes nothing else would bound.
    if (count or math.prod([size or 1 for size in shape])) > MAX_ELEMENTS:
        _corrupt(file, f"its shape {list(shape)[:8]} is of more than {MAX_ELEMENTS} elements", name)
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        known = ", ".join(DTYPE_BITS)
        raise UnknownDtype(f"Tensor {name!r} in {file} has the dtype {dtype!r:.80}; known are {known}.", tensor=name)
    offsets = _integers(ends, "data_offsets", file, name)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        _corrupt(file, f"its data_offsets {list(offsets)[:4]} are not a start and an end", name)
    nbytes, odd_bits = divmod(count * DTYPE_BITS[dtype], 8)
    if odd_bits or offsets[1] - offsets[0] != nbytes:
        _corrupt(file, f"its data_offsets span {offsets[1] - offsets[0]} bytes, its shape and dtype {nbytes}", name)
    return TensorInfo(name, dtype, shape, file, data_start + offsets[0], nbytes)


def _integers(value: Any, what: str, file: PurePosixPath, tensor: str) -> tuple[int, ...]:
    for v in value if isinstance(value, list) else [None]:
        # `type`, because True is an int to isinstance.
        if type(v) is not int or not 0 <= v <= LARGEST:
            _corrupt(file, f"its {what} is not a list of whole numbers from 0 to 2**63 - 1", tensor)
    return tuple(value)


def _check_coverage(tensors: list[TensorInfo], data_start: int, file: OpenFile) -> None:
    """The tensors have to cover the rest of the file without holes or overlaps."""
    position = data_start
    for tensor in tensors:
        if tensor.offset + tensor.nbytes > file.size:
            _corrupt(
                file.name, f"its bytes end at {tensor.offset + tensor.nbytes}, the file at {file.size}", tensor.name
            )
        if tensor.offset < position:
            _corrupt(file.name, "its bytes overlap those of another tensor", tensor.name)
        if tensor.offset > position:
            _corrupt(file.name, f"{tensor.offset - position} bytes before it belong to no tensor", tensor.name)
        position += tensor.nbytes
    if position != file.size:
        _corrupt(file.name, f"{file.size - position} bytes at its end belong to no tensor")


def _corrupt(file: PurePosixPath, what: str, tensor: str | None = None) -> NoReturn:
    where = f"Tensor {tensor!r} in {file}" if tensor is not None else f"{file}"
    raise CorruptModel(f"{where} is damaged: {what}. Fetch the file again.", tensor=tensor)
