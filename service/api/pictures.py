"""From uploaded files to what a worker paints on, and from what it painted to files. Both run in a thread."""

from dataclasses import dataclass, replace

import numpy as np

from service import fitting, imaging
from service.api.fields import InpaintFields
from service.api.forms import InpaintForm
from service.api.ip_adapter import IMAGE
from service.api.problems import Fault, InvalidRequest
from service.api.tensors import TensorChecks
from service.api.traces import StageClock
from service.errors import ErrorCode
from service.fitting import Fitted, Reshape, Size
from service.imaging import ARRAY_MEDIA_TYPE, MEDIA_TYPES, ImageFormat, MaskChannel, Upload
from service.messages import ModelInfo
from service.request import REPAINT_FROM, Floats, InpaintResult, InpaintTensors, NsfwPolicy, Pixels

PREVIEW_FORMAT: ImageFormat = "jpeg"


@dataclass(frozen=True, slots=True)
class Canvas:
    """A decoded upload and its part to be painted.

    Attributes:
        upload: The picture as sent.
        mask: (H, W) uint8, shaped as asked.
        fitted: What the model paints on.
        tensors: What the client has computed itself, at working size.
        ip_adapter_image: (H, W, 3) uint8 RGB of the picture to paint by, where there is one.
    """

    upload: Upload
    mask: Pixels
    fitted: Fitted
    tensors: InpaintTensors
    ip_adapter_image: Pixels | None


@dataclass(frozen=True, slots=True)
class Shaping:
    """What is done to an upload before it is painted on, beyond what the form says.

    Attributes:
        reshape: The size that picture and mask are brought to first of all; None leaves them as they are.
        is_filled: Whether what is under the mask is painted over with the colours around it, for the model to start
            from. It matters only where it starts from the picture at all, with a strength below 1.
    """

    reshape: Reshape | None = None
    is_filled: bool = False


DEFAULT_SHAPING = Shaping()


@dataclass(frozen=True, slots=True)
class Encoding:
    """How an answer's pictures are encoded, beyond what the form says. Arrays take no notice of it.

    Attributes:
        quality: Of JPEG and lossy WebP, 0 to 100; None for the formats' own, see `imaging.encode_image`.
        size: What the finished picture is scaled to; None leaves it as it is.
        keeps_alpha: Whether the upload's own transparency stays.
    """

    quality: int | None = None
    size: Size | None = None
    keeps_alpha: bool = True


