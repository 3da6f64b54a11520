"""Ticks in buffers: they compute what a tick computes, whoever was in the buffers before."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from service.request import InpaintRequest, InpaintTensors
from service.settings import Settings
from service.worker.batcher import Generation
from service.worker.captured import CapturedTicks, NoisePredictor, row_buckets
from service.worker.checkpoint import load
from service.worker.compiled import noise_predictor
from service.worker.denoise import tick
from service.worker.pipeline import InpaintPipeline
from service.worker.slots import Slot, SlotBatch
from tests.model.checkpoints import NATIVE_SIZE
from tests.model.rows import Model

pytestmark = pytest.mark.filterwarnings("ignore:Should have t:UserWarning")  # torchsde, of times rounded to float32

CPU = torch.device("cpu")

ROUNDING = 1e-5
"""Of the largest value: both compute in float32, in batches of other sizes."""

MODEL = Model(NATIVE_SIZE, width=32, loras={}, scheduler="dpmpp_2m")


@dataclass(frozen=True)
class Bench:
    """A checkpoint whose ticks are computed in both ways."""

    pipeline: InpaintPipeline

    def slots(self, requests: Sequence[InpaintRequest]) -> list[Slot]:
        """Newly prepared images; the same ones each time."""
        generations = [Generation(str(index), request) for index, request in enumerate(requests)]
        self.pipeline.prepare(generations)
        return [slot for generation in generations for slot in generation.latents.slots]

    def batch(self, requests: Sequence[InpaintRequest]) -> SlotBatch:
        """The same, stacked."""
        return SlotBatch.gather(self.slots(requests), CPU)

    @property
    def predict(self) -> NoisePredictor:
        """The UNet as captured ticks call it."""
        return noise_predictor(self.pipeline.components.unet, is_compiled=False)

    def captured(self, *num_rows: int, predict: NoisePredictor | None = None) -> CapturedTicks:
        """Ticks of so many rows in buffers."""
        shape = self.pipeline._tick_shape()
        captured = CapturedTicks(predict or self.predict, shape, CPU, torch.float32, max(num_rows))
        for rows in sorted(num_rows, reverse=True):
            assert captured.capture(rows) == 0.0
        return captured

    def tick(self, batch: SlotBatch) -> None:
        """A tick as anywhere."""
        tick(self.pipeline.components.unet, batch, lambda num_rows: num_rows)


class Recorder:
    """A noise predictor that notes what it is given.

    Args:
        predict: What computes.
    """

    def __init__(self, predict: NoisePredictor) -> None:
        self._predict = predict
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def __call__(self, rows: torch.Tensor, timesteps: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """As the UNet."""
        self.calls.append((rows.clone(), timesteps.clone(), embeds.clone()))
        return self._predict(rows, timesteps, embeds)


@pytest.fixture(scope="module", params=["inpainting_checkpoint", "plain_checkpoint"])
def bench(request: pytest.FixtureRequest) -> Bench:
    """A UNet of 9 channels, which is given the mask, and one of 4, whose known region is blended in."""
    folder = request.getfixturevalue(request.param)
    return Bench(InpaintPipeline(load(Settings(model=str(folder)), CPU), "flag"))


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def mixed() -> list[InpaintRequest]:
    """Of all kinds: with and without guidance, noise, history, a scheduler of its own, several images, previews."""
    return [
        MODEL.request(num_inference_steps=4, previews=True),
        MODEL.request(scheduler="euler_a", guidance_scale=1.0, seed=1, num_images_per_prompt=2),
        MODEL.request(scheduler="dpmpp_sde", num_inference_steps=3, seed=2, prompt="nothing", previews=True),
        MODEL.request(scheduler="pndm", num_inference_steps=8, strength=0.6, guidance_scale=3.0, seed=3),
        MODEL.request(scheduler="ddim", num_inference_steps=7, eta=0.8, guidance_scale=0.0, seed=4),
        MODEL.request(scheduler="heun", num_inference_steps=3, num_images_per_prompt=3, seed=5),
        MODEL.request(scheduler="dpmpp_sde_karras", num_inference_steps=2, guidance_scale=1.0, seed=6),
        MODEL.request(scheduler="unipc_karras", num_inference_steps=5, strength=0.8, seed=7, negative_prompt="grey"),
        MODEL.request(scheduler="lcm", num_inference_steps=4, seed=8, clip_skip=1),
    ]


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=ROUNDING * float(expected.abs().max()))


def assert_same_slots(actual: Sequence[Slot], expected: Sequence[Slot]) -> None:
    """They are at the same place of their way, also with what they draw from."""
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.call == theirs.call
        assert_close(ours.state, theirs.state)
        assert torch.equal(ours.generator.get_state(), theirs.generator.get_state())
        assert ours.drawn is None
        assert ours.advanced is None
        assert (ours.estimate is None) == (theirs.estimate is None)
        if ours.estimate is not None and theirs.estimate is not None:
            assert ours.estimate.call == theirs.estimate.call
            assert_close(ours.estimate.latents, theirs.estimate.latents)
            assert_close(ours.estimate.output, theirs.estimate.output)


# --- numbers of rows ---------------------------------------------------------


def test_row_buckets_hold_what_is_asked_and_are_never_far_apart() -> None:
    """For any number of rows there is one that holds it, and is filled up by few; none larger than needed."""
    for max_rows in range(1, 129):
        buckets = row_buckets(max_rows)
        assert buckets == sorted(set(buckets))
        assert buckets[-1] >= max_rows
        assert all(rows < max_rows for rows in buckets[:-1])
        assert all(rows % 2 == 0 for rows in buckets)
        assert buckets[0] == 2
        for smaller, larger in itertools.pairwise(buckets):
            assert larger - smaller <= max(4, smaller // 8)


# --- as a tick anywhere ------------------------------------------------------


def run_beside(bench: Bench, captured: CapturedTicks, requests: Sequence[InpaintRequest]) -> list[tuple[int, int]]:
    """Requests that arrive one at each tick, until all are done; every tick leaves what one as anywhere leaves.

    Returns:
        Of each tick, its rows and how many were computed.
    """
    ours, theirs = bench.slots(requests), bench.slots(requests)
    arrivals = [index for index, request in enumerate(requests) for _ in range(request.params.num_images_per_prompt)]
    ticks: list[tuple[int, int]] = []
    batch = reference = SlotBatch.gather(ours[:1], CPU)
    for now in itertools.count():
        running = [index for index, slot in enumerate(ours) if arrivals[index] <= now and slot.call < slot.num_calls]
        if not running:
            return ticks
        if batch.slots != tuple(ours[index] for index in running):
            batch = SlotBatch.gather([ours[index] for index in running], CPU)
        reference = SlotBatch.gather([theirs[index] for index in running], CPU)
        assert captured.fits(batch)
        ticks.append((batch.num_rows, captured.tick(batch)))
        bench.tick(reference)
        assert_same_slots(batch.slots, reference.slots)
    raise AssertionError


def test_ticks_in_buffers_equal_ticks_anywhere(bench: Bench) -> None:
    """Whatever shares the batch, and whoever joins and leaves it: each image's every step is the same."""
    captured = bench.captured(2, 4, 8, 12)
    assert captured.buckets == [2, 4, 8, 12]
    slots = bench.slots(mixed())
    assert {slot.instance is None for slot in slots} == {True, False}
    assert {len(slot.embeds) for slot in slots} == {1, 2}
    ticks = run_beside(bench, captured, mixed())
    assert {computed for _, computed in ticks} == {2, 4, 8, 12}
    assert any(rows < computed for rows, computed in ticks)
    assert any(rows == computed for rows, computed in ticks)
    # It shrinks as well as grows.
    assert any(one[1] > other[1] for one, other in itertools.pairwise(ticks))
    assert any(one[1] < other[1] for one, other in itertools.pairwise(ticks))


