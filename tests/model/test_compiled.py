"""What makes models fast changes no result: fused projections, compiled code, and cuDNN's trials."""

import copy
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, SlicedAttnProcessor

from service.errors import StartupError
from service.worker.adapters import Adapters
from service.worker.compiled import compiled, fuse_projections, noise_predictor, use_compile_cache
from tests.model.checkpoints import NATIVE_SIZE
from tests.model.lora_files import make_lora
from tests.model.rows import Model

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # in torch's own compiler

LATENTS = NATIVE_SIZE // 8


@pytest.fixture(scope="module")
def stock(inpainting_checkpoint: Path) -> StableDiffusionInpaintPipeline:
    return StableDiffusionInpaintPipeline.from_pretrained(inpainting_checkpoint)


@pytest.fixture
def unet(stock: StableDiffusionInpaintPipeline) -> UNet2DConditionModel:
    """A UNet of one's own."""
    return copy.deepcopy(stock.unet).eval().requires_grad_(False)


def unet_inputs(num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(num_rows)
    rows = torch.randn(num_rows, 9, LATENTS, LATENTS, generator=source)
    embeds = torch.randn(num_rows, 77, 32, generator=source)
    return rows, torch.linspace(20, 900, num_rows), embeds


def output(unet: UNet2DConditionModel) -> torch.Tensor:
    with torch.inference_mode():
        return noise_predictor(unet, is_compiled=False)(*unet_inputs(3))


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


# --- fused projections -------------------------------------------------------


def attention_layers(unet: UNet2DConditionModel) -> list[Attention]:
    return [module for module in unet.modules() if isinstance(module, Attention)]


def test_fused_projections_compute_the_same(unet: UNet2DConditionModel) -> None:
    """One product in the place of two or three, in every layer."""
    before = output(unet)
    fuse_projections(unet)
    layers = attention_layers(unet)
    assert layers
    assert all(hasattr(layer, "to_kv" if layer.is_cross_attention else "to_qkv") for layer in layers)
    assert not [one for one in unet.attn_processors.values() if isinstance(one, AttnProcessor2_0)]
    assert_close(output(unet), before)
    assert not any(weight.requires_grad for weight in unet.parameters())


def test_separate_weights_are_parts_of_the_fused_ones(unet: UNet2DConditionModel) -> None:
    """Who changes one changes both: no second copy is kept, none can be forgotten."""
    fuse_projections(unet)
    for layer in attention_layers(unet):
        parts, fused = [layer.to_k, layer.to_v], getattr(layer, "to_kv", None)
        if not layer.is_cross_attention:
            parts, fused = [layer.to_q, *parts], layer.to_qkv
        assert fused is not None
        for part in parts:
            assert part.weight.untyped_storage().data_ptr() == fused.weight.untyped_storage().data_ptr()
        assert torch.equal(torch.cat([part.weight for part in parts]), fused.weight)


@pytest.mark.parametrize("name", ["to_q", "to_k", "to_v"])
@pytest.mark.parametrize("is_cross_attention", [False, True])
def test_changed_part_is_seen_by_the_product(unet: UNet2DConditionModel, name: str, is_cross_attention: bool) -> None:
    """As LoRAs change weights, in place: the fused UNet gives what one would that was made with these weights."""
    plain = copy.deepcopy(unet)
    fuse_projections(unet)
    before = output(unet)
    for model in (unet, plain):
        layer = next(one for one in attention_layers(model) if one.is_cross_attention == is_cross_attention)
        with torch.inference_mode():
            getattr(layer, name).weight.mul_(-1.5)
    assert (output(unet) - before).abs().max() > 1e-4
    assert_close(output(unet), output(plain))


@pytest.mark.parametrize("file_format", ["peft", "locon", "dora"])
@pytest.mark.parametrize("is_fused_first", [True, False])
def test_loras_on_fused_projections(
    stock: StableDiffusionInpaintPipeline,
    unet: UNet2DConditionModel,
    tmp_path: Path,
    file_format: str,
    is_fused_first: bool,
) -> None:
    """Merged they give what they give without; when they go, every weight is bit for bit what it was."""
    plain = copy.deepcopy(unet)
    path = make_lora(tmp_path / "lora.safetensors", stock, file_format, seed=1)
    lora = Model(NATIVE_SIZE, width=32, loras={"lora": path}).lora(0, 0.8)
    if is_fused_first:
        fuse_projections(unet)
    adapters, others = (Adapters(model, copy.deepcopy(stock.text_encoder)) for model in (unet, plain))
    if not is_fused_first:  # As the pipeline does it.
        fuse_projections(unet)
    pristine = {name: weight.clone() for name, weight in unet.state_dict().items()}
    before = output(unet)
    with torch.inference_mode():
        for each in (adapters, others):
            each.apply_unet((lora,), each.load((lora,)))
        assert (output(unet) - before).abs().max() > 1e-4
        assert_close(output(unet), output(plain))
        adapters.apply_unet((), ())
    assert torch.equal(output(unet), before)
    assert all(torch.equal(weight, pristine[name]) for name, weight in unet.state_dict().items())


def give_bias(unet: UNet2DConditionModel) -> None:
    """A cross-attention layer whose projections have biases."""
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    old = block.attn2
    block.attn2 = Attention(
        query_dim=old.query_dim, cross_attention_dim=32, heads=old.heads, dim_head=old.inner_dim // old.heads, bias=True
    )


def give_added_keys(unet: UNet2DConditionModel) -> None:
    """A cross-attention layer that takes keys of another source beside the prompt's."""
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    old = block.attn2
    block.attn2 = Attention(
        query_dim=old.query_dim,
        cross_attention_dim=32,
        heads=old.heads,
        dim_head=old.inner_dim // old.heads,
        added_kv_proj_dim=32,
        processor=AttnProcessor2_0(),
    )


@pytest.mark.parametrize(
    "change",
    [give_bias, give_added_keys, lambda unet: unet.set_attention_slice(2)],
    ids=["bias", "added keys", "sliced attention"],
)
def test_unusual_layers_are_left_alone(
    unet: UNet2DConditionModel, change: Callable[[UNet2DConditionModel], None]
) -> None:
    """What is not stock's plain attention stays as it is, with all of the UNet."""
    change(unet)
    processors = dict(unet.attn_processors)
    weights = {name: (id(weight), weight.data_ptr()) for name, weight in unet.named_parameters()}
    before = copy.deepcopy(unet.state_dict())
    fuse_projections(unet)
    assert unet.attn_processors == processors
    assert {name: (id(weight), weight.data_ptr()) for name, weight in unet.named_parameters()} == weights
    assert unet.state_dict().keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in unet.state_dict().items())
    assert not any(layer.fused_projections for layer in attention_layers(unet))


