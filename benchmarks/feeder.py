"""The other end of a worker's pipe: as many requests in flight as keep it saturated, in the place of the service."""

import io
import itertools
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event

import numpy as np
from PIL import Image

from benchmarks.traffic import Job, Mix, Wish, fulfil
from service.messages import Drain, Failed, Submit, Ticked
from service.request import InpaintParams, InpaintRequest, Pixels

NUM_REQUESTS = 64
"""Different requests, which are sent again and again."""
LEAST_STEPS = 2
POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Load:
    """What to send.

    Attributes:
        in_flight: Requests that are not denoised yet, of one image each.
        size: Side of the pictures in pixels.
        steps: Of every request but the first ones.
        seed: The same seed gives the same requests.
    """

    in_flight: int
    size: int
    steps: int
    seed: int


def requests_of(load: Load) -> Iterator[InpaintRequest]:
    """Requests without end.

    The first ones have fewer steps, each another number: so they do not end together, nor do those
    that follow them, and the batch is from its start as it is after hours.
    """
    first = [Wish(max(LEAST_STEPS, load.steps * (1 + place) // load.in_flight)) for place in range(load.in_flight)]
    mix = Mix((load.steps, load.steps), {load.size: 1.0})
    jobs = [_request(job) for job in fulfil([*first, *([Wish()] * NUM_REQUESTS)], mix, load.seed)]
    return itertools.chain(jobs[: len(first)], itertools.cycle(jobs[len(first) :]))


def feed(connection: Connection, load: Load, is_over: Event) -> None:
    """Send a request whenever one is denoised, until it is over; then let the worker end. A process of its own.

    Args:
        connection: The service's end of the pipe.
        load: What to send.
        is_over: Set by the worker's side.
    """
    free = threading.Semaphore(load.in_flight)
    failures: list[Failed] = []
    # A thread: while one side of a pipe waits for room to send, the other must go on reading.
    reader = threading.Thread(target=_read, args=(connection, free, failures), daemon=True)
    reader.start()
    requests = requests_of(load)
    numbers = itertools.count()
    with suppress(OSError):  # Where the worker is gone, it has said why.
        while not is_over.is_set() and not failures:
            if free.acquire(timeout=POLL_SECONDS):
                connection.send(Submit(f"{next(numbers)}", replace(next(requests), admitted_at=time.monotonic())))
        connection.send(Drain())
    reader.join()
    if failures:
        sys.exit(f"{len(failures)} requests failed, the first: {failures[0].message}")


def _read(connection: Connection, free: threading.Semaphore, failures: list[Failed]) -> None:
    """Read until the worker is gone."""
    with suppress(EOFError, OSError):
        while True:
            report = connection.recv()
            match report:
                case Failed():
                    failures.append(report)
                case Ticked(progress=progress):  # As the service: a place is free with a request's last step.
                    for _ in [one for one in progress if one.step >= one.steps]:
                        free.release()


def _request(job: Job) -> InpaintRequest:
    """What the service makes of a request of these fields, for a worker."""
    fields = job.fields
    params = InpaintParams(
        prompt=fields["prompt"],
        negative_prompt="",
        num_inference_steps=job.num_steps,
        guidance_scale=float(fields["guidance_scale"]),
        strength=1.0,
        num_images_per_prompt=1,
        seed=int(fields["seed"]),
        scheduler=fields["scheduler"],
        eta=0.0,
        clip_skip=0,
        height=job.size,
        width=job.size,
    )
    image, mask = _pixels(job.image, "RGB"), _pixels(job.mask, "L")
    return InpaintRequest(params, image, mask, admitted_at=0.0, deadline=float("inf"))


def _pixels(png: bytes, mode: str) -> Pixels:
    with Image.open(io.BytesIO(png)) as picture:
        return np.asarray(picture.convert(mode))
