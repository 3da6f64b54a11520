"""LoRAs: every format merged as stock adds it, restored bit for bit, refused without a trace."""

import itertools
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from safetensors.torch import load_file, save_file

from service.errors import ErrorCode, InpaintError
from service.request import LoraUse
from service.worker import merging
from service.worker.adapters import Adapters
from tests.model.lora_files import FORMATS, make_lora

State = dict[str, torch.Tensor]


def use(path: Path, scale: float = 1.0, text_encoder_scale: float | None = None, blocks: object = None) -> LoraUse:
    """A LoRA as a request uses it."""
    stat = path.stat()
    return LoraUse(
        name=path.stem,
        path=str(path),
        version=f"{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ino}",
        unet_scale=scale,
        text_encoder_scale=scale if text_encoder_scale is None else text_encoder_scale,
        block_scales="" if blocks is None else json.dumps(blocks),
    )


def open_stock(folder: Path) -> StableDiffusionInpaintPipeline:
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def ours(inpainting_checkpoint: Path) -> StableDiffusionInpaintPipeline:
    """Models to merge into."""
    with torch.inference_mode(mode=False):
        return open_stock(inpainting_checkpoint)


@pytest.fixture
def stock(inpainting_checkpoint: Path) -> StableDiffusionInpaintPipeline:
    """Models for stock to load into; new for each test, because peft wraps their layers."""
    with torch.inference_mode(mode=False):
        return open_stock(inpainting_checkpoint)


@pytest.fixture
def adapters(ours: StableDiffusionInpaintPipeline) -> Adapters:
    return Adapters(ours.unet, ours.text_encoder)


def outputs(pipeline: StableDiffusionInpaintPipeline) -> tuple[torch.Tensor, torch.Tensor]:
    """A noise prediction and prompt embeddings."""
    source = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 9, 8, 8, generator=source)
    hidden = torch.randn(2, 77, 32, generator=source)
    noise = pipeline.unet(sample, torch.tensor([500.0, 20.0]), encoder_hidden_states=hidden, return_dict=False)[0]
    ids = pipeline.tokenizer("a red house", padding="max_length", return_tensors="pt").input_ids
    return noise, pipeline.text_encoder(ids)[0]


def set_stock(stock: StableDiffusionInpaintPipeline, loras: tuple[LoraUse, ...]) -> None:
    """`load_lora_weights` and `set_adapters`."""
    with torch.inference_mode(mode=False):
        for lora in loras:
            path = Path(lora.path)
            stock.load_lora_weights(path.parent, weight_name=path.name, adapter_name=lora.name)
        weights = [
            {
                "unet": json.loads(lora.block_scales) if lora.block_scales else lora.unet_scale,
                "text_encoder": lora.text_encoder_scale,
            }
            for lora in loras
        ]
        stock.set_adapters([lora.name for lora in loras], weights)


def apply(adapters: Adapters, loras: tuple[LoraUse, ...]) -> None:
    loaded = adapters.load(loras)
    adapters.apply_text_encoder(loras, loaded)
    adapters.apply_unet(loras, loaded)


