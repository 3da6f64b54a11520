"""What to paint over in the place of the picture under the mask."""

import numpy as np
from PIL import Image, ImageFilter

from service.request import Pixels

# Radius of a Gaussian blur, and how often its result is laid over what is there: far colours first, near ones last.
# Those of AUTOMATIC1111's masked content "fill" (`fill` in its modules/masking.py).
_BLURS = ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1))
_OPAQUE = 255


def filled(image: Pixels, mask: Pixels) -> Pixels:
    """The picture with the colours around the mask run into it, as AUTOMATIC1111's masked content "fill".

    Where the mask is 0, pixels stay as they are; where it is 255, nothing of the picture's own is left. A mask that
    is white everywhere gives black.

    Args:
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) uint8 grey.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    kept = Image.fromarray(np.dstack([image, _OPAQUE - mask])).convert("RGBa")
    result = Image.new("RGBA", kept.size)
    for radius, repeats in _BLURS:
        blurred = kept.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(repeats):
            result.alpha_composite(blurred)
    return np.ascontiguousarray(np.asarray(result)[..., :3])
