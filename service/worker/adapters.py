"""The LoRAs of one worker: files read once, checked against the model, and merged for the batch whose turn it is."""

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

from diffusers import UNet2DConditionModel
from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales
from transformers import CLIPTextModel

from service.errors import ErrorCode, InpaintError
from service.messages import LoraInfo
from service.request import LoraUse
from service.worker.lora_file import LoraLayers, LowRank, read_lora, refused
from service.worker.merging import MergedWeights

MAX_LOADED = 16
"""Files whose matrices are kept; the least recently used ones go first."""

MAX_REFUSED = 256
"""Files that are remembered as no LoRAs of this model, so that they are not read over and over."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class LoadedLora:
    """A file's matrices on the device; kept as long as anybody holds it.

    Attributes:
        layers: By part, then by the model's name of the module.
    """

    layers: Mapping[str, Mapping[str, LowRank]]


class Adapters:
    """The LoRAs of one worker.

    One thread loads and has the text encoder, one has the UNet; `inspect` and `free` are anybody's.

    Args:
        unet: Its UNet.
        text_encoder: Its text encoder.
        max_loaded: Files to keep that nobody holds.
    """

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, max_loaded: int = MAX_LOADED) -> None:
        self._unet = unet
        self._max_loaded = max_loaded
        self._parts = {"unet": MergedWeights(unet), "text_encoder": MergedWeights(text_encoder)}
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

    def apply_unet(self, loras: tuple[LoraUse, ...], loaded: Sequence[LoadedLora]) -> None:
        """Have the UNet with exactly these, as `load` gave them; () for the pristine weights."""
        self._apply("unet", loras, loaded)

    def apply_text_encoder(self, loras: tuple[LoraUse, ...], loaded: Sequence[LoadedLora]) -> None:
        """Have the text encoder with exactly these, as `load` gave them; () for the pristine weights."""
        self._apply("text_encoder", loras, loaded)

    def free(self) -> bool:
        """Let go of device memory that only saves time; whether there was any."""
        had_any = [weights.free() for weights in self._parts.values()]
        return any(had_any)

    def _apply(self, part: str, loras: tuple[LoraUse, ...], loaded: Sequence[LoadedLora]) -> None:
        self._parts[part].merge(loras, lambda: self._updates(part, loras, loaded))

    def _updates(
        self, part: str, loras: tuple[LoraUse, ...], loaded: Sequence[LoadedLora]
    ) -> dict[str, list[tuple[LowRank, float]]]:
        """What changes each module, in the request's order."""
        updates: dict[str, list[tuple[LowRank, float]]] = {}
        for lora, file in zip(loras, loaded, strict=True):
            scales = self._scales(lora) if part == "unet" else lora.text_encoder_scale
            for name, low_rank in file.layers.get(part, {}).items():
                updates.setdefault(name, []).append((low_rank, _scale_of(name, scales)))
        return updates

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


def _attention_beside(module: str) -> str:
    """The attention whose number a resnet has: "down_blocks.1.attentions.0" of "down_blocks.1.resnets.0.conv1"."""
    names = module.split(".")
    return f"{names[0]}.{names[1]}.attentions.{names[3]}" if len(names) > 3 else module  # noqa: PLR2004 - names[3]


def _scale_of(module: str, scales: float | Mapping[str, float]) -> float:
    """A module's weight, as stock's `set_weights_and_activate_adapters`.

    That is of its block, or the one of the attention beside it; 1 where there is neither. (Stock fails at `conv_in`
    and the like, which have no such name.)
    """
    if not isinstance(scales, Mapping):
        return scales
    if not any(block in module for block in scales):
        module = _attention_beside(module)
    return next((scale for block, scale in scales.items() if block in module), 1.0)
