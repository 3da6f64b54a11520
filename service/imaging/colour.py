"""From a loaded Pillow picture of any mode to 8-bit RGB, grey and alpha.

Sixteen-bit samples keep their high byte, which is also how Pillow reads 16-bit
RGB; its own conversion of 16-bit grey saturates everything above 255 to white.
"""

import numpy as np
from PIL import Image

from service.request import Pixels

MAX_ICC_BYTES = 1024 * 1024

_PLAIN_MODES = ("1", "L", "RGB")
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_MAX_DEEP = 0xFFFF


def rgb_and_alpha(image: Image.Image, *, bit_depth: int = 8) -> tuple[Pixels, Pixels | None]:
    """(H, W, 3) RGB and (H, W) alpha of a picture; alpha is None where the picture cannot be transparent.

    RGB under a transparent alpha is the file's own: nothing is composited onto a background.

    Args:
        image: The loaded picture.
        bit_depth: Bits per sample in the file, in whose units a PNG states its transparent colour.
    """
    if not isinstance(image.info.get("transparency"), int | tuple | bytes):
        image.info.pop("transparency", None)  # a text chunk of that name is no transparency
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in _ALPHA_MODES or (image.mode == "P" and "transparency" in image.info):
        rgba = image.convert("RGBA")
        return np.asarray(rgba.convert("RGB")), np.asarray(rgba.getchannel("A"))  # cheaper than to slice an array
    transparency = image.info.pop("transparency", None)
    if image.mode in _DEEP_MODES:
        deep = np.asarray(image)
        grey = (np.clip(deep, 0, _MAX_DEEP) >> 8).astype(np.uint8)
        alpha = None if transparency is None else _opaque_unless(deep[..., None], transparency)
        return np.repeat(grey[..., None], 3, axis=2), alpha
    rgb = np.asarray(image.convert("RGB"))
    if transparency is None:
        return rgb, None
    return rgb, _opaque_unless(rgb, _in_eight_bits(transparency, image.mode, bit_depth))


def grey(image: Image.Image, *, bit_depth: int = 8) -> Pixels:
    """(H, W) luminance of a picture, as `convert("L")` gives it; transparency is flattened over black.

    Args:
        image: The loaded picture.
        bit_depth: As for `rgb_and_alpha`.
    """
    if image.mode in _PLAIN_MODES and "transparency" not in image.info:
        return np.asarray(image.convert("L"))
    rgb, alpha = rgb_and_alpha(image, bit_depth=bit_depth)
    luminance = np.asarray(Image.fromarray(rgb).convert("L"))  # of r = g = b exactly that value
    if alpha is None:
        return luminance
    return ((luminance.astype(np.uint16) * alpha + 127) // 255).astype(np.uint8)


def rgb_profile(image: Image.Image) -> bytes | None:
    """The colour profile of a picture if it describes RGB samples, so that it still fits the decoded pixels."""
    profile = image.info.get("icc_profile")
    if not isinstance(profile, bytes) or len(profile) > MAX_ICC_BYTES:
        return None
    is_of_rgb = profile[16:20] == b"RGB " and profile[36:40] == b"acsp"
    return profile if is_of_rgb and image.mode in ("RGB", "RGBA", "RGBa", "P", "PA") else None


def _in_eight_bits(colour: int | tuple[int, ...], mode: str, bit_depth: int) -> int | tuple[int, ...]:
    """A PNG's transparent colour, stated in the file's bit depth, in the units of the decoded pixels."""
    if mode == "L" and isinstance(colour, int) and bit_depth < 8:  # noqa: PLR2004 - bits per sample
        return colour * 255 // ((1 << bit_depth) - 1)
    if mode == "RGB" and isinstance(colour, tuple) and bit_depth > 8:  # noqa: PLR2004 - bits per sample
        return tuple(sample >> 8 for sample in colour)
    return colour


def _opaque_unless(pixels: np.ndarray, colour: int | tuple[int, ...]) -> Pixels:
    """(H, W) alpha that is 0 where all channels equal `colour` and 255 elsewhere."""
    is_colour = (pixels == np.asarray(colour)).all(axis=-1)
    return np.where(is_colour, np.uint8(0), np.uint8(255))
