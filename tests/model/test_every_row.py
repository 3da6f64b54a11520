"""Each row of the README's table of the stock pipeline holds: singly, and in mixed batches of different kinds."""

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AsymmetricAutoencoderKL
from numpy.typing import NDArray

from service.request import InpaintRequest, InpaintResult
from service.settings import Settings
from service.worker.checkpoint import load
from service.worker.checkpoint_source import BUNDLED_FOLDER
from service.worker.pipeline import InpaintPipeline
from service.worker.prompts import Prompt, PromptEncoder
from tests.model.checkpoints import NATIVE_SIZE, make_checkpoint
from tests.model.embedding_files import diffusers_file, vectors, web_ui_file
from tests.model.lora_files import make_lora
from tests.model.rows import ROWS, Model
from tests.model.staggered import run_staggered
from tests.model.stock import Stock

LEVEL = 1 / 255
"""Results may differ by one level of 255: a value on the edge of two integers may round either way."""


KINDS: dict[str, dict[str, Any]] = {
    "inpainting": {},
    "plain": {"in_channels": 4},
    "stable_diffusion_2": {"is_sd2": True, "prediction_type": "v_prediction", "in_channels": 4},
    "embedded_guidance": {"time_cond_proj_dim": 32},
    "asymmetric_vae": {"has_asymmetric_vae": True},
}
"""Checkpoints, by what is special about them."""


class Bench:
    """One checkpoint in both implementations, with LoRAs and textual inversions of its own.

    Args:
        folder: The checkpoint.
        work: For the files.
        size: The checkpoint's native size.
        example_lora: A LoRA to use as the first, where there is one.
    """

    def __init__(self, folder: Path, work: Path, size: int, example_lora: Path | None = None) -> None:
        embeddings = make_embeddings(work / "embeddings", _text_width(folder))
        self.stock = Stock(folder, embeddings)
        loras = {
            "kohya": make_lora(work / "kohya.safetensors", self.stock.pipeline, "kohya", seed=1),
            "dora": make_lora(work / "dora.safetensors", self.stock.pipeline, "dora", seed=2),
        }
        if example_lora is not None:
            loras = {"example": example_lora, "kohya": loras["kohya"]}
        settings = Settings(model=str(folder), embeddings_dir=work / "embeddings")
        components = load(settings, torch.device("cpu"))
        self.pipeline = InpaintPipeline(components, "black")
        info = components.info
        self.model = Model(
            size=size,
            width=info.embeds_width,
            loras=loras,
            tokens=tuple(embeddings),
            scheduler=info.default_scheduler,
            embeds_guidance=info.embeds_guidance,
        )

    def assert_equal(self, requests: dict[str, InpaintRequest], *several: dict[str, InpaintResult]) -> None:
        """Every result, of each run, is what stock gives for its request run alone."""
        off = {}
        for name, request in requests.items():
            expected, flags = self.stock(request)
            for results in several:
                assert results[name].nsfw == tuple(flags) or request.params.output == "latents", name
                difference = _difference(expected, results[name].images)
                if difference > LEVEL + 1e-6:
                    off[name] = round(difference * 255, 2)
        assert not off


def _difference(expected: NDArray[np.generic], actual: NDArray[np.generic]) -> float:
    """Largest difference, with 1 for black to white; latents are some 5 wide, and are given as much more room."""
    assert expected.shape == actual.shape
    assert expected.dtype == actual.dtype
    scale = 255.0 if expected.dtype == np.uint8 else 1.0
    return float(np.abs(expected.astype(np.float64) - actual.astype(np.float64)).max() / scale)


def make_embeddings(folder: Path, width: int) -> dict[str, Path]:
    """Textual inversions in both layouts, one vector and several, by their tokens."""
    return {
        "<pirate>": diffusers_file(folder, "one", "<pirate>", vectors(1, width, seed=1)),
        "badhands": web_ui_file(folder, "badhands", vectors(3, width, seed=2)),
    }