def test_schedulers_that_threshold_run_beside_tables(bench: Bench) -> None:
    """Where steps are not linear each image has its scheduler, which may keep what the UNet said."""
    scheduler = DDIMScheduler.from_config(bench.pipeline.components.scheduler.config, thresholding=True)
    components = dataclasses.replace(bench.pipeline.components, scheduler=scheduler)
    other = Bench(InpaintPipeline(components, "flag"))
    requests = [
        MODEL.request(scheduler=name, num_inference_steps=4, seed=seed)
        for seed, name in enumerate(("dpmpp_2m", "unipc", "euler", "deis", "ddim"))
    ]
    slots = other.slots(requests)
    assert [slot.instance is None for slot in slots] == [False, False, True, False, False]
    run_beside(other, other.captured(2, 4, 6, 8, 12), requests)


def test_batches_that_take_turns_do_not_see_each_other(bench: Bench) -> None:
    """Two batches of as many rows, another one in between: each finds its own prompts, masks and guidance."""
    requests = [
        [MODEL.request(seed=1, prompt="a red house"), MODEL.request(seed=2, scheduler="euler_a")],
        [MODEL.request(seed=3, prompt="nothing", guidance_scale=2.0), MODEL.request(seed=4, prompt="a green tree")],
        [MODEL.request(seed=5, guidance_scale=1.0)],
    ]
    captured = bench.captured(2, 4)
    batches, references = ([bench.batch(own) for own in requests] for _ in range(2))
    for _ in range(3):
        for batch, reference in zip(batches, references, strict=True):
            captured.tick(batch)
            bench.tick(reference)
            assert_same_slots(batch.slots, reference.slots)


