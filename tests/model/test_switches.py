"""Slicing, tiling and the attention backend: as stock with the same switch, and refused where they cannot run."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionInpaintPipeline
from diffusers.models.attention_processor import Attention, SlicedAttnProcessor
from numpy.typing import NDArray
from torch.nn.attention import SDPBackend, sdpa_kernel

from service.errors import StartupError
from service.request import InpaintParams, InpaintRequest
from service.settings import Settings, load_settings
from service.worker import attention
from service.worker.attention import AttentionContext
from service.worker.checkpoint import load
from service.worker.checkpoint_source import BUNDLED_FOLDER
from service.worker.pipeline import InpaintPipeline
from service.worker.switches import apply_switches
from tests.model.checkpoints import NATIVE_SIZE
from tests.model.mixed_requests import paint_target
from tests.model.staggered import run_staggered
from tests.model.stock import Stock

CPU = torch.device("cpu")
HEADS = 8
"""Of every attention layer of the tiny UNet."""


def requests() -> list[InpaintRequest]:
    """Pictures of twice the VAE's tile on one side or both, several to a request, at any strength."""
    return [
        paint_target(
            InpaintParams(
                prompt="a red house",
                negative_prompt="",
                num_inference_steps=4,
                guidance_scale=guidance_scale,
                strength=strength,
                num_images_per_prompt=num_images,
                seed=number,
                scheduler=scheduler,
                eta=0.0,
                clip_skip=0,
                height=2 * NATIVE_SIZE,
                width=width,
            ),
            number,
        )
        for number, (guidance_scale, strength, num_images, scheduler, width) in enumerate(
            [(7.5, 1.0, 2, "ddim", 2 * NATIVE_SIZE), (1.0, 0.6, 1, "euler_a", NATIVE_SIZE)]
        )
    ]


def served(folder: Path, **changes: Any) -> list[NDArray[np.uint8]]:
    """Pictures of a worker."""
    pipeline = InpaintPipeline(load(Settings(model=str(folder), **changes), CPU), "flag")
    results, _ = run_staggered(pipeline, requests())
    return [results[str(index)].images for index in range(len(results))]


def stock(
    folder: Path,
    switch: Callable[[StableDiffusionInpaintPipeline], None],
    context: AbstractContextManager[Any] | None = None,
) -> list[NDArray[np.uint8]]:
    reference = Stock(folder)
    switch(reference.pipeline)
    with context or nullcontext():
        return [reference(request)[0] for request in requests()]


def difference(some: list[NDArray[np.uint8]], others: list[NDArray[np.uint8]]) -> int:
    return max(int(np.abs(one.astype(int) - other).max()) for one, other in zip(some, others, strict=True))


def refusal(folder: Path, **changes: Any) -> str:
    with pytest.raises(StartupError) as caught:
        load(Settings(model=str(folder), **changes), CPU)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- as stock ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "switch"),
    [
        ({"vae_slicing": True}, lambda pipe: pipe.vae.enable_slicing()),
        ({"vae_tiling": True}, lambda pipe: pipe.vae.enable_tiling()),
        (
            {"vae_slicing": True, "vae_tiling": True},
            lambda pipe: (pipe.vae.enable_slicing(), pipe.vae.enable_tiling()),
        ),
        ({"attention_slicing": "auto"}, lambda pipe: pipe.enable_attention_slicing()),
        ({"attention_slicing": "max"}, lambda pipe: pipe.enable_attention_slicing("max")),
        ({"attention_slicing": 3}, lambda pipe: pipe.enable_attention_slicing(3)),
    ],
    ids=["vae_slicing", "vae_tiling", "both", "attention_auto", "attention_max", "attention_3"],
)
def test_pictures_are_those_of_stock_with_the_same_switch(
    inpainting_checkpoint: Path, changes: dict[str, Any], switch: Callable[[StableDiffusionInpaintPipeline], None]
) -> None:
    """Whatever is turned on, the worker's pictures are stock's within a 255th."""
    assert difference(served(inpainting_checkpoint, **changes), stock(inpainting_checkpoint, switch)) <= 1


