"""How the log is written: as lines of text or of JSON, each with the ids of what it is about.

Whatever a client sends, a record stays one line, or one line and lines that are indented: control characters are
escaped in both forms, so that nobody can forge records or paint a terminal.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextvars import ContextVar, Token
from typing import Literal

LogFormat = Literal["text", "json"]

#: Their lines hold the addresses that they call, some of them signed, which is as good as a password.
TALKATIVE = ("httpx", "httpcore", "httpx2", "httpcore2", "huggingface_hub")
#: Before each further line of a record: of a traceback.
INDENT = "    | "
_context: ContextVar[Mapping[str, str]] = ContextVar("log_context", default={})  # noqa: B039 - never changed in place


class Bound:
    """For `with`: what is logged in it carries these ids; None takes one away."""

    def __init__(self, **ids: str | None) -> None:
        self._ids = ids

    def __enter__(self) -> None:
        ids = _context.get() | self._ids  # type: ignore[operator]
        self._token: Token[Mapping[str, str]] = _context.set({k: v for k, v in ids.items() if v is not None})

    def __exit__(self, *_: object) -> None:
        _context.reset(self._token)


def context() -> Mapping[str, str]:
    """The ids that a record made now would carry: `request_id`, `job_id`, `tenant`, `traceparent`, where known."""
    return _context.get()


def configure(level: str, format_: LogFormat) -> None:
    """Write all logs of this process to stderr, unless somebody has set up logging already."""
    handler = logging.StreamHandler()
    handler.setFormatter(TextFormatter() if format_ == "text" else _json_formatter())
    handler.addFilter(_add_context)
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for library in TALKATIVE:
        logging.getLogger(library).setLevel(logging.WARNING)


class TextFormatter(logging.Formatter):
    """A record as a line, its ids at the end."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line itself."""
        ids = " ".join(f"{name}={value}" for name, value in context().items())
        line = super().formatMessage(record)
        return escaped(f"{line} [{ids}]" if ids else line)

    def formatException(self, ei: object) -> str:
        """A traceback, whose messages may hold anything."""
        lines = super().formatException(ei).split("\n")  # type: ignore[arg-type]
        return "\n".join(INDENT + escaped(line) for line in lines)

    def formatStack(self, stack_info: str) -> str:
        """As `formatException`."""
        return "\n".join(INDENT + escaped(line) for line in stack_info.split("\n"))


def escaped(text: str) -> str:
    """The text with everything escaped that is not to be seen: newlines, control sequences, marks of direction."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _add_context(record: logging.LogRecord) -> bool:
    record.__dict__.update(context())
    return True


def _json_formatter() -> logging.Formatter:
    from pythonjsonlogger.core import RESERVED_ATTRS
    from pythonjsonlogger.json import JsonFormatter

    return JsonFormatter(
        "%(levelname)s %(name)s %(message)s",
        rename_fields={"levelname": "level", "name": "logger"},
        # Uvicorn's, which says the same in colours.
        reserved_attrs=[*RESERVED_ATTRS, "color_message"],
        timestamp="time",
    )
