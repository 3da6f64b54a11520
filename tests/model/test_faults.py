"""What goes wrong inside the real pipeline: out of memory, overflow, errors of one request, a device that is lost."""

import gc
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from service.errors import ErrorCode, InpaintError
from service.messages import Drain, Failed, Finished, Submit, Ticked
from service.request import InpaintRequest
from service.settings import Settings
from service.worker import pipeline as worker_pipeline
from service.worker.autoencoder import Autoencoder
from service.worker.batcher import Generation
from service.worker.checkpoint import Components, load
from service.worker.faults import DeviceLost
from service.worker.pipeline import InpaintPipeline
from service.worker.stages import Finish
from tests.model.checkpoints import NATIVE_SIZE, make_checkpoint
from tests.model.rows import Model
from tests.model.stock import Stock
from tests.unit.fake_pipeline import DrivenWorker

MODEL = Model(NATIVE_SIZE, width=32, loras={}, scheduler="ddim")


@pytest.fixture
def components(inpainting_checkpoint: Path) -> Components:
    """In float32; each test breaks its own."""
    return load(Settings(model=str(inpainting_checkpoint)), torch.device("cpu"))


@pytest.fixture(scope="module")
def stock(inpainting_checkpoint: Path) -> Stock:
    return Stock(inpainting_checkpoint)


def requests(num: int, **changes: object) -> list[InpaintRequest]:
    """Requests of one step count, so that all of them finish at once."""
    return [MODEL.request(seed=seed, **changes) for seed in range(num)]


def serve(
    components: Components, asked: Sequence[InpaintRequest], *, max_images: int = 8
) -> tuple[dict[str, Finished | Failed], DrivenWorker]:
    """Each request's one answer, by its place; all of them arrive before the first step."""
    worker = DrivenWorker(InpaintPipeline(components, "black"), max_images)
    worker.send(*(Submit(str(index), request) for index, request in enumerate(asked)), Drain())
    worker.start()
    reports = worker.reports()
    answers = [report for report in reports if isinstance(report, Finished | Failed)]
    if worker.error is None:
        assert sorted(answer.request_id for answer in answers) == [str(index) for index in range(len(asked))]
        assert max(report.images for report in reports if isinstance(report, Ticked)) > 0
    return {answer.request_id: answer for answer in answers}, worker


def assert_stocks(answer: Finished | Failed, request: InpaintRequest, stock: Stock) -> None:
    """The answer must be what the stock pipeline paints of this request alone."""
    assert isinstance(answer, Finished), answer
    expected, flags = stock(request)
    assert answer.result.nsfw == tuple(flags)
    assert np.abs(answer.result.images.astype(int) - expected.astype(int)).max() <= 1


def code_of(answer: Finished | Failed) -> ErrorCode:
    assert isinstance(answer, Failed)
    assert "secret" not in answer.message
    return answer.code


# --- out of memory ------------------------------------------------------------------------


def lack_cuda_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB at secret")


def lack_cuda_memory_outside_of_torch() -> None:
    error = torch.AcceleratorError("CUDA error: out of memory at secret")
    error.error_code = 2
    raise error


def lack_memory() -> None:
    """What torch itself says of memory that there is not."""
    torch.empty(2**58, dtype=torch.uint8)


def limit_rows(module: torch.nn.Module, max_rows: int, fail: Callable[[], None]) -> None:
    """From now on a call of the module with more rows fails."""

    def check(_module: object, arguments: tuple[torch.Tensor, ...], keywords: dict[str, torch.Tensor]) -> None:
        rows = arguments[0] if arguments else next(iter(keywords.values()))
        if len(rows) > max_rows:
            fail()

    module.register_forward_pre_hook(check, with_kwargs=True)


@pytest.mark.parametrize("fail", [lack_cuda_memory, lack_cuda_memory_outside_of_torch, lack_memory])
def test_out_of_memory_in_a_step_halves_the_batch(
    components: Components, stock: Stock, fail: Callable[[], None]
) -> None:
    """Four images do not fit: all four are answered with their pictures, and two run at once from then on."""
    limit_rows(components.unet, 4, fail)
    asked = requests(4)
    answers, worker = serve(components, asked)
    for index, request in enumerate(asked):
        assert_stocks(answers[str(index)], request, stock)
    assert worker.batcher.max_images == 2


