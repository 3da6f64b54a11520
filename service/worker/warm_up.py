"""Before the first request: every stage has run, and what makes it fast has been made and timed.

A worker is not ready before. Serving while the model compiles was the alternative: but
compiling takes all cores for a minute or two, in which requests would be slow beyond
any estimate, and with the compile cache the next start takes seconds.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from service.errors import StartupError, first_line
from service.request import InpaintParams, InpaintRequest
from service.settings import Settings
from service.worker.attention import AttentionContext, fastest_backend, seen_calls
from service.worker.batcher import Generation
from service.worker.compiled import use_compile_cache
from service.worker.faults import BatchTooLarge, DeviceLost
from service.worker.pipeline import InpaintPipeline

logger = logging.getLogger(__name__)

MAX_AUTO_IMAGES = 16
MIN_AUTO_IMAGES = 4
"""Even where more rows bring no throughput, a few share the batch: a short request need not wait for a long one."""

MEASURING_SECONDS = 20.0
"""After that no larger batches are tried."""

KNEE = 0.98
"""Share of the best throughput at which more images in a batch only delay one another."""

ROWS_PER_IMAGE = 2
"""With guidance, which is the rule."""


@dataclass(frozen=True, slots=True)
class WarmedUp:
    """What was found out.

    Attributes:
        max_images: Images that may run at once.
        step_seconds: Seconds of one step at the native size, by UNet rows.
    """

    max_images: int
    step_seconds: Mapping[int, float]


def _ignore(_stage: str) -> None:
    """Nobody wants to know."""


def warm_up(pipeline: InpaintPipeline, settings: Settings, on_stage: Callable[[str], None] = _ignore) -> WarmedUp:
    """Run every stage once, compile and capture as the settings ask, and find how many images may run.

    Args:
        pipeline: Just made.
        settings: The operator's.
        on_stage: Told in a few words what is being done.

    Raises:
        StartupError: `compile` is on, and the model or the device cannot be compiled for;
            or there is no place for compiled code where the settings ask for it.
        BatchTooLarge: There is not enough memory for one image.
        DeviceLost: The device has failed.
    """
    on_stage("warming up")
    paint(pipeline, 1)
    if _is_captured(pipeline, settings):
        _speed_up(pipeline, settings, on_stage)
        on_stage("warming up")
        paint(pipeline, 1)
    step_seconds = pipeline.captured_seconds or _measure_steps(pipeline, settings.max_images)
    return WarmedUp(settings.max_images or knee(step_seconds), step_seconds)


def knee(step_seconds: Mapping[int, float]) -> int:
    """The fewest images that reach nearly the best throughput.

    Args:
        step_seconds: Seconds of one step, by UNet rows.
    """
    rates = {rows // ROWS_PER_IMAGE: rows / seconds for rows, seconds in step_seconds.items() if seconds > 0}
    if not rates:
        return MIN_AUTO_IMAGES
    best = max(rates.values())
    return max(MIN_AUTO_IMAGES, min(images for images, rate in rates.items() if rate >= KNEE * best))


def paint(pipeline: InpaintPipeline, num_images: int, num_steps: int = 4) -> list[float]:
    """Run small requests through every stage, all in one batch; returns the seconds of each step."""
    generations = [Generation(f"warm-up-{index}", _request(pipeline, num_steps)) for index in range(num_images)]
    pipeline.prepare(generations)
    seconds = []
    while not generations[0].is_denoised:
        started_at = time.monotonic()
        pipeline.step(generations)
        seconds.append(time.monotonic() - started_at)
        for generation in generations:
            generation.steps_done += 1
    pipeline.finish(generations)
    return seconds


def _request(pipeline: InpaintPipeline, num_steps: int) -> InpaintRequest:
    size = pipeline.components.info.native_size
    params = InpaintParams(
        prompt="",
        negative_prompt="",
        num_inference_steps=num_steps,
        guidance_scale=7.5,
        strength=1.0,
        num_images_per_prompt=1,
        seed=0,
        scheduler="ddim",
        eta=0.0,
        clip_skip=0,
        height=size,
        width=size,
    )
    grey, mask = np.full((size, size, 3), 128, np.uint8), np.full((size, size), 255, np.uint8)
    return InpaintRequest(params, grey, mask, admitted_at=0.0, deadline=float("inf"))


def _measure_steps(pipeline: InpaintPipeline, max_images: int | None) -> dict[int, float]:
    """Seconds of one step by UNet rows; doubles the batch until throughput falls, memory or time runs out."""
    step_seconds: dict[int, float] = {}
    started_at = time.monotonic()
    num_images, largest = 1, max_images or MAX_AUTO_IMAGES
    while num_images <= largest:
        try:
            seconds = sorted(paint(pipeline, num_images)[1:])
        except BatchTooLarge:
            logger.warning("out of device memory at %d images", num_images)
            if num_images == 1:
                raise
            break
        step_seconds[ROWS_PER_IMAGE * num_images] = seconds[len(seconds) // 2]
        is_past_knee = num_images > 1 and (
            KNEE / step_seconds[ROWS_PER_IMAGE * num_images] < 0.5 / step_seconds[num_images]
        )
        if is_past_knee or time.monotonic() - started_at > MEASURING_SECONDS:
            break
        num_images *= 2
    return step_seconds


# --- compiled and captured -----------------------------------------------------


def _is_captured(pipeline: InpaintPipeline, settings: Settings) -> bool:
    """Whether to compile and capture.

    Raises:
        StartupError: It is asked for, and impossible.
    """
    components = pipeline.components
    if settings.compile == "off":
        return False
    obstacle = None
    if components.device.type != "cuda":
        obstacle = f"the device is {components.device.type}; compiled and captured ticks need CUDA"
    elif not pipeline.can_be_captured:
        obstacle = "the model's UNet has inputs of its own, or an IP-Adapter, which captured ticks do not have"
    if settings.compile == "on":
        if obstacle is not None:
            raise StartupError(f"cannot compile: {obstacle}")
        return True
    # In float32, an operator wants stock's numbers more than speed.
    return obstacle is None and components.dtype is not torch.float32


def _speed_up(pipeline: InpaintPipeline, settings: Settings, on_stage: Callable[[str], None]) -> None:
    components = pipeline.components
    max_rows = ROWS_PER_IMAGE * (settings.max_images or MAX_AUTO_IMAGES)
    pipeline.lay_out_for_speed()
    if components.attention.backend is None and settings.attention_slicing is None:
        on_stage("choosing what computes attention")
        with torch.inference_mode():
            calls = seen_calls(components.unet, partial(paint, pipeline, 1, num_steps=1))
            backend = fastest_backend(components.unet, calls, max_rows)
        pipeline.prefer(AttentionContext(backend))
    if settings.compile_cache is not None:
        use_compile_cache(settings.compile_cache, settings.attention_backend)
    size = components.info.native_size
    started_at = time.monotonic()
    _capture(pipeline, settings, on_stage, max_rows, f"{size}x{size}")
    if pipeline.can_capture_autoencoder:
        on_stage(f"compiling the VAE for {size}x{size}")
        _or_give_up("compile the VAE", settings, pipeline.capture_autoencoder)
    on_stage("capturing the text encoder and the safety checker")
    _or_give_up("capture the text encoder", settings, pipeline.capture_text_encoder)
    _or_give_up("capture the safety checker", settings, pipeline.capture_safety_checker)
    logger.info("compiled and captured in %.1f s", time.monotonic() - started_at)


def _capture(
    pipeline: InpaintPipeline, settings: Settings, on_stage: Callable[[str], None], max_rows: int, size: str
) -> None:
    """The ticks; where the UNet cannot be compiled, as it is, and where that cannot be captured, none."""
    on_stage(f"compiling the UNet for {size}")

    def on_rows(num_rows: int) -> None:
        if num_rows < max_rows:
            on_stage(f"capturing steps of {num_rows} rows")

    for is_compiled in (True, False):
        capture = partial(pipeline.capture_ticks, max_rows, is_compiled=is_compiled, on_rows=on_rows)
        if _or_give_up("compile the UNet" if is_compiled else "capture steps", settings, capture):
            return


def _or_give_up(what: str, settings: Settings, capture: Callable[[], None]) -> bool:
    """Whether it went well; if not, go on with less speed, unless the operator insists."""
    try:
        capture()
    except DeviceLost:
        raise
    except Exception as error:  # A compiler has many ways to fail, none of which a model must die of
        if settings.compile == "on":
            raise StartupError(f"cannot {what}: {first_line(error)}") from error
        logger.warning("cannot %s, which costs speed: %s", what, first_line(error), exc_info=error)
        return False
    return True
