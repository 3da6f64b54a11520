"""The benchmark's arithmetic and its load generator, against answers that are made up."""

import asyncio
import io
import itertools
import json
import statistics
from collections.abc import Awaitable, Callable

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from benchmarks import switches
from benchmarks.arrivals import poisson_arrivals
from benchmarks.figures import median_ratio, percentile
from benchmarks.load import GOOD, Answer, Round, closed_loop, judge, open_loop
from benchmarks.report import Comparison, NoGoodAnswerError, document, figures_of, markdown
from benchmarks.switches import VARIANTS, Costs, outcome_of
from benchmarks.traffic import SCHEDULERS, Job, Mix, num_model_calls
from benchmarks.traffic import draw_jobs as draw_jobs_of
from service.settings import Settings

SIZE = 32
MIN_STEPS, MAX_STEPS = 6, 14
NUMBERS = st.lists(st.floats(min_value=-1e6, max_value=1e6), min_size=1, max_size=50)


def draw_jobs(count: int, size: int, seed: int) -> tuple[Job, ...]:
    """Requests of 6 to 14 steps and one size."""
    return draw_jobs_of(count, Mix((MIN_STEPS, MAX_STEPS), {size: 1.0}), seed)


# --- arithmetic --------------------------------------------------------------------


def test_percentile_interpolates_between_ranks() -> None:
    """Percentiles follow NumPy's default definition, so that others can recompute them."""
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([0.0, 10.0], 95) == pytest.approx(9.5)
    assert percentile([7.0], 95) == 7.0


@given(NUMBERS)
def test_percentile_ends_are_the_extremes(values: list[float]) -> None:
    """Percentile 0 is the least value, 100 the greatest, 50 the median, whatever the order."""
    assert percentile(values, 0) == min(values)
    assert percentile(values, 100) == max(values)
    assert percentile(values, 50) == pytest.approx(statistics.median(values))


@given(NUMBERS, st.floats(0, 100), st.floats(0, 100))
def test_percentile_never_falls(values: list[float], one: float, other: float) -> None:
    """A higher percentile is never a lower number."""
    low, high = sorted((one, other))
    # Interpolation may lose the last bit of numbers of this size.
    assert percentile(values, low) <= percentile(values, high) + 1e-6


@pytest.mark.parametrize(("values", "percent"), [([], 50), ([1.0], -1), ([1.0], 101)])
def test_percentile_refuses_nonsense(values: list[float], percent: float) -> None:
    """A percentile of nothing, or outside 0 to 100, is an error and not a number."""
    with pytest.raises(ValueError, match="percent"):
        percentile(values, percent)


def test_median_ratio_pairs_rounds() -> None:
    """Ratios are taken within a round and only then summarised: noise that meets both sides cancels."""
    assert median_ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]) == 2.0
    assert median_ratio([1.0, 9.0, 30.0], [1.0, 3.0, 3.0]) == 3.0


@pytest.mark.parametrize(("tops", "bottoms"), [([], []), ([1.0], [1.0, 2.0]), ([1.0], [0.0])])
def test_median_ratio_refuses_unpaired_rounds(tops: list[float], bottoms: list[float]) -> None:
    """Sides of unequal length, empty sides and a rate of zero give no ratio."""
    with pytest.raises(ValueError, match="ratios need"):
        median_ratio(tops, bottoms)


@given(st.floats(0.1, 50), st.floats(0.1, 60), st.integers(0, 1000))
def test_poisson_arrivals_ascend_within_the_window(per_second: float, seconds: float, seed: int) -> None:
    """Arrivals ascend, lie within the window, and the same seed gives them again."""
    arrivals = poisson_arrivals(per_second, seconds, seed)
    assert list(arrivals) == sorted(arrivals)
    assert all(0 <= arrival < seconds for arrival in arrivals)
    assert arrivals == poisson_arrivals(per_second, seconds, seed)


def test_poisson_arrivals_have_rate_and_spread_of_a_poisson_process() -> None:
    """Gaps have mean 1/rate and, being exponential, a standard deviation as large as their mean."""
    arrivals = poisson_arrivals(4.0, 5000.0, seed=3)
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.05)


@pytest.mark.parametrize(("per_second", "seconds"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0)])
def test_poisson_arrivals_refuse_nonsense(per_second: float, seconds: float) -> None:
    """A rate or window that is not positive is an error, not an endless loop."""
    with pytest.raises(ValueError, match="positive"):
        poisson_arrivals(per_second, seconds, seed=0)


# --- requests ----------------------------------------------------------------------


def test_jobs_are_the_same_for_every_server() -> None:
    """The same seed gives the same requests down to the picture's bytes, another seed others."""
    assert draw_jobs(5, SIZE, seed=1) == draw_jobs(5, SIZE, seed=1)
    assert draw_jobs(5, SIZE, seed=1) != draw_jobs(5, SIZE, seed=2)


def test_jobs_mix_steps_evenly() -> None:
    """Nine requests in a row hold each number of steps once, so that rounds weigh the same."""
    jobs = draw_jobs(18, SIZE, seed=5)
    every = list(range(MIN_STEPS, MAX_STEPS + 1))
    assert sorted(job.num_steps for job in jobs[:9]) == every
    assert sorted(job.num_steps for job in jobs[9:]) == every
    assert num_model_calls(jobs) == 2 * sum(every)


