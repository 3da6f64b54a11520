"""Every picture gets a verdict, or no picture goes out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from service.errors import ErrorCode, InpaintError
from service.request import NsfwPolicy
from service.settings import Settings
from service.worker.batcher import Generation
from service.worker.checkpoint import Components, load
from service.worker.loop import Finish
from service.worker.pipeline import InpaintPipeline
from tests.model.checkpoints import NATIVE_SIZE, make_checkpoint
from tests.model.mixed_requests import mixed_requests

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def flagging_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint whose checker flags every picture."""
    return make_checkpoint(tmp_path_factory.mktemp("flagging"), flags_everything=True)


def paint(components: Components, policy: NsfwPolicy = "black", num: int = 2) -> list[Finish | InpaintError]:
    """Run a few requests of the native size to their end."""
    pipeline = InpaintPipeline(components, policy)
    requests = [one for one in mixed_requests(["ddim"], 40, NATIVE_SIZE) if one.params.height == one.params.width]
    generations = [Generation(str(index), request) for index, request in enumerate(requests[:num])]
    pipeline.prepare(generations)
    return pipeline.finish(generations)


def test_flagged_pictures_leave_the_worker_black(flagging_checkpoint: Path) -> None:
    """Under the default policy the pixels of a flagged picture never leave the worker."""
    for result in paint(load(Settings(model=str(flagging_checkpoint)), CPU)):
        assert isinstance(result, Finish)
        assert all(result.nsfw)
        assert not result.images.any()


def test_policy_flag_keeps_the_pixels_and_sets_the_flag(flagging_checkpoint: Path) -> None:
    """An operator who wants to judge for themselves gets the picture and the flag."""
    for result in paint(load(Settings(model=str(flagging_checkpoint)), CPU), "flag"):
        assert isinstance(result, Finish)
        assert all(result.nsfw)
        assert result.images.any()


def test_unflagged_pictures_pass(inpainting_checkpoint: Path) -> None:
    """A checker that finds nothing changes nothing."""
    for result in paint(load(Settings(model=str(inpainting_checkpoint)), CPU)):
        assert isinstance(result, Finish)
        assert not any(result.nsfw)
        assert result.images.any()


def test_checker_that_raises_fails_the_request(inpainting_checkpoint: Path) -> None:
    """Without a verdict there is no picture."""
    components = load(Settings(model=str(inpainting_checkpoint)), CPU)

    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("broken")

    components.safety_checker.vision_model.forward = broken  # type: ignore[union-attr]
    for result in paint(components):
        assert isinstance(result, InpaintError)
        assert result.code is ErrorCode.SAFETY_FAILED


def test_checker_that_gives_no_number_fails_the_request(inpainting_checkpoint: Path) -> None:
    """A NaN score compares as "not flagged"; it must not pass for safe."""
    components = load(Settings(model=str(inpainting_checkpoint)), CPU)
    components.safety_checker.visual_projection.weight.data.fill_(float("nan"))  # type: ignore[union-attr]
    for result in paint(components):
        assert isinstance(result, InpaintError)
        assert result.code is ErrorCode.SAFETY_FAILED


def test_nan_latents_fail_their_own_request_only(inpainting_checkpoint: Path) -> None:
    """NaN would decode to a plausible black picture; it is an error, and the neighbour's picture is untouched."""
    components = load(Settings(model=str(inpainting_checkpoint)), CPU)
    pipeline = InpaintPipeline(components, "black")
    request = mixed_requests(["ddim"], 1, NATIVE_SIZE)[0]
    pair = [Generation("nan", request), Generation("well", request)]
    pipeline.prepare(pair)
    (alone,) = pipeline.finish([pair[1]])
    with torch.inference_mode():
        pair[0].latents.slots[0].state[0, 0, 0, 0] = float("nan")
    broken, well = pipeline.finish(pair)
    assert isinstance(broken, InpaintError)
    assert broken.code is ErrorCode.NAN_OUTPUT
    assert isinstance(well, Finish)
    assert isinstance(alone, Finish)
    assert np.abs(well.images.astype(int) - alone.images.astype(int)).max() <= 1
