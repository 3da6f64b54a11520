"""Bytes to arrays and back: what clients upload, and what they get.

    bytes ──formats──▶ a known container ──decode──▶ Upload(image, mask, alpha)
    mask  ──masks────▶ inverted, grown, blurred mask
    pixels ──encode──▶ PNG, JPEG, WebP or NumPy bytes

Everything here is synchronous and pure, and may run in any thread. What a
hostile upload can provoke surfaces as `InpaintError` alone.
"""

from service.imaging.decode import MaskChannel, Upload, decode_picture, decode_upload, picture_size
from service.imaging.encode import (
    ARRAY_MEDIA_TYPE,
    MEDIA_TYPES,
    ArrayFormat,
    ImageFormat,
    OutputFormat,
    blur_flagged,
    encode_array,
    encode_image,
    media_type,
    require_encodable,
)
from service.imaging.fill import filled
from service.imaging.masks import require_nonempty, shape_mask
from service.imaging.png import png_with_text

__all__ = [
    "ARRAY_MEDIA_TYPE",
    "MEDIA_TYPES",
    "ArrayFormat",
    "ImageFormat",
    "MaskChannel",
    "OutputFormat",
    "Upload",
    "blur_flagged",
    "decode_picture",
    "decode_upload",
    "encode_array",
    "encode_image",
    "filled",
    "media_type",
    "picture_size",
    "png_with_text",
    "require_encodable",
    "require_nonempty",
    "shape_mask",
]
