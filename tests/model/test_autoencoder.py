"""The VAE in batches, and functions of batches as graphs: what is captured is used where it fits, and only there."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderKL

from service.settings import Settings
from service.worker import autoencoder
from service.worker.autoencoder import MAX_BATCH, Autoencoder
from service.worker.checkpoint import load
from service.worker.graphs import BATCH_SIZES, GraphedFunction
from tests.model.checkpoints import NATIVE_SIZE, make_checkpoint
from tests.model.graphs import Graph

CPU = torch.device("cpu")
LATENTS = NATIVE_SIZE // 8


@pytest.fixture
def vae(inpainting_checkpoint: Path) -> AutoencoderKL:
    return load(Settings(model=str(inpainting_checkpoint)), CPU).vae


@pytest.fixture(scope="module")
def asymmetric_vae(tmp_path_factory: pytest.TempPathFactory) -> AsymmetricAutoencoderKL:
    folder = make_checkpoint(tmp_path_factory.mktemp("asymmetric"), has_asymmetric_vae=True)
    return load(Settings(model=str(folder)), CPU).vae


def pictures(count: int, height: int = NATIVE_SIZE) -> torch.Tensor:
    return torch.rand(count, 3, height, NATIVE_SIZE, generator=torch.Generator().manual_seed(count)) * 2 - 1


def latents(count: int, height: int = LATENTS) -> torch.Tensor:
    return torch.randn(count, 4, height, LATENTS, generator=torch.Generator().manual_seed(count))


# --- the VAE -----------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[list[int]]]:
    """Numbers of pictures that each captured function has seen: decoding, then encoding."""
    monkeypatch.setattr(Graph, "made", ())
    monkeypatch.setattr(autoencoder, "GraphedFunction", Graph)
    monkeypatch.setattr(autoencoder, "compiled", lambda model: model)
    return lambda: [graph.seen for graph in Graph.made]


def assert_as_the_vae(ours: Autoencoder, vae: AutoencoderKL, count: int, height: int = NATIVE_SIZE) -> None:
    """What it says of pictures and of latents is what the VAE says."""
    posterior, expected = ours.encode(pictures(count, height)), vae.encode(pictures(count, height)).latent_dist
    torch.testing.assert_close(posterior.mean, expected.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(posterior.std, expected.std, rtol=1e-4, atol=1e-5)
    given = latents(count, height // 8)
    torch.testing.assert_close(ours.decode(given, {}), vae.decode(given).sample, rtol=1e-4, atol=1e-5)


def test_batches_are_no_larger_than_what_is_captured() -> None:
    """Every batch that is ever made has a graph that holds it."""
    assert max(BATCH_SIZES) >= MAX_BATCH
    assert min(BATCH_SIZES) == 1


@torch.inference_mode()
def test_nothing_captured_is_the_vae(vae: AutoencoderKL, graphs: Callable[[], list[list[int]]]) -> None:
    ours = Autoencoder(vae)
    for count in (1, 3):
        assert_as_the_vae(ours, vae, count)
    assert graphs() == []


@torch.inference_mode()
def test_captured_is_used_for_pictures_of_its_size(vae: AutoencoderKL, graphs: Callable[[], list[list[int]]]) -> None:
    """For any number of them, and the results are the VAE's; other sizes go the other way."""
    ours = Autoencoder(vae)
    ours.capture(NATIVE_SIZE)
    for count in (1, 3, MAX_BATCH):
        assert_as_the_vae(ours, vae, count)
    assert graphs() == [[1, 3, MAX_BATCH], [1, 3, MAX_BATCH]]
    assert_as_the_vae(ours, vae, 2, height=NATIVE_SIZE + 8)
    assert graphs() == [[1, 3, MAX_BATCH], [1, 3, MAX_BATCH]]


@torch.inference_mode()
def test_decoder_that_looks_at_pictures_goes_the_other_way(
    asymmetric_vae: AsymmetricAutoencoderKL, graphs: Callable[[], list[list[int]]]
) -> None:
    """A graph of latents alone would leave them out."""
    ours = Autoencoder(asymmetric_vae)
    never = Graph(lambda _: pytest.fail("it was used"), latents(1), BATCH_SIZES)
    ours._decode = never  # type: ignore[assignment]
    conditions = {"image": pictures(2), "mask": (pictures(2)[:, :1] > 0).float()}
    expected = asymmetric_vae.decode(latents(2), **conditions).sample
    torch.testing.assert_close(ours.decode(latents(2), conditions), expected)
    assert graphs() == [[]]


