"""What is fuzzed: each target takes any bytes and reads them, or refuses them with an error of the documented kinds.

A target returns a word for what came of an input; whatever it raises, and any broken promise, is a fault.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from pydantic import TypeAdapter, ValidationError
from starlette.requests import Request

from bench.fuzzing import seeds
from service.api.dependencies import AfterBatch, AfterJob
from service.api.event_replies import MAX_EVENT_ID, EventId
from service.api.negotiation import choose, wait_of
from service.api.ranges import Unsatisfiable, parse_range
from service.api.replies import is_known
from service.api.uploads_body import span_of
from service.engine.backends.reference import ReferenceBackend
from service.engine.calibration.feed import Averaging, Feed
from service.engine.calibration.opening import open_calibration
from service.engine.config import Profile, QuantizationConfig, TensorConfig, resolve
from service.engine.formats.layout import find_placement
from service.engine.formats.registry import open_model
from service.engine.formats.source import LocalFiles
from service.engine.table_io import read_table, write_table
from service.engine.tables import Tools, compare_table, dequantize_table, quantize_table
from service.engine.tensors import TensorInfo
from service.errors import ArrowQuantError, ModelError, RequestError, RunError
from service.jobs.blob_paths import check_path, check_together
from service.storage.file import resolve_model, resolve_target

Run = Callable[[bytes], str]

#: What a reader may raise; anything else would be answered as a fault of the service.
REFUSALS = (RequestError, ModelError)
MAX_ANSWER_BYTES = 1 << 24
BLOCK_BYTES = 1 << 16
SIZES = (0, 1, 7, 1000, 1 << 40)


@dataclass(frozen=True)
class Target:
    """`start(folder)` makes the function that takes inputs; `seeds` are valid ones; `tokens` are put into them."""

    name: str
    start: Callable[[Path], Run]
    seeds: Callable[[], Sequence[bytes]]
    tokens: tuple[bytes, ...] = ()


class Broken(AssertionError):
    """A promise that an input broke."""


# --- models and calibrations ---


def read_all(path: Path) -> str:
    """Open a model and read every tensor of it."""
    try:
        reader = open_model(path)
    except REFUSALS as error:
        return error.code
    except RunError as error:
        raise Broken(f"{error.code}: {error.detail}") from error
    try:
        for info in reader.tensors:
            if info.is_float:
                with np.errstate(all="ignore"):
                    reader.rows(info, 0, info.rows)
            elif info.stored_as is None:
                reader.raw(info, 0, info.nbytes)
    except REFUSALS as error:
        return f"read, then {error.code}"
    finally:
        reader.close()
    return "read"


def _file(name: str) -> Callable[[Path], Run]:
    """The input is a file, which is the model."""

    def start(folder: Path) -> Run:
        path = folder / name

        def run(data: bytes) -> str:
            path.write_bytes(data)
            return read_all(path)

        return run

    return start


def _part_of(files: Callable[[], Mapping[str, bytes]], names: Sequence[str], opened: str = "") -> Callable[[Path], Run]:
    """The input takes the place of one of the files of a model, which its first byte chooses."""

    def start(folder: Path) -> Run:
        whole = files()
        for name, content in whole.items():
            (folder / name).write_bytes(content)

        def run(data: bytes) -> str:
            name = names[data[0] % len(names)] if data else names[0]
            (folder / name).write_bytes(data[1:])
            try:
                return read_all(folder / opened)
            finally:
                if name in whole:
                    (folder / name).write_bytes(whole[name])
                else:
                    (folder / name).unlink()

        return run

    return start


def _beside(folder: Path) -> Run:
    """The input takes the place of the manifest or of metadata.json: which files are the model's, and what it is."""
    whole = seeds.parquet_folder()
    for name, content in whole.items():
        (folder / name).write_bytes(content)
    names = ("manifest.json", "metadata.json")

    def run(data: bytes) -> str:
        name = names[data[0] % len(names)] if data else names[0]
        (folder / name).write_bytes(data[1:])
        try:
            found = find_placement(LocalFiles(folder), ".parquet").layout((), (), {})
        except REFUSALS as error:
            return error.code
        finally:
            (folder / name).write_bytes(whole[name])
        return f"{found.modality}, {found.modality_from}"

    return run


# --- tables ---


def _tables(folder: Path) -> Run:  # noqa: ARG001
    tools = Tools(ReferenceBackend(), BLOCK_BYTES, lambda: False)
    config: TensorConfig = resolve(Profile.LOCAL, [QuantizationConfig(bit_width=4, group_size=32, method="minmax")])
    calls = (
        lambda table: quantize_table(table, config, tools),
        lambda table: dequantize_table(table, tools, MAX_ANSWER_BYTES),
        lambda table: compare_table(table, tools),
    )

    def run(data: bytes) -> str:
        call = calls[data[0] % len(calls)] if data else calls[0]
        try:
            with np.errstate(all="ignore"):
                return "answered" if write_table(call(read_table(data[1:]))) else ""
        except REFUSALS as error:
            return error.code

    return run