def assert_equal_outputs(ours: StableDiffusionInpaintPipeline, stock: StableDiffusionInpaintPipeline) -> None:
    for actual, expected in zip(outputs(ours), outputs(stock), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def weights_of(pipeline: StableDiffusionInpaintPipeline) -> State:
    return {
        f"{part}.{name}": tensor.clone()
        for part in ("unet", "text_encoder")
        for name, tensor in getattr(pipeline, part).state_dict().items()
    }


def assert_same(actual: State, expected: State) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


# --- equal to stock ----------------------------------------------------------------------


@pytest.mark.parametrize(("file_format", "scale"), [*itertools.product(FORMATS, (1.0, -0.6))])
def test_each_format_is_merged_as_stock_adds_it(  # noqa: PLR0917 - fixtures
    file_format: str,
    scale: float,
    tmp_path: Path,
    ours: StableDiffusionInpaintPipeline,
    stock: StableDiffusionInpaintPipeline,
    adapters: Adapters,
) -> None:
    """Noise predictions and embeddings are those after stock's `load_lora_weights` and `set_adapters`."""
    before = outputs(ours)
    loras = (use(make_lora(tmp_path / "one.safetensors", ours, file_format), scale),)
    apply(adapters, loras)
    set_stock(stock, loras)
    assert_equal_outputs(ours, stock)
    assert not torch.allclose(outputs(ours)[0], before[0], atol=1e-3)


def test_several_with_scales(
    tmp_path: Path, ours: StableDiffusionInpaintPipeline, stock: StableDiffusionInpaintPipeline, adapters: Adapters
) -> None:
    """Their sum, each with its own scales for the UNet and the text encoder; 0 and negative ones too."""
    loras = (
        use(make_lora(tmp_path / "a.safetensors", ours, "kohya", seed=1), 0.8, 0.0),
        use(make_lora(tmp_path / "b.safetensors", ours, "locon", seed=2), -0.3, 0.9),
        use(make_lora(tmp_path / "c.safetensors", ours, "dora", seed=3), 0.5),
        use(make_lora(tmp_path / "d.safetensors", ours, "peft", seed=4), 0.0, -1.0),
    )
    set_stock(stock, loras)
    # In peft a DoRA also scales what comes before it, so that the order matters: it is the request's.
    for order in (loras, loras[::-1], loras[1:3]):
        apply(adapters, order)
        stock.set_adapters(
            [lora.name for lora in order],
            [{"unet": lora.unet_scale, "text_encoder": lora.text_encoder_scale} for lora in order],
        )
        assert_equal_outputs(ours, stock)


@pytest.mark.parametrize(
    "blocks",
    [
        {"down": 0.3, "mid": 0.0, "up": -0.5},
        {"up": {"block_0": [0.1, 0.9]}},
        {"down": {"block_1": 2.0}},
        {"mid": [0.4]},
    ],
    ids=str,
)
def test_scales_by_block(
    blocks: dict[str, object],
    tmp_path: Path,
    ours: StableDiffusionInpaintPipeline,
    stock: StableDiffusionInpaintPipeline,
    adapters: Adapters,
) -> None:
    """The UNet's scale can differ by block, as in stock's `set_adapters`; resnets go with the attention beside them."""
    loras = (use(make_lora(tmp_path / "one.safetensors", ours, "locon"), 1.0, 0.5, blocks),)
    apply(adapters, loras)
    set_stock(stock, loras)
    assert_equal_outputs(ours, stock)


@pytest.mark.parametrize("blocks", [{"up": {"block_0": [1, 2, 3, 4, 5]}}, {"down": {"block_1": [1, 2]}}], ids=str)
def test_scales_of_blocks_that_do_not_fit(
    blocks: dict[str, object], tmp_path: Path, ours: StableDiffusionInpaintPipeline, adapters: Adapters
) -> None:
    """They are the client's error, and nothing changes."""
    before = weights_of(ours)
    with pytest.raises(InpaintError) as refusal:
        adapters.load((use(make_lora(tmp_path / "one.safetensors", ours), blocks=blocks),))
    assert (refusal.value.code, refusal.value.field) == (ErrorCode.INVALID_FIELD, "loras")
    assert_same(weights_of(ours), before)


def test_keys_without_a_part_are_the_unets(
    tmp_path: Path, ours: StableDiffusionInpaintPipeline, adapters: Adapters
) -> None:
    """Files of `save_attn_procs` have no prefix: they are for the UNet."""
    path = make_lora(tmp_path / "prefixed.safetensors", ours, "old_diffusers")
    unet = {key: tensor for key, tensor in load_file(path).items() if key.startswith("unet.")}
    save_file(unet, tmp_path / "prefixed.safetensors")
    save_file({key.removeprefix("unet."): tensor for key, tensor in unet.items()}, tmp_path / "bare.safetensors")
    apply(adapters, (use(path),))
    expected = weights_of(ours)
    apply(adapters, (use(tmp_path / "bare.safetensors"),))
    assert_same(weights_of(ours), expected)


# --- coming and going --------------------------------------------------------------------


def test_weights_come_back_bit_for_bit(
    tmp_path: Path, ours: StableDiffusionInpaintPipeline, adapters: Adapters
) -> None:
    """A, B, none, both, A: each is the same as the first time, and without any the weights are the pristine ones."""
    pristine = weights_of(ours)
    a = use(make_lora(tmp_path / "a.safetensors", ours, "locon", seed=1), 0.7)
    b = use(make_lora(tmp_path / "b.safetensors", ours, "dora", seed=2))
    seen: dict[tuple[LoraUse, ...], State] = {(): pristine}
    for loras in ((a,), (b,), (), (a, b), (a,), (b,), (a, b), ()):
        apply(adapters, loras)
        assert_same(weights_of(ours), seen.setdefault(loras, weights_of(ours)))
    assert any(not torch.equal(seen[a,][name], pristine[name]) for name in pristine)


def test_weights_change_in_place(tmp_path: Path, ours: StableDiffusionInpaintPipeline, adapters: Adapters) -> None:
    """The storage stays, so that what was compiled or captured with it goes on working."""
    pointers = {name: weight.data_ptr() for name, weight in ours.unet.named_parameters()}
    apply(adapters, (use(make_lora(tmp_path / "a.safetensors", ours)),))
    assert {name: weight.data_ptr() for name, weight in ours.unet.named_parameters()} == pointers


@pytest.mark.parametrize("failing", ["_foreach_copy_", "_with_updates"])
def test_failure_half_way_leaves_no_trace(
    failing: str,
    tmp_path: Path,
    ours: StableDiffusionInpaintPipeline,
    adapters: Adapters,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Memory that runs out in the middle of a merge: what is asked for next is merged rightly."""
    pristine = weights_of(ours)
    a = use(make_lora(tmp_path / "a.safetensors", ours, seed=1))
    b = use(make_lora(tmp_path / "b.safetensors", ours, "locon", seed=2))
    apply(adapters, (a,))
    with_a = weights_of(ours)
    num_calls = 0

    def copy_some(weights: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        for weight, source in [*zip(weights, sources, strict=True)][:5]:
            weight.copy_(source)
        raise torch.OutOfMemoryError

    def merge_some(weight: torch.Tensor, updates: object) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        if num_calls > 5:
            raise torch.OutOfMemoryError
        return real(weight, updates)  # type: ignore[arg-type]

    real = merging._with_updates
    for after, expected in (((), pristine), ((a,), with_a)):
        num_calls = 0
        with monkeypatch.context() as patch:
            if failing == "_foreach_copy_":
                patch.setattr(torch, failing, copy_some)
            else:
                patch.setattr(merging, failing, merge_some)
            with pytest.raises(torch.OutOfMemoryError):
                adapters.apply_unet((a, b), adapters.load((a, b)))
        apply(adapters, after)
        assert_same(weights_of(ours), expected)


def test_turns_cost_no_new_products(
    tmp_path: Path, ours: StableDiffusionInpaintPipeline, adapters: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches that take turns find their weights merged already, as far as these are kept."""
    a, b = (use(make_lora(tmp_path / f"{seed}.safetensors", ours, seed=seed)) for seed in (1, 2))
    seen = {}
    for lora in (a, b):
        apply(adapters, (lora,))
        seen[lora] = weights_of(ours)
    with monkeypatch.context() as patch:
        patch.setattr(merging, "_with_updates", lambda *_: pytest.fail("it was merged again"))
        for lora in (a, b, a):
            apply(adapters, (lora,))
            assert_same(weights_of(ours), seen[lora])


def test_merged_weights_that_are_too_large_are_not_kept(
    tmp_path: Path, ours: StableDiffusionInpaintPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for them is bounded; what is not kept is merged anew, to the same bits."""
    monkeypatch.setattr(merging, "MAX_KEPT_BYTES", 0)
    adapters = Adapters(ours.unet, ours.text_encoder)
    a, b = (use(make_lora(tmp_path / f"{seed}.safetensors", ours, seed=seed)) for seed in (1, 2))
    apply(adapters, (a,))
    first = weights_of(ours)
    apply(adapters, (b,))
    assert all(not part._kept for part in adapters._parts.values())
    apply(adapters, (a,))
    assert_same(weights_of(ours), first)


def test_loaded_lora_outlasts_its_file(tmp_path: Path, ours: StableDiffusionInpaintPipeline) -> None:
    """Who holds a loaded LoRA goes on with it, though its file is replaced and many others come."""
    adapters = Adapters(ours.unet, ours.text_encoder, max_loaded=1)
    path = make_lora(tmp_path / "a.safetensors", ours, seed=1)
    first = use(path)
    held = adapters.load((first,))
    adapters.apply_unet((first,), held)
    expected = weights_of(ours)
    make_lora(tmp_path / "new.safetensors", ours, seed=9).replace(path)
    other = use(make_lora(tmp_path / "b.safetensors", ours, seed=2))
    adapters.apply_unet((other,), adapters.load((other,)))
    adapters.apply_unet((first,), held)
    assert_same(weights_of(ours), expected)
    assert len(held) == 1

    del held
    adapters.load((other,))
    with pytest.raises(InpaintError) as refusal:
        adapters.load((first,))
    assert (refusal.value.code, refusal.value.field) == (ErrorCode.UNKNOWN_LORA, "loras")
    adapters.load((use(path),))


# --- refused -----------------------------------------------------------------------------


def _truncated(path: Path, pipeline: StableDiffusionInpaintPipeline) -> None:
    data = make_lora(path, pipeline).read_bytes()
    path.write_bytes(data[:-10])


def _pickled(path: Path, pipeline: StableDiffusionInpaintPipeline) -> None:
    state = load_file(make_lora(path, pipeline))
    path.write_bytes(pickle.dumps({key: tensor.numpy() for key, tensor in state.items()}))


def _with_nan(path: Path, pipeline: StableDiffusionInpaintPipeline) -> None:
    state = load_file(make_lora(path, pipeline))
    next(iter(state.values())).view(-1)[0] = float("nan")
    save_file(state, path)


def _half(path: Path, pipeline: StableDiffusionInpaintPipeline) -> None:
    state = load_file(make_lora(path, pipeline))
    state.pop(next(key for key in state if "lora_B" in key))
    save_file(state, path)


def _renamed(path: Path, pipeline: StableDiffusionInpaintPipeline) -> None:
    state = load_file(make_lora(path, pipeline))
    save_file({key.replace("down_blocks.1", "down_blocks.7"): tensor for key, tensor in state.items()}, path)


def _loha(path: Path, _: StableDiffusionInpaintPipeline) -> None:
    save_file({"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": torch.ones(2, 2)}, path)


def _sdxl(path: Path, pipeline: StableDiffusionInpaintPipeline) -> None:
    state = load_file(make_lora(path, pipeline, "kohya"))
    save_file({key.replace("lora_te_", "lora_te2_"): tensor for key, tensor in state.items()}, path)


def _flux(path: Path, _: StableDiffusionInpaintPipeline) -> None:
    name = "transformer.single_transformer_blocks.0.attn.to_q"
    save_file({f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(4, 2)}, path)


def _no_lora(path: Path, pipeline: StableDiffusionInpaintPipeline) -> None:
    save_file(dict(pipeline.vae.state_dict()), path)


def _empty(path: Path, _: StableDiffusionInpaintPipeline) -> None:
    save_file({}, path)


def _without_some_magnitudes(path: Path, pipeline: StableDiffusionInpaintPipeline) -> None:
    state = load_file(make_lora(path, pipeline, "dora"))
    save_file({key: tensor for key, tensor in state.items() if "attn1.to_q.lora_mag" not in key}, path)


def _of_integers(path: Path, pipeline: StableDiffusionInpaintPipeline) -> None:
    state = load_file(make_lora(path, pipeline))
    save_file({key: tensor.to(torch.int32) for key, tensor in state.items()}, path)


def _with_config(path: Path, pipeline: StableDiffusionInpaintPipeline, file_format: str, **config: object) -> None:
    state = load_file(make_lora(path, pipeline, file_format))
    unet = {f"unet.{key}": value for key, value in {"r": 3, "lora_alpha": 3, **config}.items()}
    save_file(state, path, {"lora_adapter_metadata": json.dumps(unet)})


def _contradicting(path: Path, pipeline: StableDiffusionInpaintPipeline) -> None:
    _with_config(path, pipeline, "dora", use_dora=False)


def _infinite(path: Path, pipeline: StableDiffusionInpaintPipeline) -> None:
    _with_config(path, pipeline, "unet_only", lora_alpha=float("inf"))


def _pissa(path: Path, pipeline: StableDiffusionInpaintPipeline) -> None:
    _with_config(path, pipeline, "unet_only", init_lora_weights="pissa")


def _endless(path: Path, pipeline: StableDiffusionInpaintPipeline) -> None:
    """As a regular expression, this would be tried for longer than anybody lives."""
    _with_config(path, pipeline, "unet_only", alpha_pattern={"([a-z_.0-9]+)+!": 1})


BROKEN = (
    _truncated,
    _pickled,
    _with_nan,
    _half,
    _renamed,
    _loha,
    _sdxl,
    _flux,
    _no_lora,
    _empty,
    _without_some_magnitudes,
    _of_integers,
    _contradicting,
    _infinite,
    _pissa,
    _endless,
)


@pytest.mark.parametrize("spoil", BROKEN, ids=lambda spoil: spoil.__name__)
def test_what_cannot_be_used_is_refused_without_a_trace(
    spoil: object, tmp_path: Path, ours: StableDiffusionInpaintPipeline, adapters: Adapters
) -> None:
    """422 of the field, in a sentence without paths; neither weights nor what is applied change."""
    good = use(make_lora(tmp_path / "good.safetensors", ours))
    apply(adapters, (good,))
    before = weights_of(ours)
    path = tmp_path / "bad.safetensors"
    spoil(path, ours)  # type: ignore[operator]
    for call in (lambda: adapters.load((good, use(path))), lambda: adapters.inspect(str(path))):
        with pytest.raises(InpaintError) as refusal:
            call()
        assert (refusal.value.code, refusal.value.field) == (ErrorCode.INVALID_LORA, "loras")
        assert str(tmp_path) not in refusal.value.message
        assert_same(weights_of(ours), before)


def test_refused_file_is_not_read_again(
    tmp_path: Path, ours: StableDiffusionInpaintPipeline, adapters: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is no LoRA is known as such, until the file is another one."""
    path = tmp_path / "bad.safetensors"
    _no_lora(path, ours)
    bad = use(path)
    with pytest.raises(InpaintError) as first:
        adapters.load((bad,))
    with monkeypatch.context() as patch:
        patch.setattr("service.worker.adapters.read_lora", lambda *_: pytest.fail("it was read again"))
        with pytest.raises(InpaintError) as second:
            adapters.load((bad,))
    assert (second.value.code, second.value.message) == (first.value.code, first.value.message)
    make_lora(path, ours)
    adapters.load((use(path),))


def test_lora_of_another_architecture_is_refused(
    tmp_path: Path, ours: StableDiffusionInpaintPipeline, adapters: Adapters
) -> None:
    """The same keys with other shapes."""
    path = make_lora(tmp_path / "wide.safetensors", ours)
    wide = {
        key: torch.cat([tensor, tensor], dim=1) if "lora_A" in key else tensor
        for key, tensor in load_file(path).items()
    }
    save_file(wide, path)
    with pytest.raises(InpaintError, match="another architecture"):
        adapters.load((use(path),))


def test_file_that_is_gone_or_changed(tmp_path: Path, ours: StableDiffusionInpaintPipeline, adapters: Adapters) -> None:
    """`unknown_lora`: another version is another LoRA."""
    path = make_lora(tmp_path / "a.safetensors", ours)
    wanted = use(path)
    os.utime(path, ns=(1, 1))
    for prepare in (lambda: None, path.unlink):
        prepare()
        with pytest.raises(InpaintError) as refusal:
            adapters.load((wanted,))
        assert refusal.value.code is ErrorCode.UNKNOWN_LORA


def test_inspection_tells_what_a_file_is(
    tmp_path: Path, ours: StableDiffusionInpaintPipeline, adapters: Adapters
) -> None:
    """Its rank and how many layers of each part it changes; nothing is applied."""
    before = weights_of(ours)
    info = adapters.inspect(str(make_lora(tmp_path / "a.safetensors", ours, "kohya")))
    assert info.rank == 3
    assert info.num_unet_layers > 8
    assert info.num_text_encoder_layers == 18
    assert_same(weights_of(ours), before)


def test_peft_is_not_needed(tmp_path: Path, inpainting_checkpoint: Path, ours: StableDiffusionInpaintPipeline) -> None:
    """The service merges LoRAs by itself: peft need not be installed."""
    paths = [make_lora(tmp_path / f"{name}.safetensors", ours, name) for name in FORMATS]
    script = f"""
import sys
sys.modules["peft"] = None
from pathlib import Path
from service.settings import Settings
import torch
from service.worker import merging
from service.worker.adapters import Adapters
from service.worker.checkpoint import load
components = load(Settings(model={str(inpainting_checkpoint)!r}), torch.device("cpu"))
adapters = Adapters(components.unet, components.text_encoder)
for path in {[str(path) for path in paths]!r}:
    print(adapters.inspect(path).num_unet_layers)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [int(line) > 0 for line in done.stdout.split()] == [True] * len(FORMATS)
