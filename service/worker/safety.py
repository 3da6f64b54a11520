"""The NSFW checker: every picture gets a verdict, or no picture goes out."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image

from service.errors import ErrorCode, InpaintError
from service.request import Pixels
from service.worker.clip_pixels import ClipPixels, is_reproducible
from service.worker.device_errors import is_out_of_memory
from service.worker.graphs import BATCH_SIZES, GraphedFunction


class SafetyCheck:
    """Runs the checkpoint's `StableDiffusionSafetyChecker` as stock's `run_safety_checker`.

    It fails closed: stock takes a score that is not a number for "safe", here it
    is an error. Threads may check at the same time.

    Args:
        checker: The checkpoint's checker, on the device where it stays.
        feature_extractor: Its image preprocessing.
    """

    def __init__(self, checker: StableDiffusionSafetyChecker, feature_extractor: Any) -> None:  # noqa: ANN401
        self._checker = checker
        self._feature_extractor = feature_extractor
        weight: torch.Tensor = checker.visual_projection.weight
        self._device, self._dtype = weight.device, weight.dtype
        # On a CPU Pillow itself is the faster.
        is_computed_there = self._device.type != "cpu" and is_reproducible(feature_extractor)
        self._clip_pixels = ClipPixels(feature_extractor, self._device, self._dtype) if is_computed_there else None
        # Stock reads them one by one for every picture, and each time would wait for the device.
        for thresholds in (checker.concept_embeds_weights, checker.special_care_embeds_weights):
            thresholds.data = thresholds.data.cpu()
        self._seen = _SeenEmbeds()
        checker.visual_projection.register_forward_hook(self._seen.note)

    def capture(self) -> None:
        """Have pictures looked at by a captured graph from now on, on CUDA; then one thread checks.

        Raises:
            torch.OutOfMemoryError: It does not fit.
        """
        side = self._checker.config.vision_config.image_size
        example = torch.zeros(1, 3, side, side, dtype=self._dtype, device=self._device)
        self._checker.vision_model = _CapturedVision(self._checker.vision_model, example)

    def verdicts(self, images: Sequence[Pixels] | torch.Tensor) -> list[bool]:
        """Whether each picture is flagged.

        Args:
            images: (H, W, 3) uint8 each; or (N, H, W, 3) uint8, best on the checker's device already.

        Raises:
            InpaintError: `SAFETY_FAILED`; no verdict may be assumed.
        """
        try:
            return self._verdicts(images) if len(images) > 0 else []
        except (InpaintError, torch.AcceleratorError):
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise  # Fewer pictures at once may do.
            raise InpaintError(ErrorCode.SAFETY_FAILED, "The safety checker failed.") from error

    def _verdicts(self, images: Sequence[Pixels] | torch.Tensor) -> list[bool]:
        # The checker blackens what it flags in the pictures it is given: it gets one-pixel stand-ins.
        stand_ins = [np.zeros((1, 1, 3), dtype=np.uint8) for _ in images]
        self._seen.take()  # What a check that failed may have left.
        _, flags = self._checker(images=stand_ins, clip_input=self._pixel_values(images))
        embeds = self._seen.take()
        if embeds is None or not bool(torch.isfinite(embeds).all()) or len(flags) != len(images):
            raise InpaintError(ErrorCode.SAFETY_FAILED, "The safety checker gave no verdict.")
        return [bool(flag) for flag in flags]

    def _pixel_values(self, images: Sequence[Pixels] | torch.Tensor) -> torch.Tensor:
        """(N, 3, h, w), what the feature extractor makes of them."""
        if self._clip_pixels is not None and len({image.shape for image in images}) == 1:
            pictures = images if isinstance(images, torch.Tensor) else torch.from_numpy(np.stack(images))
            values = self._clip_pixels(pictures.to(self._device))
            if values is not None:
                return values
        arrays = images.cpu().numpy() if isinstance(images, torch.Tensor) else images
        extracted: torch.Tensor = self._feature_extractor(
            [Image.fromarray(array) for array in arrays], return_tensors="pt"
        ).pixel_values
        return extracted.to(device=self._device, dtype=self._dtype)


class _CapturedVision(torch.nn.Module):
    """The checker's vision model, from a graph for as many pictures as there is one for.

    Args:
        model: Takes (N, 3, h, w) pixel values; of what it gives, the checker reads the second, pooled states.
        example: (1, 3, h, w), on its device and of its type.
    """

    def __init__(self, model: torch.nn.Module, example: torch.Tensor) -> None:
        super().__init__()
        self._model = model
        self._pooled = GraphedFunction(self._compute, example, BATCH_SIZES)

    def forward(self, pixel_values: torch.Tensor) -> tuple[None, torch.Tensor]:
        """(N, D) pooled states, where the checker looks for them."""
        compute = self._pooled if self._pooled.fits(pixel_values) else self._compute
        return None, compute(pixel_values)

    def _compute(self, pixel_values: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = self._model(pixel_values)[1]
        return pooled


class _SeenEmbeds(threading.local):
    """The image embeddings that the checker has computed in this thread: it does not return them."""

    def __init__(self) -> None:
        self._embeds: torch.Tensor | None = None

    def note(self, _module: object, _inputs: object, output: torch.Tensor) -> None:
        """A forward hook of the layer that computes them."""
        self._embeds = output

    def take(self) -> torch.Tensor | None:
        """The latest ones, once."""
        embeds, self._embeds = self._embeds, None
        return embeds