# --- headers ---


def _request(**headers: bytes) -> Request:
    named = [(name.replace("_", "-").encode(), value) for name, value in headers.items()]
    return Request({"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": named})


def _range(folder: Path) -> Run:  # noqa: ARG001
    def run(data: bytes) -> str:
        size = SIZES[data[0] % len(SIZES)] if data else 0
        try:
            span = parse_range(_request(range=data[1:]).headers["range"], size)
        except Unsatisfiable:
            return "unsatisfiable"
        if span is None:
            return "ignored"
        if not 0 <= span[0] < span[1] <= size:
            raise Broken(f"{span} of {size}")
        return "a range"

    return run


def _content_range(folder: Path) -> Run:  # noqa: ARG001
    def run(data: bytes) -> str:
        length, _, header = data.partition(b"\n")
        asked = {"content_length": length} if length else {}
        try:
            span = span_of(_request(content_range=header, **asked) if header else _request(**asked))
        except REFUSALS as error:
            return error.code
        if span.start is not None and not 0 <= span.start <= span.stop:
            raise Broken(f"{span}")
        return "a span"

    return run


def _none_match(folder: Path) -> Run:  # noqa: ARG001
    tag = '"0123456789abcdef"'

    def run(data: bytes) -> str:
        return "known" if is_known(_request(if_none_match=data), tag) else "not known"

    return run


def _negotiation(folder: Path) -> Run:  # noqa: ARG001
    def run(data: bytes) -> str:
        text = data.decode("latin-1")
        wait = wait_of(text)
        if wait is not None and not 0 <= wait <= 60:
            raise Broken(f"waits {wait} s")
        try:
            choose(text, ("text/event-stream", "application/json"))
        except ArrowQuantError as error:
            return error.code
        return "chosen" if wait is None else "waits"

    return run


def _event_id(folder: Path) -> Run:  # noqa: ARG001
    adapter: TypeAdapter[int | None] = TypeAdapter(EventId)

    def run(data: bytes) -> str:
        try:
            id_ = adapter.validate_python(data.decode("latin-1"))
        except ValidationError:
            return "refused"
        if id_ is None or not 0 <= id_ <= MAX_EVENT_ID:
            raise Broken(f"{id_}")
        return "an id"

    return run


def _cursor(folder: Path) -> Run:  # noqa: ARG001
    adapters = [TypeAdapter(AfterJob), TypeAdapter(AfterBatch)]

    def run(data: bytes) -> str:
        try:
            text = adapters[data[0] % 2 if data else 0].validate_python(data[1:].decode("utf-8", "replace"))
        except ValidationError:
            return "refused"
        if not isinstance(text, str) or not text.isascii() or len(text) not in (40, 42):
            raise Broken(repr(text))
        return "a cursor"

    return run


# --- paths ---


def _blob_paths(folder: Path) -> Run:
    def run(data: bytes) -> str:
        paths = data.decode("utf-8", "surrogatepass").split("\n")
        try:
            names = [check_path(path) for path in paths]
            check_together(names)
        except ValueError:
            return "refused"
        for name in names:
            _check_inside(folder, name)
        return "plain"

    def guarded(data: bytes) -> str:
        try:
            return run(data)
        except UnicodeDecodeError:
            return "no text"

    return guarded


def _check_inside(folder: Path, name: str) -> None:
    joined = os.path.normpath(os.path.join(folder, name))  # noqa: PTH118 - as the system sees it
    if not joined.startswith(f"{folder}/") or "\0" in name or any(p in ("", ".", "..") for p in name.split("/")):
        raise Broken(f"{name!r} leads to {joined}")
    if PurePosixPath(name).is_absolute() or not name.isprintable():
        raise Broken(repr(name))


def _addresses(folder: Path) -> Run:
    """A tree with links in all directions; whatever an address says, nothing outside the root comes of it."""
    root, outside = folder / "root", folder / "outside"
    shutil.rmtree(root, ignore_errors=True)
    (root / "m" / "in").mkdir(parents=True)
    outside.mkdir(exist_ok=True)
    (outside / "secret").write_text("secret")
    (root / "m" / "model.safetensors").write_bytes(b"x")
    (root / "out").symlink_to(outside)
    (root / "up").symlink_to("..")
    (root / "round").symlink_to("round")
    (root / "m" / "in" / "back").symlink_to("../..")
    roots = (root,)

    def run(data: bytes) -> str:
        # An input speaks of the root by a short name, so that it need not find out where that is.
        uri = data.decode("utf-8", "surrogateescape").replace("@", str(root))
        found = []
        for look in (resolve_model, resolve_target):
            try:
                path = look(uri, roots)
            except REFUSALS as error:
                found.append(error.code)
            else:
                if not Path(os.path.realpath(path)).is_relative_to(root):
                    raise Broken(f"{uri!r} leads to {path}")
                found.append("inside")
        return ", ".join(found)

    return run


