"""The benchmark's peers paint what the stock pipeline paints, and so does this service on the random checkpoint."""

import importlib.util
import io
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks import servers, synthetic
from benchmarks.peers import static_batching
from benchmarks.peers.stock import SCHEDULERS, StockPipeline
from benchmarks.peers.wire import PeerRequest
from benchmarks.servers import Server, Where
from service.errors import InpaintError
from service.request import Pixels
from service.settings import Settings
from service.worker.batcher import Generation
from service.worker.checkpoint import load
from service.worker.pipeline import InpaintPipeline
from tests.model.stock import Stock

SIZE = 64
WHERE = Where("cpu", None, 1)
CLOSE = 1
"""Of 255: batches sum in another order."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random checkpoint in float32."""
    folder = tmp_path_factory.mktemp("synthetic")
    synthetic.write(folder, tiny=True, dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def stock(checkpoint: Path) -> Stock:
    """The reference."""
    return Stock(checkpoint)


@pytest.fixture(scope="module")
def pipeline(checkpoint: Path) -> InpaintPipeline:
    """This service's own."""
    return InpaintPipeline(load(Settings(model=str(checkpoint)), torch.device("cpu")), "black")


def a_request(seed: int, height: int = SIZE) -> PeerRequest:
    """Requests of different seeds differ in everything, but for every fourth, which agrees in its settings."""
    draw = np.random.default_rng(seed)
    mask = np.zeros((height, SIZE), np.uint8)
    mask[8:40, 8:50] = 255
    kind = seed % 4
    return PeerRequest(
        prompt=("a red house", "a green tree")[seed % 2],
        negative_prompt="",
        num_inference_steps=3 + kind,
        guidance_scale=(4.0, 7.5, 1.0, 4.0)[kind],
        strength=(1.0, 1.0, 1.0, 0.7)[kind],
        scheduler=list(SCHEDULERS)[kind],
        seed=seed,
        height=height,
        width=SIZE,
        image=draw.integers(0, 256, (height, SIZE, 3), dtype=np.uint8),
        mask=mask,
    )


REQUESTS = [a_request(seed) for seed in range(8)] + [a_request(8, height=2 * SIZE)]


def difference(picture: Pixels | InpaintError, request: PeerRequest, stock: Stock) -> int:
    """The largest from what stock paints alone."""
    assert not isinstance(picture, InpaintError)
    (expected,), _ = stock(static_batching.to_inpaint_request(request))
    return int(np.abs(picture.astype(int) - expected).max())


# --- the random checkpoint -----------------------------------------------------------


def test_the_random_checkpoint_is_one_of_stock_and_of_the_service(stock: Stock, pipeline: InpaintPipeline) -> None:
    """Both load it and paint the same picture, which is neither blank nor flagged."""
    request = REQUESTS[0]
    (picture,) = static_batching.paint(pipeline, [Generation("0", static_batching.to_inpaint_request(request))])
    assert difference(picture, request, stock) <= CLOSE
    assert isinstance(picture, np.ndarray)
    assert 20 < picture.std() < 110


def test_random_weights_keep_the_scale_of_what_passes_through() -> None:
    """However wide a layer, numbers stay far below the largest of float16; the same seed gives the same weights."""
    model = torch.nn.Sequential(torch.nn.Linear(4096, 2048), torch.nn.LayerNorm(2048), torch.nn.Conv1d(1, 8, 3))
    synthetic.fill(model, (1,))
    outputs = model[0](torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)))
    assert outputs.std().item() == pytest.approx(1.0, rel=0.1)
    first = [weight.clone() for weight in model.parameters()]
    synthetic.fill(model, (1,))
    assert all(map(torch.equal, first, model.parameters()))
    synthetic.fill(model, (2,))
    assert not torch.equal(first[0], model[0].weight)


