"""Sending requests and timing the answers, every one of which is checked."""

import asyncio
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx
from PIL import Image

from benchmarks.traffic import Job, num_model_calls

ANSWER_TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one request.

    Attributes:
        latency_seconds: Closed loop: from sending to the last byte. Open loop: from the
            moment at which it was due, so that a sender that falls behind hides nothing.
        fault: Why the answer does not count, None when it is a PNG of the right size.
    """

    latency_seconds: float
    fault: str | None


@dataclass(frozen=True, slots=True)
class Round:
    """One stretch of load on one server.

    Attributes:
        answers: One per request sent, in the order of completion.
        seconds: From the first request to the last answer.
        model_calls: Calls of the UNet per image that the requests sent took.
        is_cut_short: Whether the time limit came before the last request was sent.
    """

    answers: tuple[Answer, ...]
    seconds: float
    model_calls: int
    is_cut_short: bool

    @property
    def requests_per_second(self) -> float:
        """Good answers a second."""
        return sum(answer.fault is None for answer in self.answers) / self.seconds

    @property
    def model_calls_per_second(self) -> float:
        """Model calls a second, guidance not counted twice."""
        return self.model_calls / self.seconds


def open_client() -> httpx.AsyncClient:
    """A client without a limit on connections: a pool that queues would hide latency."""
    return httpx.AsyncClient(
        timeout=httpx.Timeout(ANSWER_TIMEOUT_SECONDS),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        trust_env=False,
    )


async def closed_loop(
    client: httpx.AsyncClient, url: str, jobs: Sequence[Job], concurrency: int, max_seconds: float
) -> Round:
    """`concurrency` clients, each of which sends the next request when it has its answer.

    Args:
        client: From `open_client`.
        url: The server's inpainting endpoint.
        jobs: The requests, taken in order.
        concurrency: Number of clients.
        max_seconds: After these no further request is sent; those on their way still count.
    """
    waiting = iter(jobs)
    sent: list[Job] = []
    answers: list[Answer] = []
    started_at = time.perf_counter()

    async def one_client() -> None:
        while time.perf_counter() - started_at < max_seconds and (job := next(waiting, None)) is not None:
            sent.append(job)
            answers.append(await _send(client, url, job, time.perf_counter()))

    async with asyncio.TaskGroup() as clients:
        for _ in range(concurrency):
            clients.create_task(one_client())
    return Round(tuple(answers), time.perf_counter() - started_at, num_model_calls(sent), len(sent) < len(jobs))


async def open_loop(client: httpx.AsyncClient, url: str, jobs: Sequence[Job], arrivals: Sequence[float]) -> Round:
    """Requests at given moments, whatever has become of those before.

    Args:
        client: From `open_client`.
        url: The server's inpainting endpoint.
        jobs: One request per arrival.
        arrivals: Seconds from the start, ascending.
    """
    answers: list[Answer] = []
    started_at = time.perf_counter()

    async def one_request(job: Job, due_at: float) -> None:
        answers.append(await _send(client, url, job, due_at))

    async with asyncio.TaskGroup() as requests:
        for job, arrival in zip(jobs, arrivals, strict=True):
            due_at = started_at + arrival
            await asyncio.sleep(due_at - time.perf_counter())
            requests.create_task(one_request(job, due_at))
    return Round(tuple(answers), time.perf_counter() - started_at, num_model_calls(jobs), is_cut_short=False)


async def _send(client: httpx.AsyncClient, url: str, job: Job, counts_from: float) -> Answer:
    files = {"image": ("image.png", job.image, "image/png"), "mask": ("mask.png", job.mask, "image/png")}
    try:
        response = await client.post(url, data=job.fields, files=files, headers={"Accept": "image/png"})
    except httpx.HTTPError as error:
        return Answer(time.perf_counter() - counts_from, f"{type(error).__name__}: {error}")
    latency_seconds = time.perf_counter() - counts_from
    return Answer(latency_seconds, fault_of(response.status_code, response.content, job.size))


def fault_of(status: int, body: bytes, size: int) -> str | None:
    """Why this answer does not count, None when it is a PNG of `size` by `size` pixels that decodes."""
    if status != httpx.codes.OK:
        return f"status {status}: {body[:200].decode(errors='replace')}"
    try:
        with Image.open(io.BytesIO(body), formats=("PNG",)) as picture:
            picture.load()
            return None if picture.size == (size, size) else f"a picture of {picture.size}, not of {size} by {size}"
    except (OSError, ValueError, SyntaxError) as error:
        return f"no PNG: {type(error).__name__}"
