"""Ticks that the host only starts: one CUDA graph for each of a few numbers of UNet rows.

A graph computes a tick in buffers that stay where they are: scale, gather,
concatenate, UNet, guidance, schedulers' steps. Before each replay the host puts in
what changes (states, noise, one small table of numbers), afterwards it copies the
new states out, so that nothing of a request lives in the buffers. It never waits.

    slots ──stack──▶ buffers ──replay──▶ outputs ──clone──▶ slots

What a graph computes it computes for all its rows: a batch of fewer rows is filled
up with copies of its last one.

The graphs are captured on the stream of the thread that replays them, one after the
other; what runs beside them is captured elsewhere (`service.worker.graphs` says why).
"""

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from service.worker.denoise import advance, conclude, draw_noise, guide
from service.worker.sampler import MAX_HISTORY, Schedule
from service.worker.slots import Slot, SlotBatch
from service.worker.streams import send

logger = logging.getLogger(__name__)

NoisePredictor = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(R, channels, h, w), (R,) timesteps and (R, T, D) embeddings to (R, C, h, w)."""

_TIMED_REPLAYS = 3

# Columns of the table of numbers: one row for each image.
_TIMESTEP, _INPUT_SCALE, _GUIDANCE, _TRANSITION = 0, 1, 2, 3
_NUM_COLUMNS = _TRANSITION + (1 + MAX_HISTORY) * (3 + MAX_HISTORY)


def row_buckets(max_rows: int) -> list[int]:
    """Numbers of UNet rows to capture, up to the first that holds `max_rows`: few, and never far apart."""
    buckets = [2, 4, 6, 8]
    while buckets[-1] < max_rows:
        buckets.append(buckets[-1] + max(4, 4 * (buckets[-1] // 32)))
    return [rows for index, rows in enumerate(buckets) if index == 0 or buckets[index - 1] < max_rows]


@dataclass(frozen=True, slots=True)
class TickShape:
    """What batches must have in common to be computed in the same buffers.

    Attributes:
        channels: C of the latents.
        conditioning_channels: What the UNet is given beside them; 0 for a UNet without.
        height: h of the latents.
        width: w of the latents.
        num_tokens: T of the embeddings.
        embeds_width: D of the embeddings.
    """

    channels: int
    conditioning_channels: int
    height: int
    width: int
    num_tokens: int
    embeds_width: int


@dataclass(frozen=True, slots=True)
class _Tick:
    """A captured tick, and where it leaves what it computes."""

    replay: Callable[[], object]
    advanced: torch.Tensor
    noise_pred: torch.Tensor


class CapturedTicks:
    """The graphs of one model, for one shape.

    Args:
        predict: The noise predictor; what it reads besides its arguments stays where it is.
        shape: Of the batches.
        device: Where. On a CPU nothing is captured, and every tick computed anew in the same buffers.
        dtype: The noise predictor's.
        max_rows: Most UNet rows, and images.
    """

    def __init__(
        self, predict: NoisePredictor, shape: TickShape, device: torch.device, dtype: torch.dtype, max_rows: int
    ) -> None:
        self._predict = predict
        self._shape = shape
        self._device = device
        self._dtype = dtype
        latents = (shape.channels, shape.height, shape.width)
        self._states = torch.zeros(max_rows, 1 + MAX_HISTORY, *latents, device=device)
        self._drawn = torch.zeros(max_rows, *latents, device=device)
        self._conditioning = torch.zeros(
            max_rows, shape.conditioning_channels, *latents[1:], dtype=dtype, device=device
        )
        self._embeds = torch.zeros(max_rows, shape.num_tokens, shape.embeds_width, dtype=dtype, device=device)
        self._numbers = torch.zeros(max_rows, _NUM_COLUMNS, device=device)
        self._image_of_row, self._uncond_row, self._cond_row = torch.zeros(
            3, max_rows, dtype=torch.int64, device=device
        )
        self._ticks: dict[int, _Tick] = {}
        self._pool: Any = None  # As `torch.cuda.graph` takes it.
        self._loaded: tuple[weakref.ref[SlotBatch], int] | None = None

    @property
    def buckets(self) -> list[int]:
        """Numbers of rows that have a graph."""
        return sorted(self._ticks)

    def capture(self, num_rows: int) -> float:
        """Make the graph for so many rows. The largest first: the others then use its memory.

        Returns:
            Seconds of one tick.

        Raises:
            torch.OutOfMemoryError: It does not fit; those that were captured before still work.
        """

        def compute() -> tuple[torch.Tensor, torch.Tensor]:
            return self._compute(num_rows)

        outputs = compute()  # Whatever is chosen or compiled at a first call is by then.
        if self._device.type != "cuda":
            advanced, noise_pred = (output.clone() for output in outputs)

            def recompute() -> None:
                for kept, output in zip((advanced, noise_pred), compute(), strict=True):
                    kept.copy_(output)

            self._ticks[num_rows] = _Tick(recompute, advanced, noise_pred)
            return 0.0
        del outputs
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream(self._device)
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            outputs = compute()
        self._pool = graph.pool()
        self._ticks[num_rows] = _Tick(graph.replay, *outputs)
        return _replay_seconds(graph)

    def fits(self, batch: SlotBatch) -> bool:
        """Whether a graph can compute it."""
        shape = self._shape
        conditioning_channels = 0 if batch.conditioning is None else batch.conditioning.shape[1]
        return (
            bool(self._ticks)
            and batch.num_rows <= max(self._ticks)
            and batch.slots[0].latents.shape == (shape.channels, shape.height, shape.width)
            and batch.embeds.shape[1:] == (shape.num_tokens, shape.embeds_width)
            and conditioning_channels == shape.conditioning_channels
            and batch.embeds_mask is None
            and batch.timestep_cond is None
            and batch.image_tokens is None
        )

    def tick(self, batch: SlotBatch) -> int:
        """Advance every slot of a batch that fits by one model call, as `service.worker.denoise.tick`.

        Returns:
            The rows that were computed.
        """
        slots, num_images = batch.slots, len(batch.slots)
        num_rows = min(rows for rows in self._ticks if rows >= batch.num_rows)
        self._load(batch, num_rows)
        self._put_in(slots, num_rows)
        captured = self._ticks[num_rows]
        captured.replay()
        noise_pred = captured.noise_pred[:num_images]
        if any(slot.has_previews or slot.instance is not None for slot in slots):
            noise_pred = noise_pred.clone()
        conclude(batch, noise_pred, captured.advanced[:num_images].clone())
        return num_rows

    def _compute(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tick of so many rows, and as many images; all tensors it reads or returns have fixed places."""
        states, numbers = self._states[:num_rows], self._numbers[:num_rows]
        image_of_row = self._image_of_row[:num_rows]
        scaled = states[:, 0] * numbers[:, _INPUT_SCALE].view(-1, 1, 1, 1)
        rows = torch.cat([scaled.to(self._dtype)[image_of_row], self._conditioning[:num_rows]], dim=1)
        rows = rows.contiguous(memory_format=torch.channels_last)
        noise_pred = self._predict(rows, numbers[:, _TIMESTEP][image_of_row], self._embeds[:num_rows]).float()
        guidance_scale = numbers[:, _GUIDANCE].view(-1, 1, 1, 1)
        noise_pred = guide(noise_pred, self._uncond_row[:num_rows], self._cond_row[:num_rows], guidance_scale)
        transitions = numbers[:, _TRANSITION:].reshape(num_rows, 1 + MAX_HISTORY, 3 + MAX_HISTORY)
        return advance(transitions, states, noise_pred, self._drawn[:num_rows]), noise_pred

    def _load(self, batch: SlotBatch, num_rows: int) -> None:
        """What stays the same from step to step, where it is not there already."""
        if self._loaded is not None and self._loaded[0]() is batch and self._loaded[1] == num_rows:
            return
        num_images = len(batch.slots)
        _fill(self._embeds[:num_rows], batch.embeds)
        if batch.conditioning is not None:
            _fill(self._conditioning[:num_rows], batch.conditioning)
        _fill(self._image_of_row[:num_rows], batch.image_of_row)
        self._uncond_row[:num_images] = batch.uncond_row
        self._cond_row[:num_images] = batch.cond_row
        # Rows of images that are none; what they compute is left where it is.
        self._uncond_row[num_images:] = 0
        self._cond_row[num_images:] = 0
        self._loaded = (weakref.ref(batch), num_rows)

    def _put_in(self, slots: Sequence[Slot], num_rows: int) -> None:
        """What changes at every step."""
        num_images = len(slots)
        torch.stack([slot.state for slot in slots], out=self._states[:num_images])
        drawn = draw_noise(slots)
        if drawn is not None:
            self._drawn[:num_images] = send(drawn, self._device)
        numbers = np.zeros((num_rows, _NUM_COLUMNS), np.float32)
        for index, slot in enumerate(slots):
            numbers[index, _TIMESTEP] = slot.plan.timesteps[slot.call]
            numbers[index, _INPUT_SCALE] = 1.0
            numbers[index, _GUIDANCE] = slot.guidance_scale
            if isinstance(slot.plan, Schedule):
                numbers[index, _INPUT_SCALE] = slot.plan.input_scale[slot.call]
                numbers[index, _TRANSITION:] = slot.plan.transition[slot.call].numpy().ravel()
            elif slot.instance is not None:
                # Its transitions are zeros: of its state, only the UNet reads, and that what the scheduler gives it.
                self._states[index, 0] = slot.instance.scale(slot.latents[None], slot.call)[0]
        self._numbers[:num_rows] = send(torch.from_numpy(numbers), self._device)


def _fill(buffer: torch.Tensor, rows: torch.Tensor) -> None:
    """Put rows in, and the last one again as often as there is room."""
    buffer[: len(rows)] = rows
    buffer[len(rows) :] = rows[-1:]


def _replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    graph.replay()
    start.record()
    for _ in range(_TIMED_REPLAYS):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000 / _TIMED_REPLAYS
