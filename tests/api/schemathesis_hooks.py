"""What schemathesis cannot know of this server: where a model lies, what an Arrow stream is, what a purge means."""

from __future__ import annotations

import hashlib
import io
import os
from typing import Any

import pyarrow as pa
import schemathesis
from hypothesis import strategies as st

ARROW_STREAM = "application/vnd.apache.arrow.stream"
#: The address of a model that the server may read.
MODEL_URI = os.environ["FUZZED_MODEL_URI"]
#: Plain text in the document, since which there are is told at `/v1/formats` and the like.
_CHOICES = {"format": "parquet", "scheme": "int4", "method": "minmax", "backend": "auto"}
#: Calls whose bodies hold jobs.
_CREATING = frozenset({"create_job", "create_batch", "create_plan"})


@schemathesis.hook
def before_load_schema(context: Any, raw_schema: dict[str, Any]) -> None:  # noqa: ARG001
    """Takes out of the document what any answer would fit: a call has to announce each status by itself."""
    for operations in raw_schema["paths"].values():
        for operation in operations.values():
            del operation["responses"]["default"]


@schemathesis.hook
def filter_case(context: Any, case: Any) -> bool:  # noqa: ARG001
    """Leaves out bodies that are wrong by a null alone, perhaps: it is taken for a field that was left out."""
    is_negative = case.meta is not None and case.meta.generation.mode.is_negative
    return not (is_negative and _has_null(case.body))


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:  # noqa: ARG001
    """Has what fits the schema name a model that is there, and a blob by its digest, so that some of it comes to be."""
    name = case.operation.definition.raw.get("operationId")
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return
    if name in _CREATING:
        _make_real(case.body)
        # With the same key every other body would be refused.
        case.headers.pop("Idempotency-Key", None)
    if name == "upload_blob" and isinstance(case.body, bytes):
        case.path_parameters["digest"] = hashlib.sha256(case.body).hexdigest()
        case.headers.pop("Content-Range", None)


#: Ids of what has been purged.
_purged: set[str] = set()


@schemathesis.check
def purged_is_gone(context: Any, response: Any, case: Any) -> None:  # noqa: ARG001
    """What was purged is 404 from then on: the check `use_after_free`, for a DELETE that by itself only cancels."""
    ids = case.path_parameters or {}
    id_ = ids.get("job_id") or ids.get("batch_id")
    if case.method == "DELETE" and response.status_code == 204:
        _purged.add(id_)
    elif id_ in _purged and response.status_code < 400:
        raise AssertionError(f"{id_} was purged, and yet {case.method} {case.path} is answered")


def _has_null(node: Any) -> bool:
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return any(child is None or _has_null(child) for child in children)


def _make_real(node: Any) -> None:
    if isinstance(node, list):
        for item in node:
            _make_real(item)
    if not isinstance(node, dict):
        return
    for name, choice in _CHOICES.items():
        if name in node:
            node[name] = choice
    if "type" in node and "uri" in node:
        node["uri"] = MODEL_URI
    else:
        node.pop("uri", None)  # an output without one is written to the server's own store
    if node.get("priority", 0) % 2 == 0:
        # Of all that may be configured little goes together; half of the jobs are left as they are by default.
        for name in ("config", "timeout_s", "options", "name"):
            node.pop(name, None)
    for item in node.values():
        _make_real(item)


def _stream(columns: dict[str, Any]) -> bytes:
    sink = io.BytesIO()
    table = pa.table(columns)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


_floats = st.lists(st.floats(width=32), max_size=8)
_weights = st.builds(
    lambda x: _stream({"layer_name": ["a"], "weights": pa.array([x], pa.list_(pa.float32()))}), _floats
)
schemathesis.openapi.media_type(ARROW_STREAM, st.one_of(_weights, st.binary(max_size=200)))
