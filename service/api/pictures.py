"""From uploaded files to what a worker paints on, and from what it painted to files. Both run in a thread."""

import time
from dataclasses import dataclass

from service import fitting, imaging
from service.api.fields import InpaintFields
from service.api.forms import InpaintForm
from service.fitting import Fitted
from service.imaging import ImageFormat, Upload
from service.messages import ModelInfo
from service.metrics import Metrics
from service.request import InpaintResult, NsfwPolicy, Pixels


@dataclass(frozen=True, slots=True)
class Canvas:
    """A decoded upload and its part to be painted.

    Attributes:
        upload: The picture as sent.
        mask: (H, W) uint8, shaped as asked.
        fitted: What the model paints on.
    """

    upload: Upload
    mask: Pixels
    fitted: Fitted


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One answer's image.

    Attributes:
        data: The encoded file.
        media_type: What it is encoded as.
        height: In pixels.
        width: In pixels.
        is_flagged: Whether the safety checker flagged it.
    """

    data: bytes
    media_type: str
    height: int
    width: int
    is_flagged: bool


def prepare_canvas(
    form: InpaintForm, image_format: ImageFormat, model: ModelInfo, max_pixels: int, metrics: Metrics
) -> Canvas:
    """Decode, shape the mask and fit.

    Args:
        form: What the client sent.
        image_format: What the answer will be encoded as.
        model: The served model.
        max_pixels: Largest picture to decode.
        metrics: Where to count.

    Raises:
        InpaintError: The files cannot be used; `field` names the one at fault.
    """
    fields = form.fields
    started_at = time.monotonic()
    upload = imaging.decode_upload(form.image, form.mask, max_pixels=max_pixels)
    decoded_at = time.monotonic()
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
    size = fitting.result_size(fitted.placement, composite=fields.composite)
    imaging.require_encodable(image_format, size.height, size.width)
    metrics.observe_stage("decode", decoded_at - started_at)
    metrics.observe_stage("fit", time.monotonic() - decoded_at)
    return Canvas(upload, mask, fitted)


def render(
    canvas: Canvas, result: InpaintResult, fields: InpaintFields, image_format: ImageFormat, policy: NsfwPolicy
) -> list[ImageFile]:
    """Paste back and encode what was painted.

    Args:
        canvas: What was painted on.
        result: What was painted.
        fields: What the client asked for.
        image_format: What to encode as.
        policy: What becomes of flagged images.
    """
    return [
        _render_one(canvas, painted, fields, image_format, policy if is_flagged else None)
        for painted, is_flagged in zip(result.images, result.nsfw, strict=True)
    ]


def _render_one(
    canvas: Canvas, painted: Pixels, fields: InpaintFields, image_format: ImageFormat, flag_policy: NsfwPolicy | None
) -> ImageFile:
    alpha = None
    if flag_policy == "black":
        # Whole, as stock: nothing of it is pasted, and nothing of the upload shows.
        pixels = fitting.black_picture(canvas.fitted.placement, composite=fields.composite)
    else:
        pixels = _placed(canvas, painted, fields)
        if flag_policy == "blur":
            pixels = imaging.blur_flagged(pixels)
        else:
            alpha = _alpha(canvas, pixels, fields)
    data = imaging.encode_image(pixels, image_format, alpha=alpha, icc_profile=canvas.upload.icc_profile)
    height, width = pixels.shape[:2]
    return ImageFile(data, imaging.MEDIA_TYPES[image_format], height, width, is_flagged=flag_policy is not None)


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
