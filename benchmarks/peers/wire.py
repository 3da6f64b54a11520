"""The form and the answer of `POST /v1/inpaint`, as much of them as the peers know."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image
from starlette.datastructures import FormData, UploadFile

from service.imaging import encode_image
from service.request import Pixels

PATH = "/v1/inpaint"
MEDIA_TYPE = "image/png"

_FILES = frozenset({"image", "mask"})
_NEEDED = frozenset({"prompt", "num_inference_steps", "guidance_scale", "scheduler", "seed", "height", "width"})
_OPTIONAL = {"negative_prompt": "", "strength": "1"}


class FormError(ValueError):
    """The form is none that a peer can answer; the message says why."""


@dataclass(frozen=True, slots=True, eq=False)
class PeerRequest:
    """One request.

    Attributes:
        prompt: What to paint.
        negative_prompt: What to steer away from.
        num_inference_steps: Steps before `strength` shortens them.
        guidance_scale: Classifier-free guidance; values ≤ 1 turn it off.
        strength: How much of the schedule to run, in (0, 1].
        scheduler: Short name of a noise scheduler.
        seed: Of the noise.
        height: In pixels, that of the files.
        width: In pixels, that of the files.
        image: The picture, (height, width, 3) uint8 RGB.
        mask: What to repaint, (height, width) uint8; ≥ 128 repaints.
    """

    prompt: str
    negative_prompt: str
    num_inference_steps: int
    guidance_scale: float
    strength: float
    scheduler: str
    seed: int
    height: int
    width: int
    image: Pixels
    mask: Pixels


def read_form(form: FormData) -> PeerRequest:
    """A request of its form, the pictures decoded.

    Raises:
        FormError: Fields are missing, unknown or wrong. What a peer would ignore is refused: it would do other
            work than the service, for the same form.
    """
    names = set(form)
    unknown, missing = names - _FILES - _NEEDED - _OPTIONAL.keys(), (_FILES | _NEEDED) - names
    if unknown or missing:
        raise FormError(f"unknown fields: {sorted(unknown)}, missing fields: {sorted(missing)}")
    texts = _OPTIONAL | {name: str(value) for name, value in form.items() if name not in _FILES}
    try:
        height, width = int(texts["height"]), int(texts["width"])
        request = PeerRequest(
            prompt=texts["prompt"],
            negative_prompt=texts["negative_prompt"],
            num_inference_steps=int(texts["num_inference_steps"]),
            guidance_scale=float(texts["guidance_scale"]),
            strength=float(texts["strength"]),
            scheduler=texts["scheduler"],
            seed=int(texts["seed"]),
            height=height,
            width=width,
            image=_decode(form["image"], "RGB"),
            mask=_decode(form["mask"], "L"),
        )
    except (ValueError, OSError) as error:
        raise FormError(str(error)) from error
    if request.image.shape[:2] != (height, width) or request.mask.shape != (height, width):
        raise FormError(f"the files are not of {height}x{width} pixels: peers do not resize")
    return request


def encode(pixels: Pixels) -> bytes:
    """The answer's PNG, by the service's encoder, so that it makes no difference between servers.

    Args:
        pixels: (H, W, 3) uint8 RGB.
    """
    return encode_image(pixels, "png")


def _decode(file: UploadFile | str, mode: str) -> Pixels:
    if isinstance(file, str):
        raise FormError("image and mask are files")
    return np.asarray(Image.open(io.BytesIO(file.file.read())).convert(mode))
