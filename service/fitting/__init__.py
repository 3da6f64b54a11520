"""The working size: which part of an upload is painted, at what size, and how the result gets back.

    Upload ──fit──▶ Fitted(image, mask, placement) ──worker──▶ painted ──paste_back──▶ picture at upload size

Three ways to fit, in the order in which they are looked for:

- `padding_mask_crop`: the stock pipeline's crop around the mask, to the pixel.
- `height` or `width`: the whole picture, resized as the stock pipeline does.
- neither: a resolution bucket near the picture's shape, and a window of the
  picture that holds the mask.
"""

from service.fitting.buckets import buckets
from service.fitting.fit import Fitted, fit
from service.fitting.paste import (
    black_picture,
    opaque_where_painted,
    overlay,
    paste_back,
    paste_back_floats,
    resized,
    result_size,
)
from service.fitting.placement import Box, Placement, Size
from service.fitting.reshape import Reshape, ReshapeMode

__all__ = [
    "Box",
    "Fitted",
    "Placement",
    "Reshape",
    "ReshapeMode",
    "Size",
    "black_picture",
    "buckets",
    "fit",
    "opaque_where_painted",
    "overlay",
    "paste_back",
    "paste_back_floats",
    "resized",
    "result_size",
]