def test_tiles_are_seen(inpainting_checkpoint: Path) -> None:
    """The pictures of these tests are large enough for tiles, which change pixels."""
    assert difference(served(inpainting_checkpoint), served(inpainting_checkpoint, vae_tiling=True)) > 1


@pytest.mark.parametrize(("name", "backend"), [("math", SDPBackend.MATH), ("flash", SDPBackend.FLASH_ATTENTION)])
def test_attention_backends_of_a_cpu(inpainting_checkpoint: Path, name: str, backend: SDPBackend) -> None:
    """A CPU has two backends; with either the pictures are those of stock with the same one."""
    expected = stock(inpainting_checkpoint, lambda _: None, sdpa_kernel(backend))
    assert difference(served(inpainting_checkpoint, attention_backend=name), expected) <= 1


# --- what is set -------------------------------------------------------------


@pytest.mark.parametrize(("size", "slices"), [("auto", HEADS // 2), ("max", 1), (4, 4), (HEADS, HEADS)])
def test_every_layer_of_the_unet_is_sliced(inpainting_checkpoint: Path, size: str | int, slices: int) -> None:
    """The slice's size is stock's, in every layer."""
    unet = load(Settings(model=str(inpainting_checkpoint), attention_slicing=size), CPU).unet  # type: ignore[arg-type]
    processors = [module.processor for module in unet.modules() if isinstance(module, Attention)]
    assert processors
    assert all(isinstance(one, SlicedAttnProcessor) and one.slice_size == slices for one in processors)


def test_nothing_is_set_unless_asked(inpainting_checkpoint: Path) -> None:
    """By default nothing is sliced or tiled, and torch chooses what computes attention."""
    components = load(Settings(model=str(inpainting_checkpoint)), CPU)
    assert not components.vae.use_slicing
    assert not components.vae.use_tiling
    assert not [one for one in components.unet.attn_processors.values() if isinstance(one, SlicedAttnProcessor)]
    assert components.attention.backend is None
    assert components.info.attention_backend == "auto"


@pytest.mark.parametrize("name", ["auto", "math", "flash"])
def test_clients_are_told_the_backend(inpainting_checkpoint: Path, name: str) -> None:
    info = load(Settings(model=str(inpainting_checkpoint), attention_backend=name), CPU).info  # type: ignore[arg-type]
    assert info.attention_backend == name


def test_backend_holds_inside_the_context_and_only_there() -> None:
    """The context can be entered again, also inside itself, and leaves torch as it was."""
    rows = torch.zeros(1, 1, 2, 8)

    def chosen() -> int:
        return int(torch._fused_sdp_choice(rows, rows, rows))

    context = AttentionContext(SDPBackend.MATH)
    assert chosen() == SDPBackend.FLASH_ATTENTION.value
    for _ in range(2):
        with context.active(), context.active():
            assert chosen() == SDPBackend.MATH.value
        assert chosen() == SDPBackend.FLASH_ATTENTION.value


def test_backend_holds_as_long_as_any_thread_is_inside() -> None:
    """Threads come and go in any order, as the worker's do."""
    context = AttentionContext(SDPBackend.MATH)
    first, second = context.active(), context.active()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.backends.cuda.flash_sdp_enabled()
    second.__exit__(None, None, None)
    assert torch.backends.cuda.flash_sdp_enabled()


def test_backend_holds_in_every_model(inpainting_checkpoint: Path) -> None:
    """Text encoder, VAE, UNet and safety checker are all called with the backend that was asked for."""
    components = load(Settings(model=str(inpainting_checkpoint), attention_backend="math"), CPU)
    models = (components.text_encoder, components.unet, components.vae.encoder, components.vae.decoder)
    seen: dict[str, bool] = {}
    for model in (*models, components.safety_checker.vision_model):  # type: ignore[union-attr]
        name = type(model).__name__
        model.register_forward_pre_hook(
            lambda *_, name=name: seen.update({name: seen.get(name, False) or torch.backends.cuda.flash_sdp_enabled()})
        )
    run_staggered(InpaintPipeline(components, "flag"), requests())
    assert len(seen) == len(models) + 1
    assert not any(seen.values())


@pytest.mark.parametrize("text", ["auto", "max", "4", "", " "])
def test_attention_slicing_is_read_from_text(text: str) -> None:
    """A word, a number, or nothing, as compose files pass it."""
    value = load_settings(environ={"INPAINT_ATTENTION_SLICING": text}).attention_slicing
    assert value == {"4": 4, "": None, " ": None}.get(text, text)


@pytest.mark.parametrize(
    ("name", "text"),
    [("attention_slicing", "0"), ("attention_slicing", "half"), ("attention_backend", "fastest")],
)
def test_other_words_are_no_settings(name: str, text: str) -> None:
    with pytest.raises(StartupError, match=f"INPAINT_{name.upper()}"):
        load_settings(environ={f"INPAINT_{name.upper()}": text})


# --- refused at start --------------------------------------------------------


@pytest.mark.parametrize("name", ["efficient", "cudnn", "xformers"])
def test_backends_that_a_cpu_lacks_are_refused(
    inpainting_checkpoint: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """One line that names the backend and the device, and none of torch's own."""
    message = refusal(inpainting_checkpoint, attention_backend=name)
    assert repr(name) in message
    assert "cpu" in message
    assert "Warning" not in capfd.readouterr().err


def test_backend_that_computes_something_else_is_refused(
    inpainting_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that runs but is wrong is found before the first request."""
    computes = attention.scaled_dot_product_attention

    def wrong(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        is_trial = torch.is_inference_mode_enabled()
        return computes(query, key, value) * (1.01 if is_trial else 1.0)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", wrong)
    assert "computes wrongly on cpu in float32" in refusal(inpainting_checkpoint, attention_backend="flash")

    monkeypatch.setattr(
        attention, "scaled_dot_product_attention", lambda query, key, value: wrong(query, key, value) / 0
    )
    assert "computes wrongly" in refusal(inpainting_checkpoint, attention_backend="flash")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_within_its_own_tolerance(inpainting_checkpoint: Path, dtype: str) -> None:
    """A coarser type rounds more: that is no wrong kernel."""
    settings = Settings(model=str(inpainting_checkpoint), dtype=dtype, attention_backend="flash")  # type: ignore[arg-type]
    assert load(settings, CPU).attention.backend is SDPBackend.FLASH_ATTENTION


def test_slices_must_fit_the_heads(inpainting_checkpoint: Path) -> None:
    """A slice of more heads than a layer has is refused with the number that it has."""
    message = refusal(inpainting_checkpoint, attention_slicing=HEADS + 1)
    assert f"'{HEADS + 1}'" in message
    assert f"as few as {HEADS} heads" in message
    assert load(Settings(model=str(BUNDLED_FOLDER), attention_slicing=4), CPU)
    assert "as few as 4 heads" in refusal(BUNDLED_FOLDER, attention_slicing=5)


@pytest.mark.parametrize("backend", ["math", "flash", "efficient", "cudnn", "xformers"])
def test_slicing_excludes_a_backend(inpainting_checkpoint: Path, backend: str) -> None:
    """Sliced attention uses no backend: who asks for both is told."""
    message = refusal(inpainting_checkpoint, attention_slicing="auto", attention_backend=backend)
    assert "cannot be combined" in message
    assert repr(backend) in message


def test_vae_without_a_switch_is_named(inpainting_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every autoencoder can be sliced or tiled."""
    unet = load(Settings(model=str(inpainting_checkpoint)), CPU).unet
    vae = AutoencoderTiny()
    monkeypatch.delattr(vae, "use_slicing")
    with pytest.raises(StartupError, match="AutoencoderTiny, which has no slicing"):
        apply_switches(unet, vae, Settings(vae_slicing=True))
