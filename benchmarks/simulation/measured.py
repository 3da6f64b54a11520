"""The real service with the bundled model on this machine's CPU, and the same simulated from its own times.

Times are taken in two ways, because a machine that is shared is now faster and now slower: how a step, preparing and
finishing grow with the images in them, by requests of one to four images that run alone, before and after each load;
and how fast the machine was in each second of a load, by what the steps of that second took. What is put to the test
is what is done with these times: who waits for whom, who shares which steps.
"""

import asyncio
import statistics
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import TracebackType
from typing import Self

import httpx

from benchmarks.arrivals import poisson_arrivals
from benchmarks.load import Round, closed_loop, open_client, open_loop
from benchmarks.report import num_cores
from benchmarks.scrape import Scrape, scrape, use_between
from benchmarks.servers import Server, Where, inpaint_service
from benchmarks.simulation.costs import Costs, StageCost
from benchmarks.simulation.fleet import Fleet, simulate, simulate_closed
from benchmarks.simulation.traffic import Wanted
from benchmarks.simulation.validation import Comparison, Figures, as_round, figures_of, median_of
from benchmarks.traffic import Job, Mix, draw_jobs

MAX_IMAGES = 4
STEPS = (6, 14)
SIZE = 256
CALIBRATING_STEPS = 6
CLOSED_JOBS = {4: 20, 8: 24}
OPEN_LOAD = 0.75
OPEN_SECONDS = 20.0
TIMEOUT_SECONDS = 120.0
PIPE_SECONDS = 0.001
LOOK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Sample:
    """What requests of one to four images took, alone.

    Attributes:
        step: Images -> seconds of a step.
        prepare: Images -> seconds.
        finish: Images -> seconds.
    """

    step: dict[int, float]
    prepare: dict[int, float]
    finish: dict[int, float]


def on_this_machine(num_rounds: int, seed: int) -> list[Comparison]:
    """Measure and predict closed loops and an open one.

    Raises:
        ServerFailedError: The service did not start.
    """
    where = Where("cpu", "float32", num_cores())
    with (
        inpaint_service("demo", where, environment={"INPAINT_MAX_IMAGES": str(MAX_IMAGES)}) as server,
        httpx.Client(trust_env=False, timeout=TIMEOUT_SECONDS) as client,
    ):
        service = _Service(server, client)
        service.sample(seed)  # Warms up.
        pairs: dict[str, list[tuple[Figures, Figures]]] = {}
        for number in range(num_rounds):
            rate = 0.0
            for clients, num_jobs in CLOSED_JOBS.items():
                jobs = draw_jobs(num_jobs, Mix(STEPS, {SIZE: 1.0}), seed + 100 * number + clients)
                pair = service.closed(jobs, clients)
                rate = pair[0].per_second
                pairs.setdefault(f"closed loop, {clients} clients", []).append(pair)
            pairs.setdefault(f"open loop, Poisson, {OPEN_LOAD:.0%} of that", []).append(
                service.open(OPEN_LOAD * rate, seed + number)
            )
    return [
        Comparison(title, median_of([pair[0] for pair in found]), median_of([pair[1] for pair in found]))
        for title, found in pairs.items()
    ]


class _Service:
    """The service under measurement."""

    def __init__(self, server: Server, client: httpx.Client) -> None:
        self._server = server
        self._client = client
        self._latest: Sample | None = None

    def closed(self, jobs: Sequence[Job], num_clients: int) -> tuple[Figures, Figures]:
        """A closed loop: measured, predicted."""

        async def load() -> Round:
            async with open_client() as client:
                return await closed_loop(client, self._server.url, jobs, num_clients, TIMEOUT_SECONDS)

        one, costs = self._measure(load)
        steps = [job.num_steps for job in jobs]
        simulated = simulate_closed(Fleet((costs,)), steps, num_clients, TIMEOUT_SECONDS)
        return _told(f"{num_clients} clients", one, as_round(simulated, simulated.seconds))

    def open(self, rate: float, seed: int) -> tuple[Figures, Figures]:
        """Poisson arrivals: measured, predicted."""
        arrivals = poisson_arrivals(rate, OPEN_SECONDS, seed)
        jobs = draw_jobs(len(arrivals), Mix(STEPS, {SIZE: 1.0}), seed)

        async def load() -> Round:
            async with open_client() as client:
                return await open_loop(client, self._server.url, jobs, arrivals, window_seconds=OPEN_SECONDS)

        one, costs = self._measure(load)
        traffic = [Wanted(moment, job.num_steps) for moment, job in zip(arrivals, jobs, strict=True)]
        return _told("open", one, as_round(simulate(Fleet((costs,)), traffic), OPEN_SECONDS))

    def _measure(self, load: Callable[[], Coroutine[None, None, Round]]) -> tuple[Round, Costs]:
        """A load, and what it cost."""
        before = self._latest or self.sample(1)
        with _Speedometer(self._server.base_url) as speedometer:
            one = asyncio.run(load())
        self._latest = self.sample(2)
        return one, _costs(before, self._latest, speedometer.looks)

    def sample(self, seed: int) -> Sample:
        """Requests of one to four images, alone."""
        found = Sample({}, {}, {})
        for num_images in range(1, MAX_IMAGES + 1):
            job = draw_jobs(1, Mix((CALIBRATING_STEPS,) * 2, {SIZE: 1.0}), seed)[0]
            response = self._client.post(
                self._server.url,
                data=job.fields | {"num_images_per_prompt": str(num_images)},
                files={"image": ("image.png", job.image, "image/png"), "mask": ("mask.png", job.mask, "image/png")},
                headers={"Accept": "application/json"},
            )
            timings = response.raise_for_status().json()["timings"]
            found.step[num_images] = timings["denoise"] / CALIBRATING_STEPS
            found.prepare[num_images] = timings["prepare"]
            found.finish[num_images] = timings["decode"] + timings["safety"]
        return found


