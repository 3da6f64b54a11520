"""Results equal the stock pipeline's, whatever else is in the batch."""

from pathlib import Path

import numpy as np
import pytest
import torch

from service.messages import Drain, Failed, Finished, Report, Submit, Ticked
from service.request import InpaintRequest, InpaintResult
from service.settings import Settings
from service.worker.checkpoint import BUNDLED_FOLDER, load
from service.worker.pipeline import InpaintPipeline
from service.worker.schedulers import scheduler_names
from tests.model.checkpoints import NATIVE_SIZE
from tests.model.mixed_requests import mixed_requests
from tests.model.stock import Stock
from tests.unit.fake_pipeline import DrivenWorker

TOLERANCE = 1
"""Of 255, per channel: a value on the edge of two integers may round either way."""


def run_staggered(
    folder: Path, requests: list[InpaintRequest], *, max_images: int = 12
) -> tuple[dict[str, InpaintResult], list[Ticked]]:
    """Send requests to a real worker while earlier ones run: one more after each step."""
    settings = Settings(model=str(folder), nsfw_policy="black")
    pipeline = InpaintPipeline(load(settings, torch.device("cpu")), settings.nsfw_policy)
    worker = DrivenWorker(pipeline, max_images)
    pending = [Submit(str(index), request) for index, request in enumerate(requests)]
    worker.send(pending.pop(0))
    worker.start()
    reports: list[Report] = []
    while pending:
        reports.append(worker.receive())
        assert not isinstance(reports[-1], Failed), reports[-1]
        if isinstance(reports[-1], Ticked | Finished):
            worker.send(pending.pop(0))
    worker.send(Drain())
    reports += worker.reports()
    assert not [report for report in reports if isinstance(report, Failed)]
    results = {report.request_id: report.result for report in reports if isinstance(report, Finished)}
    return results, [report for report in reports if isinstance(report, Ticked)]


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
    results, ticks = run_staggered(folder, requests)

    assert len(results) == len(requests)
    assert max(tick.images for tick in ticks) >= 6, "the requests did not share steps"
    stock = Stock(folder)
    off = {name: value for name, value in differences(stock, requests, results).items() if value > TOLERANCE}
    assert not off
    # The comparison means something: a second seed gives another picture.
    many = next(result.images for result in results.values() if len(result.images) > 1)
    assert np.abs(many[0].astype(int) - many[1].astype(int)).max() > TOLERANCE


def test_bundled_model_equals_stock_run_alone() -> None:
    """The model that ships, too: a mixed batch at its own size, each within 1 of 255 of stock alone."""
    schedulers = ("dpmpp_2m", "euler_a", "pndm", "ddim", "unipc", "heun")
    requests = [one for one in mixed_requests(schedulers, 24, 256, seed=2) if one.params.num_images_per_prompt == 1][:8]
    results, ticks = run_staggered(BUNDLED_FOLDER, requests)
    assert max(tick.images for tick in ticks) >= 3
    off = {name: value for name, value in differences(Stock(BUNDLED_FOLDER), requests, results).items() if value > 1}
    assert not off
