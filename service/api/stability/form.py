"""From Stability's form to the native one: names and defaults; bounds and faults are those of the native form."""

import re
from collections.abc import Iterable, Mapping, Sequence
from secrets import randbelow

from service.api.accept import choose_media_type
from service.api.answers import JSON_MEDIA_TYPE
from service.api.fields import InpaintFields
from service.api.forms import read_form
from service.api.multipart import Part
from service.api.painting import Order
from service.api.problems import Fault, InvalidRequest
from service.api.stability.errors import ITS_NAMES
from service.api.tensors import TENSORS
from service.errors import ErrorCode
from service.imaging import MEDIA_TYPES, media_type
from service.messages import ModelInfo

GROW_MASK = 5
"""Pixels by which a mask is widened where the client says nothing."""

MAX_SEED = 2**32 - 2
"""The largest seed of this format, which the random ones keep to."""

_ELSEWHERE = ("num_images_per_prompt", "previews", *TENSORS)

REFUSED: Mapping[str, str] = {
    **dict.fromkeys(_ELSEWHERE, "Only /v1/inpaint takes this field."),
    "mask_grow": "The field is called grow_mask here.",
    "style_preset": "There are no presets here: describe the style in the prompt.",
}
"""Fields that would change the answer, and why they are not taken."""

HARMLESS = frozenset(
    {"accept", "content-type", "stability-client-id", "stability-client-user-id", "stability-client-version"}
)
"""Parts that are ignored: clients generated from the API's description send its headers as parts, too."""

_NATIVE_NAMES = {name: native for native, name in ITS_NAMES.items()}

# The format knows numbers, not whole numbers: languages that write 5 as 5.0 are its clients, too.
_NUMBERS = frozenset({"seed", "grow_mask"})
_WHOLE = re.compile(rb"(-?[0-9]+)\.0+")
_ZERO = re.compile(rb"0+")


def translate(parts: Sequence[Part], model: ModelInfo, accept: str) -> Order:
    """The order that a form of this format is. Runs in a thread.

    Args:
        parts: The form's parts.
        model: The served model.
        accept: The request's `Accept`.

    Raises:
        InpaintError: Fields are wrong, by their native names; or `NOT_ACCEPTABLE`.
    """
    faults = [Fault(part.name, ErrorCode.INVALID_FIELD, REFUSED[part.name]) for part in parts if part.name in REFUSED]
    native = [_native(part) for part in parts if part.name not in REFUSED and part.name not in HARMLESS]
    names = {part.name for part in native}
    if "mask_grow" not in names:
        native.append(Part.of_text("mask_grow", str(GROW_MASK)))
    if "seed" not in names:
        native.append(Part.of_text("seed", _random_seed()))
    try:
        form = read_form(native, model)
    except InvalidRequest as error:
        raise InvalidRequest((*faults, *error.faults)) from None
    faults += _format_faults(form.fields)
    if faults:
        raise InvalidRequest(tuple(faults))
    image_type = media_type(form.fields.output_format)
    return Order(form, choose_media_type(accept, (image_type, JSON_MEDIA_TYPE)))


def _native(part: Part) -> Part:
    """A part under its native name; a seed of 0 asks for a random one."""
    data = part.data
    if part.name in _NUMBERS and not part.is_file:
        whole = _WHOLE.fullmatch(data)
        data = data if whole is None else whole[1]
        if part.name == "seed" and _ZERO.fullmatch(data):
            data = _random_seed().encode()
    return Part(_NATIVE_NAMES.get(part.name, part.name), data, part.is_file)


def _random_seed() -> str:
    """Never 0, with which nobody could ask for the same picture again."""
    return str(1 + randbelow(MAX_SEED))


def _format_faults(fields: InpaintFields) -> Iterable[Fault]:
    if fields.output_format not in MEDIA_TYPES:
        message = f"Input should be one of: {', '.join(MEDIA_TYPES)}"
        yield Fault("output_format", ErrorCode.INVALID_FIELD, f"{message}.")
