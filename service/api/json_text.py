"""JSON in the text of a form field, read strictly; and what such readers raise."""

import json
from typing import Any

from pydantic_core import PydanticCustomError

from service.errors import ErrorCode

MAX_JSON_CHARACTERS = 16 * 1024
_MAX_DIGITS = 40


def fault(code: ErrorCode, message: str) -> PydanticCustomError:
    """What a validator raises; the code is the error's type."""
    return PydanticCustomError(code.value, message)


def read_json(text: str, *, has_integers: bool = True) -> Any:  # noqa: ANN401 - any JSON value
    """The value; no name is there twice. NaN and infinities are read: no bound admits them.

    Args:
        text: What the client sent.
        has_integers: False reads every number as a float: one spelling of each value.

    Raises:
        PydanticCustomError: It is no such JSON; the message does not repeat it.
    """
    if len(text) > MAX_JSON_CHARACTERS:
        raise fault(ErrorCode.OUT_OF_RANGE, f"Input should have at most {MAX_JSON_CHARACTERS} characters")
    try:
        return json.loads(
            text,
            parse_int=whole_number if has_integers else float,
            object_pairs_hook=without_repetition,
        )
    except (ValueError, RecursionError):
        raise fault(ErrorCode.INVALID_FIELD, "Input should be valid JSON") from None


def whole_number(digits: str) -> int | float:
    """Of more digits than any bound has, a float: soon read."""
    return int(digits) if len(digits) <= _MAX_DIGITS else float(digits)


def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """What a JSON object says.

    Raises:
        ValueError: A name is there twice.
    """
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a name is there twice")
    return value
