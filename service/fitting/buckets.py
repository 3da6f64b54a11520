"""Resolution buckets: the few working sizes that pictures of any shape share.

Requests can share a model call only at one working size, so that fewer sizes
make fuller batches; and the model paints best near the area it was trained on.
"""

import math

from service.fitting.placement import Size

MAX_ASPECT = 2.0
_MAX_AREA_RATIO = 1.1

# Up to here the stride between buckets is the finer one, or hardly any shapes would be left.
_COARSE_FROM = 512
_COARSE_STRIDE = 64
_FINE_STRIDE = 32


def buckets(native_size: int, size_multiple: int) -> tuple[Size, ...]:
    """Working sizes of about `native_size`² pixels with aspects from 1:2 to 2:1, the native square first.

    For a native size of 512: 512x512, 576x448, 640x384, 704x384 and these upright.

    Args:
        native_size: Side of the square that the model was trained on, a multiple of `size_multiple`.
        size_multiple: Heights and widths are multiples of this.
    """
    stride = math.lcm(_COARSE_STRIDE if native_size >= _COARSE_FROM else _FINE_STRIDE, size_multiple)
    area = native_size**2
    landscape = []
    for width in range(stride, round(native_size * math.sqrt(MAX_ASPECT)) + 1, stride):
        height = stride * round(area / width / stride)
        is_near = 0 < height < width <= MAX_ASPECT * height and area / _MAX_AREA_RATIO <= height * width
        if is_near and height * width <= area * _MAX_AREA_RATIO:
            landscape.append(Size(height, width))
    portrait = [Size(size.width, size.height) for size in landscape]
    return (Size(native_size, native_size), *landscape, *portrait)


def nearest_bucket(picture: Size, native_size: int, size_multiple: int) -> Size:
    """The bucket of a picture: the one nearest in aspect, which for a picture of a bucket's size is that one."""
    candidates = buckets(native_size, size_multiple)
    return min(candidates, key=lambda bucket: abs(math.log(bucket.aspect / picture.aspect)))