@pytest.mark.parametrize("fail", [lack_cuda_memory, lack_memory])
@pytest.mark.parametrize("part", ["text_encoder", "vae.encoder", "vae.decoder", "safety_checker"])
def test_out_of_memory_anywhere_halves_the_batch(
    components: Components, stock: Stock, part: str, fail: Callable[[], None]
) -> None:
    """Also in what comes before the first step and after the last."""
    module = components.vae.get_submodule(part[4:]) if part.startswith("vae.") else getattr(components, part)
    limit_rows(module, 2 if part != "text_encoder" else 4, fail)
    asked = [
        MODEL.request(seed=seed, prompt=f"a red house {seed}", negative_prompt=f"blurry {seed}") for seed in range(4)
    ]
    answers, worker = serve(components, asked)
    for index, request in enumerate(asked):
        assert_stocks(answers[str(index)], request, stock)
    assert worker.batcher.max_images == 2


def test_request_that_does_not_fit_alone(components: Components, stock: Stock) -> None:
    """That request is told so, its neighbours are answered, and the worker lives."""
    limit_rows(components.unet, 2, lack_cuda_memory)
    asked = requests(3)
    asked[1] = MODEL.request(seed=1, num_images_per_prompt=2)
    answers, worker = serve(components, asked)
    assert code_of(answers["1"]) is ErrorCode.OUT_OF_MEMORY
    for index in (0, 2):
        assert_stocks(answers[str(index)], asked[index], stock)
    assert worker.error is None


# --- one request's own failure ----------------------------------------------------------------

VICTIM_STEPS = 5