def _text_width(folder: Path) -> int:
    config = json.loads((folder / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    return int(config["hidden_size"])


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bench]:
    """One for each kind of tiny checkpoint."""
    found = {}
    for kind, options in KINDS.items():
        work = tmp_path_factory.mktemp(kind)
        found[kind] = Bench(make_checkpoint(work / "checkpoint", **options), work, NATIVE_SIZE)
    return found


@pytest.fixture(scope="module")
def bundled_bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The model that ships, with its example LoRA."""
    example = BUNDLED_FOLDER.parent / "loras" / "pencil.safetensors"
    return Bench(BUNDLED_FOLDER, tmp_path_factory.mktemp("bundled"), 256, example)


def named(bench: Bench) -> dict[str, InpaintRequest]:
    """Every row's requests, each under a name of its own, less those that stock itself cannot answer."""
    requests = {
        f"{row} {index}": request for row, make in ROWS.items() for index, request in enumerate(make(bench.model))
    }
    if isinstance(bench.stock.pipeline.vae, AsymmetricAutoencoderKL):
        # For this decoder stock encodes what it was given as the picture once more, also where that is latents, and
        # finds no picture for any image but the first.
        return {
            name: request
            for name, request in requests.items()
            if request.tensors.image_latents is None and request.params.num_images_per_prompt == 1
        }
    return requests


def run(bench: Bench, requests: dict[str, InpaintRequest], *, num_sharing: int = 1) -> dict[str, InpaintResult]:
    """Through one worker, staggered; some step has so many images at least."""
    results, ticks = run_staggered(bench.pipeline, list(requests.values()))
    assert max(tick.images for tick in ticks) >= num_sharing
    return {name: results[str(index)] for index, name in enumerate(requests)}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
def test_tiny_checkpoints_singly_and_in_one_mixed_batch(kind: str, benches: dict[str, Bench]) -> None:
    """A request alone in the worker is what stock gives, and so it is among requests of every other kind.

    They arrive while others run: LoRAs, FreeU, embeddings, lists of steps, sizes, none of these.
    """
    bench = benches[kind]
    requests = named(bench)
    singly = {name: run(bench, {name: request})[name] for name, request in requests.items()}
    shuffled = list(requests.items())
    random.Random(3).shuffle(shuffled)  # noqa: S311 - a repeatable choice, no secret
    bench.assert_equal(requests, singly, run(bench, dict(shuffled), num_sharing=4))


@pytest.mark.timeout(600)
def test_bundled_model(bundled_bench: Bench) -> None:
    """The model that ships, with its own example LoRA: one request of every row, singly and all at once."""
    bench = bundled_bench
    requests = {
        name: dataclasses.replace(request, params=dataclasses.replace(request.params, num_images_per_prompt=1))
        for name, request in named(bench).items()
        if name.endswith(" 0")
    }
    singly = {name: run(bench, {name: request})[name] for name, request in requests.items()}
    bench.assert_equal(requests, singly, run(bench, requests, num_sharing=4))


def test_weighted_and_long_prompts_in_a_mixed_batch(benches: dict[str, Bench]) -> None:
    """AUTOMATIC1111's syntax: what stock gives for the same embeddings, whatever the lengths in the batch.

    Stock needs prompt and negative prompt of one length. A prompt repeated along its tokens is the same to
    attention, so that the shorter one can be brought to the longer one's.
    """
    bench = benches["inpainting"]
    encoder = PromptEncoder(bench.stock.pipeline.tokenizer, bench.stock.pipeline.text_encoder)
    requests, expected = {}, {}
    for name, (text, negative) in {
        "weighted": ("a (red:1.4) house [grey]", "(blurry:1.2)"),
        "long": ("a house, " * 30, ""),
        "both": ("a tree BREAK by the (water:0.7) BREAK at night", "ugly BREAK blurry"),
    }.items():
        requests[name] = bench.model.request(prompt=text, negative_prompt=negative, prompt_syntax="a1111")
        prompts = [Prompt(part, syntax="a1111") for part in (text, negative)]
        with torch.inference_mode():
            encoded = encoder.encode(prompts)
        length = math.lcm(*(len(encoded[prompt]) for prompt in prompts))
        embeds = [encoded[prompt].repeat(length // len(encoded[prompt]), 1)[None] for prompt in prompts]
        expected[name], _ = bench.stock(
            requests[name],
            prompt=None,
            negative_prompt=None,
            **dict(zip(("prompt_embeds", "negative_prompt_embeds"), embeds, strict=True)),
        )
    company = {name: request for name, request in named(bench).items() if name.endswith(" 0")}
    results = run(bench, {**company, **requests})
    for name, wanted in expected.items():
        assert _difference(wanted, results[name].images) <= LEVEL + 1e-6, name


def test_scale_of_cross_attention_kwargs(benches: dict[str, Bench]) -> None:
    """`cross_attention_kwargs={"scale": s}` in stock is s times each LoRA's own scale."""
    bench = benches["inpainting"]
    once = bench.model.request(loras=(bench.model.lora(0, 0.8),))
    halved = {"halved": bench.model.request(loras=(bench.model.lora(0, 0.8 * 0.5),))}
    expected, _ = bench.stock(once, cross_attention_kwargs={"scale": 0.5})
    assert _difference(expected, run(bench, halved)["halved"].images) <= LEVEL + 1e-6


def test_weights_are_as_they_were(benches: dict[str, Bench]) -> None:
    """After LoRAs and FreeU have come and gone, a plain request is bitwise what it was before."""
    bench = benches["inpainting"]
    plain = {"plain": bench.model.request(batching="solo")}
    before = run(bench, plain)["plain"].images
    run(bench, named(bench))
    assert np.array_equal(run(bench, plain)["plain"].images, before)


def test_rows_do_something(benches: dict[str, Bench]) -> None:
    """The comparison means something: no row's request gives the plain request's picture."""
    bench = benches["inpainting"]
    plain = run(bench, {"plain": bench.model.request()})["plain"].images
    without_effect = {"image 0", "load_lora_weights 3"}  # the plain request itself, and a LoRA at scale 0
    for name, request in named(bench).items():
        if name not in without_effect and request.params.output == "pixels":
            images = run(bench, {name: request})[name].images
            assert images.shape != plain.shape or not np.array_equal(images, plain), name
