"""From the body of `img2img` to an order in the native form's words."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from service.api.a1111.fields import field_faults
from service.api.a1111.options import CLIP_SKIP, LIVE_PREVIEWS, OVERRIDABLE, setting_faults
from service.api.a1111.prompts import PromptWithLoras, split_prompt
from service.api.a1111.samplers import Choice, choose
from service.api.a1111.values import Values
from service.api.field_types import MAX_IMAGES_PER_PROMPT
from service.api.forms import InpaintForm, read_form
from service.api.json_body import JSON_MEDIA_TYPE, decode_file, parse_json_object
from service.api.multipart import Part
from service.api.painting import Order
from service.api.pictures import Shaping
from service.api.problems import Fault, InvalidRequest
from service.errors import InpaintError
from service.fitting import Reshape, ReshapeMode, Size
from service.messages import ModelInfo

NAMES: Mapping[str, str] = {
    "image": "init_images",
    "num_inference_steps": "steps",
    "guidance_scale": "cfg_scale",
    "strength": "denoising_strength",
    "num_images_per_prompt": "batch_size",
    "padding_mask_crop": "inpaint_full_res_padding",
    "clip_skip": f"override_settings.{CLIP_SKIP}",
    "mask_invert": "inpainting_mask_invert",
    "loras": "prompt",
}
"""What the web UI calls fields of the native form, where it has another word."""

_RESIZE_MODES: Mapping[int, ReshapeMode] = {0: "stretch", 1: "crop", 2: "fill"}
_FILL, _LATENT_FILLS = 0, (2, 3)
_MASKED_CONTENTS = range(4)


@dataclass(frozen=True, slots=True)
class Call:
    """What the answer says of a request.

    Attributes:
        parameters: Every field and its value; the files only where the client wants them back.
        sends_images: Whether the client wants the pictures.
        choice: Sampler and schedule type.
        has_mask: Whether there was a mask, and not the whole picture to be repainted.
        is_only_masked: Whether a crop around the mask was painted.
        is_filled: Whether what was under the mask was painted over beforehand.
        is_inpainting_model: Whether the model is shown the picture without what is under the mask.
    """

    parameters: Mapping[str, Any]
    sends_images: bool
    choice: Choice
    has_mask: bool
    is_only_masked: bool
    is_filled: bool
    is_inpainting_model: bool


@dataclass(frozen=True, slots=True)
class Img2ImgOrder(Order):
    """An order that came in the web UI's words; the call has a default because the fields before it have."""

    call: Call | None = None


@dataclass(frozen=True, slots=True)
class _Pictures:
    image: bytes
    mask: bytes | None


def translate(body: bytes, model: ModelInfo) -> Img2ImgOrder:
    """Read a request.

    Args:
        body: Of the request.
        model: The served model.

    Raises:
        InvalidRequest: Fields are wrong, by the web UI's names or those of `NAMES`.
        InpaintError: The body is no JSON, or there is no such sampler.
    """
    values = Values(parse_json_object(body))
    values.faults += field_faults(values.sent)
    settings = _settings(values, model)
    pictures = _pictures(values)
    choice = _choice(values, model)
    prompt = split_prompt(values.words("prompt"), with_loras=not values.flag("disable_extra_networks"))
    has_mask = pictures is not None and pictures.mask is not None
    is_only_masked = values.flag("inpaint_full_res") and has_mask
    is_filled = has_mask and _is_filled(values)
    texts = [
        *_prompt_texts(values, prompt, settings),
        *_sampling_texts(values, choice),
        *(_mask_texts(values, is_only_masked=is_only_masked) if has_mask else ()),
    ]
    mode = _resize_mode(values)
    parameters, sends_images = _parameters(values, settings), values.flag("send_images")
    form = _read(values, pictures, texts, model)
    assert choice is not None  # noqa: S101 - for the type checker: there are no faults
    size = _size(form)
    return Img2ImgOrder(
        form,
        JSON_MEDIA_TYPE,
        mask_channel="opacity",
        shaping=Shaping(None if is_only_masked else Reshape(size, mode), is_filled=is_filled),
        call=Call(
            parameters,
            sends_images,
            choice,
            has_mask,
            is_only_masked,
            is_filled,
            is_inpainting_model=model.unet_in_channels > model.latent_channels,
        ),
    )


def _read(values: Values, pictures: _Pictures | None, texts: list[tuple[str, str]], model: ModelInfo) -> InpaintForm:
    """The native form; its faults come after those that were found here."""
    image, mask = (pictures.image, pictures.mask) if pictures is not None else (b"", None)
    parts = [Part.of_text(name, text) for name, text in texts]
    parts.append(Part.of_file("image", image))
    if mask is not None:
        parts.append(Part.of_file("mask", mask))
    faults = values.faults
    try:
        form = read_form(parts, model)
    except InvalidRequest as error:
        faulty = {fault.field for fault in faults}
        native = [fault for fault in error.faults if NAMES.get(fault.field, fault.field) not in faulty]
        raise InvalidRequest((*faults, *native)) from None
    if faults:
        raise InvalidRequest(tuple(faults))
    return form


def _size(form: InpaintForm) -> Size:
    height, width = form.fields.height, form.fields.width
    assert height is not None  # noqa: S101 - for the type checker: both are always sent
    assert width is not None  # noqa: S101 - the same
    return Size(height, width)


def _parameters(values: Values, settings: Mapping[str, Any]) -> dict[str, Any]:
    has_files = values.flag("include_init_images")
    files = {name: values[name] if has_files else None for name in ("init_images", "mask")}
    return {**values.echo(), **files, "override_settings": dict(settings)}