def test_sliced_attention_is_recognised(unet: UNet2DConditionModel) -> None:
    """The test above means something: slicing does set other processors."""
    unet.set_attention_slice(2)
    assert all(isinstance(one, SlicedAttnProcessor) for one in unet.attn_processors.values())


# --- compiled ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CudnnFlags:
    """Everything that there is to set, but whether it tries."""

    enabled: bool
    deterministic: bool
    allow_tf32: bool
    benchmark_limit: int | None

    @classmethod
    def now(cls) -> "CudnnFlags":
        """As they are."""
        cudnn = torch.backends.cudnn
        return cls(cudnn.enabled, cudnn.deterministic, cudnn.allow_tf32, cudnn.benchmark_limit)


class Backend:
    """A compiler that leaves the graph as it is, counts graphs, and looks at cuDNN's flags whenever one runs."""

    def __init__(self) -> None:
        self.num_graphs = 0
        self.is_trying: list[bool] = []
        self.flags: list[CudnnFlags] = []
        self.is_failing = False

    def __call__(self, graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        """The graph."""
        self.num_graphs += 1
        self._look()

        def run(*inputs: torch.Tensor) -> Any:
            self._look()
            if self.is_failing:
                raise RuntimeError("no kernel")
            return graph.forward(*inputs)

        return run

    def _look(self) -> None:
        self.is_trying.append(torch.backends.cudnn.benchmark)
        self.flags.append(CudnnFlags.now())


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing compiled before counts."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def backend(fresh_dynamo: None, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """What `torch.compile` compiles with."""
    del fresh_dynamo
    counting = Backend()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counting))
    return counting


class Tiny(torch.nn.Module):
    """Of a noise predictor's signature."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self._linear = torch.nn.Linear(9, 4)

    def forward(self, rows: torch.Tensor, timesteps: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """(R, h, w, 4)."""
        shift = timesteps.sin().view(-1, 1, 1, 1) + embeds.mean(dim=(1, 2)).view(-1, 1, 1, 1)
        products: torch.Tensor = self._linear(rows.permute(0, 2, 3, 1))
        return products + shift


def test_one_graph_for_one_row_and_one_for_any_larger_number(backend: Backend) -> None:
    """Every new number of rows would otherwise cost a minute."""
    model = Tiny().eval()
    function = compiled(model)
    with torch.inference_mode():
        for num_rows, num_graphs in ((6, 1), (2, 1), (1, 2), (32, 2), (3, 2), (1, 2)):
            inputs = unet_inputs(num_rows)
            assert_close(function(*inputs), model(*inputs))
            assert backend.num_graphs == num_graphs, num_rows


def test_unet_is_one_graph_for_all_numbers_of_rows(backend: Backend, unet: UNet2DConditionModel) -> None:
    """Nothing in it depends on how many rows there are, nor breaks out of the graph; fused and channels last."""
    unet.to(memory_format=torch.channels_last)
    fuse_projections(unet)
    function, plain = (noise_predictor(unet, is_compiled=is_compiled) for is_compiled in (True, False))
    with torch.inference_mode():
        for num_rows in (8, 2, 12, 6):  # From 16 on, a CPU has other convolutions.
            inputs = unet_inputs(num_rows)
            assert_close(function(*inputs), plain(*inputs))
    assert backend.num_graphs == 1


@pytest.mark.parametrize("was_trying", [False, True])
def test_cudnn_tries_inside_and_only_there(backend: Backend, monkeypatch: pytest.MonkeyPatch, was_trying: bool) -> None:
    """And nothing else of it changes: neither what the operator set nor whether it is used at all."""
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "benchmark", was_trying)
    for is_enabled, is_deterministic, allows_tf32 in ((True, False, True), (True, True, False), (False, False, False)):
        with cudnn.flags(
            enabled=is_enabled, benchmark=was_trying, deterministic=is_deterministic, allow_tf32=allows_tf32
        ):
            backend.is_failing = False
            outside = CudnnFlags.now()
            assert (outside.enabled, outside.allow_tf32) == (is_enabled, allows_tf32)
            function = compiled(Tiny().eval())
            with torch.inference_mode():
                function(*unet_inputs(2))
                assert cudnn.benchmark is was_trying
                backend.is_failing = True
                with pytest.raises(RuntimeError, match="no kernel"):
                    function(*unet_inputs(2))
            assert cudnn.benchmark is was_trying
            assert CudnnFlags.now() == outside
            assert len(backend.is_trying) >= 2
            assert all(backend.is_trying)
            assert set(backend.flags) == {outside}
            backend.is_trying.clear()
            backend.flags.clear()


# --- the cache ---------------------------------------------------------------


@pytest.fixture
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Left as it was."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/nowhere")


