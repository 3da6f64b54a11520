"""Where the painted picture lies within the upload."""

from dataclasses import dataclass
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from service.request import Pixels

_Scalar = TypeVar("_Scalar", np.uint8, np.float32)


@dataclass(frozen=True, slots=True)
class Size:
    """Height and width in pixels."""

    height: int
    width: int

    @classmethod
    def of(cls, pixels: Pixels) -> Self:
        """The size of (H, W, ...) pixels."""
        height, width = pixels.shape[:2]
        return cls(height, width)

    @property
    def aspect(self) -> float:
        """Width over height."""
        return self.width / self.height


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of pixels: `left` and `top` are inside, `right` and `bottom` are not."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def size(self) -> Size:
        """Height and width."""
        return Size(self.bottom - self.top, self.right - self.left)

    @property
    def corners(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom), Pillow's order."""
        return self.left, self.top, self.right, self.bottom

    def cut(self, pixels: NDArray[_Scalar]) -> NDArray[_Scalar]:
        """A view of the box's part of (H, W, ...) pixels."""
        return pixels[self.top : self.bottom, self.left : self.right]


@dataclass(frozen=True, slots=True)
class Placement:
    """What pasting back needs to know of a fit.

    Attributes:
        upload: Size of the upload.
        working: Size at which the model paints.
        window: The part of the upload that is painted.
        is_padded_crop: Whether the window was fitted as stock's `padding_mask_crop` does: not stretched,
            but centred in the working picture, the rest filled from its edges.
    """

    upload: Size
    working: Size
    window: Box
    is_padded_crop: bool


def bounds_of(mask: Pixels, threshold: int) -> Box | None:
    """The smallest box that holds every pixel ≥ `threshold` of an (H, W) mask; None where there is none."""
    is_set = mask >= threshold
    rows, columns = np.flatnonzero(is_set.any(axis=1)), np.flatnonzero(is_set.any(axis=0))
    if rows.size == 0:
        return None
    return Box(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
