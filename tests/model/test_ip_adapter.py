"""IP-Adapters: as stock's `load_ip_adapter` and `set_ip_adapter_scale`, in the running batch and in turns with none."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from service.errors import ErrorCode, InpaintError, StartupError
from service.messages import Ticked
from service.request import InpaintRequest, InpaintResult, InpaintTensors, IpAdapterUse
from service.settings import Settings
from service.worker.batcher import Generation
from service.worker.checkpoint import load
from service.worker.pipeline import InpaintPipeline
from tests.model.checkpoints import NATIVE_SIZE, make_checkpoint
from tests.model.ip_adapter_files import (
    HIDDEN,
    LAYERS,
    NUM_STATES,
    PROJECTED,
    WIDTH,
    make_image_encoder,
    make_ip_adapter,
)
from tests.model.lora_files import make_lora
from tests.model.rows import FREEU, Model
from tests.model.staggered import run_staggered
from tests.model.stock import Stock

KINDS = ("plain", "full", "plus")
TOLERANCE = 1
"""Of 255: a value on the edge of two integers may round either way."""

BLOCKS = {"down": {"block_1": 0.4}, "up": {"block_0": [0.0, 1.3]}}


class Bench:
    """A checkpoint and an IP-Adapter in both implementations.

    Args:
        work: An empty folder.
        kind: Of the IP-Adapter.
        options: Of the checkpoint.
    """

    def __init__(self, work: Path, kind: str, **options: int) -> None:
        self.kind = kind
        self.folder = make_checkpoint(work / "checkpoint", **options)
        make_image_encoder(work / "adapter" / "image_encoder")
        self.ip_adapter = make_ip_adapter(work / "adapter" / f"{kind}.safetensors", kind)
        self.stock = Stock(self.folder, ip_adapter=self.ip_adapter)
        lora = make_lora(work / "lora.safetensors", self.stock.pipeline)
        self.model = Model(size=NATIVE_SIZE, width=WIDTH, loras={"lora": lora})
        settings = Settings(model=str(self.folder), ip_adapter=self.ip_adapter)
        self.pipeline = InpaintPipeline(load(settings, torch.device("cpu")), "black")

    def with_picture(self, scale: float = 1.0, picture: int = 1, **changes: object) -> InpaintRequest:
        """A request with a picture to paint by."""
        changes.setdefault("ip_adapter", self.use(scale))
        return dataclasses.replace(self.model.request(**changes), ip_adapter_image=upload(picture))

    def with_embeds(self, num_pictures: int, *, is_guided: bool = True, scale: float = 1.0) -> InpaintRequest:
        """A request with embeddings of some pictures."""
        shape = (num_pictures, PROJECTED) if self.kind == "plain" else (num_pictures, NUM_STATES, HIDDEN)
        embeds = np.random.default_rng(5).standard_normal((1 + is_guided, *shape)).astype(np.float32)
        return self.model.request(
            ip_adapter=IpAdapterUse(scale, embeds_shape=shape[:-1]),
            tensors=InpaintTensors(ip_adapter_image_embeds=embeds),
            guidance_scale=5.0 if is_guided else 1.0,
        )

    def use(self, scale: float = 1.0, blocks: object = None) -> IpAdapterUse:
        """How a request with a picture uses the adapter."""
        shape = (1,) if self.kind == "plain" else (1, NUM_STATES)
        return IpAdapterUse(scale, "" if blocks is None else json.dumps(blocks), shape)

    def mixed(self) -> dict[str, InpaintRequest]:
        """Requests with and without, as different as they come."""
        model = self.model
        return {
            "none": model.request(),
            "picture": self.with_picture(),
            "another picture": self.with_picture(picture=2, seed=3, num_inference_steps=6, scheduler="euler_a"),
            "unguided": self.with_picture(guidance_scale=1.0, seed=4),
            "none, unguided": model.request(guidance_scale=1.0, seed=5),
            "several images": self.with_picture(picture=3, num_images_per_prompt=3, strength=0.7),
            "half": self.with_picture(0.5),
            "half, several": self.with_picture(0.5, num_images_per_prompt=2, guidance_scale=3.0),
            "nothing": self.with_picture(0.0),
            "negative": self.with_picture(-0.6),
            "blocks": self.with_picture(ip_adapter=self.use(blocks=BLOCKS)),
            "embeds": self.with_embeds(1),
            "embeds, unguided": self.with_embeds(1, is_guided=False),
            "embeds of three": self.with_embeds(3),
            "lora": self.with_picture(loras=(model.lora(0, 0.8),)),
            "lora, none": model.request(loras=(model.lora(0, 0.8),)),
            "freeu": self.with_picture(freeu=FREEU),
            "long prompt": dataclasses.replace(
                self.with_picture(ip_adapter=self.use()),
                tensors=InpaintTensors(prompt_embeds=model.embeds(154), negative_prompt_embeds=model.embeds(154, 2)),
            ),
            "short prompt": dataclasses.replace(
                self.with_picture(guidance_scale=1.0), tensors=InpaintTensors(prompt_embeds=model.embeds(9))
            ),
            "other size": self.with_picture(height=NATIVE_SIZE - 8, width=NATIVE_SIZE + 16),
            "solo": self.with_picture(batching="solo"),
        }

    def run(self, requests: dict[str, InpaintRequest]) -> tuple[dict[str, InpaintResult], list[Ticked]]:
        """Through one worker, staggered."""
        results, ticks = run_staggered(self.pipeline, list(requests.values()))
        return {name: results[str(index)] for index, name in enumerate(requests)}, ticks

    def assert_equal(self, requests: dict[str, InpaintRequest], results: dict[str, InpaintResult]) -> None:
        """Every result is what stock gives for its request run alone."""
        off = {name: difference(self.stock(request)[0], results[name].images) for name, request in requests.items()}
        assert not {name: value for name, value in off.items() if value > TOLERANCE}


def upload(seed: int) -> NDArray[np.uint8]:
    """A picture that is not square."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((9, 11, 1), np.uint8))


