"""The service as an operator runs it: `serve` with real workers and a real (tiny) model, over HTTP."""

import asyncio
import base64
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from service.request import InpaintRequest
from tests.model.checkpoints import NATIVE_SIZE, make_checkpoint
from tests.model.mixed_requests import mixed_requests
from tests.model.stock import Stock

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(300)


class Service:
    """A `serve` process with two CPU workers.

    Args:
        model: The checkpoint.
        flags: Further flags of `serve`.
    """

    def __init__(self, model: Path, *flags: str) -> None:
        command = [sys.executable, "-m", "service", "serve", "--model", str(model), "--port", "0"]
        command += ["--devices", "cpu,cpu", "--cpu-threads", "1", "--log-format", "text", *flags]
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        self.log = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._wait_for(lambda: re.search(r"listens on (http://\S+)", self.log) is not None)
        address = re.search(r"listens on (http://[0-9.:]+)", self.log)
        assert address is not None
        self.url = address[1]
        self._wait_for(lambda: [one["state"] for one in self.get("/readyz").json()["workers"]] == ["ready", "ready"])

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log += line

    def _wait_for(self, condition: Any, seconds: float = 120.0) -> None:
        give_up_at = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < give_up_at, self.log
            time.sleep(0.05)

    def get(self, path: str) -> httpx.Response:
        """A GET of its own."""
        return httpx.get(self.url + path, timeout=30, trust_env=False)

    def metric(self, sample: str) -> float:
        """A sample's value, 0 while it does not exist."""
        lines = self.get("/metrics").text.splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(sample + " ")), 0.0)

    def wait_for_metric(self, sample: str, value: float) -> None:
        """Wait until the sample has reached a value."""
        self._wait_for(lambda: self.metric(sample) >= value)

    def worker_pids(self) -> list[int]:
        """The worker processes, in the order they were started."""
        return [int(pid) for pid in re.findall(r"worker \d+ \(cpu\) started, pid (\d+)", self.log)]

    def end(self) -> int:
        """SIGTERM, then the exit status."""
        self.process.terminate()
        status = self.process.wait(timeout=120)
        self._reader.join(timeout=30)
        return status


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("end-to-end"))


@pytest.fixture
def service(checkpoint: Path) -> Iterator[Service]:
    running = Service(checkpoint, "--max-images", "4", "--queue-size", "40")
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait(timeout=30)
        running._reader.join(timeout=30)
        assert running.process.stderr is not None
        running.process.stderr.close()


def png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def form_of(request: InpaintRequest, **changes: str) -> dict[str, Any]:
    """What a client sends to have this request painted; `composite=false` answers what the pipeline painted."""
    names = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "strength", "seed", "scheduler")
    names += ("num_images_per_prompt", "eta", "clip_skip", "height", "width", "batching")
    data = {name: str(getattr(request.params, name)) for name in names}
    files = {"image": ("image.png", png(request.image)), "mask": ("mask.png", png(request.mask))}
    return {"data": {**data, "composite": "false", **changes}, "files": files}


async def post_all(service: Service, requests: list[InpaintRequest]) -> list[httpx.Response]:
    """All at once, on a connection each."""
    limits = httpx.Limits(max_connections=len(requests))
    async with httpx.AsyncClient(base_url=service.url, timeout=240, limits=limits, trust_env=False) as client:
        headers = {"Accept": "application/json"}
        posts = [client.post("/v1/inpaint", headers=headers, **form_of(request)) for request in requests]
        return list(await asyncio.gather(*posts))


def pictures(response: httpx.Response) -> list[NDArray[np.uint8]]:
    files = [base64.b64decode(image["b64_json"]) for image in response.json()["images"]]
    return [np.asarray(Image.open(io.BytesIO(data))) for data in files]


def test_mixed_requests_over_http_equal_stock_though_a_worker_is_killed(service: Service, checkpoint: Path) -> None:
    """Over HTTP, batched across two workers, one killed on the way: each answer is stock's for that request alone."""
    requests = mixed_requests(("ddim", "euler_a", "dpmpp_2m", "dpmpp_sde", "unipc", "lms"), 18, NATIVE_SIZE, seed=3)
    victim = service.worker_pids()[0]
    killer = threading.Thread(
        target=lambda: (service.wait_for_metric("inpaint_batch_images_count", 5), os.kill(victim, signal.SIGKILL))
    )
    killer.start()
    responses = asyncio.run(post_all(service, requests))
    killer.join()

    stock = Stock(checkpoint)
    for request, response in zip(requests, responses, strict=True):
        assert response.status_code == 200, response.text
        expected, flags = stock(request)
        assert [image["nsfw_content_detected"] for image in response.json()["images"]] == flags
        for painted, picture in zip(pictures(response), expected, strict=True):
            assert np.abs(painted.astype(int) - picture.astype(int)).max() <= 1, request.params
    assert max(response.json()["batch"]["mean_images"] for response in responses) > 1
    # Shared steps are visible to the operator too, and so is the restart.
    num_ticks, num_images = service.metric("inpaint_batch_images_count"), service.metric("inpaint_batch_images_sum")
    assert num_images > num_ticks
    assert service.metric('inpaint_worker_restarts_total{worker="0"}') == 1


def test_client_that_hangs_up_leaves_the_batch(service: Service) -> None:
    """A hang-up frees the place in the batch at the next step, and is counted."""
    request = mixed_requests(("ddpm",), 1, NATIVE_SIZE)[0]
    form = form_of(request, num_inference_steps="150", strength="1", num_images_per_prompt="1")

    async def hang_up() -> None:
        async with httpx.AsyncClient(base_url=service.url, timeout=60, trust_env=False) as client:
            post = asyncio.create_task(client.post("/v1/inpaint", **form))
            await asyncio.to_thread(service.wait_for_metric, "inpaint_batch_images_count", 1)
            post.cancel()
            await asyncio.gather(post, return_exceptions=True)

    asyncio.run(hang_up())
    service.wait_for_metric('inpaint_cancelled_total{reason="disconnect"}', 1)
    service._wait_for(lambda: service.metric("inpaint_in_flight") == 0)
    assert service.metric("inpaint_batch_images_count") < 150


def test_burst_beyond_the_queue_is_told_when_to_come_back(checkpoint: Path) -> None:
    """What does not fit the queue gets 429 with Retry-After at once; what fits is answered."""
    service = Service(checkpoint, "--max-images", "1", "--queue-size", "2")
    try:
        requests = [one for one in mixed_requests(("ddim",), 40, NATIVE_SIZE) if one.params.num_images_per_prompt == 1]
        responses = asyncio.run(post_all(service, requests))
        assert {response.status_code for response in responses} == {200, 429}
        for response in responses:
            if response.status_code == 429:
                assert int(response.headers["Retry-After"]) >= 1
                assert response.json()["code"] == "overloaded"
    finally:
        assert service.end() == 0


def test_sigterm_answers_what_was_accepted(checkpoint: Path) -> None:
    """SIGTERM in the middle of a batch: accepted requests are answered, then the process exits with 0."""
    service = Service(checkpoint, "--max-images", "4")
    requests = mixed_requests(("ddim", "euler"), 6, NATIVE_SIZE, seed=5)
    terminator = threading.Thread(
        target=lambda: (service.wait_for_metric("inpaint_in_flight", len(requests)), service.process.terminate())
    )
    terminator.start()
    responses = asyncio.run(post_all(service, requests))
    terminator.join()
    assert [response.status_code for response in responses] == [200] * len(requests)
    assert service.process.wait(timeout=60) == 0
