"""On a GPU in fp16: no further from the fp32 stock result than the fp16 stock result is."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from service.request import InpaintRequest, InpaintResult, IpAdapterUse, Pixels
from service.settings import Settings
from service.worker.background import InlineJobs, Jobs, ThreadedJobs
from service.worker.batcher import Generation
from service.worker.captured import CapturedTicks
from service.worker.checkpoint import load
from service.worker.checkpoint_source import BUNDLED_FOLDER
from service.worker.pipeline import InpaintPipeline
from service.worker.schedulers import scheduler_names
from service.worker.slots import SlotBatch
from service.worker.stages import Finish
from service.worker.warm_up import warm_up
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


@pytest.fixture(scope="module")
def warm() -> InpaintPipeline:
    """Compiled and captured, as it is served by default."""
    settings = Settings(devices=("cuda:0",))
    pipeline = InpaintPipeline(load(settings, torch.device("cuda:0")), "flag")
    warm_up(pipeline, settings)
    return pipeline


def as_loaded() -> InpaintPipeline:
    """Neither compiled nor captured."""
    return InpaintPipeline(load(Settings(devices=("cuda:0",)), torch.device("cuda:0")), "flag")


@pytest.mark.parametrize("is_warm", [True, False], ids=["captured", "as-loaded"])
@pytest.mark.parametrize("jobs", [ThreadedJobs, InlineJobs])
def test_mixed_batch_is_no_further_from_fp32_stock_than_fp16_stock(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, is_warm: bool, jobs: Callable[[], Jobs]
) -> None:
    """Compiled or not, padded and mixed with others, a request's picture is as good as stock's own in fp16."""
    pipeline = request.getfixturevalue("warm") if is_warm else as_loaded()
    num_captured = count_captured(monkeypatch)
    requests = [*mixed_requests(scheduler_names()[::3], 24, 256), *adapted_requests()]
    results, ticks = run_staggered(pipeline, requests, max_images=13, jobs=jobs())
    assert max(tick.images for tick in ticks) >= 6
    assert num_captured() >= (len(ticks) // 3 if is_warm else 0)

    assert_no_further(requests, images_of(results), stock(torch.float16), stock(torch.float32))


def test_each_number_of_rows_is_no_further_from_fp32_stock_than_fp16_stock(warm: InpaintPipeline) -> None:
    """Batches of one image to the most that are captured, with and without guidance: full ones and padded ones."""
    model = Model(256, 192, {}, scheduler="dpmpp_2m")
    half, full = stock(torch.float16), stock(torch.float32)
    for num_images in (1, 2, 3, 5, 8, 11, 16):
        requests = [
            model.request(num_inference_steps=6, seed=seed, guidance_scale=1.0 if seed % 5 == 4 else 6.0)
            for seed in range(num_images)
        ]
        generations = [Generation(str(seed), request) for seed, request in enumerate(requests)]
        warm.prepare(generations)
        while not generations[0].is_denoised:
            warm.step(generations)
            for generation in generations:
                generation.steps_done += 1
        pictures = [finish.images for finish in warm.finish(generations) if isinstance(finish, Finish)]
        results = {str(index): np.asarray(images, np.uint8) for index, images in enumerate(pictures)}
        print(f"{num_images} images:", end=" ")
        assert_no_further(requests, results, half, full)


def test_solo_requests_are_repeatable_to_the_bit(warm: InpaintPipeline) -> None:
    """Whatever else runs."""
    model = Model(256, 192, {}, scheduler="euler_a")
    solo = model.request(num_inference_steps=8, seed=7, batching="solo")
    others = [model.request(num_inference_steps=5 + index, seed=index) for index in range(6)]
    requests = [solo, *others[:3], solo, *others[3:], solo]
    results, _ = run_staggered(warm, requests, max_images=8, jobs=ThreadedJobs())
    first, *later = (results[str(index)].images for index, request in enumerate(requests) if request is solo)
    assert len(later) == 2
    assert all(np.array_equal(first, images) for images in later)


def test_overflow_is_decoded_in_float32(warm: InpaintPipeline) -> None:
    """Latents that fp16 cannot decode give a picture, whose neighbour's is untouched; the memory it took is free."""
    model = Model(256, 192, {}, scheduler="ddim")
    generations = [Generation(str(seed), model.request(seed=seed)) for seed in range(2)]
    warm.prepare(generations)
    _, expected = warm.finish(generations)
    allocated = torch.cuda.memory_allocated()
    with torch.inference_mode():
        generations[0].latents.slots[0].state[0] *= 1e6
    overflown, sound = warm.finish(generations)
    assert isinstance(overflown, Finish)
    assert isinstance(sound, Finish)
    assert isinstance(expected, Finish)
    assert overflown.images.any()
    assert np.array_equal(sound.images, expected.images)
    assert torch.cuda.memory_allocated() == allocated


def count_captured(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many ticks have been replayed since."""
    calls = []
    tick = CapturedTicks.tick

    def counted(self: CapturedTicks, batch: SlotBatch) -> int:
        calls.append(batch.num_rows)
        return tick(self, batch)

    monkeypatch.setattr(CapturedTicks, "tick", counted)
    return lambda: len(calls)


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
    results, ticks = run_staggered(pipeline, requests, jobs=ThreadedJobs())
    assert max(tick.images for tick in ticks) >= 2
    assert_no_further(requests, images_of(results), stock(torch.float16, ip_adapter), stock(torch.float32, ip_adapter))


def images_of(results: Mapping[str, InpaintResult]) -> dict[str, Pixels]:
    """The pictures of each request."""
    return {index: np.asarray(result.images, np.uint8) for index, result in results.items()}


def assert_no_further(
    requests: Sequence[InpaintRequest], results: Mapping[str, Pixels], half: Stock, full: Stock
) -> None:
    """Our results are as near to stock's in fp32 as stock's in fp16 are."""
    ours_error, half_error = [], []
    for index, request in enumerate(requests):
        expected = full(request)[0].astype(float)
        ours_error.append(np.abs(results[str(index)] - expected).mean())
        half_error.append(np.abs(half(request)[0] - expected).mean())
    print(
        f"mean |error| of 255 against fp32 stock: ours {np.mean(ours_error):.4f}, fp16 stock {np.mean(half_error):.4f}"
    )
    assert np.mean(ours_error) <= NOISE_SENSITIVE * np.mean(half_error)
    assert np.median(ours_error) <= NOISE_SENSITIVE * np.median(half_error)