def difference(expected: NDArray[np.generic], actual: NDArray[np.generic]) -> int:
    """Largest difference, of 255."""
    assert expected.shape == actual.shape
    return int(np.abs(expected.astype(int) - actual.astype(int)).max())


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bench]:
    """Each kind of adapter with a 9-channel UNet, and one with another UNet."""
    found = {kind: Bench(tmp_path_factory.mktemp(kind), kind, in_channels=9) for kind in KINDS}
    found["4 channels"] = Bench(tmp_path_factory.mktemp("4"), "plain", in_channels=4)
    return found


BENCHES = pytest.mark.parametrize("name", [*KINDS, "4 channels"])


# --- results -------------------------------------------------------------------------


@BENCHES
def test_each_request_singly(name: str, benches: dict[str, Bench]) -> None:
    """A request alone in the worker is what stock gives."""
    bench = benches[name]
    requests, results = bench.mixed(), {}
    for request_name, request in requests.items():
        results |= bench.run({request_name: request})[0]
    bench.assert_equal(requests, results)


@BENCHES
def test_mixed_staggered_batch(name: str, benches: dict[str, Bench]) -> None:
    """Pictures, embeddings and neither, of any scale, in one worker at once: each is what stock gives alone."""
    bench = benches[name]
    requests = bench.mixed()
    results, ticks = bench.run(requests)
    bench.assert_equal(requests, results)
    assert max(tick.images for tick in ticks) >= 4, "the requests did not share steps"


@BENCHES
def test_pictures_and_scales_are_seen(name: str, benches: dict[str, Bench]) -> None:
    """The comparison means something: another picture, scale or block gives another result, scale 0 that of none."""
    bench = benches[name]
    requests = {
        "none": bench.model.request(),
        "zero": bench.with_picture(0.0),
        "one": bench.with_picture(),
        "other picture": bench.with_picture(picture=2),
        "half": bench.with_picture(0.5),
        "blocks": bench.with_picture(ip_adapter=bench.use(blocks=BLOCKS)),
        "embeds": bench.with_embeds(1),
        "embeds of three": bench.with_embeds(3),
    }
    images = {key: result.images for key, result in bench.run(requests)[0].items()}
    assert difference(images.pop("zero"), images["none"]) <= TOLERANCE
    names = list(images)
    for index, one in enumerate(names):
        for other in names[:index]:
            assert difference(images[one], images[other]) > TOLERANCE, (one, other)


