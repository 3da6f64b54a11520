"""Each row of the README's table of the stock pipeline holds: singly, and in mixed batches of different kinds."""

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from service.request import InpaintRequest, InpaintResult
from service.settings import Settings
from service.worker.checkpoint import load
from service.worker.pipeline import InpaintPipeline
from tests.model.rows import ROWS, Model
from tests.model.staggered import run_staggered
from tests.model.stock import Stock

LEVEL = 1 / 255
"""Results may differ by one level of 255: a value on the edge of two integers may round either way."""


class Bench:
    """One checkpoint in both implementations.

    Args:
        folder: The checkpoint.
        model: What requests need to know of it.
        embeddings_dir: Textual inversions.
    """

    def __init__(self, folder: Path, model: Model, embeddings_dir: Path | None = None) -> None:
        settings = Settings(model=str(folder), embeddings_dir=embeddings_dir)
        self.pipeline = InpaintPipeline(load(settings, torch.device("cpu")), "black")
        embeddings = sorted(embeddings_dir.glob("*.safetensors")) if embeddings_dir is not None else []
        self.stock = Stock(folder, embeddings)
        self.model = model

    def assert_equal(self, requests: dict[str, InpaintRequest], results: dict[str, InpaintResult]) -> None:
        """Every result is what stock gives for its request run alone."""
        off = {}
        for name, request in requests.items():
            expected, flags = self.stock(request)
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


def named(bench: Bench) -> dict[str, InpaintRequest]:
    """Every row's requests, each under a name of its own."""
    return {f"{row} {index}": request for row, make in ROWS.items() for index, request in enumerate(make(bench.model))}


def run(bench: Bench, requests: dict[str, InpaintRequest]) -> dict[str, InpaintResult]:
    """Through one worker, staggered."""
    results, _ = run_staggered(bench.pipeline, list(requests.values()))
    return {name: results[str(index)] for index, name in enumerate(requests)}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["inpainting", "plain", "v_prediction", "embedded_guidance", "asymmetric_vae"])
class TestTinyCheckpoints:
    """Random weights of each kind of checkpoint."""

    def test_each_row_singly(self, kind: str, benches: dict[str, Bench]) -> None:
        """A request alone in the worker is what stock gives."""
        bench = benches[kind]
        requests = named(bench)
        results = {}
        for name, request in requests.items():
            results |= run(bench, {name: request})
        bench.assert_equal(requests, results)

    def test_all_rows_in_one_mixed_batch(self, kind: str, benches: dict[str, Bench]) -> None:
        """Requests of every kind that arrive while others run: LoRAs, FreeU, embeddings, lists, sizes, none."""
        bench = benches[kind]
        requests = list(named(bench).items())
        random.Random(3).shuffle(requests)  # noqa: S311 - a repeatable choice, no secret
        bench.assert_equal(dict(requests), run(bench, dict(requests)))


@pytest.mark.timeout(600)
def test_bundled_model_in_one_mixed_batch(bundled_bench: Bench) -> None:
    """The model that ships, with its own example LoRA: one request of most rows, all at once."""
    chosen = {
        name: dataclasses.replace(request, params=dataclasses.replace(request.params, num_images_per_prompt=1))
        for name, request in named(bundled_bench).items()
        if name.endswith(" 0")
    }
    bundled_bench.assert_equal(chosen, run(bundled_bench, chosen))


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
