"""A folder that Flax saved is served as the PyTorch one it stands for, or refused in one line."""

import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from service.errors import StartupError
from service.settings import Settings
from service.worker.checkpoint import Components, load
from service.worker.flax_weights import read_flax_weights
from tests.model.flax_files import FILES, flax_bytes, flax_tree, leaves, make_flax_folder

CPU = torch.device("cpu")
PARTS = tuple(FILES)


def randomise(source: Path, folder: Path) -> Path:
    """A copy of which no two parameters are alike: new norms are all ones, new biases all zeros."""
    shutil.copytree(source, folder)
    generator = torch.Generator().manual_seed(7)
    for path in sorted(folder.glob("*/*.safetensors")):
        weights = {name: torch.randn(w.shape, generator=generator) / 4 for name, w in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def pytorch_folder(inpainting_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return randomise(inpainting_checkpoint, tmp_path_factory.mktemp("pytorch") / "model")


@pytest.fixture(scope="module")
def flax_folder(pytorch_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_flax_folder(pytorch_folder, tmp_path_factory.mktemp("flax") / "model")


@pytest.fixture
def broken(flax_folder: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(flax_folder, tmp_path / "broken-model"))


def load_cpu(folder: Path, dtype: str = "float32") -> Components:
    return load(Settings(model=str(folder), dtype=dtype), CPU)  # type: ignore[arg-type]


def refusal(folder: Path) -> str:
    with pytest.raises(StartupError) as caught:
        load_cpu(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert folder.name in message
    return message


def assert_same_weights(actual: Components, expected: Components, through: torch.dtype) -> None:
    """Every weight and buffer bit for bit; `through` is the dtype that the file rounded them to."""
    for part in PARTS:
        ours, theirs = getattr(actual, part), getattr(expected, part)
        assert type(ours) is type(theirs)
        assert not ours.training
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        for (name, weight), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert weight.dtype == other.dtype == actual.dtype
            assert torch.equal(weight, other.to(through).to(other.dtype)), (part, name)
        assert all(torch.equal(left, right) for left, right in zip(ours.buffers(), theirs.buffers(), strict=True))


@torch.no_grad()
def outputs(components: Components) -> list[torch.Tensor]:
    """One forward pass through every part."""
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(components.dtype)

    assert components.safety_checker is not None
    embeds = components.text_encoder(torch.arange(77)[None])[0]
    channels = components.unet.config.in_channels
    checked = components.safety_checker.vision_model(noise(1, 3, 30, 30))[1]
    return [
        embeds,
        components.unet(noise(1, channels, 8, 8), 500, embeds).sample,
        components.vae.encode(noise(1, 3, 64, 64)).latent_dist.parameters,
        components.vae.decode(noise(1, 4, 8, 8)).sample,
        components.safety_checker.visual_projection(checked),
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_flax_folder_is_its_pytorch_folder(pytorch_folder: Path, flax_folder: Path, dtype: str) -> None:
    """Equal weights, equal outputs, equal scheduler and description, under Flax's class names."""
    ours, theirs = load_cpu(flax_folder, dtype), load_cpu(pytorch_folder, dtype)
    assert_same_weights(ours, theirs, torch.float32)
    assert all(torch.equal(left, right) for left, right in zip(outputs(ours), outputs(theirs), strict=True))
    assert ours.info == theirs.info
    assert type(ours.scheduler) is type(theirs.scheduler)
    assert dict(ours.scheduler.config).items() >= {"beta_schedule": "scaled_linear", "steps_offset": 1}.items()
    for part in ("text_encoder", "safety_checker"):
        assert getattr(ours, part).config._attn_implementation == getattr(theirs, part).config._attn_implementation


@pytest.mark.parametrize("served", ["float32", "bfloat16"])
def test_bfloat16_files_in_chunks(pytorch_folder: Path, tmp_path: Path, served: str) -> None:
    """There is no bfloat16 in numpy, and Flax cuts large arrays: both are put together bit for bit."""
    folder = make_flax_folder(pytorch_folder, tmp_path / "model", dtype=torch.bfloat16, max_chunk_size=1000)
    assert_same_weights(load_cpu(folder, served), load_cpu(pytorch_folder, served), torch.bfloat16)


def test_a_plain_unet(plain_checkpoint: Path, tmp_path: Path) -> None:
    """Four channels, as in the checkpoints that no one trained for inpainting."""
    source = randomise(plain_checkpoint, tmp_path / "source")
    ours, theirs = load_cpu(make_flax_folder(source, tmp_path / "model")), load_cpu(source)
    assert ours.unet.config.in_channels == 4
    assert_same_weights(ours, theirs, torch.float32)


def test_only_what_lacks_safetensors_is_read_from_flax(pytorch_folder: Path, broken: Path) -> None:
    """A part with safetensors does not look at the Flax file beside them."""
    (path,) = (pytorch_folder / "vae").glob("*.safetensors")
    shutil.copy(path, broken / "vae")
    (broken / "vae" / FILES["vae"][1]).write_bytes(b"nothing of use")
    assert_same_weights(load_cpu(broken), load_cpu(pytorch_folder), torch.float32)


def test_linear_projections_and_more_than_ten_of_a_kind(tmp_path: Path) -> None:
    """Stable Diffusion 2's UNet projects by dense layers; numbers of two digits are numbers too."""
    unet = UNet2DConditionModel(
        block_out_channels=(8, 8),
        layers_per_block=11,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
        attention_head_dim=2,
        cross_attention_dim=8,
        use_linear_projection=True,
    )
    path = tmp_path / "diffusion_flax_model.msgpack"
    path.write_bytes(flax_bytes(flax_tree(unet)))
    weights = read_flax_weights(path, unet)
    assert weights.keys() == unet.state_dict().keys()
    assert all(torch.equal(weights[name], weight) for name, weight in unet.state_dict().items())


@pytest.mark.parametrize("name", ["bfloat16", "V2"])
@pytest.mark.parametrize("extension_type", [1, 3])
def test_scalars_and_both_names_of_bfloat16(tmp_path: Path, name: str, extension_type: int) -> None:
    """Flax has a type for scalars of numpy; numpy itself calls what it does not know by its size."""
    path = tmp_path / "flax_model.msgpack"
    scalar = msgpack.ExtType(extension_type, msgpack.packb(((), name, b"\xc0\x3f")))
    path.write_bytes(msgpack.packb({"scalar": scalar}))
    weights = read_flax_weights(path, torch.nn.ParameterDict({"scalar": torch.tensor(0.0)}))
    assert torch.equal(weights["scalar"], torch.tensor(1.5, dtype=torch.bfloat16))


def test_names_are_those_that_flax_gave(pytorch_folder: Path) -> None:
    """The files of these tests have the names and layouts of the Flax modules."""
    trees = {part: flax_tree(cls.from_pretrained(pytorch_folder, subfolder=part)) for part, (cls, _) in FILES.items()}
    names = {part: {"/".join(path) for path in leaves(tree)} for part, tree in trees.items()}
    block = "down_blocks_1/attentions_0/transformer_blocks_0"
    assert names["unet"] >= {
        "time_embedding/linear_1/kernel",
        "down_blocks_0/downsamplers_0/conv/kernel",
        f"{block}/attn1/to_out_0/kernel",
        f"{block}/ff/net_0/proj/kernel",
        f"{block}/norm1/scale",
    }
    assert names["vae"] >= {"encoder/mid_block/attentions_0/query/kernel", "decoder/up_blocks_0/resnets_0/norm1/scale"}
    assert names["text_encoder"] >= {
        "text_model/embeddings/position_embedding/embedding",
        "text_model/encoder/layers/0/self_attn/k_proj/kernel",
    }
    assert names["safety_checker"] >= {
        "concept_embeds",
        "vision_model/vision_model/embeddings/class_embedding",
        "vision_model/vision_model/pre_layrnorm/scale",
        "visual_projection/kernel",
    }
    assert trees["unet"]["conv_in"]["kernel"].shape == (3, 3, 9, 16)


def rewrite(folder: Path, part: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Save a part again after `change` was at its tree."""
    cls, file = FILES[part]
    torch_part = getattr(load_cpu(folder), part)
    assert isinstance(torch_part, cls)
    tree = flax_tree(torch_part)
    change(tree)
    (folder / part / file).write_bytes(flax_bytes(tree))


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_weight_is_named(broken: Path, part: str) -> None:
    def remove(tree: dict[str, Any]) -> None:
        *path, leaf = max(leaves(tree))
        for key in path:
            tree = tree[key]
        del tree[leaf]

    rewrite(broken, part, remove)
    message = refusal(broken)
    assert f"{part} lacks 1 of its weights in {FILES[part][1]}" in message
    assert "the first is" in message


def test_a_weight_of_the_wrong_shape_is_named(broken: Path) -> None:
    """A kernel of four input channels does not fit nine."""
    rewrite(broken, "unet", lambda tree: tree["conv_in"].update(kernel=tree["conv_in"]["kernel"][:, :, :4]))
    assert "conv_in.weight with (16, 4, 3, 3) for (16, 9, 3, 3)" in refusal(broken)


def test_a_weight_that_the_model_lacks_is_named(broken: Path) -> None:
    """A model whose configuration is another one's would not say what its maker saw."""
    rewrite(broken, "vae", lambda tree: tree.update(extra_conv={"bias": torch.zeros(3)}))
    assert "extra_conv/bias" in refusal(broken)


def test_position_ids_are_no_weights(pytorch_folder: Path, broken: Path) -> None:
    """Files that were converted from PyTorch hold them, and nothing is lost without."""
    ids = {"position_ids": torch.arange(77)[None]}
    rewrite(broken, "text_encoder", lambda tree: tree["text_model"]["embeddings"].update(ids))
    assert_same_weights(load_cpu(broken), load_cpu(pytorch_folder), torch.float32)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("size", [0, 1, 1000, -1])
def test_half_a_file_is_no_model(broken: Path, part: str, size: int) -> None:
    path = broken / part / FILES[part][1]
    path.write_bytes(path.read_bytes()[:size])
    assert f"{part}/{path.name} is no complete Flax file" in refusal(broken)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_is_not_unpickled(broken: Path, tmp_path: Path, protocol: int) -> None:
    """Whatever the file is called, what is in it does not run."""
    victim = tmp_path / "victim"

    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (victim,)

    path = broken / "unet" / FILES["unet"][1]
    path.write_bytes(pickle.dumps(Attack(), protocol=protocol))
    assert "no complete Flax file" in refusal(broken)
    torch.save({"conv_in.weight": torch.zeros(1)}, path)
    assert "no complete Flax file" in refusal(broken)
    assert not victim.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\n",
        b"\x81\xa1a\x01",  # a number for an array
        b"\x81\xa1a\xd4\x02\x00",  # an extension type that is no array
        b"\x81\xa1a\xd4\x01\x00",  # an array of no shape
        b"\x81\xb9__msgpack_chunked_array__\xc3",  # pieces of nothing
        b"\x81\xa1a" * 3000 + b"\x01",  # a well of tables
    ],
)
def test_what_is_no_tree_of_arrays_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "diffusion_flax_model.msgpack"
    path.write_bytes(content)
    with pytest.raises(StartupError, match="no complete Flax file"):
        read_flax_weights(path, AutoencoderKL())


def test_without_msgpack_the_operator_learns_how_to_get_it(flax_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only those who serve Flax folders need it."""
    monkeypatch.setitem(sys.modules, "msgpack", None)
    assert "pip install inpaint-service[flax]" in refusal(flax_folder)
