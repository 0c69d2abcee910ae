"""What all answers share: the base of wire models, and the problem."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from typing_extensions import TypeAliasType

from service.api.problem_codes import CODES

ErrorCode = TypeAliasType("ErrorCode", Annotated[str, WithJsonSchema({"type": "string", "enum": list(CODES)})])


class Wire(BaseModel):
    """Base of what the API answers; a field that is None is left out."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FieldProblem(Wire):
    """One field or parameter of a request, and what is wrong with it."""

    pointer: str | None = Field(default=None, description="JSON pointer into the body.")
    parameter: str | None = Field(default=None, description="Name of a parameter of path, query or header.")
    detail: str


class Problem(Wire):
    """What went wrong, after RFC 9457."""

    type: str = Field(description="Address of a page that explains it.")
    title: str
    status: int = Field(ge=400, le=599)
    detail: str
    code: ErrorCode
    instance: str | None = Field(default=None, description="Address of the call or the job that failed.")
    tensor: str | None = Field(default=None, description="The tensor concerned.")
    errors: list[FieldProblem] | None = None


class Links(Wire):
    """Where to go from a job."""

    self: str
    events: str
    report: str
    artifacts: str
    archive: str
