"""Kills a writer at every point where it may be killed, or has it start again, and compares what comes out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

from service.engine.formats.base import ModelWriter
from service.engine.schemes.base import Scheme
from tests.engine.formats.outputs import Output, contents


def check_every_interruption(make: Callable[[str], Output]) -> None:
    """`make` gives the same output in another folder."""
    whole = make("whole")
    whole.run()
    expected = contents(whole.folder)
    for done in range(len(whole.items) + 1):
        for kill in (_between, _within_a_tensor, _with_a_torn_write, _in_close, _at_the_end):
            torn = make("torn")
            states = _start(torn, done)
            kill(torn, done, states)
            _go_on(torn, done, states)
            assert contents(torn.folder) == expected, (done, kill.__name__)
            shutil.rmtree(torn.folder)


def check_abandoned(make: Callable[[str], Output], other: Scheme) -> None:
    """Whatever is begun in `other` and abandoned does not show in what comes out."""
    plain, tried = make("plain"), make("tried")
    plain.run()
    writer = tried.writer()
    for item in tried.items:
        if item.scheme is not None:
            tried.write(writer, item, other)
            writer.abandon()
        tried.add(writer, item)
    writer.close(lambda: False)
    assert contents(plain.folder) == contents(tried.folder)


def _start(output: Output, done: int) -> list[dict[str, Any]]:
    """Write the first tensors; the states as a journal would hold them."""
    writer = output.writer()
    states = []
    for item in output.items[:done]:
        output.add(writer, item)
        states.append(json.loads(json.dumps(writer.state())))
    writer.discard()
    return states


def _restored(output: Output, states: list[dict[str, Any]]) -> ModelWriter:
    writer = output.writer()
    writer.restore(states)
    return writer


def _go_on(output: Output, done: int, states: list[dict[str, Any]]) -> None:
    writer = _restored(output, states)
    for item in output.items[done:]:
        output.add(writer, item)
    writer.close(lambda: False)


def _between(*_: Any) -> None:
    """Killed between two tensors."""


def _within_a_tensor(output: Output, done: int, states: list[dict[str, Any]]) -> None:
    """Killed after the next tensors were written, of which the journal knows nothing."""
    writer = _restored(output, states)
    for item in output.items[done : done + 3]:
        output.add(writer, item)
    writer.discard()


def _with_a_torn_write(output: Output, *_: Any) -> None:
    """Killed in the middle of a write: anything may lie behind what was committed."""
    for path in output.folder.rglob("*"):
        if path.is_file():
            with path.open("ab") as file:
                file.write(b"garbage" * 100)


class _Killed(BaseException):
    """Stands for a signal that cannot be caught."""


def _at_the_end(output: Output, done: int, states: list[dict[str, Any]]) -> None:
    """Killed when all was complete, and the last lines of the journal cannot be read."""
    _go_on(output, done, states)


def _in_close(output: Output, done: int, states: list[dict[str, Any]]) -> None:
    """Killed while the files are completed, which is after the last tensor."""
    if done < len(output.items):
        return
    for calls in range(20):
        writer = _restored(output, states)
        asked = 0

        def kill(limit: int = calls) -> bool:
            nonlocal asked
            asked += 1
            if asked > limit:
                raise _Killed
            return False

        try:
            writer.close(kill)
        except _Killed:
            writer.discard()
            continue
        break
