"""From an upload to what the model paints on."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from service.errors import ErrorCode, InpaintError
from service.fitting import stock
from service.fitting.buckets import nearest_bucket
from service.fitting.placement import Box, Placement, Size, bounds_of
from service.fitting.window import choose_window
from service.request import REPAINT_FROM, Pixels

# When only one side is named, the other is at most this many times longer or shorter.
_MAX_FREE_ASPECT = 4


@dataclass(frozen=True, slots=True)
class Fitted:
    """An upload at working size.

    Attributes:
        image: (h, w, 3) uint8 RGB.
        mask: (h, w) uint8 grey; ≥ 128 is to be repainted, somewhere at least if anything was in the upload.
        placement: How to get back.
    """

    image: Pixels
    mask: Pixels
    placement: Placement


def fit(
    upload_image: Pixels,
    mask: Pixels,
    *,
    native_size: int,
    size_multiple: int,
    height: int | None,
    width: int | None,
    padding_mask_crop: int | None,
) -> Fitted:
    """Bring a picture and its mask to a working size.

    Args:
        upload_image: (H, W, 3) uint8 RGB.
        mask: (H, W) uint8; ≥ 128 is to be repainted.
        native_size: Side of the square that the model was trained on.
        size_multiple: Working heights and widths are multiples of this.
        height: Working height that the client asked for. With one side alone, the other follows the picture's
            shape, up to 1:4.
        width: Working width that the client asked for.
        padding_mask_crop: Paint a crop around the mask with this margin, as the stock pipeline does; a side
            that is not named is then the native size.

    Raises:
        InpaintError: `OUT_OF_RANGE` when a side is not a positive multiple of `size_multiple`; `EMPTY_MASK` when
            a crop around the mask is asked for and the mask is black.
    """
    _require_multiple("height", height, size_multiple)
    _require_multiple("width", width, size_multiple)
    upload = Size.of(upload_image)
    if padding_mask_crop is not None:
        working = Size(height or native_size, width or native_size)
        window = _crop_region(mask, working, padding_mask_crop)
    elif height is not None or width is not None:
        working = _asked_size(upload, height, width, size_multiple)
        window = _whole(upload)
    else:
        working = nearest_bucket(upload, native_size, size_multiple)
        window = choose_window(upload, bounds_of(mask, REPAINT_FROM) or _whole(upload), working)

    placement = Placement(upload, working, window, is_padded_crop=padding_mask_crop is not None)
    return Fitted(
        image=_to_working(window.cut(upload_image), placement),
        mask=_mask_to_working(window.cut(mask), placement),
        placement=placement,
    )


def _require_multiple(field: str, side: int | None, size_multiple: int) -> None:
    if side is not None and (side < 1 or side % size_multiple):
        raise InpaintError(ErrorCode.OUT_OF_RANGE, f"The {field} must be a multiple of {size_multiple}.", field=field)


def _whole(picture: Size) -> Box:
    return Box(0, 0, picture.width, picture.height)


def _crop_region(mask: Pixels, working: Size, padding: int) -> Box:
    if not mask.any():
        raise InpaintError(ErrorCode.EMPTY_MASK, "The mask is black: there is nothing to crop around.", field="mask")
    return stock.get_crop_region(mask, working, padding)


def _asked_size(upload: Size, height: int | None, width: int | None, size_multiple: int) -> Size:
    """The client's working size, a missing side chosen from the picture's shape."""
    aspect = min(max(upload.aspect, 1 / _MAX_FREE_ASPECT), _MAX_FREE_ASPECT)
    if height is None:
        assert width is not None  # noqa: S101 - for the type checker: one of them is named
        return Size(_nearest_multiple(width / aspect, size_multiple), width)
    return Size(height, _nearest_multiple(height * aspect, size_multiple) if width is None else width)


def _nearest_multiple(side: float, size_multiple: int) -> int:
    return max(1, round(side / size_multiple)) * size_multiple


def _to_working(pixels: Pixels, placement: Placement) -> Pixels:
    """The window's pixels, picture or mask, at working size."""
    if Size.of(pixels) == placement.working:
        return pixels
    image = Image.fromarray(pixels)
    bring = stock.resize_and_fill if placement.is_padded_crop else stock.resize
    return np.asarray(bring(image, placement.working))


def _mask_to_working(mask: Pixels, placement: Placement) -> Pixels:
    """The window's mask at working size; what the filter lost altogether is set pixel by pixel.

    A mask of a few pixels can vanish below the threshold when a large window is scaled down. The stock
    pipeline then paints nothing at all; here each masked pixel sets the working pixel that it falls on.
    """
    fitted = _to_working(mask, placement)
    if fitted.max() >= REPAINT_FROM or mask.max() < REPAINT_FROM:
        return fitted
    window, working = placement.window.size, placement.working
    inner = stock.inner_box(window, working) if placement.is_padded_crop else _whole(working)
    rows, columns = np.nonzero(mask >= REPAINT_FROM)
    fitted = fitted.copy()
    fitted[
        inner.top + rows * inner.size.height // window.height,
        inner.left + columns * inner.size.width // window.width,
    ] = 255
    return fitted