DEFAULT_ENCODING = Encoding()


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One answer's image.

    Attributes:
        data: The encoded file.
        media_type: What it is encoded as.
        height: In pixels.
        width: In pixels.
        is_flagged: Whether the safety checker flagged it.
        has_alpha: Whether some of it may be transparent.
    """

    data: bytes
    media_type: str
    height: int
    width: int
    is_flagged: bool
    has_alpha: bool = False


def prepare_canvas(
    form: InpaintForm,
    model: ModelInfo,
    max_pixels: int,
    clock: StageClock,
    *,
    mask_channel: MaskChannel = "luminance",
    shaping: Shaping = DEFAULT_SHAPING,
) -> Canvas:
    """Decode, shape the mask and fit.

    Args:
        form: What the client sent, with the format that is answered.
        model: The served model.
        max_pixels: Largest picture to decode.
        clock: Times decoding and fitting.
        mask_channel: What of the mask's file says where to repaint.
        shaping: What else is done to the picture.

    Raises:
        InpaintError: The files cannot be used; `field` names the one at fault.
    """
    _require_something_to_paste_into(form)
    with clock.time("decode"):
        upload = imaging.decode_upload(form.image, form.mask, max_pixels=max_pixels, mask_channel=mask_channel)
        ip_adapter_image = None
        if form.ip_adapter_image is not None:
            ip_adapter_image = imaging.decode_picture(form.ip_adapter_image, IMAGE, max_pixels=max_pixels)
    with clock.time("fit"):
        return _fit(upload, form, model, shaping, ip_adapter_image)


def _fit(
    upload: Upload, form: InpaintForm, model: ModelInfo, shaping: Shaping, ip_adapter_image: Pixels | None
) -> Canvas:
    fields = form.fields
    if shaping.reshape is not None:
        upload = _reshaped(upload, shaping.reshape)
    mask = imaging.shape_mask(upload.mask, invert=fields.mask_invert, grow=fields.mask_grow, blur=fields.mask_blur)
    imaging.require_nonempty(mask)
    fitted = fitting.fit(
        upload.image,
        mask,
        native_size=model.native_size,
        size_multiple=model.size_multiple,
        height=fields.height,
        width=fields.width,
        padding_mask_crop=fields.padding_mask_crop,
    )
    if shaping.is_filled and fields.strength < 1:
        fitted = replace(fitted, image=imaging.filled(fitted.image, fitted.mask))
    checks = TensorChecks(model, fields.num_images_per_prompt, is_guided=fields.is_guided(model))
    latents, faults = checks.latents(form.latents, fitted.placement.working)
    if faults:
        raise InvalidRequest(tuple(faults))
    size = fitting.result_size(fitted.placement, composite=fields.composite)
    imaging.require_encodable(fields.output_format, size.height, size.width)
    return Canvas(upload, mask, fitted, InpaintTensors(**form.embeds, **latents), ip_adapter_image)


def _reshaped(upload: Upload, reshape: Reshape) -> Upload:
    alpha = None if upload.alpha is None else reshape.of(upload.alpha)
    return replace(upload, image=reshape.of(upload.image), mask=reshape.of(upload.mask), alpha=alpha)


def _require_something_to_paste_into(form: InpaintForm) -> None:
    if form.image is None and form.fields.composite and form.fields.output_format != "latent":
        message = "Without an image there is nothing to paste into: send composite=false."
        raise InvalidRequest((Fault("composite", ErrorCode.INVALID_FIELD, message),))


def render(
    canvas: Canvas,
    result: InpaintResult,
    fields: InpaintFields,
    policy: NsfwPolicy,
    encoding: Encoding = DEFAULT_ENCODING,
) -> list[ImageFile]:
    """Paste back and encode what was painted.

    Args:
        canvas: What was painted on.
        result: What was painted.
        fields: What the client asked for, with the format that is answered.
        policy: What becomes of flagged images.
        encoding: How pictures are encoded.
    """
    files = []
    output_format = fields.output_format
    for painted, is_flagged in zip(result.images, result.nsfw, strict=True):
        flag_policy = policy if is_flagged else None
        if output_format == "latent":
            files.append(_latents_file(canvas, painted, flag_policy))
        elif output_format == "npy":
            files.append(_floats_file(canvas, painted, fields, flag_policy))
        else:
            files.append(
                _picture_file(canvas, painted, fields, output_format, flag_policy=flag_policy, encoding=encoding)
            )
    return files


def preview_file(canvas: Canvas, painted: Pixels, fields: InpaintFields) -> bytes:
    """A JPEG of an unfinished picture at working size, over what is kept.

    Args:
        canvas: What is painted on.
        painted: (h, w, 3) uint8 RGB.
        fields: What the client asked for.
    """
    if fields.composite:
        fitted = canvas.fitted
        painted = np.where((fitted.mask >= REPAINT_FROM)[..., None], painted, fitted.image)
    return imaging.encode_image(painted, PREVIEW_FORMAT)


def unfinished_file(
    canvas: Canvas, painted: Pixels, fields: InpaintFields, image_format: ImageFormat, encoding: Encoding
) -> ImageFile:
    """An unfinished picture in the very form that the finished one will have.

    Args:
        canvas: What is painted on.
        painted: (h, w, 3) uint8 RGB.
        fields: What the client asked for.
        image_format: What to encode as.
        encoding: How.
    """
    return _picture_file(canvas, painted, fields, image_format, flag_policy=None, encoding=encoding)


def _latents_file(canvas: Canvas, latents: Pixels | Floats, flag_policy: NsfwPolicy | None) -> ImageFile:
    """Latents as they are; flagged ones are zeros, because there is no blurring them."""
    if flag_policy in ("black", "blur"):
        latents = np.zeros_like(latents)
    working = canvas.fitted.placement.working
    data = imaging.encode_array(latents.astype(np.float32, copy=False))
    return ImageFile(data, ARRAY_MEDIA_TYPE, working.height, working.width, is_flagged=flag_policy is not None)


def _floats_file(
    canvas: Canvas, painted: Pixels | Floats, fields: InpaintFields, flag_policy: NsfwPolicy | None
) -> ImageFile:
    placement = canvas.fitted.placement
    floats = painted.astype(np.float32, copy=False)
    if flag_policy == "black":
        floats = fitting.black_picture(placement, composite=fields.composite).astype(np.float32)
    elif fields.composite:
        floats = fitting.paste_back_floats(
            canvas.upload.image, canvas.mask, placement, floats, feather=fields.mask_blur > 0
        )
    if flag_policy == "blur":
        floats = imaging.blur_flagged((floats * 255).round().astype(np.uint8)).astype(np.float32) / np.float32(255)
    height, width = floats.shape[:2]
    return ImageFile(imaging.encode_array(floats), ARRAY_MEDIA_TYPE, height, width, is_flagged=flag_policy is not None)


def _picture_file(
    canvas: Canvas,
    painted: Pixels | Floats,
    fields: InpaintFields,
    image_format: ImageFormat,
    *,
    flag_policy: NsfwPolicy | None,
    encoding: Encoding,
) -> ImageFile:
    alpha = None
    if flag_policy == "black":
        # Whole, as stock: nothing of it is pasted, and nothing of the upload shows.
        pixels = fitting.black_picture(canvas.fitted.placement, composite=fields.composite)
    else:
        pixels = _placed(canvas, painted.astype(np.uint8, copy=False), fields)
        if flag_policy == "blur":
            pixels = imaging.blur_flagged(pixels)
        elif encoding.keeps_alpha and image_format != "jpeg":
            alpha = _alpha(canvas, pixels, fields)
    if encoding.size is not None:
        pixels = fitting.resized(pixels, encoding.size)
        alpha = None if alpha is None else fitting.resized(alpha, encoding.size)
    data = imaging.encode_image(
        pixels, image_format, alpha=alpha, icc_profile=canvas.upload.icc_profile, quality=encoding.quality
    )
    height, width = pixels.shape[:2]
    is_flagged, has_alpha = flag_policy is not None, alpha is not None
    return ImageFile(data, MEDIA_TYPES[image_format], height, width, is_flagged=is_flagged, has_alpha=has_alpha)


def _placed(canvas: Canvas, painted: Pixels, fields: InpaintFields) -> Pixels:
    """The painted picture where the client wants it."""
    placement = canvas.fitted.placement
    if fields.composite:
        return fitting.paste_back(canvas.upload.image, canvas.mask, placement, painted, feather=fields.mask_blur > 0)
    if placement.is_padded_crop:
        return fitting.overlay(canvas.upload.image, canvas.mask, placement, painted)
    return painted


def _alpha(canvas: Canvas, pixels: Pixels, fields: InpaintFields) -> Pixels | None:
    """The upload's own transparency, where the answer is the upload with something painted in it."""
    alpha = canvas.upload.alpha
    if (
        alpha is None
        or alpha.shape != pixels.shape[:2]
        or not (fields.composite or fields.padding_mask_crop is not None)
    ):
        return None
    return fitting.opaque_where_painted(alpha, canvas.mask, feather=fields.mask_blur > 0)
