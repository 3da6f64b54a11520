"""What was painted for a request that is fetched later: files as they are sent, and what there is to say of them."""

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from service.api.answers import JSON_MEDIA_TYPE, Painted, image_headers, inpaint_answer, server_timing
from service.api.kept_answers import Answer
from service.api.pictures import ImageFile


@dataclass(frozen=True, slots=True)
class KeptImage:
    """One image.

    Attributes:
        file: As it was encoded.
        seed: What its noise was drawn with.
    """

    file: ImageFile
    seed: int


@dataclass(frozen=True, slots=True)
class KeptResult:
    """One request's result.

    Attributes:
        request_id: The request that asked for it.
        facts: The JSON answer without its images, as text: what it takes can be told.
        images: The images.
    """

    request_id: str
    facts: str
    images: tuple[KeptImage, ...]

    @property
    def num_bytes(self) -> int:
        """Memory that it takes. A text can take four bytes a character."""
        return 4 * len(self.facts) + sum(len(image.file.data) for image in self.images)


def kept_result(painted: Painted) -> KeptResult:
    """What is kept of what was painted."""
    images = tuple(KeptImage(file, painted.params.seed + index) for index, file in enumerate(painted.files))
    facts = inpaint_answer(painted, []).model_dump_json(exclude={"images"})
    return KeptResult(painted.request_id, facts, images)


def result_document(result: KeptResult, url_of: Callable[[int], str], *, with_base64: bool) -> dict[str, Any]:
    """The JSON answer with links to the images.

    Args:
        result: The result.
        url_of: Where an image is to be had, by its index.
        with_base64: Whether the images are in it, too. Takes a while: not for the event loop.
    """
    images = [
        {
            "url": url_of(index),
            "b64_json": _base64(image) if with_base64 else None,
            **_facts_of(image),
        }
        for index, image in enumerate(result.images)
    ]
    return _with_images(result, images)


def answer_of(result: KeptResult, media_type: str) -> Answer:
    """The answer that the request would have had, had nobody been told to come back. Not for the event loop, either.

    Args:
        result: The result.
        media_type: JSON, or anything else for the bytes of the only image.
    """
    timing = server_timing(json.loads(result.facts)["timings"])
    if media_type != JSON_MEDIA_TYPE:
        image = result.images[0]
        headers = image_headers(image.file, image.seed) | timing
        return Answer(result.request_id, image.file.media_type, headers, image.file.data)
    images = [{"b64_json": _base64(image), **_facts_of(image)} for image in result.images]
    body = json.dumps(_with_images(result, images), ensure_ascii=False).encode()
    return Answer(result.request_id, JSON_MEDIA_TYPE, timing, body)


def _with_images(result: KeptResult, images: list[dict[str, Any]]) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(result.facts)
    return {**facts, "images": images}


def _facts_of(image: KeptImage) -> dict[str, Any]:
    file = image.file
    return {
        "media_type": file.media_type,
        "seed": image.seed,
        "nsfw_content_detected": file.is_flagged,
        "width": file.width,
        "height": file.height,
    }


def _base64(image: KeptImage) -> str:
    return base64.b64encode(image.file.data).decode("ascii")
