"""From the parts of a form to a validated request; every fault is reported, not just the first."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from service.api.fields import InpaintFields, side_bounds
from service.api.ip_adapter import IMAGE, ip_adapter_faults
from service.api.multipart import Part
from service.api.problems import Fault, InvalidRequest
from service.api.tensors import LATENTS, TENSORS, TensorChecks, TensorFault, read_tensor
from service.errors import ErrorCode
from service.fitting import Size
from service.imaging import ArrayFormat
from service.messages import ModelInfo
from service.request import Floats

FILES = ("image", "mask", IMAGE, *TENSORS)

JSON_FIELDS = ("timesteps", "sigmas", "loras", "ip_adapter_scale", "freeu")

_PROMPTS = ("prompt", "negative_prompt")
_SANE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_OUT_OF_RANGE = frozenset(
    {
        "too_short",
        "too_long",
        "greater_than",
        "greater_than_equal",
        "less_than",
        "less_than_equal",
        "multiple_of",
        "finite_number",
    }
)
_BAD_LENGTH = frozenset({"string_too_short", "string_too_long"})


@dataclass(frozen=True, slots=True)
class InpaintForm:
    """What a client sent.

    Attributes:
        image: The picture's file; None when its latents were sent in its place.
        mask: The mask's file; None when the picture's alpha is the mask.
        ip_adapter_image: The file of a picture to paint by.
        fields: The scalar fields.
        embeds: Embeddings by field: of prompts, (T, D) each, and of pictures to paint by.
        latents: Latents by field, of any shape so far: see `TensorChecks.latents`.
        is_format_named: Whether `output_format` was sent, and is not merely the default.
    """

    image: bytes | None
    mask: bytes | None
    ip_adapter_image: bytes | None
    fields: InpaintFields
    embeds: Mapping[str, Floats]
    latents: Mapping[str, Floats]
    is_format_named: bool

    def without_files(self) -> Self:
        """The same, with none of the megabytes that came with it."""
        return replace(self, image=None, mask=None, ip_adapter_image=None, embeds={}, latents={})


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
    names = {part.name for part in parts}
    faults += [fault for fault in ip_adapter_faults(names, model.ip_adapter) if fault.field not in faulty]
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

    tensors: dict[str, Floats] = {}
    for part in parts:
        if part.name in TENSORS and part.name not in faulty:
            try:
                tensors[part.name] = read_tensor(part.data, part.name)
            except TensorFault as error:
                faults.append(Fault(part.name, ErrorCode.INVALID_FIELD, f"{part.name}: {error}"))

    fields = None
    try:
        fields = InpaintFields.model_validate(texts, context=model)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
        faults += [value_fault(detail) for detail in details if detail["loc"][0] not in faulty]
    embeds: Mapping[str, Floats] = {}
    if fields is not None:
        checks = TensorChecks(model, fields.num_images_per_prompt, is_guided=fields.is_guided(model))
        prompt_embeds, prompt_faults = checks.embeds(tensors)
        image_embeds, image_faults = checks.image_embeds(tensors)
        embeds = prompt_embeds | image_embeds
        faults += [*prompt_faults, *image_faults, *_array_faults(fields)]
    if faults or fields is None:
        raise InvalidRequest(tuple(sorted(faults, key=lambda fault: _place(fault.field))))

    latents = {name: array for name, array in tensors.items() if name in LATENTS}
    files = {part.name: part.data for part in parts if part.name in FILES}
    return InpaintForm(
        image=files.get("image"),
        mask=files.get("mask"),
        ip_adapter_image=files.get(IMAGE),
        fields=_sized(fields, checks.working_size(latents), model),
        embeds=embeds,
        latents=latents,
        is_format_named="output_format" in texts,
    )


def _array_faults(fields: InpaintFields) -> Iterable[Fault]:
    """A crop is laid over a picture, and there is none: stock refuses it, too."""
    if fields.output_format in get_args(ArrayFormat) and fields.padding_mask_crop is not None:
        message = f"The output format {fields.output_format} does not go with padding_mask_crop."
        yield Fault("output_format", ErrorCode.INVALID_FIELD, message)


def _sized(fields: InpaintFields, latents: Size | None, model: ModelInfo) -> InpaintFields:
    """Where the client named no working size but sent latents, theirs is meant."""
    if latents is None or fields.height is not None or fields.width is not None:
        return fields
    min_side, max_side = side_bounds(model)
    if not all(min_side <= side <= max_side for side in (latents.height, latents.width)):
        return fields  # Their shape is refused later, against a size that there is.
    return fields.model_copy(update={"height": latents.height, "width": latents.width})


def _structural_faults(parts: Sequence[Part]) -> Iterable[Fault]:
    """What is wrong before any value is looked at; at most one fault a field."""
    counts = Counter(part.name for part in parts)
    yield from _missing_parts(counts)
    for prompt in _PROMPTS:
        if counts[prompt] and counts[f"{prompt}_embeds"]:
            both = f"Send {prompt} or {prompt}_embeds, not both."
            yield Fault(f"{prompt}_embeds", ErrorCode.INVALID_FIELD, both)
    # A script in a browser says that a field is JSON by sending a Blob, which then has a file name.
    is_file = {part.name: part.is_file and not (part.is_json and part.name in JSON_FIELDS) for part in parts}
    for name, count in counts.items():
        message = None
        if name not in FILES and name not in InpaintFields.model_fields:
            message = "There is no such field."
        elif count > 1:
            message = f"The field {name} is sent {count} times."
        elif name in FILES and not is_file[name]:
            message = f"Send {name} as a file, with a file name."
        elif name not in FILES and is_file[name]:
            message = f"Send {name} as text, not as a file."
        if message is not None:
            yield Fault(shown(name), ErrorCode.INVALID_FIELD, message)


def _missing_parts(counts: Mapping[str, int]) -> Iterable[Fault]:
    """What has to be there. In the place of a picture its latents do, as in stock: with those of the masked one."""
    if not counts.get("prompt") and not counts.get("prompt_embeds"):
        yield Fault("prompt", ErrorCode.INVALID_FIELD, "The field prompt is missing.")
    if counts.get("image"):
        return
    if not counts.get("image_latents"):
        yield Fault("image", ErrorCode.INVALID_FIELD, "The image is missing.")
        return
    for name in ("mask", "masked_image_latents"):
        if not counts.get(name):
            message = f"Without an image, {name} is needed beside image_latents."
            yield Fault(name, ErrorCode.INVALID_FIELD, message)


def value_fault(detail: ErrorDetails) -> Fault:
    """A fault that validation found; a validator's own error type is the code."""
    field, kind = str(detail["loc"][0]), detail["type"]
    if kind in _OUT_OF_RANGE:
        code = ErrorCode.OUT_OF_RANGE
    elif kind in _BAD_LENGTH:
        code = ErrorCode.INVALID_PROMPT
    elif kind in set(ErrorCode):
        code = ErrorCode(kind)
    else:
        code = ErrorCode.INVALID_FIELD
    return Fault(field, code, f"{field}: {detail['msg']}.")


def shown(name: str) -> str:
    """A client's own name for a field is shown only where it is harmless."""
    return name if _SANE_NAME.fullmatch(name) else "?"


def _place(name: str) -> int:
    """Where a field stands in the documentation; unknown ones come last."""
    order = [*FILES, *InpaintFields.model_fields]
    return order.index(name) if name in order else len(order)
