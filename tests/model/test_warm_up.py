"""Before the first request: what is compiled and captured when, what is said meanwhile, and how many images may run."""

import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend

from service.errors import StartupError
from service.messages import CannotStart, Command, Drain, Loading, Ready, Report
from service.settings import Settings
from service.worker import autoencoder, process, prompts, safety, warm_up
from service.worker import pipeline as worker_pipeline
from service.worker.captured import CapturedTicks, NoisePredictor
from service.worker.checkpoint import load
from service.worker.compiled import noise_predictor
from service.worker.faults import BatchTooLarge, DeviceLost
from service.worker.pipeline import InpaintPipeline
from service.worker.warm_up import KNEE, MIN_AUTO_IMAGES, knee
from tests.model.mixed_requests import mixed_requests
from tests.model.staggered import run_staggered

CPU = torch.device("cpu")


# --- how many images ---------------------------------------------------------


def at_rates(rates: Mapping[int, float]) -> dict[int, float]:
    """Seconds of a step by rows, for images per second by images."""
    return {2 * images: images / rate for images, rate in rates.items()}


def test_fewest_images_of_nearly_the_best_throughput() -> None:
    """More would only delay one another."""
    assert knee(at_rates({4: 300, 8: 420, 12: 429, 16: 430})) == 12
    assert knee(at_rates({4: 300, 8: KNEE * 430 + 0.1, 12: 429, 16: 430})) == 8
    assert knee(at_rates({4: 300, 8: KNEE * 430 - 0.1, 12: 410, 16: 430})) == 16


def test_dip_hides_nothing_beyond_it() -> None:
    """A size that the device happens to be slow at is not the end of the curve."""
    assert knee(at_rates({4: 400, 6: 380, 8: 405, 12: 395, 16: 430})) == 16
    assert knee(at_rates({4: 400, 6: 428, 8: 300, 12: 430, 16: 429})) == 6


def test_some_images_may_always_share() -> None:
    """A device that one image fills, or of which nothing is known."""
    assert knee(at_rates({1: 10, 2: 10, 4: 10})) == MIN_AUTO_IMAGES
    assert knee(at_rates({1: 10})) == MIN_AUTO_IMAGES
    assert knee({}) == MIN_AUTO_IMAGES
    assert knee({2: 0.0, 64: 0.0}) == MIN_AUTO_IMAGES


@given(st.dictionaries(st.integers(1, 64), st.floats(1, 1000), min_size=1))
def test_knee_of_any_timings(rates: dict[int, float]) -> None:
    """Whatever was measured: as few as do it, of what was measured, and never fewer than the least."""
    best = max(rates.values())
    # Either side of where rounding decides.
    at_least, at_most = (
        min(images for images, rate in rates.items() if rate >= share * best) for share in (KNEE - 1e-6, KNEE + 1e-6)
    )
    assert max(MIN_AUTO_IMAGES, at_least) <= knee(at_rates(rates)) <= max(MIN_AUTO_IMAGES, at_most)


class Measured:
    """Stands for a pipeline whose steps take given times.

    Args:
        rates: Images per second by images; more are out of memory.
    """

    def __init__(self, rates: Mapping[int, float]) -> None:
        self._rates = rates
        self.tried: list[int] = []

    def paint(self, _pipeline: object, num_images: int) -> list[float]:
        """Seconds of each step; the first of a new size is slow."""
        self.tried.append(num_images)
        if num_images not in self._rates:
            raise BatchTooLarge
        seconds = num_images / self._rates[num_images]
        return [100.0, seconds, 2 * seconds, seconds]

    def measure(self, patch: pytest.MonkeyPatch, max_images: int | None = None) -> dict[int, float]:
        """As if the pipeline were measured."""
        patch.setattr(warm_up, "paint", self.paint)
        return warm_up._measure_steps(SimpleNamespace(), max_images)  # type: ignore[arg-type]