def test_jobs_are_valid_requests() -> None:
    """Fields say what the job counts, pictures have the size named, masks keep and repaint something."""
    for job in draw_jobs(9, SIZE, seed=7):
        assert job.fields["num_inference_steps"] == str(job.num_steps)
        assert job.fields["height"] == job.fields["width"] == str(SIZE)
        assert job.fields["scheduler"] in SCHEDULERS
        assert judge(200, job.image, job) == (GOOD, None)
        with Image.open(io.BytesIO(job.mask)) as mask:
            assert mask.size == (SIZE, SIZE)
            assert mask.getextrema() == (0, 255)


# --- load --------------------------------------------------------------------------


def png(size: int) -> bytes:
    """A picture that a server could have painted."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size)).save(buffer, format="PNG")
    return buffer.getvalue()


def run_with(
    handler: Callable[[httpx.Request], Awaitable[httpx.Response]],
    load: Callable[[httpx.AsyncClient], Awaitable[Round]],
) -> Round:
    """A load against a server that is a function."""

    async def run() -> Round:
        async with httpx.AsyncClient(transport=httpx.MockTransport(handler)) as client:
            return await load(client)

    return asyncio.run(run())


async def good(_: httpx.Request) -> httpx.Response:
    """A server that answers everything well."""
    return httpx.Response(200, content=png(SIZE))


@pytest.mark.parametrize(
    ("status", "body", "outcome", "fault"),
    [
        (200, png(SIZE), "good", None),
        (429, b"busy", "status 429", "status 429: busy"),
        (200, png(SIZE + 8), "wrong picture", "a picture of"),
        (200, b"<html>", "wrong picture", "no PNG"),
        (200, png(SIZE)[:-20], "wrong picture", "no PNG"),
    ],
)
def test_only_a_whole_png_of_the_right_size_counts(status: int, body: bytes, outcome: str, fault: str | None) -> None:
    """Errors, other formats, other sizes and truncated files are faults, however fast they came."""
    found, why = judge(status, body, draw_jobs(1, SIZE, seed=1)[0])
    assert found == outcome
    assert (why is None) == (fault is None)
    assert fault is None or (why is not None and why.startswith(fault))


def test_closed_loop_keeps_its_concurrency() -> None:
    """Exactly as many requests as clients are on their way, and every request is sent once."""
    on_their_way = 0
    most = 0
    seeds = []

    async def handler(request: httpx.Request) -> httpx.Response:
        nonlocal on_their_way, most
        seeds.append(request.content.split(b'name="seed"\r\n\r\n')[1].split(b"\r\n")[0].decode())
        on_their_way += 1
        most = max(most, on_their_way)
        for _ in range(5):  # Let the other clients send theirs.
            await asyncio.sleep(0)
        on_their_way -= 1
        return await good(request)

    jobs = draw_jobs(9, SIZE, seed=1)
    one = run_with(handler, lambda client: closed_loop(client, "http://server/", jobs, 3, max_seconds=60))
    assert most == 3
    assert sorted(seeds) == sorted(job.fields["seed"] for job in jobs)
    assert [answer.fault for answer in one.answers] == [None] * 9
    assert one.model_calls_per_second * one.seconds == pytest.approx(num_model_calls(jobs))
    assert not one.is_cut_short


def test_closed_loop_is_bounded_in_time() -> None:
    """After its time nothing more is sent, and the round says so."""
    jobs = draw_jobs(3, SIZE, seed=1)
    one = run_with(good, lambda client: closed_loop(client, "http://server/", jobs, 2, max_seconds=0))
    assert one.answers == ()
    assert one.is_cut_short


def test_open_loop_counts_latency_from_the_intended_moment() -> None:
    """A request sent late carries its lateness: a stalled sender cannot hide a queue."""
    jobs = draw_jobs(2, SIZE, seed=1)
    one = run_with(good, lambda client: open_loop(client, "http://server/", jobs, (-7.0, -3.0)))
    latencies = sorted(answer.latency_seconds for answer in one.answers)
    assert latencies[0] >= 3.0
    assert latencies[1] >= 7.0


def test_open_loop_does_not_wait_for_answers() -> None:
    """Every request goes out at its moment even when no answer has come."""
    jobs = draw_jobs(4, SIZE, seed=1)
    arrived: list[httpx.Request] = []
    everyone_is_there = asyncio.Event()

    async def handler(request: httpx.Request) -> httpx.Response:
        arrived.append(request)
        if len(arrived) == len(jobs):
            everyone_is_there.set()
        await everyone_is_there.wait()
        return await good(request)

    one = run_with(handler, lambda client: open_loop(client, "http://server/", jobs, (0.0,) * 4))
    assert [answer.fault for answer in one.answers] == [None] * 4


def test_a_lost_connection_is_a_fault() -> None:
    """A server that goes away costs a fault per request, not the measurement."""

    async def gone(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    jobs = draw_jobs(2, SIZE, seed=1)
    one = run_with(gone, lambda client: closed_loop(client, "http://server/", jobs, 1, max_seconds=60))
    assert [answer.fault for answer in one.answers] == ["ConnectError: refused"] * 2


# --- report ------------------------------------------------------------------------


def a_round(latency: float, seconds: float, fault: str | None = None) -> Round:
    """Two requests of twenty model calls; the second is the one with the fault."""
    first = Answer(0.0, 0.0, latency, 20, GOOD, None)
    second = Answer(0.0, 0.0, latency * 2, 20, GOOD if fault is None else "status 500", fault)
    return Round((first, second), seconds, seconds, is_cut_short=False)


def test_figures_leave_out_what_was_not_answered_well() -> None:
    """A fault adds neither to the throughput nor to the latencies, and is listed."""
    figures = figures_of([a_round(1.0, 4.0, fault="status 500")])
    assert figures.requests == 2
    assert figures.requests_per_second == 0.25
    assert figures.p95_seconds == 1.0
    assert figures.faults == ("status 500",)


def test_figures_need_a_good_answer() -> None:
    """A server that answered nothing well has no figures; the error names the first fault."""
    dead = Round((Answer(0.0, 0.0, 0.1, 10, "status 503", "status 503"),), 1.0, 1.0, is_cut_short=False)
    with pytest.raises(NoGoodAnswerError, match="status 503"):
        figures_of([dead])


def test_report_states_medians_ratios_and_counts() -> None:
    """The table holds the medians of both sides and the median of the paired ratios."""
    comparison = Comparison(
        "closed loop",
        service=(a_round(1.0, 1.0), a_round(1.0, 2.0), a_round(1.0, 4.0)),
        peer=(a_round(2.0, 4.0), a_round(2.0, 4.0), a_round(2.0, 4.0)),
        is_open=False,
    )
    table = markdown([comparison], {"model": "demo"})
    assert "| closed loop | requests/s | 1.00 | 0.50 | 2.00 |" in table
    assert "| closed loop | model calls/s | 20.00 | 10.00 | 2.00 |" in table
    assert "| closed loop | latency p50, s | 1.50 | 3.00 | 0.50 |" in table
    assert "| closed loop | requests (rounds), not answered well | 6 (3), 0 | 6 (3), 0 | |" in table
    assert "- model: demo" in table


def test_report_of_an_open_loop_leaves_out_the_throughput() -> None:
    """Given arrivals fix the throughput, so only latencies are compared."""
    rounds = (a_round(1.0, 1.0),)
    table = markdown([Comparison("open loop", rounds, rounds, is_open=True)], {})
    assert "requests/s" not in table
    assert "latency p95" in table


def test_document_holds_every_answer() -> None:
    """The JSON keeps each single latency, so that others can compute what the table left out."""
    rounds = (a_round(1.0, 1.0, fault="status 500"),)
    text = json.dumps(document([Comparison("load", rounds, rounds, is_open=False)], {"model": "demo"}))
    kept = json.loads(text)["comparisons"][0]["service"]["rounds"][0]["answers"]
    assert [(answer["latency_seconds"], answer["fault"]) for answer in kept] == [(1.0, None), (2.0, "status 500")]


# --- switches ------------------------------------------------------------------------


def test_switches_are_compared_with_the_default() -> None:
    """Seconds are shown in milliseconds, each figure with its ratio to the first line's."""
    table = switches.markdown({"default": Costs(0.2, 1.0, 400.0, 800.0), "tiled": Costs(0.3, 0.5, 100.0, 1200.0)}, {})
    assert "| default | 200.0 (1.00) | 1000.0 (1.00) | 400 (1.00) | 800 (1.00) |" in table
    assert "| tiled | 300.0 (1.50) | 500.0 (0.50) | 100 (0.25) | 1200 (1.50) |" in table


