"""On a GPU in fp16: no further from the fp32 stock result than the fp16 stock result is."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline

from service.request import InpaintRequest
from service.settings import Settings
from service.worker.checkpoint import BUNDLED_FOLDER, load
from service.worker.pipeline import InpaintPipeline
from service.worker.schedulers import scheduler_names
from tests.model.mixed_requests import mixed_requests
from tests.model.rows import FREEU, Model
from tests.model.staggered import run_staggered
from tests.model.stock import Stock

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(900),
]

NOISE_SENSITIVE = 1.1
"""Two fp16 results differ from the fp32 one by rounding alone; which is closer is chance within this factor."""


def stock(dtype: torch.dtype, folder: Path = BUNDLED_FOLDER) -> Stock:
    """The stock pipeline on the GPU."""
    reference = Stock(folder)
    reference.pipeline.to("cuda", dtype)
    return reference


def adapted_requests() -> list[InpaintRequest]:
    """Requests that change the weights: the example LoRA at two scales, FreeU, both."""
    model = Model(256, 192, {"pencil": BUNDLED_FOLDER.parent / "loras" / "pencil.safetensors"}, scheduler="dpmpp_2m")
    lora, weaker = (model.lora(0, 1.0),), (model.lora(0, 0.5),)
    return [
        model.request(loras=lora, num_inference_steps=8),
        model.request(loras=lora, num_inference_steps=6, guidance_scale=1.0),
        model.request(loras=weaker, num_inference_steps=7, scheduler="euler_a"),
        model.request(freeu=FREEU, num_inference_steps=8),
        model.request(freeu=FREEU, loras=lora, num_inference_steps=5),
    ]


def test_mixed_batch_is_no_further_from_fp32_stock_than_fp16_stock() -> None:
    """Compiled or not, padded and mixed with others, a request's picture is as good as stock's own in fp16."""
    settings = Settings(devices=("cuda:0",))
    pipeline = InpaintPipeline(load(settings, torch.device("cuda:0")), "flag")
    requests = [*mixed_requests(scheduler_names()[::3], 24, 256), *adapted_requests()]
    results, ticks = run_staggered(pipeline, requests, max_images=13)
    assert max(tick.images for tick in ticks) >= 6

    half, full = stock(torch.float16), stock(torch.float32)
    for reference in (half, full):
        reference.pipeline.safety_checker = None
        assert isinstance(reference.pipeline, StableDiffusionInpaintPipeline)
    ours_error, half_error = [], []
    for index, request in enumerate(requests):
        expected = full(request)[0].astype(float)
        ours_error.append(np.abs(results[str(index)].images - expected).mean())
        half_error.append(np.abs(half(request)[0] - expected).mean())
    print(
        f"mean |error| of 255 against fp32 stock: ours {np.mean(ours_error):.4f}, fp16 stock {np.mean(half_error):.4f}"
    )
    assert np.mean(ours_error) <= NOISE_SENSITIVE * np.mean(half_error)
    assert np.median(ours_error) <= NOISE_SENSITIVE * np.median(half_error)
