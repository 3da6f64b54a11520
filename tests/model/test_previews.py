"""Previews: the finished picture as unfinished steps guess it, and nothing that the checker would not pass."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from service.errors import ErrorCode
from service.messages import Drain, Failed, Submit, Ticked
from service.request import InpaintRequest, InpaintResult
from service.settings import Settings
from service.worker.checkpoint import load
from service.worker.checkpoint_source import BUNDLED_FOLDER
from service.worker.pipeline import InpaintPipeline
from tests.model.checkpoints import NATIVE_SIZE, make_checkpoint
from tests.model.mixed_requests import mixed_requests
from tests.model.staggered import run_staggered
from tests.unit.fake_pipeline import DrivenWorker


def run(
    folder: Path, requests: list[InpaintRequest]
) -> tuple[dict[str, InpaintResult], dict[str, list[NDArray[np.uint8]]]]:
    """Results, and every preview by request."""
    pipeline = InpaintPipeline(load(Settings(model=str(folder)), torch.device("cpu")), "black")
    results, ticks = run_staggered(pipeline, requests)
    return results, previews_of(ticks)


def previews_of(ticks: list[Ticked]) -> dict[str, list[NDArray[np.uint8]]]:
    found: dict[str, list[NDArray[np.uint8]]] = {}
    for tick in ticks:
        for progress in tick.progress:
            if progress.preview is not None:
                found.setdefault(progress.request_id, []).append(progress.preview)
    return found


def with_previews(request: InpaintRequest, **changes: object) -> InpaintRequest:
    return dataclasses.replace(request, params=dataclasses.replace(request.params, previews=True, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("scheduler", ["dpmpp_2m", "euler", "ddim", "heun", "lcm"])
def test_previews_approach_the_result(scheduler: str) -> None:
    """The last guess is close to the finished picture and much closer than the first, whatever the scheduler."""
    (template,) = mixed_requests((scheduler,), 1, 256)
    request = with_previews(
        template, num_inference_steps=8, strength=1.0, num_images_per_prompt=1, guidance_scale=4.0, clip_skip=0
    )
    results, previews = run(BUNDLED_FOLDER, [request])
    final = results["0"].images[0].astype(float)
    errors = [np.abs(preview.astype(float) - final).mean() for preview in previews["0"]]
    assert len(errors) >= 6
    assert errors[-1] < 6
    assert errors[-1] < errors[0] / 2


def test_previews_change_nothing(inpainting_checkpoint: Path) -> None:
    """A picture is the same with and without previews on the way."""
    requests = [
        dataclasses.replace(one, params=dataclasses.replace(one.params, batching="solo"))
        for one in mixed_requests(("euler_a", "ddim", "dpmpp_sde"), 3, NATIVE_SIZE, seed=3)
    ]
    plain, none = run(inpainting_checkpoint, requests)
    shown, some = run(inpainting_checkpoint, [with_previews(one) for one in requests])
    assert not none
    assert some
    for name, result in plain.items():
        assert np.array_equal(result.images, shown[name].images)


def test_flagged_guesses_are_not_shown(tmp_path: Path) -> None:
    """Where the checker flags every picture there is no preview."""
    folder = make_checkpoint(tmp_path / "strict", flags_everything=True)
    (request,) = mixed_requests(("ddim",), 1, NATIVE_SIZE)
    results, previews = run(folder, [with_previews(request, num_inference_steps=9)])
    assert all(results["0"].nsfw)
    assert not previews


def test_checker_that_fails_shows_nothing(inpainting_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No verdict, no preview; and the request ends with the error that says so."""
    components = load(Settings(model=str(inpainting_checkpoint)), torch.device("cpu"))
    pipeline = InpaintPipeline(components, "black")

    def fail(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("no verdict")

    monkeypatch.setattr(components.safety_checker, "forward", fail)
    (request,) = mixed_requests(("ddim",), 1, NATIVE_SIZE)
    worker = DrivenWorker(pipeline)
    worker.send(Submit("one", with_previews(request, num_inference_steps=9)), Drain())
    worker.start()
    *ticks, answer = worker.reports()
    assert isinstance(answer, Failed)
    assert answer.code is ErrorCode.SAFETY_FAILED
    assert not previews_of([tick for tick in ticks if isinstance(tick, Ticked)])
