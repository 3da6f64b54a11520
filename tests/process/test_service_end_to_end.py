"""The service as an operator runs it: `serve` with real workers and a real (tiny) model, over HTTP."""

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.model.checkpoints import NATIVE_SIZE, make_checkpoint
from tests.model.mixed_requests import mixed_requests
from tests.model.stock import Stock
from tests.process.real_service import Service, form_of, pictures, post_all, serving

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("end-to-end"))


@pytest.fixture
def service(checkpoint: Path) -> Iterator[Service]:
    with serving(checkpoint, "--max-images", "4", "--queue-size", "40") as running:
        yield running


def test_mixed_requests_over_http_equal_stock_though_a_worker_is_killed(service: Service, checkpoint: Path) -> None:
    """Over HTTP, batched across two workers, one killed on the way: each answer is stock's for that request alone."""
    requests = mixed_requests(("ddim", "euler_a", "dpmpp_2m", "dpmpp_sde", "unipc", "lms"), 18, NATIVE_SIZE, seed=3)
    victim = service.worker_pids()[0]
    killer = threading.Thread(
        target=lambda: (service.wait_for_metric("inpaint_batch_images_count", 5), os.kill(victim, signal.SIGKILL))
    )
    killer.start()
    responses = asyncio.run(post_all(service, [form_of(request) for request in requests]))
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
        responses = asyncio.run(post_all(service, [form_of(request) for request in requests]))
        assert {response.status_code for response in responses} == {200, 429}
        for response in responses:
            if response.status_code == 429:
                assert int(response.headers["Retry-After"]) >= 1
                assert response.json()["code"] == "overloaded"
    finally:
        assert service.end() == 0


def test_sigterm_answers_what_was_accepted(checkpoint: Path) -> None:
    """SIGTERM in the middle of a batch: accepted requests are answered, then the process exits with 0."""
    requests = mixed_requests(("ddim", "euler"), 6, NATIVE_SIZE, seed=5)
    # Long ones: all must still be there when the metric is looked at.
    forms = [form_of(request, num_inference_steps="150", strength="1") for request in requests]
    with serving(checkpoint, "--max-images", "4") as service:
        terminator = threading.Thread(
            target=lambda: (service.wait_for_metric("inpaint_in_flight", len(requests)), service.process.terminate())
        )
        terminator.start()
        responses = asyncio.run(post_all(service, forms))
        terminator.join()
        assert [response.status_code for response in responses] == [200] * len(requests)
        assert service.process.wait(timeout=60) == 0
