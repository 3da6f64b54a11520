"""CLIP's picture preprocessing on the checker's device, to the bit.

The feature extractor has Pillow resize each picture on the CPU. What Pillow sums
up are bytes times whole numbers, and stays near 2³¹, so that products of float64
matrices give the very same on any device.
"""

import functools
import logging
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import CLIPImageProcessorPil
from transformers.image_utils import PILImageResampling

from service.request import Floats, Pixels

logger = logging.getLogger(__name__)

MAX_BATCH = 8
"""Pictures that are in float64 at a time."""

# Pillow's Resample.c: bits behind the point of its weights, and the bicubic filter's reach and parameter.
_PRECISION_BITS = 32 - 8 - 2
_REACH = 2.0
_A = -0.5

_MAX_MATRICES = 32
_LEVELS = 256

_Order = Literal["columns first", "rows first"]
_ORDERS: tuple[_Order, ...] = ("columns first", "rows first")


def is_reproducible(extractor: Any) -> bool:  # noqa: ANN401
    """Whether `ClipPixels` can do what a feature extractor is configured to do."""
    if type(extractor) is not CLIPImageProcessorPil or not extractor.do_resize or extractor.do_pad:
        return False
    size, crop = dict(extractor.size), dict(extractor.crop_size or {})
    if extractor.resample != PILImageResampling.BICUBIC or set(size) not in ({"shortest_edge"}, {"height", "width"}):
        return False
    if not extractor.do_center_crop:
        return True
    # A crop larger than the picture would be padded.
    return set(crop) == {"height", "width"} and all(
        crop[side] <= size.get(side, size.get("shortest_edge")) for side in crop
    )


@dataclass(frozen=True, slots=True)
class _Span:
    """One side of a picture: its length, what it is resized to, and the part of that which is kept."""

    length: int
    resized: int
    start: int
    stop: int


class ClipPixels:
    """What a `CLIPImageProcessorPil` makes of pictures: resized, cropped, rescaled and normalized.

    Args:
        extractor: One that `is_reproducible`.
        device: Where to compute.
        dtype: Of the result.
    """

    def __init__(self, extractor: Any, device: torch.device, dtype: torch.dtype) -> None:  # noqa: ANN401
        self._extractor = extractor
        self._device = device
        self._dtype = dtype
        self._values = self._values_of_levels()
        self._channels = torch.arange(3, device=device)[:, None, None]
        self._matrix = functools.lru_cache(_MAX_MATRICES)(self._new_matrix)
        self._orders: dict[tuple[int, int], _Order | None] = {}

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor | None:
        """(N, 3, h, w) pixel values of (N, H, W, 3) uint8 pictures on the device.

        None for a size of which they would not equal the extractor's.
        """
        height, width = pictures.shape[1:3]
        if (height, width) not in self._orders:
            self._orders[height, width] = self._find_order(height, width)
        order = self._orders[height, width]
        if order is None:
            return None
        return torch.cat([self._pixel_values(batch, order) for batch in torch.split(pictures, MAX_BATCH)])

    def _find_order(self, height: int, width: int) -> _Order | None:
        """The order of the two passes that gives what Pillow does, found out on a picture of noise.

        Pillow decides by the sizes, and has changed how. That one of the orders fits also proves the rest:
        a safety check is not where to trust that nothing changes.
        """
        noise = np.random.default_rng(0).integers(0, _LEVELS, (height, width, 3), dtype=np.uint8)
        expected = torch.as_tensor(self._extracted(noise)).to(self._dtype)
        picture = torch.from_numpy(noise)[None].to(self._device)
        for order in _ORDERS:
            if torch.equal(self._pixel_values(picture, order)[0].cpu(), expected):
                return order
        logger.warning("pictures of %dx%d are prepared for the safety checker on the CPU", width, height)
        return None

    def _pixel_values(self, pictures: torch.Tensor, order: _Order) -> torch.Tensor:
        rows, columns = self._spans(*pictures.shape[1:3])
        pixels = pictures.permute(0, 3, 1, 2)  # (N, 3, H, W)
        if order == "rows first":
            pixels = self._resize_rows(pixels, rows)
        pixels = self._resize_columns(pixels, columns)
        if order == "columns first":
            pixels = self._resize_rows(pixels, rows)
        return self._values[self._channels, pixels.long()]

    def _resize_rows(self, pixels: torch.Tensor, rows: _Span) -> torch.Tensor:
        """(N, 3, H, W) to (N, 3, h, W), whole levels both."""
        if rows.resized == rows.length:
            return pixels[..., rows.start : rows.stop, :]
        return _to_levels(self._matrix(rows) @ pixels.double())

    def _resize_columns(self, pixels: torch.Tensor, columns: _Span) -> torch.Tensor:
        """(N, 3, H, W) to (N, 3, H, w), whole levels both."""
        if columns.resized == columns.length:
            return pixels[..., columns.start : columns.stop]
        return _to_levels(pixels.double() @ self._matrix(columns).T)

    def _spans(self, height: int, width: int) -> tuple[_Span, _Span]:
        """Rows and columns."""
        size, crop = dict(self._extractor.size), dict(self._extractor.crop_size or {})
        if "shortest_edge" in size:
            edge = size["shortest_edge"]
            longer = int(edge * max(height, width) / min(height, width))
            size = {"height": edge, "width": longer} if height < width else {"height": longer, "width": edge}
        if not self._extractor.do_center_crop:
            crop = size
        top, left = (size["height"] - crop["height"]) // 2, (size["width"] - crop["width"]) // 2
        return (
            _Span(height, size["height"], top, top + crop["height"]),
            _Span(width, size["width"], left, left + crop["width"]),
        )

    def _new_matrix(self, span: _Span) -> torch.Tensor:
        return torch.from_numpy(resize_weights(span.length, span.resized, span.start, span.stop)).to(self._device)

    def _values_of_levels(self) -> torch.Tensor:
        """(3, 256) pixel value of each level of each channel: the extractor's own arithmetic, done in advance."""
        levels = np.arange(_LEVELS, dtype=np.uint8)[None, :, None].repeat(3, axis=2)
        values = self._extracted(levels, do_resize=False, do_center_crop=False)
        return torch.as_tensor(values)[:, 0].to(self._dtype).to(self._device)

    def _extracted(self, picture: Pixels, **options: bool) -> Floats:
        extracted = self._extractor(picture, input_data_format="channels_last", return_tensors="np", **options)
        values: Floats = extracted.pixel_values[0]
        return values


