"""How a command ends: what it prints, and its exit status."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from service.errors import ArrowQuantError, Cancelled

if TYPE_CHECKING:
    from pathlib import Path

#: The option that every command with a result has.
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document on stdout.")]

FAILED = 1
USAGE = 2
INTERRUPTED = 130
#: As if SIGPIPE had ended it: whoever read the output, such as `head`, has gone.
UNREAD = 141

#: Codes of requests that no server could carry out as they were typed.
USAGE_CODES = {"invalid_config", "invalid_request", "unsupported_by_format", "invalid_calibration"}


class Failed(Exception):
    """A command did not do what it was asked to; `problem` is like an RFC 9457 body."""

    def __init__(self, problem: dict[str, Any], *, status: int = FAILED, job: dict[str, Any] | None = None) -> None:
        super().__init__(problem.get("detail", ""))
        self.problem = problem
        self.status = status
        self.job = job


@contextmanager
def outcome(*, as_json: bool) -> Iterator[None]:
    """Turn whatever goes wrong inside into one line on stderr, and into an exit status."""
    try:
        try:
            with _told(as_json=as_json):
                yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        mute(sys.stdout)
        mute(sys.stderr)
        raise typer.Exit(UNREAD) from None


@contextmanager
def _told(*, as_json: bool) -> Iterator[None]:
    try:
        with _terminate_like_interrupt():
            yield
    except KeyboardInterrupt:
        _end({"code": "interrupted", "detail": "interrupted"}, None, INTERRUPTED, as_json=as_json)
    except Failed as failure:
        _end(failure.problem, failure.job, failure.status, as_json=as_json)
    except ArrowQuantError as error:
        _end(problem_of(error), None, _status(error), as_json=as_json)
    except BrokenPipeError:
        raise
    except OSError as error:
        _end({"code": "storage_failure", "detail": str(error)}, None, FAILED, as_json=as_json)


def mute(stream: TextIO) -> None:
    """Let a stream that nobody reads lead nowhere, so that what is buffered does not fail again at the exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def problem_of(error: ArrowQuantError) -> dict[str, Any]:
    """The error as the API would word it, as far as a terminal needs it."""
    known = {"code": error.code, "detail": error.detail, "pointer": error.pointer, "tensor": error.tensor}
    return {k: v for k, v in known.items() if v is not None}


def sentence(problem: dict[str, Any]) -> str:
    """A problem in one line."""
    text = str(problem.get("detail") or problem.get("title") or "failed")
    for field in problem.get("errors", ()):
        if field["detail"] not in text:
            text += f"; {field.get('pointer') or field.get('parameter', '')}: {field['detail']}"
    return f"{' '.join(text.split())} [{problem.get('code', 'error')}]"


def print_json(document: Any) -> None:
    """The one JSON document of a command, on stdout."""
    print(json.dumps(document, indent=2, ensure_ascii=False))


def finish(job: dict[str, Any], *, as_json: bool, out: Path | None = None) -> None:
    """Print what a job that has succeeded achieved. Raises Failed when that is below the accuracy asked for."""
    if out is not None:
        job = job | {"out": str(out.absolute())}
    if not as_json:
        print_result(job, where=str(out) if out is not None else None)
    if not job["result"]["passed"]:
        raise Failed({"code": "accuracy_too_low", "detail": "the result is below the accuracy asked for"}, job=job)
    if as_json:
        print_json(job)


def print_result(job: dict[str, Any], *, where: str | None = None) -> None:
    """The figures of a finished job, a line for each output."""
    result = job["result"]
    for output in result.get("outputs", [result]):
        print(_figures(output))
    if where is not None:
        print(f"written to {where} in {result['quantization_time_s']:.1f} s ({result['backend']})")


def _status(error: ArrowQuantError) -> int:
    if isinstance(error, Cancelled):
        return INTERRUPTED
    return USAGE if error.code in USAGE_CODES else FAILED


def _figures(output: dict[str, Any]) -> str:
    parts = [str(output.get("name", "model"))]
    if "cosine_similarity" in output:
        parts.append(f"cosine similarity {output['cosine_similarity']:.5f}")
    if "output_relative_error" in output:
        parts.append(f"error of the outputs {output['output_relative_error']:.4f}")
    if "sqnr_db" in output:
        parts.append(f"SQNR {output['sqnr_db']:.1f} dB")
    if "bits_per_weight" in output:
        parts.append(f"{output['bits_per_weight']:.2f} bits per weight")
    parts.append(f"{mib(output['original_bytes'])} to {mib(output['quantized_bytes'])}")
    parts.append(f"{output['compression_ratio']:.2f} times smaller")
    parts.append("passed" if output["passed"] else "below min_accuracy")
    return ", ".join(parts)


def mib(size_bytes: float) -> str:
    """A size in MiB."""
    return f"{size_bytes / 2**20:.1f} MiB"


def _end(problem: dict[str, Any], job: dict[str, Any] | None, status: int, *, as_json: bool) -> None:
    print(f"arrowquant: {sentence(problem)}", file=sys.stderr)
    if as_json:
        print_json(job if job is not None else {"status": "failed", "error": problem})
    raise typer.Exit(status)


@contextmanager
def _terminate_like_interrupt() -> Iterator[None]:
    def interrupt(signum: int, frame: FrameType | None) -> None:
        del signum, frame
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