def test_refused_switches_say_why() -> None:
    """What the service would not start with has its reason in the place of figures, and no others suffer."""
    costs = Costs(0.2, 1.0, 400.0, 800.0)
    table = switches.markdown({"default": costs, "cudnn": "not here", "math": costs}, {"device": "cpu"})
    assert "| cudnn | not here | | | |" in table
    assert "| math | 200.0 (1.00) |" in table
    assert "- device: cpu" in table
    without_base = switches.markdown({"default": "not here", "math": costs}, {})
    assert "| math | 200.0 | 1000.0 | 400 | 800 |" in without_base


def test_figures_of_switches_survive_json() -> None:
    """What a variant's process prints is what its starter reads."""
    outcomes = {"default": Costs(0.2, 1.0, 400.0, 800.0), "cudnn": "not here"}
    kept = json.loads(json.dumps(switches.document(outcomes, {"model": "demo"})))
    assert {name: outcome_of(one) for name, one in kept["variants"].items()} == outcomes
    assert kept["facts"] == {"model": "demo"}


def test_the_default_comes_first_and_changes_nothing() -> None:
    """The first variant is what the others are compared with; each other one sets something that can be set."""
    assert next(iter(VARIANTS.items())) == ("default", {})
    assert all(Settings(**changes) != Settings() for name, changes in VARIANTS.items() if name != "default")
