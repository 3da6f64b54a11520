"""Which part of a picture to paint when the client named no size.

The window has the bucket's aspect, so that nothing is stretched, and holds the
mask. A picture near the bucket's size is taken as a whole, or nearly so; of a
larger one, the surroundings of the mask. The window is only ever stretched
where the mask leaves no choice, e.g. one that spans a panorama.

What to expect of odd pictures: smaller ones than the bucket are enlarged, down
to a single pixel. Of very thin ones (8x2000) the window is a short piece around
the mask, or as long a piece as the mask, squeezed into the bucket.
"""

from service.fitting.placement import Box, Size

# A picture of up to this many times the bucket's sides is scaled down as a whole.
_MAX_REDUCTION = 1.5

# A whole picture may be stretched by as much as neighbouring buckets differ in aspect, not more.
_MAX_STRETCH = 1.25

# Of a large picture, the window is the mask's box widened on each side by this share of it.
_CONTEXT = 0.5


def choose_window(picture: Size, bounds: Box, bucket: Size) -> Box:
    """The part of a picture that is painted.

    Args:
        picture: The picture's size.
        bounds: The mask's box.
        bucket: The working size.

    Returns:
        A box inside the picture that holds `bounds`.
    """
    reduction = max(picture.height / bucket.height, picture.width / bucket.width)
    stretch = max(picture.aspect / bucket.aspect, bucket.aspect / picture.aspect)
    if reduction <= _MAX_REDUCTION and stretch <= _MAX_STRETCH:
        window = _with_aspect(picture, bucket)
        if bounds.size.height > window.height or bounds.size.width > window.width:
            window = picture
    else:
        window = _around(picture, bounds.size, bucket)
    return _centred(window, bounds, picture)


def _with_aspect(picture: Size, bucket: Size) -> Size:
    """The largest size of the bucket's aspect inside a picture."""
    return Size(
        height=max(1, min(picture.height, round(picture.width / bucket.aspect))),
        width=max(1, min(picture.width, round(picture.height * bucket.aspect))),
    )


def _around(picture: Size, mask: Size, bucket: Size) -> Size:
    """The mask with its context: at least the bucket's pixels, so that nothing is enlarged for nothing."""
    height = max(bucket.height, round(mask.height * (1 + 2 * _CONTEXT)))
    width = max(bucket.width, round(mask.width * (1 + 2 * _CONTEXT)))
    # Widen to the bucket's aspect.
    height, width = max(height, round(width / bucket.aspect)), max(width, round(height * bucket.aspect))
    # Where the picture ends, the other side gives way too, down to the mask.
    height, width = min(height, picture.height), min(width, picture.width)
    width = max(mask.width, min(width, max(1, round(height * bucket.aspect))))
    height = max(mask.height, min(height, max(1, round(width / bucket.aspect))))
    return Size(height, width)


def _centred(window: Size, bounds: Box, picture: Size) -> Box:
    """The window with the mask at its centre, or as near to that as the picture's edges allow."""
    left = bounds.left - (window.width - bounds.size.width) // 2
    top = bounds.top - (window.height - bounds.size.height) // 2
    left = min(max(left, 0), picture.width - window.width)
    top = min(max(top, 0), picture.height - window.height)
    return Box(left, top, left + window.width, top + window.height)
