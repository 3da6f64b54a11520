"""The NSFW checker: every picture gets a verdict, or no picture goes out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image

from service.errors import ErrorCode, InpaintError
from service.request import Pixels


class SafetyCheck:
    """Runs the checkpoint's `StableDiffusionSafetyChecker` as stock's `run_safety_checker`.

    It fails closed: stock takes a score that is not a number for "safe", here it
    is an error.

    Args:
        checker: The checkpoint's checker.
        feature_extractor: Its image preprocessing.
    """

    def __init__(self, checker: StableDiffusionSafetyChecker, feature_extractor: Any) -> None:  # noqa: ANN401
        self._checker = checker
        self._feature_extractor = feature_extractor

    def verdicts(self, images: Sequence[Pixels]) -> list[bool]:
        """Whether each (H, W, 3) uint8 picture is flagged.

        Raises:
            InpaintError: `SAFETY_FAILED`; no verdict may be assumed.
        """
        try:
            return self._verdicts(images)
        except (InpaintError, torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:
            raise InpaintError(ErrorCode.SAFETY_FAILED, "The safety checker failed.") from error

    def _verdicts(self, images: Sequence[Pixels]) -> list[bool]:
        pictures = [Image.fromarray(image) for image in images]
        pixel_values = self._feature_extractor(pictures, return_tensors="pt").pixel_values
        parameter = self._checker.visual_projection.weight
        image_embeds: list[torch.Tensor] = []
        handle = self._checker.visual_projection.register_forward_hook(
            lambda _module, _inputs, output: image_embeds.append(output)
        )
        try:
            # The checker blackens what it flags in the pictures it is given: it gets one-pixel stand-ins.
            stand_ins = [np.zeros((1, 1, 3), dtype=np.uint8) for _ in images]
            _, flags = self._checker(
                images=stand_ins, clip_input=pixel_values.to(device=parameter.device, dtype=parameter.dtype)
            )
        finally:
            handle.remove()
        if len(image_embeds) != 1 or not bool(torch.isfinite(image_embeds[0]).all()) or len(flags) != len(images):
            raise InpaintError(ErrorCode.SAFETY_FAILED, "The safety checker gave no verdict.")
        return [bool(flag) for flag in flags]