@BENCHES
def test_other_requests_run_as_if_none_was_loaded(name: str, benches: dict[str, Bench]) -> None:
    """Bit for bit, before, between and after requests that use it; with LoRAs and FreeU, too."""
    bench = benches[name]
    without = InpaintPipeline(load(Settings(model=str(bench.folder)), torch.device("cpu")), "black")
    plain = {
        "plain": bench.model.request(batching="solo"),
        "lora": bench.model.request(batching="solo", loras=(bench.model.lora(0, 0.7),)),
        "freeu": bench.model.request(batching="solo", freeu=FREEU),
    }
    expected, _ = run_staggered(without, list(plain.values()))
    with_pictures = {f"picture {index}": bench.with_picture(seed=index) for index in range(4)}
    for company in ({}, with_pictures, {}):
        results, _ = bench.run({**company, **plain, **{f"later {key}": value for key, value in company.items()}})
        for index, key in enumerate(plain):
            assert np.array_equal(results[key].images, expected[str(index)].images), key


def test_the_unet_is_left_as_it_was(benches: dict[str, Bench]) -> None:
    """Between the turns of batches that use it, the very same processors and configuration are there."""
    bench = benches["plain"]
    unet = load(Settings(model=str(bench.folder)), torch.device("cpu")).unet
    components = load(Settings(model=str(bench.folder), ip_adapter=bench.ip_adapter), torch.device("cpu"))
    assert components.ip_adapter is not None
    before = components.unet.attn_processors
    components.ip_adapter.apply(bench.use())
    during = components.unet.attn_processors
    assert [key for key in before if during[key] is not before[key]] == [key for key in before if "attn2" in key]
    components.ip_adapter.apply(bench.use(0.5))
    components.ip_adapter.apply(None)
    after = components.unet.attn_processors
    assert all(after[key] is before[key] for key in before)
    assert set(components.unet.state_dict()) == set(unet.state_dict())
    assert components.unet.config == unet.config


def test_solo_is_bitwise_repeatable(benches: dict[str, Bench]) -> None:
    """Also with a picture, in any company."""
    bench = benches["plus"]
    solo = bench.with_picture(batching="solo")
    alone = bench.run({"solo": solo})[0]["solo"].images
    results, _ = bench.run({**bench.mixed(), "again": solo})
    assert np.array_equal(results["again"].images, alone)


