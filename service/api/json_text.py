"""JSON in the text of a form field, read strictly."""

import json
from typing import Any

from pydantic_core import PydanticCustomError

from service.errors import ErrorCode

MAX_JSON_CHARACTERS = 20_000


def read_json(text: str) -> Any:  # noqa: ANN401 - any JSON value
    """The value; numbers are finite, and no name is there twice.

    Raises:
        PydanticCustomError: It is no such JSON; the message does not repeat it.
    """
    if len(text) > MAX_JSON_CHARACTERS:
        raise _fault(f"Input should have at most {MAX_JSON_CHARACTERS} characters")
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise _fault("Input should be valid JSON") from None


def _fault(message: str) -> PydanticCustomError:
    return PydanticCustomError(ErrorCode.INVALID_FIELD.value, message)


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a name is there twice")
    return value
