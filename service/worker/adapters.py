"""LoRAs merged into the weights of the batch whose turn it is.

    W = W0 + Σ s · (alpha / r) · B · A

W0 is kept aside the first time that a weight is touched, and is what everything
is computed from and restored from: whatever came and went, the pristine weights
are bit for bit what they were. Weights change in place, so that compiled code
and captured graphs go on using them. peft, which stock uses, adds the same sum
to each layer's output instead.
"""

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales
from transformers import CLIPTextModel

from service.errors import ErrorCode, InpaintError
from service.messages import LoraInfo
from service.request import LoraUse
from service.worker.lora_file import LoraLayers, LowRank, read_lora, refused

MAX_LOADED = 16
"""Files whose matrices are kept; the least recently used ones go first."""

MAX_REFUSED = 256
"""Files that are remembered as no LoRAs of this model, so that they are not read over and over."""

_MISFIT = "The LoRA is for a model of another architecture."


@dataclass(slots=True, eq=False)
class _Part:
    """One model whose weights LoRAs change.

    Attributes:
        weights: What can be changed, by the module's name.
        pristine: The former values of what was ever changed.
        touched: Modules whose weights may be other than pristine now.
        applied: What is merged now; None while that is not known.
    """

    weights: Mapping[str, torch.Tensor]
    pristine: dict[str, torch.Tensor] = field(default_factory=dict)
    touched: set[str] = field(default_factory=set)
    applied: tuple[LoraUse, ...] | None = ()

    def find(self, name: str) -> str | None:
        """A module by the name that a file gives it: transformers 5.6 took `text_model` out of the names."""
        candidates = (name, name.removeprefix("text_model."), f"text_model.{name}")
        return next((candidate for candidate in candidates if candidate in self.weights), None)

    def fit(self, layers: LoraLayers) -> dict[str, LowRank]:
        """Layers by this model's names, on its device.

        Raises:
            InpaintError: `INVALID_LORA`, the model has no such layers, or of other shapes.
        """
        fitting = {}
        for name, low_rank in layers.items():
            found = self.find(name)
            if found is None or not _fits(low_rank, self.weights[found]):
                raise refused(_MISFIT)
            device = self.weights[found].device
            fitting[found] = LowRank(
                low_rank.down.to(device),
                low_rank.up.to(device),
                low_rank.scaling,
                None if low_rank.magnitude is None else low_rank.magnitude.to(device),
            )
        return fitting

    def merge(self, loras: tuple[LoraUse, ...], updates: Mapping[str, Sequence[tuple[LowRank, float]]]) -> None:
        """Have exactly these merged. After an exception, the next call starts from the pristine weights again."""
        self.applied = None
        for name in self.touched - set(updates):
            self.weights[name].copy_(self.pristine[name])
        self.touched &= set(updates)
        for name, several in updates.items():
            weight = self.weights[name]
            if name not in self.pristine:
                self.pristine[name] = weight.clone()
            self.touched.add(name)
            weight.copy_(_merged(self.pristine[name].float(), several))
        self.applied = loras


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class LoadedLora:
    """A file's matrices on the device; kept as long as anybody holds it.

    Attributes:
        layers: By part, then by the model's name of the module.
    """

    layers: Mapping[str, Mapping[str, LowRank]]


