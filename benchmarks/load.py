"""Sending requests and timing the answers, every one of which is checked."""

import asyncio
import io
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import numpy as np
from PIL import Image

from benchmarks.traffic import Job

ANSWER_TIMEOUT_SECONDS = 120.0
KEEPALIVE_SECONDS = 2.0
CHECKING_THREADS = 2

GOOD = "good"
WRONG_PICTURE = "wrong picture"
TIMEOUT = "timeout"
NO_ANSWER = "no answer"


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one request.

    Attributes:
        due_seconds: When it was to be sent, from the round's start. In a closed loop, when it was.
        late_seconds: How much later the sender came to it.
        latency_seconds: From the moment at which it was due to the last byte, so that a
            sender that falls behind hides nothing.
        num_steps: Steps that it asked for.
        outcome: `GOOD`, or what to count it under: `WRONG_PICTURE`, `TIMEOUT`, `NO_ANSWER`
            when the connection failed, or the status, such as `status 429`.
        fault: Why it does not count, in full; None when it is good.
    """

    due_seconds: float
    late_seconds: float
    latency_seconds: float
    num_steps: int
    outcome: str
    fault: str | None


@dataclass(frozen=True, slots=True)
class Round:
    """One stretch of load on one server.

    Attributes:
        answers: One per request sent, in the order in which they were due.
        seconds: From the start to the last answer.
        sending_seconds: From the start to the end of the window in which requests were sent.
        is_cut_short: Whether the time limit came before the last request was sent.
    """

    answers: tuple[Answer, ...]
    seconds: float
    sending_seconds: float
    is_cut_short: bool

    @property
    def good(self) -> tuple[Answer, ...]:
        """The answers that count."""
        return tuple(answer for answer in self.answers if answer.outcome == GOOD)

    @property
    def requests_per_second(self) -> float:
        """Good answers a second."""
        return len(self.good) / self.seconds

    @property
    def model_calls_per_second(self) -> float:
        """Model calls of good answers a second, guidance not counted twice."""
        return sum(answer.num_steps for answer in self.good) / self.seconds


def open_client() -> httpx.AsyncClient:
    """A client without a limit on connections: a pool that queues would hide latency."""
    return httpx.AsyncClient(
        timeout=httpx.Timeout(ANSWER_TIMEOUT_SECONDS),
        # Idle connections go before a server drops them (uvicorn after 5 s), which could cost a request.
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEPALIVE_SECONDS),
        trust_env=False,
    )


async def closed_loop(
    client: httpx.AsyncClient,
    url: str,
    jobs: Sequence[Job],
    concurrency: int,
    max_seconds: float,
    *,
    timeout_seconds: float = ANSWER_TIMEOUT_SECONDS,
    checks_pixels: bool = False,
) -> Round:
    """`concurrency` clients, each of which sends the next request when it has its answer.

    Args:
        client: From `open_client`.
        url: The server's inpainting endpoint.
        jobs: The requests, taken in order.
        concurrency: Number of clients.
        max_seconds: After these no further request is sent; those on their way still count.
        timeout_seconds: A request without an answer by then is given up.
        checks_pixels: Whether pixels outside the mask must be the upload's.
    """
    waiting = iter(jobs)
    num_sent = 0
    sending = _Sending(client, url, timeout_seconds, checks_pixels=checks_pixels)

    async def one_client() -> None:
        nonlocal num_sent
        while sending.seconds() < max_seconds and (job := next(waiting, None)) is not None:
            num_sent += 1
            await sending.send(job, sending.seconds())

    async with asyncio.TaskGroup() as clients:
        for _ in range(concurrency):
            clients.create_task(one_client())
    sending_seconds = min(max_seconds, sending.seconds())
    return await sending.round(sending_seconds, is_cut_short=num_sent < len(jobs))


async def open_loop(
    client: httpx.AsyncClient,
    url: str,
    jobs: Sequence[Job],
    arrivals: Sequence[float],
    *,
    window_seconds: float | None = None,
    timeout_seconds: float = ANSWER_TIMEOUT_SECONDS,
    checks_pixels: bool = False,
) -> Round:
    """Requests at given moments, whatever has become of those before.

    Args:
        client: From `open_client`.
        url: The server's inpainting endpoint.
        jobs: One request per arrival.
        arrivals: Seconds from the start, ascending.
        window_seconds: Length of the window that the arrivals were drawn in, up to the last when None.
        timeout_seconds: A request without an answer by then is given up.
        checks_pixels: Whether pixels outside the mask must be the upload's.
    """
    sending = _Sending(client, url, timeout_seconds, checks_pixels=checks_pixels)
    async with asyncio.TaskGroup() as requests:
        for job, arrival in zip(jobs, arrivals, strict=True):
            await asyncio.sleep(arrival - sending.seconds())
            requests.create_task(sending.send(job, arrival))
    return await sending.round(window_seconds or max(arrivals, default=0.0), is_cut_short=False)


class _Sending:
    """A round in the making."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        url: str,
        timeout_seconds: float,
        *,
        checks_pixels: bool,
    ) -> None:
        self._client = client
        self._url = url
        self._timeout_seconds = timeout_seconds
        self._checks_pixels = checks_pixels
        self._started_at = time.perf_counter()
        self._answers: list[asyncio.Future[Answer]] = []
        # Decoding an answer takes longer than sending a request: here it would make the next one late.
        self._checking = ThreadPoolExecutor(CHECKING_THREADS, thread_name_prefix="check")

    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._started_at

    async def send(self, job: Job, due_seconds: float) -> None:
        """Send one request and take the time of its answer; the check follows when there is a thread for it."""
        late_seconds = self.seconds() - due_seconds
        files = {"image": ("image.png", job.image, "image/png"), "mask": ("mask.png", job.mask, "image/png")}
        given_up_after = max(0.0, self._timeout_seconds - late_seconds)
        response: httpx.Response | None = None
        outcome, fault = NO_ANSWER, ""
        try:
            async with asyncio.timeout(given_up_after):
                response = await self._client.post(
                    self._url, data=job.fields, files=files, headers={"Accept": "image/png"}
                )
        except (TimeoutError, httpx.TimeoutException):
            outcome, fault = TIMEOUT, f"no answer within {self._timeout_seconds:g} s"
        except httpx.HTTPError as error:
            fault = f"{type(error).__name__}: {error}"
        latency_seconds = self.seconds() - due_seconds

        def check() -> Answer:
            found = (
                (outcome, fault)
                if response is None
                else judge(response.status_code, response.content, job, checks_pixels=self._checks_pixels)
            )
            return Answer(due_seconds, late_seconds, latency_seconds, job.num_steps, *found)

        self._answers.append(asyncio.get_running_loop().run_in_executor(self._checking, check))

    async def round(self, sending_seconds: float, *, is_cut_short: bool) -> Round:
        """The whole round, once every answer is there."""
        seconds = self.seconds()
        answers = await asyncio.gather(*self._answers)
        self._checking.shutdown()
        return Round(
            tuple(sorted(answers, key=lambda answer: answer.due_seconds)), seconds, sending_seconds, is_cut_short
        )