def test_new_batch_is_loaded_also_where_the_old_one_lay(bench: Bench) -> None:
    """A batch that is gone is not taken for the next one, though that has its place in memory."""
    recorder = Recorder(bench.predict)
    captured = bench.captured(2, predict=recorder)
    for prompt in ("a", "b c", "d e f", "g", "h i", "j k l"):
        slots = bench.slots([MODEL.request(prompt=prompt)])
        captured.tick(SlotBatch.gather(slots, CPU))
        _, _, embeds = recorder.calls[-1]
        assert torch.equal(embeds, torch.stack(slots[0].embeds))


def test_last_row_fills_up(bench: Bench) -> None:
    """The rows that nobody asked for are copies: no number of an earlier batch can spoil the UNet's call."""
    recorder = Recorder(bench.predict)
    captured = bench.captured(2, 10, predict=recorder)
    captured.tick(bench.batch([MODEL.request(seed=seed) for seed in range(5)]))
    batch = bench.batch([MODEL.request(seed=8, strength=0.5), MODEL.request(prompt="nothing", guidance_scale=1.0)])
    assert captured.tick(batch) == 10
    for given in recorder.calls[-1]:
        assert len(given) == 10
        assert not torch.equal(given[1], given[2])
        assert torch.equal(given[3:], given[2:3].expand(7, *given.shape[1:]))


def test_numbers_that_are_none_do_not_spread(bench: Bench) -> None:
    """What an image that went wrong leaves in the buffers reaches no image of a later batch."""
    captured = bench.captured(6)
    sick = bench.batch([MODEL.request(seed=seed, scheduler="euler_a") for seed in range(3)])
    for slot in sick.slots:
        slot.state = torch.full_like(slot.state, torch.nan)
    captured.tick(sick)
    assert all(slot.state.isnan().any() for slot in sick.slots)
    requests = [MODEL.request(seed=7, scheduler="euler_a", guidance_scale=1.0)]
    batch, reference = bench.batch(requests), bench.batch(requests)
    captured.tick(batch)
    bench.tick(reference)
    assert_same_slots(batch.slots, reference.slots)


def test_guess_for_a_preview_outlives_the_next_tick(bench: Bench) -> None:
    """Another thread may still make a picture of it, while the buffers have something else."""
    captured = bench.captured(4)
    batch = bench.batch([MODEL.request(previews=True), MODEL.request(seed=3)])
    captured.tick(batch)
    guess = batch.slots[0].estimate
    assert guess is not None
    assert batch.slots[1].estimate is None
    latents, output = guess.latents.clone(), guess.output.clone()
    captured.tick(batch)
    captured.tick(bench.batch([MODEL.request(seed=5, previews=True)]))
    assert batch.slots[0].estimate is not guess
    assert torch.equal(guess.latents, latents)
    assert torch.equal(guess.output, output)


def test_states_outlive_the_next_tick(bench: Bench) -> None:
    """What an image has become is its own, not the buffers'."""
    captured = bench.captured(4)
    batch = bench.batch([MODEL.request(), MODEL.request(seed=3)])
    captured.tick(batch)
    states = [slot.state.clone() for slot in batch.slots]
    captured.tick(bench.batch([MODEL.request(seed=5), MODEL.request(seed=6)]))
    assert all(torch.equal(slot.state, state) for slot, state in zip(batch.slots, states, strict=True))


# --- what does not fit -------------------------------------------------------


def test_nothing_fits_before_anything_is_captured(bench: Bench) -> None:
    batch = bench.batch([MODEL.request()])
    empty = CapturedTicks(bench.predict, bench.pipeline._tick_shape(), CPU, torch.float32, 4)
    assert empty.buckets == []
    assert not empty.fits(batch)
    empty.capture(2)
    assert empty.fits(batch)


def test_only_so_many_rows_fit(bench: Bench) -> None:
    """As many as the largest that is captured, counted in rows and not in images."""
    captured = bench.captured(2, 6)
    assert captured.fits(bench.batch([MODEL.request(seed=seed) for seed in range(3)]))
    assert not captured.fits(bench.batch([MODEL.request(seed=seed) for seed in range(4)]))
    assert captured.fits(bench.batch([MODEL.request(guidance_scale=1.0, num_images_per_prompt=6)]))
    assert not captured.fits(bench.batch([MODEL.request(guidance_scale=1.0, num_images_per_prompt=7)]))


@pytest.mark.parametrize("side", ["height", "width"])
def test_other_size_does_not_fit(bench: Bench, side: str) -> None:
    assert not bench.captured(4).fits(bench.batch([MODEL.request(**{side: NATIVE_SIZE + 8})]))