def test_only_the_plain_vae_can_be_captured(vae: AutoencoderKL, asymmetric_vae: AsymmetricAutoencoderKL) -> None:
    """What computes a batch in pieces, or from more than the batch, cannot."""
    ours = Autoencoder(vae)
    assert ours.can_be_captured
    for switch in ("slicing", "tiling"):
        getattr(vae, f"enable_{switch}")()
        assert not ours.can_be_captured
        getattr(vae, f"disable_{switch}")()
        assert ours.can_be_captured
    assert not Autoencoder(asymmetric_vae).can_be_captured


# --- functions as graphs -----------------------------------------------------


class Doubling:
    """A function that remembers where it was given and left what: by that, stand-ins of graphs compute it again."""

    def __init__(self) -> None:
        self.latest: tuple[torch.Tensor, torch.Tensor] | None = None
        self.num_rows: list[int] = []
        self.captured_on: list[object] = []

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """Twice as much."""
        self.num_rows.append(len(batch))
        outputs = 2 * batch
        self.latest = (batch, outputs)
        return outputs


@pytest.fixture
def doubling(monkeypatch: pytest.MonkeyPatch) -> Doubling:
    """It, and CUDA graphs that know nothing else."""
    function, replayed = Doubling(), list[int]()

    class CudaGraph:
        def __init__(self) -> None:
            self.buffers: tuple[torch.Tensor, torch.Tensor] | None = None

        def pool(self) -> tuple[int, int]:
            return (0, 0)

        def replay(self) -> None:
            assert self.buffers is not None
            inputs, outputs = self.buffers
            replayed.append(len(inputs))
            outputs.copy_(2 * inputs)

    class Capture:
        def __init__(self, graph: CudaGraph, *, stream: object, **_: Any) -> None:
            self._graph = graph
            function.captured_on.append(stream)

        def __enter__(self) -> None:
            function.latest = None

        def __exit__(self, *_: object) -> None:
            self._graph.buffers = function.latest

    monkeypatch.setattr(torch.cuda, "CUDAGraph", CudaGraph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr("service.worker.graphs.stream_of_its_own", lambda _: nullcontext(object()))
    function.num_rows = replayed
    return function


def test_graph_is_filled_up_and_gives_what_was_asked(doubling: Doubling) -> None:
    """The smallest that holds the batch is replayed, and no row of an earlier batch comes back."""
    captured = GraphedFunction(doubling, torch.zeros(1, 3), (1, 4, 2))
    doubling.num_rows.clear()
    for count, replayed in ((4, 4), (1, 1), (3, 4), (2, 2), (4, 4), (3, 4)):
        batch = torch.rand(count, 3)
        assert captured.fits(batch)
        assert torch.equal(captured(batch), 2 * batch)
        assert doubling.num_rows.pop() == replayed


def test_graphs_of_one_function_share_a_stream_and_those_of_two_do_not(doubling: Doubling) -> None:
    """What cuBLAS works in belongs to the stream of a capture, and different functions may be replayed side by side."""
    for _ in range(2):
        GraphedFunction(doubling, torch.zeros(1, 3), (1, 2))
    first, again, second, second_again = doubling.captured_on
    assert first is again
    assert second is second_again
    assert first is not second


def test_results_outlive_the_next_call(doubling: Doubling) -> None:
    captured = GraphedFunction(doubling, torch.zeros(1, 3), (2,))
    batch = torch.rand(2, 3)
    first = captured(batch)
    captured(torch.rand(2, 3))
    assert torch.equal(first, 2 * batch)


def test_other_shapes_and_larger_batches_do_not_fit(doubling: Doubling) -> None:
    captured = GraphedFunction(doubling, torch.zeros(1, 3), (2, 4))
    assert captured.fits(torch.zeros(3, 3))
    assert not captured.fits(torch.zeros(5, 3))
    assert not captured.fits(torch.zeros(2, 4))
    assert not captured.fits(torch.zeros(2, 3, 1))
