"""What happens when the device has too little memory."""

from pathlib import Path

import numpy as np
import pytest
import torch

from service.request import InpaintRequest
from service.settings import Settings
from service.worker import pipeline as worker_pipeline
from service.worker.batcher import Generation
from service.worker.checkpoint import load
from service.worker.faults import BatchTooLarge
from service.worker.pipeline import InpaintPipeline
from tests.model.checkpoints import NATIVE_SIZE
from tests.model.lora_files import make_lora
from tests.model.rows import Model
from tests.model.staggered import run_staggered
from tests.model.stock import Stock


@pytest.fixture
def pipeline(inpainting_checkpoint: Path) -> InpaintPipeline:
    """A worker's pipeline that keeps nothing yet."""
    return InpaintPipeline(load(Settings(model=str(inpainting_checkpoint)), torch.device("cpu")), "black")


@pytest.fixture(scope="module")
def request_with_lora(inpainting_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> InpaintRequest:
    """A request whose LoRA's merged weights are kept."""
    stock = Stock(inpainting_checkpoint)
    path = make_lora(tmp_path_factory.mktemp("loras") / "kohya.safetensors", stock.pipeline, "kohya", seed=1)
    model = Model(NATIVE_SIZE, width=32, loras={"kohya": path}, scheduler="ddim")
    return model.request(loras=(model.lora(0, 0.8),))


class ShortMemory:
    """A tick that lacks memory at its first calls."""

    def __init__(self, num_failures: int) -> None:
        self.num_failures = num_failures
        self.num_calls = 0
        self._tick = worker_pipeline.tick

    def __call__(self, *args: object) -> None:
        """A tick, or none."""
        self.num_calls += 1
        if self.num_calls <= self.num_failures:
            raise torch.OutOfMemoryError
        self._tick(*args)  # type: ignore[arg-type]


def test_kept_weights_make_room_for_a_request(
    pipeline: InpaintPipeline, request_with_lora: InpaintRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is tried again without them, and the result is the same."""
    expected = run_staggered(pipeline, [request_with_lora])[0]["0"].images
    short = ShortMemory(num_failures=1)
    monkeypatch.setattr(worker_pipeline, "tick", short)
    assert np.array_equal(run_staggered(pipeline, [request_with_lora])[0]["0"].images, expected)
    assert short.num_calls == request_with_lora.params.num_inference_steps + 1


def test_batch_is_too_large_once_there_is_nothing_to_let_go(
    pipeline: InpaintPipeline, request_with_lora: InpaintRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more try, and no further one before the batch is made smaller."""
    generation = Generation("one", request_with_lora)
    pipeline.prepare([generation])
    short = ShortMemory(num_failures=3)
    monkeypatch.setattr(worker_pipeline, "tick", short)
    for num_calls in (2, 3):
        with pytest.raises(BatchTooLarge):
            pipeline.step([generation])
        assert short.num_calls == num_calls
    pipeline.step([generation])