def test_prompts_of_other_lengths_do_not_fit(bench: Bench) -> None:
    """Neither fewer or more tokens, nor tokens that are masked."""
    captured = bench.captured(4)

    def of(num_tokens: int) -> InpaintRequest:
        embeds = InpaintTensors(prompt_embeds=MODEL.embeds(num_tokens))
        return MODEL.request(tensors=embeds, guidance_scale=1.0)

    assert captured.fits(bench.batch([of(77)]))
    for num_tokens in (40, 154):
        batch = bench.batch([of(num_tokens)])
        assert batch.embeds_mask is None
        assert not captured.fits(batch)
        assert not captured.fits(bench.batch([of(num_tokens), MODEL.request()]))


@pytest.mark.parametrize(
    "change",
    [
        lambda batch: {"embeds_mask": torch.ones(batch.embeds.shape[:2])},
        lambda batch: {"timestep_cond": torch.zeros(batch.num_rows, 32)},
        lambda batch: {"image_tokens": torch.zeros(batch.num_rows, 4, 32)},
        lambda batch: {"embeds": batch.embeds[..., :16]},
        lambda batch: {"conditioning": torch.zeros(batch.num_rows, 3, *batch.slots[0].latents.shape[1:])},
    ],
    ids=["masked tokens", "guidance as an input", "picture's tokens", "narrower prompts", "other conditioning"],
)
def test_what_has_no_place_in_the_buffers_does_not_fit(
    bench: Bench, change: Callable[[SlotBatch], dict[str, Any]]
) -> None:
    """An input that a graph does not read would be ignored in silence."""
    captured, batch = bench.captured(4), bench.batch([MODEL.request()])
    assert captured.fits(batch)
    assert not captured.fits(dataclasses.replace(batch, **change(batch)))


def test_conditioning_must_be_there(inpainting_checkpoint: Any, plain_checkpoint: Any) -> None:
    """A UNet of 9 channels does not take the batch of one of 4, nor the other way round."""
    nine, four = (
        Bench(InpaintPipeline(load(Settings(model=str(folder)), CPU), "flag"))
        for folder in (inpainting_checkpoint, plain_checkpoint)
    )
    assert not nine.captured(2).fits(four.batch([MODEL.request()]))
    assert not four.captured(2).fits(nine.batch([MODEL.request()]))


# --- what goes wrong ---------------------------------------------------------


@dataclass(frozen=True)
class Before:
    """What a slot is before a tick."""

    slot: Slot
    state: torch.Tensor
    copy: torch.Tensor
    call: int
    estimate: object

    @classmethod
    def of(cls, slot: Slot) -> "Before":
        """As it is."""
        return cls(slot, slot.state, slot.state.clone(), slot.call, slot.estimate)

    def assert_still(self) -> None:
        """Nothing of it has changed."""
        assert self.slot.state is self.state
        assert torch.equal(self.state, self.copy)
        assert self.slot.call == self.call
        assert self.slot.estimate is self.estimate


FRAGILE = [
    MODEL.request(previews=True),
    MODEL.request(scheduler="euler_a", seed=1, guidance_scale=1.0),
    MODEL.request(scheduler="dpmpp_sde", seed=2),
    MODEL.request(scheduler="dpmpp_sde_karras", seed=3, previews=True),
]


def test_failed_tick_changes_nothing_and_can_be_tried_with_fewer(bench: Bench) -> None:
    """Memory that runs out in the UNet: every image goes on as if it had not, also those that draw noise."""
    predict, is_failing = bench.predict, False

    def fail_at_times(rows: torch.Tensor, timesteps: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        if is_failing:
            raise torch.OutOfMemoryError
        return predict(rows, timesteps, embeds)

    captured = bench.captured(2, 4, 8, predict=fail_at_times)
    batch, reference = bench.batch(FRAGILE), bench.batch(FRAGILE)
    captured.tick(batch)
    bench.tick(reference)
    before = [Before.of(slot) for slot in batch.slots]
    is_failing = True
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            captured.tick(batch)
        for each in before:
            each.assert_still()
    is_failing = False
    for half in (batch.slots[:1], batch.slots[1:]):
        captured.tick(SlotBatch.gather(half, CPU))
    bench.tick(reference)
    assert_same_slots(batch.slots, reference.slots)


def test_failed_scheduler_changes_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """One image's own scheduler raises after another's has stepped: neither steps twice."""
    captured = bench.captured(8)
    batch, reference = bench.batch(FRAGILE), bench.batch(FRAGILE)
    before = [Before.of(slot) for slot in batch.slots]

    def fail(*_: object) -> None:
        raise RuntimeError("no step")

    with monkeypatch.context() as patch:
        patch.setattr(batch.slots[-1].instance, "step", fail)
        with pytest.raises(RuntimeError, match="no step"):
            captured.tick(batch)
    for each in before:
        each.assert_still()
    for _ in range(2):
        captured.tick(batch)
        bench.tick(reference)
    assert_same_slots(batch.slots, reference.slots)
