"""Every picture gets a verdict, or no picture goes out."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPVisionConfig

from service.errors import ErrorCode, InpaintError
from service.request import NsfwPolicy
from service.settings import Settings
from service.worker import safety
from service.worker.batcher import Generation
from service.worker.checkpoint import Components, load
from service.worker.clip_pixels import ClipPixels
from service.worker.graphs import BATCH_SIZES
from service.worker.pipeline import InpaintPipeline
from service.worker.safety import SafetyCheck
from service.worker.stages import Finish
from tests.model.checkpoints import NATIVE_SIZE, make_checkpoint
from tests.model.graphs import Graph
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


# --- verdicts -------------------------------------------------------------------------


class Projected(torch.nn.Module):
    """Stands in for the vision model: its "pooled output" is what it was made with."""

    def __init__(self, pooled: torch.Tensor) -> None:
        super().__init__()
        self.pooled = pooled

    def forward(self, _: torch.Tensor) -> tuple[None, torch.Tensor]:
        """As the vision model's output is indexed."""
        return None, self.pooled


def scattered_checker(num: int) -> StableDiffusionSafetyChecker:
    """A checker whose vision model gives `num` different pictures, whatever it is shown; some are flagged."""
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32
    )
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision.to_dict(), projection_dim=8))
    draw = torch.Generator().manual_seed(5)
    checker.vision_model = Projected(torch.randn((num, 16), generator=draw))
    for weights in (checker.concept_embeds, checker.special_care_embeds, checker.visual_projection.weight):
        weights.data = torch.randn(weights.shape, generator=draw)
    checker.concept_embeds_weights.data.fill_(0.75)
    checker.special_care_embeds_weights.data.fill_(0.6)
    return checker


def test_verdicts_are_stocks() -> None:
    """The flags of stock's checker, picture by picture."""
    num = 200
    checker = scattered_checker(num)
    _, expected = checker(images=[np.zeros((1, 1, 3))] * num, clip_input=torch.zeros(1))
    check = SafetyCheck(checker, CLIPImageProcessorPil(size=32, crop_size=32))
    assert check.verdicts([np.zeros((32, 32, 3), np.uint8)] * num) == expected
    assert set(expected) == {False, True}


def test_threads_do_not_take_each_others_embeddings() -> None:
    """A check that gets no number fails also while another thread's check goes well, and fails alone."""
    checker = scattered_checker(2)
    well, broken = checker.vision_model.pooled, torch.full((2, 16), float("nan"))
    has_projected, may_go_on = threading.Event(), threading.Event()

    class ByThread(torch.nn.Module):
        """Gives the main thread sound embeddings, and others none."""

        def forward(self, _: torch.Tensor) -> tuple[None, torch.Tensor]:
            """As the vision model's output is indexed."""
            return None, well if threading.current_thread() is threading.main_thread() else broken

    def wait_for_the_main_thread(*_: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            has_projected.set()
            assert may_go_on.wait(20)

    checker.vision_model = ByThread()
    check = SafetyCheck(checker, CLIPImageProcessorPil(size=32, crop_size=32))
    checker.visual_projection.register_forward_hook(wait_for_the_main_thread)
    images = [np.zeros((32, 32, 3), np.uint8)] * 2
    with ThreadPoolExecutor(1) as other:
        failing = other.submit(check.verdicts, images)
        assert has_projected.wait(20)
        assert len(check.verdicts(images)) == 2
        may_go_on.set()
        with pytest.raises(InpaintError, match="no verdict"):
            failing.result(20)


def test_pictures_on_the_device_get_the_verdicts_of_arrays(inpainting_checkpoint: Path) -> None:
    """It makes no difference whether pictures come as arrays or as a tensor, nor where they are prepared."""
    components = load(Settings(model=str(inpainting_checkpoint)), CPU)
    checker, extractor = components.safety_checker, components.feature_extractor
    assert checker is not None
    pictures = np.random.default_rng(3).integers(0, 256, (12, 72, 64, 3), dtype=np.uint8)
    image_embeds: list[torch.Tensor] = []
    checker.visual_projection.register_forward_hook(lambda *call: image_embeds.append(call[-1]))
    check = SafetyCheck(checker, extractor)
    on_device = SafetyCheck(checker, extractor)
    on_device._clip_pixels = ClipPixels(extractor, CPU, torch.float32)  # As on a GPU.
    flags = [one.verdicts(given) for one in (check, on_device) for given in (list(pictures), torch.tensor(pictures))]
    assert all(one == flags[0] for one in flags)
    assert all(torch.equal(one, image_embeds[0]) for one in image_embeds)


def test_no_pictures_no_verdicts(inpainting_checkpoint: Path) -> None:
    """Nothing to check is no failure."""
    components = load(Settings(model=str(inpainting_checkpoint)), CPU)
    assert components.safety_checker is not None
    assert SafetyCheck(components.safety_checker, components.feature_extractor).verdicts([]) == []


def test_one_picture_without_a_number_fails_the_check() -> None:
    """Among sound neighbours, too."""
    checker = scattered_checker(3)
    checker.vision_model.pooled[1, 4] = float("inf")
    check = SafetyCheck(checker, CLIPImageProcessorPil(size=32, crop_size=32))
    with pytest.raises(InpaintError) as refused:
        check.verdicts([np.zeros((32, 32, 3), np.uint8)] * 3)
    assert refused.value.code is ErrorCode.SAFETY_FAILED


def test_verdicts_from_a_graph_are_the_same(inpainting_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For as many pictures as it holds, and for more, which go the other way; what it fails at has no verdict."""
    monkeypatch.setattr(safety, "GraphedFunction", Graph)
    components = load(Settings(model=str(inpainting_checkpoint)), CPU)
    checker = components.safety_checker
    assert checker is not None
    check = SafetyCheck(checker, components.feature_extractor)
    seen: list[torch.Tensor] = []
    checker.visual_projection.register_forward_hook(lambda *call: seen.append(call[-1]))
    pictures = np.random.default_rng(3).integers(0, 256, (max(BATCH_SIZES) + 1, 64, 64, 3), dtype=np.uint8)
    for thresholds in (checker.concept_embeds_weights, checker.special_care_embeds_weights):
        thresholds.data.fill_(0.0)  # So that some are flagged, whatever the weights.
    counts = (1, 5, len(pictures))
    expected = [check.verdicts(list(pictures[:count])) for count in counts]
    check.capture()
    found = [check.verdicts(list(pictures[:count])) for count in counts]
    assert found == expected
    assert all(torch.equal(one, other) for one, other in zip(seen[: len(counts)], seen[len(counts) :], strict=True))
    assert Graph.made[-1].seen == [1, 5]
    checker.visual_projection.weight.data.fill_(float("nan"))
    with pytest.raises(InpaintError, match="no verdict"):
        check.verdicts(list(pictures[:1]))
