"""On a GPU in fp16: no further from the fp32 stock result than the fp16 stock result is."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from service.request import InpaintRequest, InpaintResult, IpAdapterUse
from service.settings import Settings
from service.worker.checkpoint import load
from service.worker.checkpoint_source import BUNDLED_FOLDER
from service.worker.pipeline import InpaintPipeline
from service.worker.schedulers import scheduler_names
from tests.model.ip_adapter_files import make_image_encoder, make_ip_adapter
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

CHECKER_SIDE = 96
"""Pixels that the bundled model's safety checker looks at, with a feature extractor that the IP-Adapter shares."""


def stock(dtype: torch.dtype, ip_adapter: Path | None = None) -> Stock:
    """The stock pipeline on the GPU."""
    reference = Stock(BUNDLED_FOLDER, ip_adapter=ip_adapter)
    reference.pipeline.to("cuda", dtype)
    reference.pipeline.safety_checker = None
    return reference


def pictured_requests() -> list[InpaintRequest]:
    """Requests that paint by pictures, and one that does not."""
    model = Model(256, 192, {}, scheduler="dpmpp_2m")
    shape = (1, (CHECKER_SIDE // 6) ** 2 + 1)
    request = model.request(ip_adapter=IpAdapterUse(0.6, embeds_shape=shape), num_inference_steps=8)
    unguided = model.request(ip_adapter=request.params.ip_adapter, num_inference_steps=6, guidance_scale=1.0)
    weaker = model.request(ip_adapter=IpAdapterUse(0.3, embeds_shape=shape), scheduler="euler_a")
    return [
        *(dataclasses.replace(each, ip_adapter_image=each.image) for each in (request, unguided, weaker)),
        dataclasses.replace(request, ip_adapter_image=255 - request.image),
        model.request(num_inference_steps=7),
    ]


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

    assert_no_further(requests, results, stock(torch.float16), stock(torch.float32))


def test_ip_adapter_is_no_further_from_fp32_stock_than_fp16_stock(tmp_path: Path) -> None:
    """The same of requests with pictures, in turns with one that has none; adapter and image encoder are random."""
    components = load(Settings(), torch.device("cpu"))
    names = [name for name in components.unet.attn_processors if "attn2" in name]
    widths = [components.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features for name in names]
    ip_adapter = make_ip_adapter(tmp_path / "plus.safetensors", "plus", tuple(widths), width=192)
    make_image_encoder(tmp_path / "image_encoder", image_size=CHECKER_SIDE)
    settings = Settings(devices=("cuda:0",), ip_adapter=ip_adapter)
    pipeline = InpaintPipeline(load(settings, torch.device("cuda:0")), "flag")
    requests = pictured_requests()
    results, ticks = run_staggered(pipeline, requests)
    assert max(tick.images for tick in ticks) >= 2
    assert_no_further(requests, results, stock(torch.float16, ip_adapter), stock(torch.float32, ip_adapter))


def assert_no_further(
    requests: Sequence[InpaintRequest], results: Mapping[str, InpaintResult], half: Stock, full: Stock
) -> None:
    """Our results are as near to stock's in fp32 as stock's in fp16 are."""
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