def judge(status: int, body: bytes, job: Job, *, checks_pixels: bool = False) -> tuple[str, str | None]:
    """What an answer counts as, and its fault, None when it is a PNG of the job's size that decodes.

    Args:
        status: HTTP status.
        body: What came with it.
        job: What was asked for.
        checks_pixels: Whether pixels outside the mask must be the upload's, exactly.
    """
    if status != httpx.codes.OK:
        return f"status {status}", f"status {status}: {body[:200].decode(errors='replace')}"
    try:
        with Image.open(io.BytesIO(body), formats=("PNG",)) as picture:
            picture.load()
    except (OSError, ValueError, SyntaxError) as error:
        return WRONG_PICTURE, f"no PNG: {type(error).__name__}"
    if picture.size != (job.size, job.size):
        return WRONG_PICTURE, f"a picture of {picture.size}, not of {job.size} by {job.size}"
    if checks_pixels and (num_changed := _num_changed_outside(picture, job)) > 0:
        return WRONG_PICTURE, f"{num_changed} pixels outside the mask are not the upload's"
    return GOOD, None


def _num_changed_outside(picture: Image.Image, job: Job) -> int:
    with Image.open(io.BytesIO(job.image)) as upload, Image.open(io.BytesIO(job.mask)) as mask:
        differs = np.asarray(picture.convert("RGB")) != np.asarray(upload.convert("RGB"))
        return int(np.count_nonzero(differs.any(axis=2) & (np.asarray(mask.convert("L")) < 128)))
