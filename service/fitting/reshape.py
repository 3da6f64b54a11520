"""A whole upload brought to a size before anything else happens to it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from service.fitting import stock
from service.fitting.placement import Size
from service.request import Pixels

ReshapeMode = Literal["stretch", "crop", "fill"]

_MODES: Mapping[ReshapeMode, Callable[[Image.Image, Size], Image.Image]] = {
    "stretch": stock.resize,
    "crop": stock.resize_and_crop,
    "fill": stock.resize_and_fill,
}


@dataclass(frozen=True, slots=True)
class Reshape:
    """The size that an upload is brought to, and how.

    Attributes:
        size: Of the result.
        mode: What becomes of another shape: it is stretched; or cut at the sides that are too long; or fitted inside,
            with the rest filled from its edges.
    """

    size: Size
    mode: ReshapeMode = "stretch"

    def of(self, pixels: Pixels) -> Pixels:
        """The same picture or mask at that size; one of this size stays as it is.

        Args:
            pixels: (H, W, 3) or (H, W) uint8.
        """
        if Size.of(pixels) == self.size:
            return pixels
        return np.asarray(_MODES[self.mode](Image.fromarray(pixels), self.size))