def _calibration(folder: Path) -> Run:
    """The first byte chooses the kind of file, and the rest is what is known of the layers of a small model."""
    model = [
        TensorInfo(name, "F32", shape, PurePosixPath("m"), 0, 0)
        for name, shape in (("a.weight", (4, 8)), ("b.weight", (4, 2, 2, 2)), ("blk.0.attn_q.weight", (4, 8)))
    ]

    def run(data: bytes) -> str:
        path = folder / f"calibration.{seeds.CALIBRATIONS[data[0] % 3] if data else 'gguf'}"
        path.write_bytes(data[1:])
        try:
            with closing(open_calibration(path)) as calibration:
                steps = len(calibration.timesteps)
                feed = Feed(calibration, Averaging(np.full(steps, 1.0 / steps), samples=4))
                found = [feed.inputs(info) for info in model]
        except REFUSALS as error:
            return error.code
        except RunError as error:
            raise Broken(f"{error.code}: {error.detail}") from error
        for inputs in found:
            if inputs is not None and inputs.weights is not None and not np.isfinite(inputs.weights).all():
                raise Broken("weights that are not finite")
        return "read"

    return run


def _words(*texts: str) -> tuple[bytes, ...]:
    return tuple(text.encode() for text in texts)


_JSON = _words(
    '"', "{", "}", "[", "]", ":", ",", "null", "true", "1e999", "NaN", "-0", "1e5", '"\\ud800"', "18446744073709551616"
)
_SAFETENSORS = (*_JSON, *_words("__metadata__", "data_offsets", "shape", "dtype", "F32", "F4", "BF16", "I64"))
_CALIBRATION = (
    *_SAFETENSORS,
    *_words("a.gram", "a.samples", "timesteps", "a.count", "arrowquant.shared", "GGUF"),
)
_INDEX = (*_JSON, *_words("weight_map", "a.safetensors", "../a.safetensors", "/etc/x.safetensors", "\\u0000", "\\\\"))
_MANIFEST = (*_JSON, *_words("files", "path", "source_fingerprint", "modality"))
_ADDRESSES = _words("file:", "//", "/", "..", "%2e", "%2F", "%00", "@", "localhost", "?", "#", "out", "up", "back")
_COMPRESSED = ("config.json", "model.safetensors")
INDEX = seeds.INDEX

#: The slowest comes first, as they run side by side.
TARGETS = (
    Target("Parquet", _file("model.parquet"), seeds.parquet, (b"PAR1",)),
    Target("safetensors", _file("model.safetensors"), seeds.safetensors, _SAFETENSORS),
    Target("index and shards", _part_of(seeds.shards, (INDEX, "a.safetensors"), INDEX), seeds.of_shards, _INDEX),
    Target("compressed-tensors", _part_of(seeds.compressed, _COMPRESSED), seeds.of_compressed, _SAFETENSORS),
    Target("manifest and metadata", _beside, seeds.of_manifest, _MANIFEST),
    Target("calibration", _calibration, seeds.calibrations, _CALIBRATION),
    Target("Arrow IPC", _tables, seeds.tables, _words("layer_name", "weights", "shape", "other", "data")),
    Target("Range", _range, seeds.ranges, _words("bytes", "=", "-", ",", "\u0663")),
    Target("Content-Range", _content_range, seeds.content_ranges, _words("bytes ", "*", "/", "-", "\n")),
    Target("If-None-Match", _none_match, seeds.tags, _words('"', "W/", ",", "*")),
    Target("Accept, Prefer", _negotiation, seeds.accepts, _words("q=", ";", ",", "*/*", "wait=", "/")),
    Target("Last-Event-ID", _event_id, seeds.event_ids, _words("-", "+", "_", "1e3", "0x")),
    Target("cursors", _cursor, seeds.cursors, _words("job_", "batch_", "-", "\n")),
    Target("blob paths", _blob_paths, seeds.paths, _words("..", "/", "\\", ".", "\0", "\u0301", " ", "\u202e")),
    Target("file addresses", _addresses, seeds.addresses, _ADDRESSES),
)


def targets(names: Iterable[str]) -> list[Target]:
    """Those of these names, or all where there are none; raises KeyError."""
    known = {target.name: target for target in TARGETS}
    return [known[name] for name in names] or list(TARGETS)
