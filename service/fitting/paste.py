"""From what the model painted back to a picture at upload size."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.fitting import stock
from service.fitting.placement import Placement, Size
from service.request import REPAINT_FROM, Floats, Pixels


def paste_back(
    upload_image: Pixels, mask: Pixels, placement: Placement, painted: Pixels, *, feather: bool = False
) -> Pixels:
    """The upload with the painted picture where the mask is set.

    Every pixel whose mask is 0, and without `feather` every pixel whose mask is below 128, is the upload's own.

    Args:
        upload_image: (H, W, 3) uint8 RGB.
        mask: (H, W) uint8, as it was fitted.
        placement: Of the fit.
        painted: (h, w, 3) uint8 RGB at working size.
        feather: Blend by the mask's grey instead of cutting at 128.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    window = placement.window
    share, painted = window.cut(mask), _to_window(painted, placement)
    if feather:
        # Pillow's blend is exact at both ends: 0 gives the upload's value and 255 the painted one.
        painted = np.asarray(
            Image.composite(Image.fromarray(painted), Image.fromarray(window.cut(upload_image)), Image.fromarray(share))
        )
        return _with_window(upload_image, placement, painted)
    result = upload_image.copy()
    painted = np.ascontiguousarray(painted)
    np.copyto(_whole_pixels(window.cut(result)), _whole_pixels(painted), where=share >= REPAINT_FROM)
    return result


def paste_back_floats(
    upload_image: Pixels, mask: Pixels, placement: Placement, painted: Floats, *, feather: bool = False
) -> Floats:
    """As `paste_back`, without rounding to whole levels; not for a placement with `padding_mask_crop`.

    Args:
        upload_image: (H, W, 3) uint8 RGB.
        mask: (H, W) uint8, as it was fitted.
        placement: Of the fit.
        painted: (h, w, 3) float32 from 0 to 1 at working size.
        feather: Blend by the mask's grey instead of cutting at 128.

    Returns:
        (H, W, 3) float32 from 0 to 1; where the mask is 0, the upload's levels divided by 255.
    """
    window = placement.window
    result: Floats = upload_image.astype(np.float32) / np.float32(255)
    share = window.cut(mask)
    if not feather:
        share = np.where(share >= REPAINT_FROM, np.uint8(255), np.uint8(0))
    weight = share.astype(np.float32)[..., None] / np.float32(255)
    if placement.working != window.size:
        channels = [Image.fromarray(np.ascontiguousarray(painted[..., channel])) for channel in range(3)]
        resized = [np.asarray(stock.resize(channel, window.size)) for channel in channels]
        painted = np.stack(resized, axis=-1).clip(0, 1)
    kept = window.cut(result)
    kept[:] = (1 - weight) * kept + weight * painted  # Exact at both ends.
    return result


def overlay(upload_image: Pixels, mask: Pixels, placement: Placement, painted: Pixels) -> Pixels:
    """What the stock pipeline returns for `padding_mask_crop`: the upload laid over the painted crop.

    Args:
        upload_image: (H, W, 3) uint8 RGB.
        mask: (H, W) uint8, as it was fitted.
        placement: Of a fit with `padding_mask_crop`.
        painted: (h, w, 3) uint8 RGB at working size.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    window = placement.window
    laid_over = stock.apply_overlay(
        Image.fromarray(window.cut(mask)),
        Image.fromarray(window.cut(upload_image)),
        Image.fromarray(_to_window(painted, placement)),
    )
    return _with_window(upload_image, placement, np.asarray(laid_over))


def opaque_where_painted(alpha: Pixels, mask: Pixels, *, feather: bool = False) -> Pixels:
    """The upload's alpha for the pasted picture: what was painted is opaque, or it would not be seen.

    Args:
        alpha: (H, W) uint8 opacity of the upload.
        mask: (H, W) uint8, as it was pasted with.
        feather: As for `paste_back`.
    """
    if feather:
        return np.maximum(alpha, mask)
    return np.where(mask >= REPAINT_FROM, np.uint8(255), alpha)


def result_size(placement: Placement, *, composite: bool) -> Size:
    """Size of the picture that a client gets: the upload's, or the working size of a picture not pasted back."""
    return placement.upload if composite or placement.is_padded_crop else placement.working


def resized(pixels: Pixels, size: Size) -> Pixels:
    """A finished picture at another size.

    Args:
        pixels: (H, W, 3) or (H, W) uint8.
        size: Of the result; another shape stretches.
    """
    if Size.of(pixels) == size:
        return pixels
    return np.asarray(stock.resize(Image.fromarray(pixels), size))


def black_picture(placement: Placement, *, composite: bool) -> Pixels:
    """What a flagged picture is replaced by, (H, W, 3) uint8 of the size that the client expects."""
    size = result_size(placement, composite=composite)
    return np.zeros((size.height, size.width, 3), np.uint8)


def _to_window(painted: Pixels, placement: Placement) -> Pixels:
    """The painted picture at the window's size: the reverse of how the window was fitted."""
    size = placement.window.size
    if Size.of(painted) == size:
        return painted
    image = Image.fromarray(painted)
    bring = stock.resize_and_crop if placement.is_padded_crop else stock.resize
    return np.asarray(bring(image, size))


def _with_window(upload_image: Pixels, placement: Placement, window: Pixels) -> Pixels:
    """A copy of the upload with other pixels in the window."""
    result = upload_image.copy()
    placement.window.cut(result)[:] = window
    return result


def _whole_pixels(pixels: Pixels) -> NDArray[np.void]:
    """(H, W) view of (H, W, 3) pixels, each as one value: NumPy copies them by a mask many times as fast."""
    return pixels.view("V3")[..., 0]
