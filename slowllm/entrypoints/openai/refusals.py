"""What is wrong with a request, in one sentence, for people and for programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from slowllm.files import shown

Body = TypeVar("Body", bound=BaseModel)

# By which pydantic names a field that nobody knows.
_STRANGE = "extra_forbidden"
MAX_NAME_LETTERS = 100


class RequestError(Exception):
    """A request that cannot be done.

    Attributes:
        param: field of the body that is wrong, if it is one.
        code: of the error, for programs.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code or ("invalid_value" if param else "invalid_request")


def wrong(sentence: str, code: str = "invalid_value") -> PydanticCustomError:
    """Return what a validator raises about its field; the sentence and the code are those of the `RequestError`."""
    return PydanticCustomError("slowllm", "{sentence}", {"sentence": sentence, "code": code})


def _clipped(name: str) -> str:
    """Return the name of a field as it is told; one that nobody can have meant, cut."""
    return name if len(name) <= MAX_NAME_LETTERS else f"{name[:MAX_NAME_LETTERS]}..."


def read_as(schema: type[Body], body: Mapping[str, Any]) -> Body:
    """Return the body of a request as a schema has it.

    Raises:
        RequestError: a field is wrong, missing or unknown; the first one is named, and of unknown ones all.
    """
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
    known = [one for one in found if one["type"] != _STRANGE or len(one["loc"]) > 1]
    if not known:
        names = [_clipped(str(one["loc"][0])) for one in found]
        raise RequestError(
            f"{', '.join(sorted(names))}: unknown in the body", min(names), "unknown_parameter"
        )
    first = known[0]
    name = str(first["loc"][0])
    if first["type"] == "slowllm":
        raise RequestError(first["ctx"]["sentence"], name, first["ctx"]["code"])
    # A field's description says what it must be.
    raise RequestError(
        f"{name} must be {schema.model_fields[name].description}, not {shown(body.get(name))}", name
    )
