"""From the parts of a form to a validated request; every fault is reported, not just the first."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from service.api.fields import InpaintFields
from service.api.multipart import Part
from service.api.problems import Fault, InvalidRequest
from service.errors import ErrorCode
from service.messages import ModelInfo

FILES = ("image", "mask")

NOT_YET_SUPPORTED = (
    "loras",
    "freeu",
    "prompt_embeds",
    "negative_prompt_embeds",
    "latents",
    "masked_image_latents",
    "image_latents",
)

_PROMPTS = ("prompt", "negative_prompt")
_SANE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_OUT_OF_RANGE = frozenset(
    {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "multiple_of", "finite_number"}
)
_BAD_LENGTH = frozenset({"string_too_short", "string_too_long"})


@dataclass(frozen=True, slots=True)
class InpaintForm:
    """What a client sent.

    Attributes:
        image: The picture's file.
        mask: The mask's file; None when the picture's alpha is the mask.
        fields: The scalar fields.
        is_format_named: Whether `output_format` was sent, and is not merely the default.
    """

    image: bytes
    mask: bytes | None
    fields: InpaintFields
    is_format_named: bool


def read_form(parts: Sequence[Part], model: ModelInfo) -> InpaintForm:
    """Validate a form.

    Args:
        parts: Its parts, in any order.
        model: The served model, which sets some bounds.

    Raises:
        InvalidRequest: Unknown, duplicate, missing or wrong fields.
    """
    faults = list(_structural_faults(parts))
    faulty = {fault.field for fault in faults}
    texts: dict[str, str] = {}
    for part in parts:
        if part.name in InpaintFields.model_fields and part.name not in faulty:
            try:
                texts[part.name] = part.data.decode()
            except UnicodeDecodeError:
                code = ErrorCode.INVALID_PROMPT if part.name in _PROMPTS else ErrorCode.INVALID_FIELD
                faults.append(Fault(part.name, code, "The text is not valid UTF-8."))
                faulty.add(part.name)

    fields = None
    try:
        fields = InpaintFields.model_validate(texts, context=model)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
        faults += [_value_fault(detail) for detail in details if detail["loc"][0] not in faulty]
    if faults or fields is None:
        raise InvalidRequest(tuple(sorted(faults, key=lambda fault: _place(fault.field))))

    files = {part.name: part.data for part in parts if part.name in FILES}
    return InpaintForm(files["image"], files.get("mask"), fields, is_format_named="output_format" in texts)


def _structural_faults(parts: Sequence[Part]) -> Iterable[Fault]:
    """What is wrong before any value is looked at; at most one fault a field."""
    counts = Counter(part.name for part in parts)
    if not counts["image"]:
        yield Fault("image", ErrorCode.INVALID_FIELD, "The image is missing.")
    is_file = {part.name: part.is_file for part in parts}
    for name, count in counts.items():
        message = None
        if name in NOT_YET_SUPPORTED:
            message = f"The field {name} is not supported by this version."
        elif name not in FILES and name not in InpaintFields.model_fields:
            message = "There is no such field."
        elif count > 1:
            message = f"The field {name} is sent {count} times."
        elif name in FILES and not is_file[name]:
            message = f"Send {name} as a file, with a file name."
        elif name not in FILES and is_file[name]:
            message = f"Send {name} as text, not as a file."
        if message is not None:
            yield Fault(_shown(name), ErrorCode.INVALID_FIELD, message)


def _value_fault(detail: ErrorDetails) -> Fault:
    """A fault that validation found; a validator's own error type is the code."""
    field, kind = str(detail["loc"][0]), detail["type"]
    if kind == "missing":
        return Fault(field, ErrorCode.INVALID_FIELD, f"The field {field} is missing.")
    if kind in _OUT_OF_RANGE:
        code = ErrorCode.OUT_OF_RANGE
    elif kind in _BAD_LENGTH:
        code = ErrorCode.INVALID_PROMPT
    elif kind in set(ErrorCode):
        code = ErrorCode(kind)
    else:
        code = ErrorCode.INVALID_FIELD
    return Fault(field, code, f"{field}: {detail['msg']}.")


def _shown(name: str) -> str:
    """A client's own name for a field is shown only where it is harmless."""
    return name if _SANE_NAME.fullmatch(name) else "?"


def _place(name: str) -> int:
    """Where a field stands in the documentation; unknown ones come last."""
    names = list(InpaintFields.model_fields)
    embeddings_follow = names.index("clip_skip") + 1
    order = [*FILES, *names[:embeddings_follow], *NOT_YET_SUPPORTED, *names[embeddings_follow:]]
    return order.index(name) if name in order else len(order)
