"""How the text of a form field becomes a value: spelling and bounds, for pydantic."""

import re
from itertools import pairwise
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, WithJsonSchema

from service.api.ip_adapter import SCALE_SCHEMA, IpAdapterScale
from service.api.json_text import fault, read_json
from service.api.loras import LORAS_SCHEMA, LoraChoice, parse_loras
from service.api.scales import read_block_scales, read_scale
from service.errors import ErrorCode

MAX_PROMPT_CHARACTERS = 2000
MAX_STEPS = 150
MAX_IMAGES_PER_PROMPT = 8
MAX_CLIP_SKIP = 10
MAX_SEED = 2**32 - 1
MAX_MARGIN = 65_535
MAX_SIGMA = 1000
SIDE_MULTIPLE = 8

_INTEGER = re.compile(r"-?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE)
_BOOLEANS = {"true": True, "1": True, "on": True, "false": False, "0": False, "off": False}
"""In any case: Python's `requests` sends True, a form's checkbox on."""

# More digits than any bound has: not worth converting.
_MAX_DIGITS = 40


def _integer(value: object) -> object:
    """Read "20", but neither "20.0", "2e1" nor " 20"."""
    if not isinstance(value, str):
        return value
    if not _INTEGER.fullmatch(value):
        raise fault(ErrorCode.INVALID_FIELD, "Input should be a whole number in decimal digits")
    return int(value) if len(value) <= _MAX_DIGITS else int(value[: _MAX_DIGITS - 1] + "1")


def _number(value: object) -> object:
    """Read "7.5", "7" and "7.5e0"; also "nan" and "1e400", which no bound admits."""
    if not isinstance(value, str):
        return value
    if not _NUMBER.fullmatch(value):
        raise fault(ErrorCode.INVALID_FIELD, "Input should be a decimal number")
    return float(value)


def _boolean(value: object) -> object:
    if not isinstance(value, str):
        return value
    if value.lower() not in _BOOLEANS:
        raise fault(ErrorCode.INVALID_FIELD, "Input should be true, false, 1 or 0")
    return _BOOLEANS[value.lower()]


def _require_text(value: str) -> str:
    """Refuse what no tokenizer can read."""
    if "\0" in value:
        raise fault(ErrorCode.INVALID_PROMPT, "Input should not contain NUL")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise fault(ErrorCode.INVALID_PROMPT, "Input should be valid Unicode") from None
    return value


def _require_words(value: str) -> str:
    if not value.strip():
        raise fault(ErrorCode.INVALID_PROMPT, "Input should not be blank")
    return value


def _json(value: object) -> object:
    return read_json(value) if isinstance(value, str) else value


def _loras(value: object) -> object:
    return parse_loras(value) if isinstance(value, str) else value


def _ip_adapter_scale(value: object) -> object:
    """Read a number, or a JSON object with one for each block."""
    if not isinstance(value, str):
        return value
    if value.startswith("{"):
        return IpAdapterScale(0.0, read_block_scales(read_json(value, has_integers=False)))
    return IpAdapterScale(read_scale(_number(value)))


def _whole_number(value: object) -> object:
    """In JSON, 3 but neither 3.0, "3" nor true."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise fault(ErrorCode.INVALID_FIELD, "Input should be a list of whole numbers")
    return value


def _real_number(value: object) -> object:
    """In JSON, 3 or 3.5 but neither "3" nor true."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise fault(ErrorCode.INVALID_FIELD, "Input should be made of numbers")
    return value


def _require_descending(values: tuple[float, ...]) -> tuple[float, ...]:
    if any(later >= earlier for earlier, later in pairwise(values)):
        raise fault(ErrorCode.OUT_OF_RANGE, "Input should be in descending order")
    return values


Integer = Annotated[int, Field(strict=True), BeforeValidator(_integer)]
Number = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_number)]
Boolean = Annotated[bool, Field(strict=True), BeforeValidator(_boolean)]
JsonInteger = Annotated[int, Field(ge=0), BeforeValidator(_whole_number)]
JsonNumber = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_real_number)]
Text = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS), AfterValidator(_require_text)]

# Optional fields: with the bounds inside the union, where the schema shows them as such.
Steps = Annotated[int, Field(strict=True, ge=1, le=MAX_STEPS), BeforeValidator(_integer)]
Seed = Annotated[int, Field(strict=True, ge=0, le=MAX_SEED), BeforeValidator(_integer)]
Side = Annotated[int, Field(strict=True, ge=SIDE_MULTIPLE, multiple_of=SIDE_MULTIPLE), BeforeValidator(_integer)]
Margin = Annotated[int, Field(strict=True, ge=0, le=MAX_MARGIN), BeforeValidator(_integer)]
Timeout = Annotated[float, Field(allow_inf_nan=False, gt=0), BeforeValidator(_number)]
Prompt = Annotated[
    str,
    Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS),
    AfterValidator(_require_text),
    AfterValidator(_require_words),
]
Timesteps = Annotated[
    tuple[JsonInteger, ...],
    Field(min_length=1, max_length=MAX_STEPS),
    BeforeValidator(_json),
    AfterValidator(_require_descending),
]
Sigmas = Annotated[
    tuple[Annotated[float, Field(allow_inf_nan=False, gt=0, le=MAX_SIGMA), BeforeValidator(_real_number)], ...],
    Field(min_length=2, max_length=MAX_STEPS),
    BeforeValidator(_json),
    AfterValidator(_require_descending),
]
FreeUFactor = Annotated[JsonNumber, Field(ge=0, le=10)]


class FreeUFactors(BaseModel):
    """FreeU's factors: s for skip connections, b for backbone features."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    s1: FreeUFactor
    s2: FreeUFactor
    b1: FreeUFactor
    b2: FreeUFactor


Loras = Annotated[tuple[LoraChoice, ...], PlainValidator(_loras), WithJsonSchema(LORAS_SCHEMA)]
IpAdapterScaleField = Annotated[IpAdapterScale, PlainValidator(_ip_adapter_scale), WithJsonSchema(SCALE_SCHEMA)]
FreeUField = Annotated[FreeUFactors, BeforeValidator(_json)]