def test_batches_grow_until_throughput_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are doubled; the first that brings nothing is the last that is tried."""
    measured = Measured({1: 100, 2: 150, 4: 190, 8: 191, 16: 500})
    seconds = measured.measure(monkeypatch)
    assert measured.tried == [1, 2, 4, 8]
    assert seconds == pytest.approx(at_rates({1: 100, 2: 150, 4: 190, 8: 191}))


def test_batches_grow_as_far_as_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the operator, or by default."""
    rates = {1 << power: 100.0 * 1.5**power for power in range(8)}
    for max_images, tried in ((None, [1, 2, 4, 8, 16]), (5, [1, 2, 4]), (1, [1])):
        measured = Measured(rates)
        measured.measure(monkeypatch, max_images)
        assert measured.tried == tried


def test_batches_grow_as_far_as_memory_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured before holds; without memory for one image there is no service."""
    assert set(Measured({1: 100, 2: 150}).measure(monkeypatch)) == {2, 4}
    with pytest.raises(BatchTooLarge):
        Measured({}).measure(monkeypatch)


def test_measuring_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow device is not measured for minutes."""
    monkeypatch.setattr(warm_up, "MEASURING_SECONDS", -1.0)
    measured = Measured({1: 100, 2: 150})
    assert set(measured.measure(monkeypatch)) == {2}


# --- whether to capture ------------------------------------------------------


def stand_in(
    device: str = "cuda:0", dtype: torch.dtype = torch.float16, *, can_be_captured: bool = True
) -> InpaintPipeline:
    """What decides of a pipeline."""
    components = SimpleNamespace(device=torch.device(device), dtype=dtype)
    return SimpleNamespace(components=components, can_be_captured=can_be_captured)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("pipeline", "by_auto"),
    [
        (stand_in(), True),
        (stand_in(dtype=torch.bfloat16), True),
        (stand_in(dtype=torch.float32), False),
        (stand_in(can_be_captured=False), False),
        (stand_in("cpu"), False),
        (stand_in("cpu", torch.float32), False),
    ],
)
def test_auto_captures_what_can_be_in_half_precision_on_cuda(pipeline: InpaintPipeline, by_auto: bool) -> None:
    """And off captures nothing anywhere."""
    assert warm_up._is_captured(pipeline, Settings(compile="auto")) is by_auto
    assert not warm_up._is_captured(pipeline, Settings(compile="off"))


def test_on_captures_also_in_float32() -> None:
    assert warm_up._is_captured(stand_in(dtype=torch.float32), Settings(compile="on"))


@pytest.mark.parametrize(
    ("pipeline", "named"), [(stand_in("cpu"), "the device is cpu"), (stand_in(can_be_captured=False), "IP-Adapter")]
)
def test_on_is_refused_with_the_reason(pipeline: InpaintPipeline, named: str) -> None:
    """Where nothing can be captured, who insists is told in one line."""
    with pytest.raises(StartupError) as raised:
        warm_up._is_captured(pipeline, Settings(compile="on"))
    assert named in str(raised.value)
    assert "\n" not in str(raised.value)


# --- on a CPU ----------------------------------------------------------------


def settings_of(folder: Path, **changes: Any) -> Settings:
    """Two images at most, so that little is measured."""
    return Settings(model=str(folder), **{"max_images": 2, **changes})


def open_pipeline(settings: Settings) -> InpaintPipeline:
    return InpaintPipeline(load(settings, CPU), "flag")


@pytest.mark.parametrize("how", ["auto", "off"])
def test_cpu_captures_nothing(inpainting_checkpoint: Path, how: str) -> None:
    """Every stage has run, and steps are timed."""
    settings, stages = settings_of(inpainting_checkpoint, compile=how), list[str]()
    pipeline = open_pipeline(settings)
    warmed_up = warm_up.warm_up(pipeline, settings, stages.append)
    assert stages == ["warming up"]
    assert pipeline.captured_seconds == {}
    assert warmed_up.max_images == 2
    assert 2 in warmed_up.step_seconds
    assert all(seconds > 0 for seconds in warmed_up.step_seconds.values())


@pytest.fixture
def _libraries() -> Iterator[None]:
    """As loud, and with as many threads, as before."""
    loggings, num_threads = (diffusers.utils.logging, transformers.logging), torch.get_num_threads()
    levels = [logs.get_verbosity() for logs in loggings]
    yield
    for logs, level in zip(loggings, levels, strict=True):
        logs.set_verbosity(level)
        logs.enable_progress_bar()
    torch.set_num_threads(num_threads)


