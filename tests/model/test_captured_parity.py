"""A worker whose ticks are computed in buffers paints what stock paints, whatever takes another way in between."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from service.request import InpaintRequest, InpaintTensors
from service.settings import Settings
from service.worker import pipeline as worker_pipeline
from service.worker.captured import CapturedTicks
from service.worker.checkpoint import load
from service.worker.pipeline import InpaintPipeline
from service.worker.schedulers import scheduler_names
from tests.model.checkpoints import NATIVE_SIZE
from tests.model.lora_files import make_lora
from tests.model.mixed_requests import mixed_requests
from tests.model.rows import FREEU, Model
from tests.model.staggered import run_staggered
from tests.model.stock import Stock

pytestmark = pytest.mark.filterwarnings("ignore:Should have t:UserWarning")  # torchsde, of times rounded to float32

MAX_ROWS = 8
"""Fewer than the batches have at times."""


def open_pipeline(folder: Path) -> InpaintPipeline:
    return InpaintPipeline(load(Settings(model=str(folder)), torch.device("cpu")), "black")


def ignore(_num_rows: int) -> None:
    """Nobody wants to know."""


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> Callable[[], int]:
    """How often a function has been called since."""
    function, calls = getattr(owner, name), list[str]()

    def counted(*args: object) -> object:
        calls.append(name)
        return function(*args)

    monkeypatch.setattr(owner, name, counted)
    return lambda: len(calls)


def interspersed(requests: list[InpaintRequest], others: list[InpaintRequest]) -> list[InpaintRequest]:
    """The others among the requests, two after two."""
    mixed = []
    for index in range(0, max(len(requests), len(others)), 2):
        mixed += [*requests[index : index + 2], *others[index : index + 2]]
    return mixed


@pytest.mark.parametrize("checkpoint", ["inpainting_checkpoint", "plain_checkpoint"])
def test_mixed_staggered_batch_equals_stock_run_alone(
    checkpoint: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is within 1 of 255 of stock alone: in buffers, in too large a batch for them, with LoRAs, with FreeU."""
    folder = request.getfixturevalue(checkpoint)
    stock = Stock(folder)
    loras = {
        name: make_lora(tmp_path / f"{name}.safetensors", stock.pipeline, name, seed=seed)
        for seed, name in enumerate(("kohya", "locon"))
    }
    model = Model(NATIVE_SIZE, width=32, loras=loras, scheduler="dpmpp_2m")
    others = [
        model.request(loras=(model.lora(0, 0.8),), num_inference_steps=6),
        model.request(freeu=FREEU, num_inference_steps=6),
        model.request(loras=(model.lora(1, -0.6), model.lora(0, 0.5)), scheduler="euler_a", seed=2),
        model.request(freeu=FREEU, loras=(model.lora(0, 0.8),), guidance_scale=1.0),
        model.request(tensors=InpaintTensors(prompt_embeds=model.embeds(40)), seed=3),
        model.request(loras=(model.lora(0, 0.8),), scheduler="dpmpp_sde", num_images_per_prompt=2),
    ]
    requests = interspersed(mixed_requests(scheduler_names()[::6], 10, NATIVE_SIZE, seed=7), others)

    pipeline = open_pipeline(folder)
    pipeline.capture_ticks(MAX_ROWS, is_compiled=False, on_rows=ignore)
    num_captured = count_calls(monkeypatch, CapturedTicks, "tick")
    num_others = count_calls(monkeypatch, worker_pipeline, "tick")
    results, ticks = run_staggered(pipeline, requests)

    assert num_captured() + num_others() == len(ticks)
    assert min(num_captured(), num_others()) >= len(ticks) // 4
    assert max(tick.rows for tick in ticks) > MAX_ROWS
    off = {}
    for index, one in enumerate(requests):
        expected, flags = stock(one)
        result = results[str(index)]
        assert result.nsfw == tuple(flags)
        difference = int(np.abs(result.images.astype(int) - expected.astype(int)).max())
        if difference > 1:
            off[f"{index}: {one.params}"] = difference
    assert not off


# --- how much is captured ----------------------------------------------------


def capture_up_to(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Have memory for ticks of so many rows and no more."""
    capture = CapturedTicks.capture

    def short(self: CapturedTicks, num_rows: int) -> float:
        if num_rows > most:
            raise torch.OutOfMemoryError
        return capture(self, num_rows)

    monkeypatch.setattr(CapturedTicks, "capture", short)


@pytest.mark.parametrize(("most", "captured"), [(8, [2, 4, 6, 8]), (5, [2, 4]), (0, [])])
def test_as_much_is_captured_as_memory_allows(
    inpainting_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, most: int, captured: list[int]
) -> None:
    """The largest first; those that do not fit are left out, and such batches go the other way."""
    capture_up_to(monkeypatch, most)
    pipeline = open_pipeline(inpainting_checkpoint)
    told: list[int] = []
    pipeline.capture_ticks(8, is_compiled=False, on_rows=told.append)
    assert told == [8, 6, 4, 2]
    assert sorted(pipeline.captured_seconds) == captured
    requests = mixed_requests(("ddim", "euler_a"), 4, NATIVE_SIZE, seed=3)
    results, _ = run_staggered(pipeline, requests)
    others, _ = run_staggered(open_pipeline(inpainting_checkpoint), requests)
    for index, result in results.items():
        assert np.abs(result.images.astype(int) - others[index].images.astype(int)).max() <= 1


def test_failed_compilation_changes_nothing(inpainting_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was captured before stays in use."""
    pipeline = open_pipeline(inpainting_checkpoint)
    pipeline.capture_ticks(4, is_compiled=False, on_rows=ignore)
    before = pipeline._captured

    def predictor(*_: object, **__: object) -> Callable[..., torch.Tensor]:
        def fail(*_: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no compiler")

        return fail

    monkeypatch.setattr(worker_pipeline, "noise_predictor", predictor)
    with pytest.raises(RuntimeError, match="no compiler"):
        pipeline.capture_ticks(8, is_compiled=True, on_rows=ignore)
    assert pipeline._captured is before
    assert sorted(pipeline.captured_seconds) == [2, 4]
