"""The arithmetic of diffusers' `VaeImageProcessor` on Pillow pictures, to the pixel, without torch.

Each function is named after the method that it reproduces. They differ from it
only where the original cannot answer: for a picture so thin that a side would
round to nothing, or that would be enlarged to more memory than there is.
"""

from PIL import Image, ImageOps

from service.fitting.placement import Box, Size, bounds_of
from service.request import Pixels

# Beyond this `resize_and_crop` crops first.
_MAX_RESIZED_PIXELS = 2**26


def resize(image: Image.Image, size: Size) -> Image.Image:
    """`VaeImageProcessor.resize`: stretch to a size."""
    return image.resize((size.width, size.height), resample=Image.Resampling.LANCZOS)


def get_crop_region(mask: Pixels, size: Size, pad: int) -> Box:
    """`VaeImageProcessor.get_crop_region`: the mask's box, padded, then widened to the working aspect.

    Args:
        mask: (H, W) uint8; every pixel > 0 counts here. Not all of them may be 0.
        size: The working size.
        pad: Pixels to add on each side.
    """
    bounds = bounds_of(mask, threshold=1)
    if bounds is None:
        raise ValueError("the mask is empty")
    picture = Size.of(mask)
    left, top = max(bounds.left - pad, 0), max(bounds.top - pad, 0)
    right, bottom = min(bounds.right + pad, picture.width), min(bounds.bottom + pad, picture.height)

    height, width = bottom - top, right - left
    if width / height > size.aspect:
        top, bottom = _widened(top, bottom, int(width / size.aspect - height), picture.height)
    else:
        left, right = _widened(left, right, int(height * size.aspect - width), picture.width)
    return Box(left, top, right, bottom)


def _widened(start: int, stop: int, extra: int, limit: int) -> tuple[int, int]:
    """An interval with `extra` added half on each side, then shifted back inside 0 to `limit`."""
    start -= extra // 2
    stop += extra - extra // 2
    overhang = max(stop - limit, 0)
    start, stop = start - overhang, stop - overhang
    shortfall = max(-start, 0)
    return start + shortfall, min(stop + shortfall, limit)


def inner_box(picture: Size, size: Size) -> Box:
    """Where `resize_and_fill` puts a picture: as large as fits, its shape kept, centred."""
    is_wider = size.aspect < picture.aspect
    width = size.width if is_wider else max(1, picture.width * size.height // picture.height)
    height = max(1, picture.height * size.width // picture.width) if is_wider else size.height
    left, top = size.width // 2 - width // 2, size.height // 2 - height // 2
    return Box(left, top, left + width, top + height)


def resize_and_fill(image: Image.Image, size: Size) -> Image.Image:
    """`VaeImageProcessor._resize_and_fill`: fit inside a size, fill the rest from the picture's edges."""
    picture = Size(image.height, image.width)
    inner = inner_box(picture, size)
    resized = resize(image, inner.size)
    filled = Image.new(image.mode, (size.width, size.height))
    filled.paste(resized, box=(inner.left, inner.top))

    if size.aspect < picture.aspect and inner.top > 0:
        strip = (size.width, inner.top)
        filled.paste(resized.resize(strip, box=(0, 0, size.width, 0)), box=(0, 0))
        last = (0, resized.height, size.width, resized.height)
        filled.paste(resized.resize(strip, box=last), box=(0, inner.bottom))
    elif size.aspect > picture.aspect and inner.left > 0:
        strip = (inner.left, size.height)
        filled.paste(resized.resize(strip, box=(0, 0, 0, size.height)), box=(0, 0))
        last = (resized.width, 0, resized.width, size.height)
        filled.paste(resized.resize(strip, box=last), box=(inner.right, 0))
    return filled


def resize_and_crop(image: Image.Image, size: Size) -> Image.Image:
    """`VaeImageProcessor._resize_and_crop`: cover a size, the picture's shape kept, and cut off the excess."""
    aspect = image.width / image.height
    width = size.width if size.aspect > aspect else max(1, image.width * size.height // image.height)
    height = size.height if size.aspect <= aspect else max(1, image.height * size.width // image.width)
    if width * height > _MAX_RESIZED_PIXELS:
        inside = inner_box(size, Size(image.height, image.width))
        return resize(image.crop(inside.corners), size)
    cropped = Image.new(image.mode, (size.width, size.height))
    cropped.paste(
        resize(image, Size(height, width)), box=(size.width // 2 - width // 2, size.height // 2 - height // 2)
    )
    return cropped


def apply_overlay(mask: Image.Image, upload: Image.Image, painted: Image.Image) -> Image.Image:
    """`VaeImageProcessor.apply_overlay` within the crop region: the upload over the painted picture.

    Outside the region the original leaves the upload as it is.

    Args:
        mask: The region of the mask, "L".
        upload: The region of the upload, "RGB".
        painted: The painted region, "RGB".
    """
    kept = Image.new("RGBa", upload.size)
    kept.paste(upload.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask))
    result = painted.convert("RGBA")
    result.alpha_composite(kept.convert("RGBA"))
    return result.convert("RGB")