def break_stage(
    pipeline: InpaintPipeline, stage: str, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> list[int]:
    """Have a stage fail whenever the request of `VICTIM_STEPS` steps is part of it; notes how many were."""
    sizes: list[int] = []

    def fail_for(step_counts: Sequence[int]) -> None:
        if VICTIM_STEPS in step_counts:
            sizes.append(len(step_counts))
            raise error

    preparer, finisher, tick = pipeline._preparer, pipeline._finisher, worker_pipeline.tick
    prepare, finish = preparer.prepare, finisher.finish

    def broken_prepare(asked: Sequence[InpaintRequest]) -> object:
        prepared = prepare(asked)
        fail_for([request.params.num_inference_steps for request in asked])
        return prepared

    def broken_tick(unet: torch.nn.Module, batch: object, *arguments: object) -> None:
        def fail(*_: object) -> None:
            fail_for([slot.num_calls for slot in batch.slots])  # type: ignore[attr-defined]

        hook = unet.register_forward_hook(fail)
        try:
            tick(unet, batch, *arguments)  # type: ignore[arg-type]
        finally:
            hook.remove()

    def broken_finish(generations: Sequence[Sequence[object]], *arguments: object) -> object:
        finished = finish(generations, *arguments)  # type: ignore[arg-type]
        fail_for([slots[0].num_calls for slots in generations])  # type: ignore[attr-defined]
        return finished

    if stage == "prepare":
        monkeypatch.setattr(preparer, "prepare", broken_prepare)
    elif stage == "step":
        monkeypatch.setattr(worker_pipeline, "tick", broken_tick)
    else:
        monkeypatch.setattr(finisher, "finish", broken_finish)
    return sizes


@pytest.mark.parametrize("stage", ["prepare", "step", "finish"])
def test_failure_is_one_requests_own(
    components: Components, stock: Stock, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request raises: its neighbours' pictures are what they are when it is not there.

    Those that share its batch are computed in halves of it, and may differ by rounding; the one that has a batch of
    its own does not, bit for bit.
    """
    asked = [
        MODEL.request(seed=0, scheduler="euler_a", num_inference_steps=VICTIM_STEPS + 1, num_images_per_prompt=2),
        MODEL.request(seed=1, num_inference_steps=VICTIM_STEPS),
        MODEL.request(seed=2, num_inference_steps=VICTIM_STEPS - 1, guidance_scale=1.0),
        MODEL.request(seed=3, scheduler="dpmpp_2m", num_inference_steps=VICTIM_STEPS + 1, batching="solo"),
    ]
    alone, _ = serve(components, asked[3:])

    pipeline = InpaintPipeline(components, "black")
    sizes = break_stage(pipeline, stage, monkeypatch, ValueError("secret /path"))
    worker = DrivenWorker(pipeline, 8)
    worker.send(*(Submit(str(index), request) for index, request in enumerate(asked)), Drain())
    worker.start()
    answers = {answer.request_id: answer for answer in worker.reports() if isinstance(answer, Finished | Failed)}

    assert sorted(answers) == ["0", "1", "2", "3"]
    assert code_of(answers["1"]) is ErrorCode.INTERNAL
    assert max(sizes) > 1 or stage == "finish"
    for index in (0, 2, 3):
        assert_stocks(answers[str(index)], asked[index], stock)
    solo, expected = answers["3"], alone["0"]
    assert isinstance(solo, Finished)
    assert isinstance(expected, Finished)
    assert np.array_equal(solo.result.images, expected.result.images)
    assert worker.error is None


def test_lora_that_is_damaged_later_fails_its_request_only(
    components: Components, stock: Stock, tmp_path: Path
) -> None:
    """A LoRA's file that was sound when it came and is not when it is read: that request is told so."""
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(b"\x08\0\0\0\0\0\0\0{}      secret")
    damaged = Model(NATIVE_SIZE, width=32, loras={"damaged": path}, scheduler="ddim")
    asked = [MODEL.request(), damaged.request(loras=(damaged.lora(0, 1.0),)), MODEL.request(seed=4)]
    answers, _ = serve(components, asked)
    assert code_of(answers["1"]) is ErrorCode.INVALID_LORA
    for index in (0, 2):
        assert_stocks(answers[str(index)], asked[index], stock)


# --- a device that is lost ----------------------------------------------------------------------


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae.decoder", "safety_checker"])
def test_sticky_error_ends_the_worker(components: Components, part: str) -> None:
    """An error that poisons the process is no request's: nobody is answered here, the requests are run elsewhere."""
    module = components.vae.get_submodule(part[4:]) if part.startswith("vae.") else getattr(components, part)

    def lose(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    module.register_forward_pre_hook(lose)
    answers, worker = serve(components, requests(3))
    assert answers == {}
    assert isinstance(worker.error, DeviceLost)


# --- numbers that are none ----------------------------------------------------------------------


@pytest.fixture(scope="module", params=[False, True], ids=["stock decoder", "asymmetric decoder"])
def half(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> InpaintPipeline:
    """A pipeline in half precision."""
    folder = make_checkpoint(tmp_path_factory.mktemp("half"), has_asymmetric_vae=request.param)
    settings = Settings(model=str(folder), dtype="float16")
    return InpaintPipeline(load(settings, torch.device("cpu")), "black")


def overflowing(pipeline: InpaintPipeline, factor: float = 1e6, **changes: object) -> list[Generation]:
    """Three prepared requests; the second one's latents are finite, and too large for half precision."""
    generations = [Generation(str(index), request) for index, request in enumerate(requests(3, **changes))]
    pipeline.prepare(generations)
    with torch.inference_mode():
        for slot in generations[1].latents.slots:
            slot.state[0] *= factor
    return generations


def kept_copies(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[torch.nn.Module]]:
    """Notes the decoder of each float32 copy that is made."""
    copies: list[weakref.ref[torch.nn.Module]] = []
    in_float32 = Autoencoder.in_float32

    def noting(self: Autoencoder) -> Autoencoder:
        made = in_float32(self)
        copies.append(weakref.ref(made._vae.decoder))
        return made

    monkeypatch.setattr(Autoencoder, "in_float32", noting)
    return copies


def test_overflow_in_the_decoder_is_decoded_in_float32(half: InpaintPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents that half precision cannot decode are decoded once more in float32, and the copy is let go again."""
    copies = kept_copies(monkeypatch)
    generations = overflowing(half, num_images_per_prompt=2)
    finished = half.finish(generations)
    assert len(copies) == 1

    (whole,) = (half._autoencoder.in_float32(),)
    slots = generations[1].latents.slots
    with torch.inference_mode():
        for index, slot in enumerate(slots):
            conditions = half._finisher._conditions([slot], torch.float32)
            latents = slot.latents[None] / half.components.vae.config.scaling_factor
            decoded = whole.decode(latents, conditions)[0].permute(1, 2, 0)
            expected = ((decoded * 0.5 + 0.5).clamp(0, 1) * 255).round().numpy().astype(np.uint8)
            result = finished[1]
            assert isinstance(result, Finish)
            assert np.array_equal(result.images[index], expected)
            assert result.images[index].any()
    del whole
    gc.collect()
    assert [copy() for copy in copies] == [None, None]
    assert {parameter.dtype for parameter in half.components.vae.parameters()} == {torch.float16}


def test_overflow_changes_no_neighbour(half: InpaintPipeline) -> None:
    """Who shares the batch with it gets the picture, bit for bit, that it gets without it."""
    beside_overflow = half.finish(overflowing(half))
    beside_sound = half.finish(overflowing(half, factor=1.0))
    for index in (0, 2):
        one, other = beside_overflow[index], beside_sound[index]
        assert isinstance(one, Finish)
        assert isinstance(other, Finish)
        assert np.array_equal(one.images, other.images)


def test_floats_are_decoded_again_too(half: InpaintPipeline) -> None:
    """An array of floats is finite, and the picture of it."""
    result = half.finish(overflowing(half, output="floats"))[1]
    assert isinstance(result, Finish)
    assert np.isfinite(result.images).all()
    assert result.images.dtype == np.float32
    assert 0 < result.images.max() <= 1


def test_what_float32_cannot_decode_either_is_an_error(half: InpaintPipeline) -> None:
    """Never a black picture: the request fails, and its neighbours do not."""
    results = half.finish(overflowing(half, factor=1e37))
    assert isinstance(results[1], InpaintError)
    assert results[1].code is ErrorCode.NAN_OUTPUT
    assert isinstance(results[0], Finish)
    assert isinstance(results[2], Finish)


def test_no_room_for_float32_is_that_requests_failure(half: InpaintPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the device has no memory for another try, nobody else's picture is decoded again, or in halves."""
    num_calls = []
    decode = Autoencoder.decode
    monkeypatch.setattr(Autoencoder, "decode", lambda *arguments: num_calls.append(1) or decode(*arguments))
    monkeypatch.setattr(Autoencoder, "in_float32", lambda _: lack_cuda_memory())
    results = half.finish(overflowing(half))
    assert isinstance(results[1], InpaintError)
    assert results[1].code is ErrorCode.NAN_OUTPUT
    assert isinstance(results[0], Finish)
    assert isinstance(results[2], Finish)
    assert len(num_calls) == 1


def test_decoder_of_float32_is_not_asked_twice(components: Components, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 there is no wider type to try."""
    pipeline = InpaintPipeline(components, "black")
    monkeypatch.setattr(Autoencoder, "in_float32", lambda _: pytest.fail("decoded again"))
    (result,) = pipeline.finish(overflowing(pipeline, factor=1e37)[1:2])
    assert isinstance(result, InpaintError)
    assert result.code is ErrorCode.NAN_OUTPUT


def test_numbers_that_are_none_from_the_unet(components: Components, stock: Stock) -> None:
    """A UNet that gives no number for one request: that one fails, and is no black picture."""
    asked = requests(3)
    victim_rows = slice(2, 4)

    def spoil(_module: object, _arguments: object, output: tuple[torch.Tensor]) -> None:
        if len(output[0]) == 6:
            output[0][victim_rows] = float("nan")

    components.unet.register_forward_hook(spoil)
    answers, _ = serve(components, asked)
    assert code_of(answers["1"]) is ErrorCode.NAN_OUTPUT
    for index in (0, 2):
        assert_stocks(answers[str(index)], asked[index], stock)


# --- the safety checker ---------------------------------------------------------------------------


def test_checker_that_fails_for_one_request(components: Components, stock: Stock) -> None:
    """Without a verdict there is no picture, of that request alone."""
    assert components.safety_checker is not None
    sizes: list[int] = []

    def fail_for_second(_module: object, arguments: tuple[torch.Tensor]) -> None:
        sizes.append(len(arguments[0]))
        if sizes in ([3], [3, 1, 1]):
            raise ValueError("secret")

    components.safety_checker.vision_model.register_forward_pre_hook(fail_for_second)
    asked = requests(3)
    answers, _ = serve(components, asked)
    assert sizes == [3, 1, 1, 1]
    assert code_of(answers["1"]) is ErrorCode.SAFETY_FAILED
    for index in (0, 2):
        assert_stocks(answers[str(index)], asked[index], stock)