def test_the_random_checkpoint_is_half_precision_by_default(tmp_path: Path) -> None:
    """Full-size, that is half of what has to be written and read; every weight is finite."""
    synthetic.write(tmp_path, tiny=True)
    components = load(Settings(model=str(tmp_path), dtype="float16"), torch.device("cpu"))
    weights = [*components.unet.parameters(), *components.vae.parameters(), *components.text_encoder.parameters()]
    assert all(weight.dtype == torch.float16 and bool(torch.isfinite(weight).all()) for weight in weights)


def test_the_full_size_is_that_of_stable_diffusion() -> None:
    """Each part has as many weights as in Stable Diffusion 1.5; the inpainting UNet's input has 5 channels more."""
    with torch.device("meta"):
        parts = (
            UNet2DConditionModel(**synthetic.FULL_SIZE.unet),
            AutoencoderKL(**synthetic.FULL_SIZE.vae),
            CLIPTextModel(CLIPTextConfig(**synthetic.FULL_SIZE.text_encoder)),
        )
    counts = [sum(weight.numel() for weight in part.parameters()) for part in parts]
    assert counts == [859_520_964 + 320 * 5 * 9, 83_653_863, 123_060_480]


# --- in one process ------------------------------------------------------------------


def test_stock_requests_of_equal_settings_share_a_call(checkpoint: Path, stock: Stock) -> None:
    """In one call of the stock pipeline each request keeps its prompt, its picture and its own noise."""
    peer = StockPipeline(checkpoint, "cpu", torch.float32)
    assert peer.native_size == SIZE
    same = [replace(REQUESTS[0], seed=seed, prompt=prompt) for seed, prompt in ((1, "nothing"), (2, "a red ball"))]
    for request, picture in zip(same, peer.paint(same), strict=True):
        assert difference(picture, request, stock) <= CLOSE


def test_a_static_batch_runs_whatever_the_settings(stock: Stock, pipeline: InpaintPipeline) -> None:
    """Other steps, guidance, schedulers and strengths in one batch change no request's picture."""
    batch = [request for request in REQUESTS if request.height == SIZE]
    generations = [Generation(str(n), static_batching.to_inpaint_request(one)) for n, one in enumerate(batch)]
    for request, picture in zip(batch, static_batching.paint(pipeline, generations), strict=True):
        assert difference(picture, request, stock) <= CLOSE


# --- over a socket -------------------------------------------------------------------


@pytest.fixture(scope="module")
def running(checkpoint: Path) -> Iterator[Mapping[str, Server]]:
    """The peers that can run here, started at once."""
    starts = {
        "stock_lock": servers.stock_lock(checkpoint, WHERE),
        "static_batching": servers.static_batching(checkpoint, WHERE),
    }
    if importlib.util.find_spec("litserve") is not None:
        starts["litserve_stock"] = servers.litserve_stock(checkpoint, WHERE, max_batch=4)
    with ExitStack() as stack, ThreadPoolExecutor() as threads:
        yield dict(zip(starts, threads.map(stack.enter_context, starts.values()), strict=True))


def post(server: Server, request: PeerRequest) -> Pixels:
    """The answer to one request, sent as a form."""
    names = ("prompt", "num_inference_steps", "guidance_scale", "strength", "scheduler", "seed", "height", "width")
    files = {"image": _png(request.image), "mask": _png(request.mask)}
    fields = {name: str(getattr(request, name)) for name in names}
    response = httpx.post(server.url, data=fields, files=files, timeout=120, trust_env=False)
    assert response.status_code == 200, response.text
    return np.asarray(Image.open(io.BytesIO(response.content), formats=("PNG",)))


def _png(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("peer", ["stock_lock", "static_batching", "litserve_stock"])
def test_every_peer_answers_requests_of_any_settings(peer: str, running: Mapping[str, Server], stock: Stock) -> None:
    """Sent at once, of different settings and sizes, each request gets the picture that stock paints of it alone."""
    if peer not in running:
        pytest.skip("the package litserve is not installed (extra: bench)")
    with ThreadPoolExecutor(len(REQUESTS)) as threads:
        pictures = list(threads.map(lambda request: post(running[peer], request), REQUESTS))
    for request, picture in zip(REQUESTS, pictures, strict=True):
        assert difference(picture, request, stock) <= CLOSE