class _Speedometer:
    """Looks at the service's metrics every second, from `with` to its end.

    Args:
        base_url: Where the service is.
    """

    def __init__(self, base_url: str) -> None:
        self.looks: list[tuple[float, Scrape]] = []
        """Seconds from the start, and what was seen; the first before the load, the last after it."""
        self._base_url = base_url
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="speedometer", daemon=True)
        self._client = httpx.Client(trust_env=False, timeout=TIMEOUT_SECONDS)

    def __enter__(self) -> Self:
        self._look(time.monotonic())
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()
        self._client.close()

    def _watch(self) -> None:
        started_at = time.monotonic()
        while not self._is_over.wait(LOOK_SECONDS):
            self._look(started_at)
        self._look(started_at)

    def _look(self, started_at: float) -> None:
        self.looks.append((time.monotonic() - started_at, scrape(self._client, self._base_url)))


def _costs(before: Sample, after: Sample, looks: Sequence[tuple[float, Scrape]]) -> Costs:
    """As the samples say, at the speed that the machine had in between."""
    steps = {2 * images: (before.step[images] + after.step[images]) / 2 for images in before.step}
    costs = Costs(
        step_seconds=steps,
        max_images=MAX_IMAGES,
        prepare=_stage([before.prepare, after.prepare]),
        finish=_stage([before.finish, after.finish]),
        has_background=False,
        is_padded=False,
        pipe_seconds=PIPE_SECONDS,
    )
    slowness = []
    for (began_at, earlier), (_, later) in pairwise(looks):
        expected = _expected(earlier, later, costs)
        if expected > 0:
            slowness.append((began_at, use_between(earlier, later).stepping_seconds / expected))
    stages = use_between(looks[0][1], looks[-1][1]).stage_seconds
    edges = sum(stages.get(stage, 0.0) for stage in ("decode", "fit", "render"))
    return replace(costs, slowness=tuple(slowness), edge_seconds=edges / 2)


def _expected(earlier: Scrape, later: Scrape, costs: Costs) -> float:
    """What the steps between two looks would have taken at the samples' speed.

    Up to eight rows, each of the metric's buckets holds one number of rows.
    """
    rows = later.histogram("inpaint_batch_rows")
    if rows is None:
        return 0.0
    new = rows.since(earlier.histogram("inpaint_batch_rows"))
    return sum(count * costs.step(round(bound)) for bound, count in zip(new.bounds, new.counts, strict=True) if count)


def _stage(samples: Sequence[dict[int, float]]) -> StageCost:
    """A line through one image and the most."""
    first, last = (statistics.fmean(sample[images] for sample in samples) for images in (1, MAX_IMAGES))
    each = max(0.0, (last - first) / (MAX_IMAGES - 1))
    return StageCost(fixed_seconds=first - each, image_seconds=each)


def _told(what: str, measured: Round, predicted: Round) -> tuple[Figures, Figures]:
    pair = figures_of(measured), figures_of(predicted)
    rates, medians = [f"{one.per_second:.2f}/s" for one in pair], [f"{one.p50_seconds:.2f} s" for one in pair]
    print(
        f"{what}: measured {rates[0]}, p50 {medians[0]}; predicted {rates[1]}, p50 {medians[1]}",
        file=sys.stderr,
        flush=True,
    )
    return pair
