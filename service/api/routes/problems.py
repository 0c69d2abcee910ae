"""A page for each kind of problem, made from the docstring of its error."""

from __future__ import annotations

import html
import inspect
import re

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from service.api.problem_codes import CODES
from service.api.problems import documented, status_of, title_of
from service.api.schemas.common import ErrorCode
from service.errors import NotFound

router = APIRouter(prefix="/problems", tags=["problems"])

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{code}</title>
<h1>{title}</h1>
<p>Code <code>{code}</code>, status {status}</p>
{text}
</html>
"""


@router.get("/{code}", response_class=HTMLResponse, responses=documented(NotFound))
async def get_problem(code: ErrorCode) -> HTMLResponse:
    """What a problem's `type` leads to."""
    error = CODES.get(code)
    if error is None:
        raise NotFound(f"there is no problem {code!r}; there are {', '.join(CODES)}")
    paragraphs = (inspect.getdoc(error) or "").split("\n\n")[1:]
    text = "\n".join(f"<p>{_marked(paragraph)}</p>" for paragraph in paragraphs)
    return HTMLResponse(_PAGE.format(code=code, title=_marked(title_of(error)), status=status_of(error), text=text))


def _marked(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