@pytest.mark.usefixtures("_environment")
def test_cache_is_below_the_operators_folder(tmp_path: Path) -> None:
    """In a folder for this version of torch and this choice of attention, which its own keys do not tell apart."""
    seen = set()
    for name in ("auto", "flash"):
        use_compile_cache(tmp_path / "new" / "cache", name)
        path = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        assert path.parent == tmp_path / "new" / "cache"
        assert torch.__version__ in path.name
        assert path.is_dir()
        seen.add(path)
    assert len(seen) == 2
    use_compile_cache(tmp_path / "new" / "cache", "auto")  # At the next start it is there.


@pytest.mark.usefixtures("_environment")
def test_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    use_compile_cache(Path("~/.cache/inpaint"), "auto")
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parent == tmp_path / ".cache" / "inpaint"


@pytest.mark.usefixtures("_environment")
def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """The operator reads one line, not a traceback."""
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    with pytest.raises(StartupError) as raised:
        use_compile_cache(tmp_path / "file" / "cache", "auto")
    assert str(tmp_path / "file" / "cache") in str(raised.value)
    assert "\n" not in str(raised.value)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/nowhere"


@pytest.mark.usefixtures("_environment", "fresh_dynamo")
def test_compiled_code_is_kept_there_and_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiler that torch has, as it is used."""
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)  # More would outlast the test.
    use_compile_cache(tmp_path, "auto")
    model = torch.nn.Linear(6, 3).eval()  # A product needs no C++ compiler, which would take long.
    function = compiled(model)
    with torch.inference_mode():
        for num_rows in (4, 2):
            rows = torch.rand(num_rows, 6)
            assert_close(function(rows), model(rows))
    assert [path for path in tmp_path.rglob("*") if path.is_file()]
