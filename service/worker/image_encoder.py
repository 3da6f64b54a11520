"""The picture encoder that an IP-Adapter was trained with."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from service.errors import StartupError, first_line
from service.request import Pixels

logger = logging.getLogger(__name__)

MAX_ENCODE_BATCH = 8


class ImageEncoder:
    """Stock's `encode_image`, many pictures at once.

    Args:
        model: The CLIP vision model.
        feature_extractor: The checkpoint's image preprocessing, which stock uses where there is one.
    """

    def __init__(self, model: CLIPVisionModelWithProjection, feature_extractor: Any) -> None:  # noqa: ANN401
        self._model = model
        side = model.config.image_size
        if feature_extractor is None or dict(feature_extractor.crop_size) != {"height": side, "width": side}:
            feature_extractor = CLIPImageProcessorPil(size=side, crop_size=side)
        self._feature_extractor = feature_extractor
        self._side = side
        self._of_nothing: torch.Tensor | None = None

    @property
    def embeds_width(self) -> int:
        """D of `embeds`."""
        return int(self._model.config.projection_dim)

    @property
    def states_width(self) -> int:
        """D of `states`."""
        return int(self._model.config.hidden_size)

    @property
    def num_states(self) -> int:
        """T of `states`: one for each patch, and one for the whole."""
        return int((self._side // self._model.config.patch_size) ** 2 + 1)

    def embeds(self, pictures: Sequence[Pixels]) -> torch.Tensor:
        """(N, D) of (H, W, 3) uint8 RGB pictures of any size."""
        return torch.cat([self._model(batch).image_embeds for batch in self._batches(pictures)])

    def states(self, pictures: Sequence[Pixels]) -> torch.Tensor:
        """(N, T, D), the last hidden states but one."""
        return torch.cat([self._states(batch) for batch in self._batches(pictures)])

    def states_of_nothing(self) -> torch.Tensor:
        """(T, D) of pixel values of zero, which stock has stand for no picture."""
        if self._of_nothing is None:
            shape = (1, 3, self._side, self._side)
            self._of_nothing = self._states(torch.zeros(shape, device=self._model.device, dtype=self._model.dtype))[0]
        return self._of_nothing

    def _states(self, pixel_values: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self._model(pixel_values, output_hidden_states=True).hidden_states[-2]
        return states

    def _batches(self, pictures: Sequence[Pixels]) -> list[torch.Tensor]:
        values = [
            self._feature_extractor(Image.fromarray(picture), return_tensors="pt").pixel_values for picture in pictures
        ]
        stacked = torch.cat(values).to(self._model.device, self._model.dtype)
        return [stacked[first : first + MAX_ENCODE_BATCH] for first in range(0, len(stacked), MAX_ENCODE_BATCH)]


def load_image_encoder(
    folder: Path,
    feature_extractor: Any,  # noqa: ANN401
    device: torch.device,
    dtype: torch.dtype,
) -> ImageEncoder:
    """Load a folder, every weight accounted for.

    Raises:
        StartupError: It is not there, not complete, pickled or of another kind.
    """
    name = folder.name
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kinds = config.get("architectures") or []
    except (OSError, ValueError, AttributeError):
        raise StartupError(f"image encoder {name!r} is no folder with a readable config.json") from None
    if "CLIPVisionModelWithProjection" not in kinds:
        found = ", ".join(map(str, kinds)) or "model of unknown kind"
        raise StartupError(f"image encoder {name!r} is a {found}; a CLIPVisionModelWithProjection is needed")
    if not any(folder.glob("*.safetensors")):
        raise StartupError(f"image encoder {name!r} has no .safetensors weights; pickles are not loaded")
    try:
        model, loading = CLIPVisionModelWithProjection.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except Exception as error:
        logger.debug("loading failed", exc_info=error)
        raise StartupError(f"cannot load image encoder {name!r}: {first_line(error)}") from error
    faults = sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"])
    if faults:
        raise StartupError(f"image encoder {name!r} lacks {len(faults)} of its weights, the first is {faults[0]}")
    return ImageEncoder(model.to(device).eval().requires_grad_(requires_grad=False), feature_extractor)
