"""A model's weights with LoRAs merged into them.

    W = W0 + Σ s · (alpha / r) · B · A

W0 is kept aside the first time that a weight is changed, and is what everything
is computed from and restored from: whatever came and went, the pristine weights
are bit for bit what they were. Weights change in place, so that compiled code
and captured graphs go on using them. peft, which stock uses, adds the same sum
to each layer's output instead.

Batches with different LoRAs take turns, a step each, so the latest merged
weights are kept: a turn then costs one copy, not a product for each layer.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence

import torch

from service.worker.lora_file import LoraLayers, LowRank, refused
from service.worker.streams import note_use

KEPT_SHARE = 1 / 8
"""Of the memory that is free at the start: for merged weights that are kept, of each model."""

MAX_KEPT_BYTES = 2 * 1024**3
"""The same on a CPU."""

_MISFIT = "The LoRA is for a model of another architecture."

Updates = Mapping[str, Sequence[tuple[LowRank, float]]]
"""By module: matrices, and the request's scale for each."""


class MergedWeights:
    """The weights of one model. One thread merges; any may ask for the memory that only saves time.

    Args:
        model: On its device; only layers that LoRAs are made for are ever changed.
        max_kept_bytes: Merged weights to keep, the least recently used ones go first; by default as above.
    """

    def __init__(self, model: torch.nn.Module, max_kept_bytes: int | None = None) -> None:
        self._weights: dict[str, torch.Tensor] = {
            name: module.weight
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
        }
        self._max_kept_bytes = _spare_bytes(model) if max_kept_bytes is None else max_kept_bytes
        self._pristine: dict[str, torch.Tensor] = {}
        self._touched: set[str] = set()
        self._applied: Hashable = ()
        self._kept: OrderedDict[Hashable, dict[str, torch.Tensor]] = OrderedDict()
        self._lock = threading.Lock()  # Of what is kept.

    def fit(self, layers: LoraLayers) -> dict[str, LowRank]:
        """Layers by this model's names, on its device.

        Raises:
            InpaintError: `INVALID_LORA`, the model has no such layers, or of other shapes.
        """
        fitting = {}
        for name, low_rank in layers.items():
            found = self._find(name)
            if found is None or not _fits(low_rank, self._weights[found]):
                raise refused(_MISFIT)
            device = self._weights[found].device
            fitting[found] = LowRank(
                low_rank.down.to(device),
                low_rank.up.to(device),
                low_rank.scaling,
                None if low_rank.magnitude is None else low_rank.magnitude.to(device),
            )
        return fitting

    def merge(self, loras: Hashable, updates: Callable[[], Updates]) -> None:
        """Have exactly these merged; does nothing where they are.

        After an exception, whatever is asked for next is made of the pristine weights again.

        Args:
            loras: Names what is to be merged; equal names have equal updates.
            updates: Asked where it is not known any more.
        """
        if loras == self._applied:
            return
        merged = self._merged(loras, updates)
        sources = merged | {name: self._pristine[name] for name in self._touched - set(merged)}
        self._applied = None
        self._touched |= set(merged)
        if sources:
            torch._foreach_copy_([self._weights[name] for name in sources], list(sources.values()))
        self._touched = set(merged)
        self._applied = loras

    def free(self) -> bool:
        """Let go of merged weights that are kept; whether there were any."""
        with self._lock:
            had_any = bool(self._kept)
            self._kept.clear()
        return had_any

    def _merged(self, loras: Hashable, updates: Callable[[], Updates]) -> dict[str, torch.Tensor]:
        """The changed weights by module, as they are to be."""
        with self._lock:
            if loras in self._kept:
                self._kept.move_to_end(loras)
                return self._kept[loras]
        merged: dict[str, torch.Tensor] = {}
        for name, several in updates().items():
            weight = self._weights[name]
            if name not in self._pristine:
                self._pristine[name] = weight.clone()
            for low_rank, _ in several:
                note_use((low_rank.down, low_rank.up, low_rank.magnitude))
            merged[name] = _with_updates(self._pristine[name].float(), several).to(weight.dtype)
        with self._lock:
            self._kept[loras] = merged
            while sum(map(_num_bytes, self._kept.values())) > self._max_kept_bytes:
                self._kept.popitem(last=False)
        return merged

    def _find(self, name: str) -> str | None:
        """A module by the name that a file gives it: transformers 5.6 took `text_model` out of the names."""
        candidates = (name, name.removeprefix("text_model."), f"text_model.{name}")
        return next((candidate for candidate in candidates if candidate in self._weights), None)


def _spare_bytes(model: torch.nn.Module) -> int:
    device = next(model.parameters()).device
    if device.type != "cuda":
        return MAX_KEPT_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return int(KEPT_SHARE * free)


def _num_bytes(weights: Mapping[str, torch.Tensor]) -> int:
    return sum(weight.nbytes for weight in weights.values())


def _fits(low_rank: LowRank, weight: torch.Tensor) -> bool:
    down, up, rank = low_rank.down.shape, low_rank.up.shape, low_rank.rank
    if rank == 0 or down[1:] != weight.shape[1:] or up[:2] != (weight.shape[0], rank):
        return False
    is_up_flat = all(side == 1 for side in up[2:])
    return is_up_flat and (low_rank.magnitude is None or len(low_rank.magnitude) == weight.shape[0])


def _with_updates(weight: torch.Tensor, updates: Sequence[tuple[LowRank, float]]) -> torch.Tensor:
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
