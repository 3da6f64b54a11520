"""Results equal the stock pipeline's, whatever else is in the batch."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from service.messages import Ticked
from service.request import InpaintRequest, InpaintResult
from service.settings import Settings
from service.worker.checkpoint import load
from service.worker.checkpoint_source import BUNDLED_FOLDER
from service.worker.pipeline import InpaintPipeline
from service.worker.schedulers import scheduler_names
from tests.model.checkpoints import NATIVE_SIZE
from tests.model.mixed_requests import mixed_requests
from tests.model.staggered import run_staggered
from tests.model.stock import Stock

TOLERANCE = 1
"""Of 255, per channel: a value on the edge of two integers may round either way."""


def run(folder: Path, requests: list[InpaintRequest]) -> tuple[dict[str, InpaintResult], list[Ticked]]:
    """Through a worker on the CPU in float32."""
    settings = Settings(model=str(folder))
    return run_staggered(InpaintPipeline(load(settings, torch.device("cpu")), "black"), requests)


def differences(stock: Stock, requests: list[InpaintRequest], results: dict[str, InpaintResult]) -> dict[str, int]:
    """Largest difference per request, named by what it asked for."""
    found = {}
    for index, request in enumerate(requests):
        expected, flags = stock(request)
        result = results[str(index)]
        assert result.nsfw == tuple(flags)
        difference = np.abs(result.images.astype(int) - expected.astype(int)).max()
        found[f"{index}: {request.params}"] = int(difference)
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize("checkpoint", ["inpainting_checkpoint", "plain_checkpoint"])
def test_mixed_staggered_batch_equals_stock_run_alone(checkpoint: str, request: pytest.FixtureRequest) -> None:
    """At least 40 requests of every scheduler in one running batch: each is within 1 of 255 of stock alone."""
    folder = request.getfixturevalue(checkpoint)
    requests = mixed_requests(scheduler_names(), 48, NATIVE_SIZE)
    results, ticks = run(folder, requests)

    assert len(results) == len(requests)
    assert max(tick.images for tick in ticks) >= 6, "the requests did not share steps"
    stock = Stock(folder)
    off = {name: value for name, value in differences(stock, requests, results).items() if value > TOLERANCE}
    assert not off
    # The comparison means something: a second seed gives another picture.
    many = next(result.images for result in results.values() if len(result.images) > 1)
    assert np.abs(many[0].astype(int) - many[1].astype(int)).max() > TOLERANCE


def test_solo_request_is_bitwise_repeatable_in_any_company(inpainting_checkpoint: Path) -> None:
    """A request with a batch of its own gives the very same bytes, whatever runs beside it."""
    company = mixed_requests(("ddim", "euler_a", "unipc"), 12, NATIVE_SIZE, seed=4)
    template = next(one for one in company if one.params.num_images_per_prompt == 1)
    solo = dataclasses.replace(template, params=dataclasses.replace(template.params, batching="solo", clip_skip=0))
    alone, _ = run(inpainting_checkpoint, [solo])
    among, _ = run(inpainting_checkpoint, [*company[:5], solo, *company[5:], solo])
    assert np.array_equal(among["5"].images, alone["0"].images)
    assert np.array_equal(among["13"].images, alone["0"].images)


def test_bundled_model_equals_stock_run_alone() -> None:
    """The model that ships, too: a mixed batch at its own size, each within 1 of 255 of stock alone."""
    schedulers = ("dpmpp_2m", "euler_a", "pndm", "ddim", "unipc", "heun")
    requests = [one for one in mixed_requests(schedulers, 24, 256, seed=2) if one.params.num_images_per_prompt == 1][:6]
    results, ticks = run(BUNDLED_FOLDER, requests)
    assert max(tick.images for tick in ticks) >= 3
    off = {name: value for name, value in differences(Stock(BUNDLED_FOLDER), requests, results).items() if value > 1}
    assert not off
