"""From a request in OpenAI's words to an order in native ones."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from service import imaging
from service.api.answers import EVENT_STREAM_MEDIA_TYPE, JSON_MEDIA_TYPE
from service.api.field_types import MAX_STEPS
from service.api.fields import InpaintFields
from service.api.forms import InpaintForm, read_form, value_fault
from service.api.multipart import Part
from service.api.openai.bodies import parts_of
from service.api.openai.fields import STEPS_SHARE, EditFields, Quality
from service.api.painting import Body, Order
from service.api.pictures import Encoding
from service.api.problems import InvalidRequest, faults_of
from service.errors import ErrorCode, InpaintError
from service.fitting import Size
from service.imaging import ImageFormat
from service.messages import ModelInfo

MAX_SHAPE_DIFFERENCE = 0.01
"""Between the picture's width over height and that of a size that it is scaled to: what rounding to pixels makes."""

# Front ends have one of them built in, and no field to change it.
_OPENAI_MODEL = re.compile(r"(chatgpt-image|dall-e|gpt-image)-[a-z0-9.-]{1,64}")

_CLASHING: Mapping[str, str] = {"num_images_per_prompt": "n", "previews": "stream and partial_images"}
"""Native words for what OpenAI's wire format says in its own."""

_NAMES: Mapping[str, str] = {"num_images_per_prompt": "n"}
"""What the format calls fields of the native form, where it has another word."""

_STEPS = ("num_inference_steps", "timesteps", "sigmas")
_WORDS = frozenset({"n", *EditFields.model_fields})
_MAX_COMPRESSION = 100


@dataclass(frozen=True, slots=True)
class EditOrder(Order):
    """An order, and what the answer repeats of it.

    Attributes:
        quality: What the steps come from; None where the client chose them itself.
        image_format: What the pictures are encoded as.
        partial_images: How many unfinished pictures the stream may show.
    """

    quality: Quality | None = None
    image_format: ImageFormat = "png"
    partial_images: int = 0


def order_of(body: Body, model: ModelInfo, max_pixels: int) -> EditOrder:
    """Translate a request. Megabytes take a while: not for the event loop.

    Args:
        body: Form data, or JSON.
        model: The served model.
        max_pixels: Largest picture, height times width.

    Raises:
        InpaintError: It is refused.
    """
    parts = parts_of(body)
    _refuse_native_words(parts)
    texts = _texts([part for part in parts if part.name in _WORDS])
    fields = _read_fields({name: text for name, text in texts.items() if name != "n"})
    if fields.model is not None and fields.model != model.id and not _OPENAI_MODEL.fullmatch(fields.model):
        raise InpaintError(ErrorCode.UNKNOWN_MODEL, "There is no such model: GET /v1/models has it.", field="model")
    own = [part for part in parts if part.name not in _WORDS]
    has_own_steps = any(part.name in _STEPS for part in own)
    said = _in_native_words(fields, texts.get("n"), None if has_own_steps else _num_steps(fields.rung, model))
    if has_own_steps and fields.quality != "auto":
        raise _fault("quality", "quality: Send it, or the steps themselves, not both.")
    encoding = Encoding(_compression(fields), fields.size, keeps_alpha=fields.background == "auto")
    try:
        form = read_form([*own, *(Part.of_text(name, text) for name, text in said.items())], model)
    except InvalidRequest as error:
        raise InvalidRequest(faults_of(error, _NAMES)) from None
    if form.image is None:  # Latents can stand in for it, but a mask beside them is no file with transparency.
        raise _fault("image", "The image is missing.")
    if fields.size is not None:
        _check_size(fields.size, form, form.image, fields.output_format, max_pixels)
    return EditOrder(
        form,
        EVENT_STREAM_MEDIA_TYPE if fields.stream else JSON_MEDIA_TYPE,
        mask_channel="alpha",
        encoding=encoding,
        quality=None if has_own_steps else fields.rung,
        image_format=fields.output_format,
        partial_images=fields.partial_images if fields.stream else 0,
    )


def _refuse_native_words(parts: Sequence[Part]) -> None:
    """Refuse what would be understood, but not here."""
    for part in parts:
        if part.name in _CLASHING:
            raise _fault(part.name, f"{part.name}: Send {_CLASHING[part.name]} instead.")
        name, bracket, _ = part.name.partition("[")
        # How clients flatten lists and objects: whose scale it is that comes after two names, nobody can tell.
        if bracket and name in InpaintFields.model_fields:
            raise _fault(name, f"{name}: Send it as one field of JSON text.")


def _texts(parts: Sequence[Part]) -> dict[str, str]:
    """The text of each field."""
    texts: dict[str, str] = {}
    counts = Counter(part.name for part in parts)
    for part in parts:
        if counts[part.name] > 1:
            raise _fault(part.name, f"The field {part.name} is sent {counts[part.name]} times.")
        if part.is_file:
            raise _fault(part.name, f"Send {part.name} as text, not as a file.")
        try:
            texts[part.name] = part.data.decode()
        except UnicodeDecodeError:
            raise _fault(part.name, f"{part.name}: The text is not valid UTF-8.") from None
    return texts


def _read_fields(texts: Mapping[str, str]) -> EditFields:
    """OpenAI's words, but `n`, which is validated as the native field."""
    try:
        return EditFields.model_validate(texts)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
        raise InvalidRequest(tuple(value_fault(detail) for detail in details)) from None


def _in_native_words(fields: EditFields, n: str | None, num_steps: int | None) -> dict[str, str]:
    """What OpenAI's words say, by native fields."""
    said: dict[str, str] = {"output_format": fields.output_format}
    if n is not None:
        said["num_images_per_prompt"] = n
    if num_steps is not None:
        said["num_inference_steps"] = str(num_steps)
    if fields.stream and fields.partial_images:
        said["previews"] = "true"
    return said


def _num_steps(quality: Quality, model: ModelInfo) -> int:
    return min(MAX_STEPS, max(1, round(model.default_steps * STEPS_SHARE[quality])))


def _compression(fields: EditFields) -> int | None:
    """What encoders call quality.

    Raises:
        InpaintError: PNG has none.
    """
    compression = _MAX_COMPRESSION if fields.output_compression is None else fields.output_compression
    if fields.output_format == "jpeg":
        return compression
    if fields.output_format == "png" and compression < _MAX_COMPRESSION:
        raise _fault("output_compression", "output_compression: Input should be 100 for png, which loses nothing.")
    return None if compression == _MAX_COMPRESSION else compression


def _check_size(size: Size, form: InpaintForm, image: bytes, image_format: ImageFormat, max_pixels: int) -> None:
    """Refuse a size to which the result cannot be scaled without a stretch."""
    if not form.fields.composite and form.fields.padding_mask_crop is None:
        raise _fault("size", "size: Input should be auto where composite is false.")
    picture = Size(*imaging.picture_size(image, "image", max_pixels=max_pixels))
    if abs(size.aspect / picture.aspect - 1) > MAX_SHAPE_DIFFERENCE:
        message = f"size: Input should be auto, or have the shape of the image, {picture.width}x{picture.height}."
        raise _fault("size", message)
    if size.height * size.width > max_pixels:
        raise InpaintError(
            ErrorCode.OUT_OF_RANGE, f"size: Input should have at most {max_pixels} pixels.", field="size"
        )
    imaging.require_encodable(image_format, size.height, size.width)


def _fault(name: str, message: str) -> InpaintError:
    return InpaintError(ErrorCode.INVALID_FIELD, message, field=name)
