"""What the service painted."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.client.failures import PaintFailed


@dataclass(frozen=True, slots=True)
class Picture:
    """One image.

    Attributes:
        data: Its file, of the format that was asked for.
        is_flagged: Whether the safety checker flagged it; it is written as it came.
    """

    data: bytes
    is_flagged: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """All images of a request.

    Attributes:
        pictures: At least one.
        metadata: The JSON answer without its images' bytes.
    """

    pictures: tuple[Picture, ...]
    metadata: Mapping[str, Any]

    @property
    def num_flagged(self) -> int:
        """How many were flagged."""
        return sum(picture.is_flagged for picture in self.pictures)

    def described(self, files: Sequence[Path]) -> dict[str, Any]:
        """The metadata, with where each image was written.

        Args:
            files: One for each image; none for standard output.
        """
        images = [dict(image) for image in self.metadata["images"]]
        for image, path in zip(images, files, strict=False):
            image["file"] = str(path)
        return {**self.metadata, "images": images}


def read_answer(data: bytes) -> Answer:
    """The `completed` event's data.

    Raises:
        PaintFailed: It is none.
    """
    try:
        metadata = json.loads(data)
        pictures = tuple(
            Picture(base64.b64decode(image.pop("b64_json"), validate=True), image["nsfw_content_detected"] is not False)
            for image in metadata["images"]
        )
    except (ValueError, LookupError, TypeError, AttributeError):
        pictures, metadata = (), {}
    if not pictures:
        raise PaintFailed("the answer is not one of this service's")
    return Answer(pictures, metadata)
