"""An IP-Adapter: pictures as prompts, for the batch whose turn it is.

    Z = Attention(Q, K, V) + s · Attention(Q, K', V')

with keys and values K', V' of the picture's tokens ("IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image
Diffusion Models", Ye et al., equation 5). The second term is the work of stock's attention processors, which are the
UNet's only while a batch that uses them has its turn: all others run on the very objects that were there before.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales

from service.errors import ErrorCode, InpaintError, StartupError
from service.messages import IpAdapterInfo
from service.request import InpaintRequest, IpAdapterUse
from service.settings import Settings
from service.worker.image_encoder import ImageEncoder, load_image_encoder
from service.worker.ip_adapter_file import IpAdapterWeights, locate, make_processors, make_projection, read_weights

DEFAULT_ENCODER = "image_encoder"
"""Folder beside the weights, as published."""


@dataclass(slots=True)
class _Attention:
    """The UNet's attention processors, with the adapter or without.

    Attributes:
        processors: With it: those of cross-attention, by name.
        former: Without it: all; None while they are in place.
        applied: What is in place now.
    """

    processors: Mapping[str, Any]
    former: dict[str, Any] | None = None
    applied: IpAdapterUse | None = None


class IpAdapter:
    """The IP-Adapter of one worker.

    Args:
        weights: The file.
        unet: The worker's UNet, with the attention processors that it keeps.
        encoder: What makes embeddings of pictures; None where clients have to send embeddings.

    Raises:
        StartupError: The parts do not fit each other.
    """

    def __init__(self, weights: IpAdapterWeights, unet: UNet2DConditionModel, encoder: ImageEncoder | None) -> None:
        self._unet = unet
        self._encoder = encoder
        self._is_plain = weights.kind == "plain"
        self._projection = make_projection(weights, unet)
        self._attention = _Attention(make_processors(weights, unet))
        width = weights.embeds_width
        if encoder is not None:
            encoded = encoder.embeds_width if self._is_plain else encoder.states_width
            if encoded != width:
                raise StartupError(
                    f"IP-Adapter {weights.name!r} takes embeddings {width} wide; its image encoder's are {encoded}"
                )
        num_states = None if encoder is None or self._is_plain else encoder.num_states
        self.info = IpAdapterInfo(weights.name, weights.kind, width, num_states, takes_images=encoder is not None)
        """What clients may know of it."""

    # --- the UNet ----------------------------------------------------------------

    def check(self, use: IpAdapterUse) -> None:
        """Refuse scales that do not fit.

        Raises:
            InpaintError: `INVALID_FIELD`, the UNet has no such blocks.
        """
        self._scales(use)

    def apply(self, use: IpAdapterUse | None) -> None:
        """Have the UNet with the adapter so, or without it: then as if there was none."""
        attention = self._attention
        if use == attention.applied:
            return
        if use is None:
            assert attention.former is not None  # noqa: S101 - for the type checker: something is applied
            self._unet.set_attn_processor(dict(attention.former))
            attention.former = None
        else:
            scales = self._scales(use)
            for name, processor in attention.processors.items():
                processor.scale = [_scale_of(name, scales)]
            if attention.former is None:
                attention.former = self._unet.attn_processors
                self._unet.set_attn_processor({**attention.former, **attention.processors})
        attention.applied = use

    def _scales(self, use: IpAdapterUse) -> float | dict[str, float]:
        """One weight, or one for each attention block, as stock's `set_ip_adapter_scale` reads it."""
        if not use.block_scales:
            return use.scale
        try:
            (scales,) = _maybe_expand_lora_scales(self._unet, [json.loads(use.block_scales)], default_scale=0.0)
        except ValueError as error:
            message = "The scales by block do not fit the served model's UNet."
            raise InpaintError(ErrorCode.INVALID_FIELD, message, field="ip_adapter_scale") from error
        expanded: dict[str, float] = scales
        return expanded

    # --- pictures ----------------------------------------------------------------

    def tokens(self, requests: Sequence[InpaintRequest]) -> list[tuple[torch.Tensor, ...]]:
        """(tokens, D) of each UNet row: of the pictures, behind those of no picture when guided, for each request.

        Stock projects embeddings to tokens at every step; they are the same at each.

        Args:
            requests: Each has a picture or embeddings.
        """
        pictures = [request.ip_adapter_image for request in requests if request.ip_adapter_image is not None]
        encoded = iter(self._encode(pictures) if pictures else ())
        embeds = [
            self._given(request) if request.ip_adapter_image is None else self._rows(request, next(encoded))
            for request in requests
        ]
        return [self._project(each) for each in embeds]

    def _encode(self, pictures: Sequence[Any]) -> torch.Tensor:
        assert self._encoder is not None  # noqa: S101 - for the type checker: where there is none, no pictures are taken
        return self._encoder.embeds(pictures) if self._is_plain else self._encoder.states(pictures)

    def _rows(self, request: InpaintRequest, encoded: torch.Tensor) -> torch.Tensor:
        """(rows, 1, [T,] D) of one picture, as stock's `prepare_ip_adapter_image_embeds`."""
        if not request.params.is_guided:
            return encoded[None, None]
        assert self._encoder is not None  # noqa: S101 - for the type checker: it has encoded
        nothing = torch.zeros_like(encoded) if self._is_plain else self._encoder.states_of_nothing()
        return torch.stack([nothing, encoded])[:, None]

    def _given(self, request: InpaintRequest) -> torch.Tensor:
        embeds = request.tensors.ip_adapter_image_embeds
        assert embeds is not None  # noqa: S101 - for the type checker: where there is no picture, there are embeddings
        return torch.from_numpy(embeds.copy()).to(self._unet.device, self._unet.dtype)

    def _project(self, embeds: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(tokens, D) of each row of (rows, n, [T,] D); a row attends to the tokens of all its pictures."""
        tokens: torch.Tensor = self._projection(embeds.flatten(0, 1))
        return tuple(tokens.view(len(embeds), -1, tokens.shape[-1]))


def load_ip_adapter(
    settings: Settings,
    unet: UNet2DConditionModel,
    feature_extractor: Any,  # noqa: ANN401
) -> IpAdapter | None:
    """Load what the operator named, if anything.

    Args:
        settings: The operator's settings.
        unet: On its device, with the attention processors that it keeps.
        feature_extractor: The checkpoint's image preprocessing; None where it has none.

    Raises:
        StartupError: It is not there, not complete, pickled, or of another architecture.
    """
    if settings.ip_adapter is None:
        if settings.ip_adapter_image_encoder is not None:
            raise StartupError("INPAINT_IP_ADAPTER_IMAGE_ENCODER is set without INPAINT_IP_ADAPTER")
        return None
    path = locate(settings.ip_adapter)
    folder = settings.ip_adapter_image_encoder or path.parent / DEFAULT_ENCODER
    encoder = None
    if settings.ip_adapter_image_encoder is not None or folder.is_dir():
        encoder = load_image_encoder(folder.expanduser(), feature_extractor, unet.device, unet.dtype)
    return IpAdapter(read_weights(path), unet, encoder)


def _scale_of(processor: str, scales: float | Mapping[str, float]) -> float:
    """A layer's weight; where blocks have their own, each layer is in one of them."""
    if not isinstance(scales, Mapping):
        return scales
    return next(scale for block, scale in scales.items() if processor.startswith(block))