def test_padded_rows_have_tokens_too(benches: dict[str, Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that are filled up, as on CUDA, give the same."""
    bench = benches["plus"]
    monkeypatch.setattr(InpaintPipeline, "_pad_rows", lambda _self, num_rows: num_rows + 3)
    requests = {"picture": bench.with_picture(), "embeds of three": bench.with_embeds(3), "none": bench.model.request()}
    bench.assert_equal(requests, bench.run(requests)[0])


def test_pictures_that_agree_share_steps(benches: dict[str, Bench]) -> None:
    """Requests of one scale share the UNet calls, whatever their pictures; a picture counts like its embedding."""
    bench = benches["plus"]
    keys = {
        Generation("", request).key
        for request in (bench.with_picture(), bench.with_picture(picture=2, seed=9), bench.with_embeds(1))
    }
    assert len(keys) == 1
    assert Generation("", bench.with_picture(0.5)).key not in keys
    assert Generation("", bench.with_embeds(2)).key not in keys
    assert Generation("", bench.model.request()).key not in keys


def test_scales_for_blocks_that_do_not_exist(benches: dict[str, Bench]) -> None:
    """Refused with the field's name; the other requests go on."""
    bench = benches["plain"]
    request = bench.with_picture(ip_adapter=bench.use(blocks={"up": {"block_0": [1.0, 1.0, 1.0]}}))
    with pytest.raises(InpaintError) as caught:
        bench.pipeline.prepare([Generation("one", request)])
    assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID_FIELD, "ip_adapter_scale")


# --- loading -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), has_safety_checker=False)


def load_with(tiny: Path, ip_adapter: Path, encoder: Path | None = None):  # noqa: ANN201 - what load gives
    """Load the checkpoint with an IP-Adapter."""
    settings = Settings(model=str(tiny), allow_unchecked=True, ip_adapter=ip_adapter, ip_adapter_image_encoder=encoder)
    return load(settings, torch.device("cpu"))


def test_what_clients_learn_of_it(tiny: Path, tmp_path: Path) -> None:
    """Its name, kind and shapes; without an image encoder, that embeddings have to be sent."""
    file = make_ip_adapter(tmp_path / "a.safetensors")
    info = load_with(tiny, file).info.ip_adapter
    assert (info.name, info.kind, info.embeds_width, info.takes_images) == ("a.safetensors", "plain", PROJECTED, False)
    make_image_encoder(tmp_path / "image_encoder")
    plus = make_ip_adapter(tmp_path / "plus" / "b.safetensors", "plus")
    info = load_with(tiny, plus.parent, tmp_path / "image_encoder").info.ip_adapter
    assert (info.kind, info.embeds_width, info.embeds_tokens, info.takes_images) == ("plus", HIDDEN, NUM_STATES, True)
    assert load(Settings(model=str(tiny), allow_unchecked=True), torch.device("cpu")).info.ip_adapter is None


def test_embeds_without_an_image_encoder(tiny: Path, tmp_path: Path) -> None:
    """They give what they give with one."""
    file = make_ip_adapter(tmp_path / "a.safetensors")
    model = Model(size=NATIVE_SIZE, width=WIDTH, loras={})
    embeds = np.random.default_rng(5).standard_normal((2, 1, PROJECTED)).astype(np.float32)
    request = model.request(ip_adapter=IpAdapterUse(0.8), tensors=InpaintTensors(ip_adapter_image_embeds=embeds))
    results, _ = run_staggered(InpaintPipeline(load_with(tiny, file), "black"), [request])
    make_image_encoder(tmp_path / "image_encoder")
    expected, _ = Stock(tiny, ip_adapter=file)(request)
    assert difference(expected, results["0"].images) <= TOLERANCE


def test_picture_without_a_feature_extractor_of_the_checkpoint(tiny: Path, tmp_path: Path) -> None:
    """A checkpoint without a safety checker has none: stock makes one for the image encoder's size."""
    file = make_ip_adapter(tmp_path / "a.safetensors")
    make_image_encoder(tmp_path / "image_encoder")
    model = Model(size=NATIVE_SIZE, width=WIDTH, loras={})
    request = dataclasses.replace(model.request(ip_adapter=IpAdapterUse(1.0)), ip_adapter_image=upload(1))
    results, _ = run_staggered(InpaintPipeline(load_with(tiny, file), "black"), [request])
    expected, _ = Stock(tiny, ip_adapter=file)(request)
    assert difference(expected, results["0"].images) <= TOLERANCE


def _without(prefix: str, file: Path) -> Path:
    weights = {key: tensor for key, tensor in load_file(file).items() if not key.startswith(prefix)}
    save_file(weights, file)
    return file


def _with(weights: dict[str, torch.Tensor], file: Path) -> Path:
    save_file({**load_file(file), **weights}, file)
    return file


def _face_id(folder: Path) -> Path:
    file = _without("image_proj", make_ip_adapter(folder / "face.safetensors"))
    names = ("proj.0.weight", "proj.0.bias", "proj.2.weight", "proj.2.bias", "norm.weight", "norm.bias")
    return _with({f"image_proj.{name}": torch.zeros(WIDTH) for name in names}, file)


def _pickled(folder: Path) -> Path:
    (folder / "ip-adapter.bin").write_bytes(b"\x80\x04")
    return folder


def _two(folder: Path) -> Path:
    make_ip_adapter(folder / "a.safetensors")
    make_ip_adapter(folder / "b.safetensors")
    return folder


def _garbage(folder: Path) -> Path:
    (folder / "a.safetensors").write_bytes(b"garbage")
    return folder / "a.safetensors"


REFUSED = {
    "missing": (lambda folder: folder / "nowhere", "does not exist"),
    "empty": (lambda folder: folder, "has no .safetensors weights; pickles are not loaded"),
    "pickled": (_pickled, "pickles are not loaded"),
    "pickled file": (lambda folder: _pickled(folder) / "ip-adapter.bin", "pickles are not loaded"),
    "two": (_two, "name one of them, e.g. a.safetensors"),
    "garbage": (_garbage, "not readable as safetensors"),
    "no projection": (
        lambda folder: _without("image_proj", make_ip_adapter(folder / "a.safetensors")),
        "lacks weights named",
    ),
    "part of a projection": (
        lambda folder: _without("image_proj.norm", make_ip_adapter(folder / "a.safetensors")),
        "lacks weights of its image projection",
    ),
    "part of the layers": (
        lambda folder: _without("ip_adapter.5.to_v", make_ip_adapter(folder / "a.safetensors")),
        "another architecture",
    ),
    "more layers": (
        lambda folder: make_ip_adapter(folder / "a.safetensors", layers=(*LAYERS, 32)),
        "another architecture",
    ),
    "wider layers": (
        lambda folder: make_ip_adapter(folder / "a.safetensors", layers=(32, 64, 64, 32)),
        "another architecture",
    ),
    "wider prompts": (lambda folder: make_ip_adapter(folder / "a.safetensors", width=48), "for prompts 48 wide"),
    "face id": (_face_id, "FaceID"),
    "face id's lora": (
        lambda folder: _with(
            {"ip_adapter.0.to_k_lora.down.weight": torch.zeros(1)}, make_ip_adapter(folder / "a.safetensors")
        ),
        "another architecture",
    ),
    "unknown": (
        lambda folder: _with(
            {"image_proj.x": torch.zeros(1)}, _without("image_proj", make_ip_adapter(folder / "a.safetensors"))
        ),
        "unknown kind",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_adapters_end_the_start_with_a_line(case: str, tiny: Path, tmp_path: Path) -> None:
    """Missing, pickled, cut off, or for another model: one line that says so."""
    make, message = REFUSED[case]
    with pytest.raises(StartupError, match=message) as caught:
        load_with(tiny, make(tmp_path))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("IP-Adapter '")


def test_refused_image_encoders(tiny: Path, tmp_path: Path) -> None:
    """One that is not there, of another kind, pickled, incomplete, or for another adapter."""
    file = make_ip_adapter(tmp_path / "a.safetensors")
    with pytest.raises(StartupError, match=r"no folder with a readable config\.json"):
        load_with(tiny, file, tmp_path / "nowhere")
    with pytest.raises(StartupError, match="is a CLIPTextModel; a CLIPVisionModelWithProjection is needed"):
        load_with(tiny, file, tiny / "text_encoder")
    with pytest.raises(StartupError, match=f"embeddings {PROJECTED} wide; its image encoder's are 20"):
        load_with(tiny, file, make_image_encoder(tmp_path / "wide", projection_dim=20))
    encoder = make_image_encoder(tmp_path / "image_encoder")
    weights = encoder / "model.safetensors"
    states = {key: tensor for key, tensor in load_file(weights).items() if "visual_projection" not in key}
    save_file(states, weights, metadata={"format": "pt"})
    with pytest.raises(StartupError, match="lacks 1 of its weights"):
        load_with(tiny, file)
    weights.rename(encoder / "pytorch_model.bin")
    with pytest.raises(StartupError, match="pickles are not loaded"):
        load_with(tiny, file)
    with pytest.raises(StartupError, match="INPAINT_IP_ADAPTER_IMAGE_ENCODER is set without INPAINT_IP_ADAPTER"):
        load(Settings(model=str(tiny), allow_unchecked=True, ip_adapter_image_encoder=encoder), torch.device("cpu"))