def reports_of_a_process(settings: Settings, *commands: Command) -> list[Report]:
    """What a worker process says that finds these in its pipe."""
    ours, theirs = Pipe()
    for command in commands:
        ours.send(command)
    process.run(theirs, settings, "cpu", 1)
    theirs.close()
    reports: list[Report] = []
    while True:
        try:
            reports.append(ours.recv())
        except EOFError:
            return reports


@pytest.mark.usefixtures("_libraries")
def test_worker_that_cannot_compile_says_so_and_ends(
    inpainting_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`compile=on` on a CPU: the last word of the process names the device."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    *stages, last = reports_of_a_process(settings_of(inpainting_checkpoint, compile="on"))
    assert all(isinstance(stage, Loading) for stage in stages)
    assert isinstance(last, CannotStart)
    assert last == CannotStart("cannot compile: the device is cpu; compiled and captured ticks need CUDA")


@pytest.mark.usefixtures("_libraries")
def test_ready_worker_does_not_look_for_garbage_in_what_it_has_loaded(
    inpainting_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds of thousands of objects: of torch and its companions, and of the model."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    num_loaded = len(gc.get_objects())
    try:
        *_, last = reports_of_a_process(settings_of(inpainting_checkpoint), Drain())
        assert gc.get_freeze_count() > num_loaded // 2
        assert len(gc.get_objects()) < num_loaded // 2
    finally:
        gc.unfreeze()
    assert isinstance(last, Ready)


# --- as if a CPU could -------------------------------------------------------


@dataclass
class Compiler:
    """What compiling meets, in the place of torch's."""

    unet_error: Exception | None = None
    vae_error: Exception | None = None
    text_encoder_error: Exception | None = None
    safety_checker_error: Exception | None = None
    num_compiled: int = 0

    def noise_predictor(self, unet: Any, *, is_compiled: bool) -> NoisePredictor:
        """The UNet, which is not compiled."""
        if is_compiled and self.unet_error is not None:
            raise self.unet_error
        self.num_compiled += is_compiled
        return noise_predictor(unet, is_compiled=False)

    def capturing(self, part: str) -> Callable[..., Any]:
        """A part of which nothing is captured."""

        def captured(function: Callable[..., torch.Tensor], *_: object) -> Any:
            error = getattr(self, f"{part}_error")
            if error is not None:
                raise error
            return SimpleNamespace(fits=lambda _: False, function=function)

        return captured


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """A CPU that is taken for a device where ticks are captured."""
    stub = Compiler()
    monkeypatch.setattr(warm_up, "_is_captured", lambda _, settings: settings.compile != "off")
    monkeypatch.setattr(worker_pipeline, "noise_predictor", stub.noise_predictor)
    monkeypatch.setattr(autoencoder, "compiled", lambda model: model)
    for module, part in ((autoencoder, "vae"), (prompts, "text_encoder"), (safety, "safety_checker")):
        monkeypatch.setattr(module, "GraphedFunction", stub.capturing(part))
    return stub


def assert_paints(pipeline: InpaintPipeline, folder: Path) -> None:
    """As one that was not warmed up."""
    requests = mixed_requests(("ddim", "euler_a"), 3, 64, seed=3)
    (results, _), (others, _) = (
        run_staggered(each, requests) for each in (pipeline, open_pipeline(settings_of(folder)))
    )
    for index, result in results.items():
        assert abs(result.images.astype(int) - others[index].images.astype(int)).max() <= 1


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The service's own."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("service.")]


def test_stages_are_told(inpainting_checkpoint: Path, compiler: Compiler) -> None:
    """Whoever waits for minutes sees what for."""
    settings, stages = settings_of(inpainting_checkpoint), list[str]()
    pipeline = open_pipeline(settings)
    warmed_up = warm_up.warm_up(pipeline, settings, stages.append)
    assert stages == [
        "warming up",
        "choosing what computes attention",
        "compiling the UNet for 64x64",
        "capturing steps of 2 rows",
        "compiling the VAE for 64x64",
        "capturing the text encoder and the safety checker",
        "warming up",
    ]
    assert compiler.num_compiled == 1
    assert set(warmed_up.step_seconds) == {2, 4}
    assert warmed_up.max_images == 2
    assert all(layer.fused_projections for layer in pipeline.components.unet.modules() if hasattr(layer, "to_kv"))
    assert_paints(pipeline, inpainting_checkpoint)


def test_without_a_limit_as_much_is_captured_as_may_run(inpainting_checkpoint: Path, compiler: Compiler) -> None:
    """Two rows for each image of the most that are ever run."""
    settings = settings_of(inpainting_checkpoint, max_images=None)
    pipeline = open_pipeline(settings)
    warmed_up = warm_up.warm_up(pipeline, settings)
    assert compiler.num_compiled == 1
    assert max(pipeline.captured_seconds) == 2 * warm_up.MAX_AUTO_IMAGES
    assert warmed_up.max_images == MIN_AUTO_IMAGES  # On a CPU nothing is timed.


def test_fastest_attention_is_used(
    inpainting_checkpoint: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked for with the model's own calls, at as many rows as may come."""
    asked: list[tuple[int, int]] = []

    def fastest(unet: torch.nn.Module, calls: Mapping[object, int], num_rows: int) -> SDPBackend:
        num_layers = len([module for module in unet.modules() if hasattr(module, "to_kv") or hasattr(module, "to_qkv")])
        asked.append((sum(calls.values()) - num_layers, num_rows))
        return SDPBackend.MATH

    monkeypatch.setattr(warm_up, "fastest_backend", fastest)
    settings = settings_of(inpainting_checkpoint)
    pipeline = open_pipeline(settings)
    warm_up.warm_up(pipeline, settings)
    assert asked == [(0, 4)]
    assert pipeline._attention.backend is SDPBackend.MATH
    assert compiler.num_compiled == 1


@pytest.mark.parametrize("changes", [{"attention_backend": "math"}, {"attention_slicing": "auto"}])
def test_attention_that_the_operator_chose_stays(
    inpainting_checkpoint: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.setattr(warm_up, "fastest_backend", lambda *_: pytest.fail("it was chosen"))
    settings = settings_of(inpainting_checkpoint, **changes)
    pipeline = open_pipeline(settings)
    attention = pipeline.components.attention
    warm_up.warm_up(pipeline, settings)
    assert pipeline._attention is attention
    assert compiler.num_compiled == 1


@pytest.mark.parametrize("is_set", [True, False])
def test_cache_is_used_where_it_is_set(
    inpainting_checkpoint: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_set: bool
) -> None:
    """Before anything is compiled."""
    used: list[tuple[object, ...]] = []
    monkeypatch.setattr(warm_up, "use_compile_cache", lambda *args: used.append((*args, compiler.num_compiled)))
    settings = settings_of(inpainting_checkpoint, compile_cache=tmp_path if is_set else None)
    warm_up.warm_up(open_pipeline(settings), settings)
    assert used == ([(tmp_path, "auto", 0)] if is_set else [])


def test_unet_that_does_not_compile_is_captured_as_it_is(
    inpainting_checkpoint: Path, compiler: Compiler, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says what it costs and why; the pictures are the same."""
    compiler.unet_error = RuntimeError("no compiler\nand a page of its output")
    settings, stages = settings_of(inpainting_checkpoint), list[str]()
    pipeline = open_pipeline(settings)
    with caplog.at_level(logging.WARNING):
        warmed_up = warm_up.warm_up(pipeline, settings, stages.append)
    assert warnings_of(caplog) == ["cannot compile the UNet, which costs speed: no compiler"]
    assert set(pipeline.captured_seconds) == {2, 4}
    assert warmed_up.max_images == 2
    assert compiler.num_compiled == 0
    assert stages[-3:] == [
        "compiling the VAE for 64x64",
        "capturing the text encoder and the safety checker",
        "warming up",
    ]
    assert_paints(pipeline, inpainting_checkpoint)


def test_steps_that_cannot_be_captured_are_computed_one_by_one(
    inpainting_checkpoint: Path,
    compiler: Compiler,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model that neither compiles nor can be captured is served all the same."""
    compiler.unet_error = RuntimeError("no compiler")

    def refuse(_self: CapturedTicks, _num_rows: int) -> float:
        raise RuntimeError("no capture")

    monkeypatch.setattr(CapturedTicks, "capture", refuse)
    settings = settings_of(inpainting_checkpoint)
    pipeline = open_pipeline(settings)
    with caplog.at_level(logging.WARNING):
        warm_up.warm_up(pipeline, settings)
    assert warnings_of(caplog) == [
        "cannot compile the UNet, which costs speed: no compiler",
        "cannot capture steps, which costs speed: no capture",
    ]
    assert not pipeline.captured_seconds
    assert_paints(pipeline, inpainting_checkpoint)


@pytest.mark.parametrize(
    "error", [RuntimeError("no compiler\nand a page of its output"), torch.OutOfMemoryError("short of memory")]
)
def test_vae_that_does_not_compile_stays_as_it_is(
    inpainting_checkpoint: Path, compiler: Compiler, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    """Also for want of memory: the UNet's share is what matters."""
    compiler.vae_error = error
    settings = settings_of(inpainting_checkpoint)
    pipeline = open_pipeline(settings)
    with caplog.at_level(logging.WARNING):
        warm_up.warm_up(pipeline, settings)
    (warning,) = warnings_of(caplog)
    assert warning.startswith("cannot compile the VAE, which costs speed: ")
    assert set(pipeline.captured_seconds) == {2, 4}
    assert_paints(pipeline, inpainting_checkpoint)


@pytest.mark.parametrize("part", ["text_encoder", "safety_checker"])
def test_what_cannot_be_captured_stays_as_it_is(
    inpainting_checkpoint: Path, compiler: Compiler, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    """The log says so; every picture is checked all the same."""
    setattr(compiler, f"{part}_error", RuntimeError("no capture"))
    settings = settings_of(inpainting_checkpoint)
    pipeline = open_pipeline(settings)
    with caplog.at_level(logging.WARNING):
        warm_up.warm_up(pipeline, settings)
    assert warnings_of(caplog) == [f"cannot capture the {part.replace('_', ' ')}, which costs speed: no capture"]
    assert set(pipeline.captured_seconds) == {2, 4}
    assert_paints(pipeline, inpainting_checkpoint)


PARTS = {
    "unet": "compile the UNet",
    "vae": "compile the VAE",
    "text_encoder": "capture the text encoder",
    "safety_checker": "capture the safety checker",
}


@pytest.mark.parametrize("part", PARTS)
def test_who_insists_gets_no_slower_service(inpainting_checkpoint: Path, compiler: Compiler, part: str) -> None:
    """`compile=on`: what cannot be compiled ends the start, in one line."""
    setattr(compiler, f"{part}_error", RuntimeError("no compiler\nand a page of its output"))
    settings = settings_of(inpainting_checkpoint, compile="on")
    with pytest.raises(StartupError) as raised:
        warm_up.warm_up(open_pipeline(settings), settings)
    assert str(raised.value) == f"cannot {PARTS[part]}: no compiler"


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("how", ["auto", "on"])
def test_lost_device_is_no_failed_compilation(
    inpainting_checkpoint: Path, compiler: Compiler, part: str, how: str
) -> None:
    """A process whose device has failed is replaced, whatever it was doing."""
    setattr(compiler, f"{part}_error", torch.AcceleratorError("gone"))
    settings = settings_of(inpainting_checkpoint, compile=how)
    with pytest.raises(DeviceLost):
        warm_up.warm_up(open_pipeline(settings), settings)


def test_sliced_vae_is_not_captured(inpainting_checkpoint: Path, compiler: Compiler) -> None:
    """An operator who has little memory keeps what the switch saves."""
    settings, stages = settings_of(inpainting_checkpoint, vae_slicing=True), list[str]()
    warm_up.warm_up(open_pipeline(settings), settings, stages.append)
    assert not [stage for stage in stages if "VAE" in stage]
    assert compiler.num_compiled == 1