# --- parts of a request -----------------------------------------------------------


def _settings(values: Values, model: ModelInfo) -> Mapping[str, Any]:
    """The settings of this request alone."""
    settings = values["override_settings"] or {}
    if not isinstance(settings, dict):
        values.refuse("override_settings", "Input should be an object")
        return {}
    values.faults += setting_faults(settings, model, "override_settings.", OVERRIDABLE)
    return settings


def _pictures(values: Values) -> _Pictures | None:
    """The files, from Base64."""
    images, mask = values["init_images"], values["mask"]
    if not isinstance(images, list) or len(images) != 1:
        values.refuse("init_images", "Input should be a list of one picture")
        return None
    try:
        return _Pictures(decode_file(images[0], "init_images"), decode_file(mask, "mask") if mask else None)
    except InpaintError as error:
        values.faults.append(Fault(error.field or "init_images", error.code, error.message))
        return None


def _choice(values: Values, model: ModelInfo) -> Choice | None:
    """Sampler and schedule type; None where they do not go together. An unknown sampler is not a fault among others."""
    name = "sampler_name" if values["sampler_name"] else "sampler_index"
    schedule = values.words("scheduler") if values["scheduler"] is not None else ""
    try:
        return choose(values.text(name), schedule, model.schedulers)
    except InpaintError as error:
        if error.field != "scheduler":
            raise
        values.faults.append(Fault("scheduler", error.code, error.message))
        return None


def _is_filled(values: Values) -> bool:
    """Whether what is under the mask is painted over. Noise in the latents makes no difference at full strength."""
    content = values.whole("inpainting_fill")
    if content not in _MASKED_CONTENTS:
        values.refuse("inpainting_fill", "Input should be 0, 1, 2 or 3")
    elif content in _LATENT_FILLS and values.number("denoising_strength") != 1:
        values.refuse("inpainting_fill", "Input should be 0 (fill) or 1 (original) where denoising_strength is below 1")
    return content == _FILL


def _resize_mode(values: Values) -> ReshapeMode:
    mode = _RESIZE_MODES.get(values.whole("resize_mode"))
    if mode is None:
        values.refuse("resize_mode", "Input should be 0 (just resize), 1 (crop and resize) or 2 (resize and fill)")
    return mode or "stretch"


def _prompt_texts(values: Values, prompt: PromptWithLoras, settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "prompt", prompt.text
    yield "negative_prompt", values.words("negative_prompt")
    yield "prompt_syntax", "a1111"
    if prompt.loras:
        yield "loras", prompt.loras
    last_layer = settings.get(CLIP_SKIP)
    if last_layer is None:
        pass
    elif not isinstance(last_layer, int) or isinstance(last_layer, bool):
        values.refuse(f"override_settings.{CLIP_SKIP}", "Input should be a whole number")
    else:
        yield "clip_skip", str(last_layer - 1)  # The web UI counts the layers that are left out from 1.
    previews = settings.get(LIVE_PREVIEWS) or False
    if not isinstance(previews, bool):
        values.refuse(f"override_settings.{LIVE_PREVIEWS}", "Input should be true or false")
    elif previews:
        yield "previews", "true"


def _sampling_texts(values: Values, choice: Choice | None) -> Iterator[tuple[str, str]]:
    yield "num_inference_steps", values.text("steps")
    yield "guidance_scale", values.text("cfg_scale")
    yield "strength", values.text("denoising_strength")
    yield "width", values.text("width")
    yield "height", values.text("height")
    if values["seed"] not in (-1, "", "-1"):
        yield "seed", values.text("seed")
    num_images = 1
    for name in ("batch_size", "n_iter"):
        number = values.whole(name)
        if number < 1:
            values.refuse(name, "Input should be at least 1")
        num_images *= max(1, number)
    if num_images > MAX_IMAGES_PER_PROMPT:
        message = f"Input should be at most {MAX_IMAGES_PER_PROMPT} pictures, batch_size times n_iter"
        values.refuse(max(("batch_size", "n_iter"), key=values.whole), message)
        num_images = MAX_IMAGES_PER_PROMPT
    yield "num_images_per_prompt", str(num_images)
    if choice is None:
        return
    yield "scheduler", choice.scheduler
    if choice.scheduler == "ddim" and values["eta"] is not None:
        yield "eta", values.text("eta")
    elif choice.sampler.is_ancestral:
        for name in ("eta", "s_noise"):
            if values[name] not in (None, 1):
                values.refuse(name, f"Input should be 1 with {choice.sampler.name}")


def _mask_texts(values: Values, *, is_only_masked: bool) -> Iterator[tuple[str, str]]:
    name = "mask_blur" if values["mask_blur"] is not None else "mask_blur_x"
    if name == "mask_blur_x" and values["mask_blur_x"] != values["mask_blur_y"]:
        values.refuse("mask_blur_x", "Input should be that of mask_blur_y")
    yield "mask_blur", values.text(name)
    yield "mask_invert", "true" if values.flag("inpainting_mask_invert") else "false"
    if is_only_masked:
        yield "padding_mask_crop", values.text("inpaint_full_res_padding")


def answered_fields(order: Order) -> Call:
    """What the answer to an order says of its request."""
    assert isinstance(order, Img2ImgOrder)  # noqa: S101 - for the type checker: see `translate`
    assert order.call is not None  # noqa: S101 - the same
    return order.call
