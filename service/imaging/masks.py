"""What a client may ask to be done to a mask before it is used."""

import numpy as np
from PIL import Image, ImageFilter

from service.errors import ErrorCode, InpaintError
from service.request import REPAINT_FROM, Pixels


def shape_mask(mask: Pixels, *, invert: bool, grow: int, blur: int) -> Pixels:
    """Invert, then grow, then blur a mask.

    Args:
        mask: (H, W) uint8; ≥ 128 is to be repainted.
        invert: Repaint what was kept, and the reverse.
        grow: Pixels by which to widen the white, in each direction and into the corners (a square brush).
        blur: Radius of a Gaussian blur in pixels. The mask stays grey after it: ≥ 128 is repainted, and the
            greys feather the edge where the result is pasted back.

    Returns:
        (H, W) uint8.
    """
    if invert:
        mask = 255 - mask
    if grow > 0:
        mask = _running_max(_running_max(mask, grow, axis=0), grow, axis=1)
    if blur > 0:
        mask = np.asarray(Image.fromarray(mask).filter(ImageFilter.GaussianBlur(blur)))
    return mask


def require_nonempty(mask: Pixels) -> None:
    """Refuse a mask that asks for nothing.

    Raises:
        InpaintError: `EMPTY_MASK` when no pixel is ≥ 128.
    """
    if mask.max() < REPAINT_FROM:
        raise InpaintError(
            ErrorCode.EMPTY_MASK,
            "The mask has nothing to repaint: no pixel is at least half white, mask_invert, mask_grow and mask_blur "
            "considered.",
            field="mask",
        )


def _running_max(mask: Pixels, radius: int, axis: int) -> Pixels:
    """Largest value within `radius` along an axis, in a logarithmic number of passes.

    The maximum over a span of pixels is the maximum of two overlapping shorter spans, so that each pass
    doubles the span: eight passes for a radius of 64, where a filter would look at 129 values for each pixel.
    """
    span = 2 * radius + 1
    margins = [(0, 0), (0, 0)]
    margins[axis] = (radius, radius)
    values = np.moveaxis(np.pad(mask, margins), axis, 0)
    covered = 1
    while covered < span:
        step = min(covered, span - covered)
        values = np.maximum(values[:-step], values[step:])
        covered += step
    return np.ascontiguousarray(np.moveaxis(values, 0, axis))