class Adapters:
    """The LoRAs of one worker.

    Args:
        unet: Its UNet.
        text_encoder: Its text encoder.
        max_loaded: Files to keep that nobody holds.
    """

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, max_loaded: int = MAX_LOADED) -> None:
        self._unet = unet
        self._max_loaded = max_loaded
        self._parts = {"unet": _Part(_weights_of(unet)), "text_encoder": _Part(_weights_of(text_encoder))}
        self._recent: OrderedDict[tuple[str, str], LoadedLora] = OrderedDict()
        self._held: WeakValueDictionary[tuple[str, str], LoadedLora] = WeakValueDictionary()
        self._refused: OrderedDict[tuple[str, str], str] = OrderedDict()

    def load(self, loras: Sequence[LoraUse]) -> tuple[LoadedLora, ...]:
        """Make sure that every file is read, and fits; otherwise nothing changes.

        Returns:
            What to hold while the LoRAs are in use: a file may be replaced or removed meanwhile.

        Raises:
            InpaintError: `UNKNOWN_LORA`, `INVALID_LORA` or `INVALID_FIELD`, of the field `loras`.
        """
        for lora in loras:
            self._scales(lora)
        return tuple(self._load(lora) for lora in loras)

    def inspect(self, path: str) -> LoraInfo:
        """What a file is as a LoRA of this model; nothing of it is kept.

        Raises:
            InpaintError: `INVALID_LORA`.
        """
        layers = self._fit(read_lora(Path(path)))
        return LoraInfo(
            rank=max(low_rank.rank for part in layers.values() for low_rank in part.values()),
            num_unet_layers=len(layers.get("unet", {})),
            num_text_encoder_layers=len(layers.get("text_encoder", {})),
        )

    def apply_unet(self, loras: tuple[LoraUse, ...]) -> None:
        """Have the UNet with exactly these; () for the pristine weights."""
        self._apply("unet", loras)

    def apply_text_encoder(self, loras: tuple[LoraUse, ...]) -> None:
        """Have the text encoder with exactly these; () for the pristine weights."""
        self._apply("text_encoder", loras)

    def _apply(self, part: str, loras: tuple[LoraUse, ...]) -> None:
        if self._parts[part].applied == loras:
            return
        updates: dict[str, list[tuple[LowRank, float]]] = {}
        for lora in loras:
            scales = self._scales(lora) if part == "unet" else lora.text_encoder_scale
            for name, low_rank in self._load(lora).layers.get(part, {}).items():
                updates.setdefault(name, []).append((low_rank, _scale_of(name, scales)))
        self._parts[part].merge(loras, updates)

    # --- files -------------------------------------------------------------------

    def _load(self, lora: LoraUse) -> LoadedLora:
        """The matrices of a file, read once."""
        key = (lora.path, lora.version)
        if key in self._refused:
            raise refused(self._refused[key])
        loaded = self._held.get(key)
        if loaded is None:
            loaded = self._held[key] = self._read(lora)
        self._recent[key] = loaded
        self._recent.move_to_end(key)
        while len(self._recent) > self._max_loaded:
            self._recent.popitem(last=False)
        return loaded

    def _read(self, lora: LoraUse) -> LoadedLora:
        try:
            return LoadedLora(self._fit(read_lora(Path(lora.path), lora.version)))
        except InpaintError as error:
            if error.code is ErrorCode.INVALID_LORA:
                self._refused[lora.path, lora.version] = error.message
                while len(self._refused) > MAX_REFUSED:
                    self._refused.popitem(last=False)
            raise

    def _fit(self, layers: Mapping[str, LoraLayers]) -> dict[str, dict[str, LowRank]]:
        return {part: self._parts[part].fit(of_part) for part, of_part in layers.items()}

    # --- scales ------------------------------------------------------------------

    def _scales(self, lora: LoraUse) -> float | dict[str, float]:
        """The UNet's weight, or one for each of its attention blocks, as stock's `set_adapters` reads it.

        Raises:
            InpaintError: `INVALID_FIELD`, the UNet has no such blocks.
        """
        if not lora.block_scales:
            return lora.unet_scale
        try:
            (scales,) = _maybe_expand_lora_scales(self._unet, [json.loads(lora.block_scales)])
        except ValueError as error:
            message = "The scales by block do not fit the served model's UNet."
            raise InpaintError(ErrorCode.INVALID_FIELD, message, field="loras") from error
        expanded: dict[str, float] = scales
        return expanded


def _scale_of(module: str, scales: float | Mapping[str, float]) -> float:
    """A module's weight; 1 outside the blocks that have one, as stock's `set_weights_and_activate_adapters`."""
    if not isinstance(scales, Mapping):
        return scales
    return next((scale for block, scale in scales.items() if block in module), 1.0)


def _weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of the layers that LoRAs are made for."""
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }


def _fits(low_rank: LowRank, weight: torch.Tensor) -> bool:
    down, up, rank = low_rank.down.shape, low_rank.up.shape, low_rank.rank
    if rank == 0 or down[1:] != weight.shape[1:] or up[:2] != (weight.shape[0], rank):
        return False
    is_up_flat = all(side == 1 for side in up[2:])
    return is_up_flat and (low_rank.magnitude is None or len(low_rank.magnitude) == weight.shape[0])


def _merged(weight: torch.Tensor, updates: Sequence[tuple[LowRank, float]]) -> torch.Tensor:
    """W: W0 and what LoRAs add to it, in float32, in the request's order.

    A DoRA ("Weight-Decomposed Low-Rank Adaptation", Liu et al., equation 5) gives each output its own length m.
    As peft has it, that is (m / ‖W0 + ΔW‖) (W + ΔW), with W what the ones before it have made of W0.

    Args:
        weight: W0 in float32, (out, in) or (out, in, kh, kw).
        updates: Matrices, and the request's scale for each.
    """
    merged = weight.clone()
    for low_rank, scale in updates:
        product = low_rank.up.float().flatten(1) @ low_rank.down.float().flatten(1)
        delta = (scale * low_rank.scaling) * product.view_as(weight)
        merged += delta
        if low_rank.magnitude is not None:
            lengths = (weight + delta).flatten(1).norm(dim=1)
            merged *= (low_rank.magnitude.float() / lengths).view(-1, *[1] * (weight.ndim - 1))
    return merged