def resize_weights(length: int, resized: int, start: int, stop: int) -> NDArray[np.float64]:
    """(stop - start, length) whole numbers by which Pillow weighs the pixels of a row in its bicubic resize.

    `precompute_coeffs` and `normalize_coeffs_8bpc` of Pillow's Resample.c, in their order of operations.

    Args:
        length: Pixels of the row.
        resized: Pixels that it is resized to.
        start: First of those that are wanted.
        stop: First that is not wanted any more.
    """
    scale = length / resized
    filter_scale = max(scale, 1.0)
    reach = _REACH * filter_scale
    centres = (np.arange(start, stop) + 0.5) * scale
    firsts = np.maximum((centres - reach + 0.5).astype(np.int64), 0)
    lasts = np.minimum((centres + reach + 0.5).astype(np.int64), length)
    places = firsts[:, None] + np.arange((lasts - firsts).max())  # (stop - start, pixels within reach)
    is_within = places < lasts[:, None]
    weights = np.where(is_within, _bicubic((places - centres[:, None] + 0.5) * (1.0 / filter_scale)), 0.0)
    total = np.cumsum(weights, axis=1)[:, -1:]  # One after the other, as a loop does; sum() adds in pairs.
    weights = np.divide(weights, total, out=weights, where=total != 0)
    fixed = np.trunc(weights * (1 << _PRECISION_BITS) + np.where(weights < 0, -0.5, 0.5))
    matrix = np.zeros((stop - start, length))
    np.add.at(matrix, (np.arange(stop - start)[:, None], np.minimum(places, length - 1)), fixed * is_within)
    return matrix


def _bicubic(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    x = np.abs(distance)
    near = ((_A + 2.0) * x - (_A + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * _A
    return np.where(x < 1.0, near, np.where(x < _REACH, far, 0.0))


def _to_levels(sums: torch.Tensor) -> torch.Tensor:
    """Pillow's `clip8`: rounded to whole levels, those kept within a byte."""
    half = 1 << (_PRECISION_BITS - 1)
    return ((sums + half) / (1 << _PRECISION_BITS)).floor_().clamp_(0, _LEVELS - 1)
