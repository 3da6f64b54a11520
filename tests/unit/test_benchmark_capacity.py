"""The simulation of several devices: its clock, its arithmetic, and that nothing gets lost in it."""

import json
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks.capacity import questions, read_steps
from benchmarks.figures import steady_rates
from benchmarks.measurement import MAX_CLOSED_JOBS
from benchmarks.simulation.costs import Costs, StageCost
from benchmarks.simulation.fleet import PAINTED, Fleet, Simulated, simulate, simulate_closed
from benchmarks.simulation.page import page
from benchmarks.simulation.points import Question, Setting, answer
from benchmarks.simulation.traffic import Wanted, poisson_traffic
from benchmarks.simulation.validation import (
    Comparison,
    Figures,
    against_results,
    as_round,
    device_time_from,
    figures_of,
    markdown,
    median_of,
)
from benchmarks.simulation.virtual_time import VirtualTime
from benchmarks.traffic import Mix, draw_jobs
from service.errors import ErrorCode
from service.worker.loop import GATHER_SECONDS

FREE = StageCost(0.0, 0.0)
PLAIN = Costs({2: 0.1, 4: 0.15, 6: 0.2, 8: 0.25}, 4, FREE, FREE, has_background=False, edge_seconds=0, pipe_seconds=0)
"""Nothing takes time but steps."""

STAGED = replace(
    PLAIN, prepare=StageCost(0.01, 0.01), finish=StageCost(0.02, 0.01), edge_seconds=0.005, pipe_seconds=0.001
)

GPU = Costs(
    step_seconds={2: 0.006, 4: 0.009, 6: 0.0126, 8: 0.016, 12: 0.0228, 16: 0.0303, 20: 0.038, 24: 0.0453, 32: 0.061},
    max_images=6,
    prepare=StageCost(fixed_seconds=0.024, image_seconds=0.004, device_seconds=0.006),
    finish=StageCost(fixed_seconds=0.017, image_seconds=0.008, device_seconds=0.012),
    switch_seconds=0.0011,
    edge_seconds=0.0075,
)
"""About what was measured of one; it stays when others are."""

ROOMY = replace(GPU, max_images=16)
"""As many images share its steps as there are graphs for: batches of several keys have room beside one another."""


def last_answer(simulated: Simulated) -> float:
    """When all was over."""
    return max(fate.wanted.due_seconds + fate.seconds for fate in simulated.fates)


# --- the clock ---------------------------------------------------------------------------


def test_events_happen_in_order_at_their_moments() -> None:
    """What is due earlier happens earlier, what is due at once in the order in which it was planned."""
    clock, seen = VirtualTime(), []
    for delay, name in ((2.0, "c"), (1.0, "a"), (1.0, "b")):
        clock.plan(delay, lambda name=name: seen.append((name, clock.now)))
    clock.run(lambda: False)
    assert seen == [("a", 1.0), ("b", 1.0), ("c", 2.0)]


def test_what_takes_time_keeps_nobody_waiting() -> None:
    """Two devices that compute at the same time take as long as one, and what they plan comes after it."""
    clock, seen = VirtualTime(), []

    def compute(name: str) -> None:
        clock.pass_by(5.0)
        clock.plan(1.0, lambda: seen.append((name, clock.now)))

    clock.plan(1.0, lambda: compute("a"))
    clock.plan(2.0, lambda: compute("b"))
    clock.run(lambda: False)
    assert seen == [("a", 7.0), ("b", 8.0)]


def test_the_real_clock_comes_back() -> None:
    """The service's clock is replaced within a simulation alone."""
    clock, real = VirtualTime(), time.monotonic
    with clock.in_place_of_the_real_one():
        clock.pass_by(7.0)
        assert time.monotonic() == 7.0
    assert time.monotonic is real


# --- costs -------------------------------------------------------------------------------


def test_step_times_between_what_was_measured() -> None:
    """Captured batches are filled up to the next number of rows, others lie on a line; beyond, in proportion."""
    assert GPU.step(10) == GPU.step_seconds[12]
    assert replace(PLAIN, is_padded=False).step(5) == pytest.approx(0.175)
    assert PLAIN.step(1) == 0.1
    assert PLAIN.step(16) == pytest.approx(0.5)


def test_capacity_is_a_full_batch_with_its_stages() -> None:
    """Images a second are those of a batch over its steps and what preparing and finishing take of the device."""
    assert PLAIN.images_per_second(10) == pytest.approx(4 / (10 * 0.25))
    assert STAGED.images_per_second(10) == pytest.approx(4 / (10 * 0.25 + 4 * (0.02 + 0.03)))
    assert GPU.images_per_second(20) == pytest.approx(6 / (20 * 0.0228 + 6 * 0.018))


def test_slowness_by_moment() -> None:
    """A device that is slow for a while takes as many times as long from that moment on."""
    costs = replace(PLAIN, slowness=((1.0, 2.0), (3.0, 1.0)))
    assert [costs.slowness_at(moment) for moment in (0.0, 1.0, 2.9, 3.0, 9.0)] == [2.0, 2.0, 2.0, 1.0, 1.0]
    slow = simulate(Fleet((replace(PLAIN, slowness=((0.0, 3.0),)),)), [Wanted(0.0, 5)])
    assert slow.fates[0].seconds == pytest.approx(GATHER_SECONDS + 3 * 5 * 0.1)


# --- closed forms ------------------------------------------------------------------------


@pytest.mark.parametrize("num_requests", [1, 2, 3, 4])
def test_one_batch_takes_its_steps(num_requests: int) -> None:
    """Equal requests that come at once share every step: all end after the steps of so many rows, to the digit."""
    simulated = simulate(Fleet((PLAIN,)), [Wanted(0.0, 10)] * num_requests)
    expected = GATHER_SECONDS + 10 * PLAIN.step(2 * num_requests)
    assert [fate.seconds for fate in simulated.fates] == [pytest.approx(expected)] * num_requests
    assert (simulated.steps, simulated.step_rows) == (10, 10 * 2 * num_requests)


def test_a_short_request_leaves_the_batch() -> None:
    """The batch is smaller, and faster, once a shorter request is done; what comes meanwhile joins it."""
    simulated = simulate(Fleet((PLAIN,)), [Wanted(0.0, 4), Wanted(0.0, 10)])
    short, long = (fate.seconds for fate in simulated.fates)
    assert short == pytest.approx(GATHER_SECONDS + 4 * 0.15)
    assert long == pytest.approx(short + 6 * 0.1)
    joining = simulate(Fleet((PLAIN,)), [Wanted(0.0, 10), Wanted(0.25, 2)])
    # It comes in the third step, and shares the fourth and the fifth.
    assert last_answer(joining) == pytest.approx(GATHER_SECONDS + 8 * 0.1 + 2 * 0.15)
    assert joining.fates[1].seconds == pytest.approx(GATHER_SECONDS + 3 * 0.1 + 2 * 0.15 - 0.25)


def test_keys_take_turns() -> None:
    """Two LoRAs on one device make a step each in turn, and change the weights each time."""
    costs = replace(PLAIN, switch_seconds=0.01)
    simulated = simulate(Fleet((costs,)), [Wanted(0.0, 5, lora=1), Wanted(0.0, 5, lora=2)])
    assert last_answer(simulated) == pytest.approx(GATHER_SECONDS + 10 * (0.1 + 0.01))
    assert simulated.switches == simulated.steps == 10


def test_alone_with_every_stage() -> None:
    """A request that has a device for itself takes what `alone_seconds` says, in the background or not."""
    for costs in (STAGED, GPU):
        simulated = simulate(Fleet((costs,)), [Wanted(0.0, 10)])
        expected = costs.alone_seconds(10) + GATHER_SECONDS + costs.prepare.device_seconds
        assert simulated.fates[0].seconds == pytest.approx(expected)


def test_one_at_a_time_waits_as_queueing_theory_says() -> None:
    """With one image at a time, everybody waits as in a line before one server; on average, as in an M/D/1 queue."""
    service_seconds, load = 1.0, 0.6
    costs = replace(PLAIN, step_seconds={2: service_seconds / 2}, max_images=1)
    traffic = poisson_traffic(load / service_seconds, 4000.0, (2, 2), (1.0,), seed=3)
    simulated = simulate(Fleet((costs,), queue_size=1000), traffic)
    waits = [fate.seconds - service_seconds for fate in simulated.fates]
    expected = [0.0]
    for earlier, later in pairwise(traffic):
        expected.append(max(0.0, expected[-1] + service_seconds - (later.due_seconds - earlier.due_seconds)))
    assert waits == pytest.approx(expected, abs=10 * GATHER_SECONDS)
    assert sum(waits) / len(waits) == pytest.approx(load * service_seconds / (2 * (1 - load)), rel=0.2)


def test_saturated_devices_reach_their_capacity() -> None:
    """Clients that keep a device busy get what `images_per_second` says, but for the batch that is not always full."""
    one = as_round(simulate_closed(Fleet((GPU,)), [20] * 400, 24, 100.0), 100.0)
    assert steady_rates(replace(one, sending_seconds=one.seconds - 3))[0] == pytest.approx(
        GPU.images_per_second(20), rel=0.1
    )


# --- nothing gets lost -------------------------------------------------------------------


def test_every_request_has_one_fate() -> None:
    """Overloaded, and with workers that die all the time: each request is painted, refused or lost, once."""
    costs = replace(GPU, load_seconds=2.0)
    traffic = poisson_traffic(3 * 1.3 * costs.images_per_second(30), 20.0, (10, 50), (0.5, 0.5), seed=2)
    simulated = simulate(Fleet((costs,) * 3, mean_seconds_to_loss=4.0), traffic, seed=2)
    assert [fate.wanted for fate in simulated.fates] == list(traffic)
    outcomes = simulated.outcomes
    assert sum(outcomes.values()) == len(traffic)
    assert set(outcomes) <= {PAINTED, ErrorCode.OVERLOADED, ErrorCode.NOT_READY, ErrorCode.WORKER_LOST}
    assert simulated.losses > 3
    assert outcomes[ErrorCode.WORKER_LOST] > 0
    by_losses = Counter((fate.outcome == ErrorCode.WORKER_LOST, fate.num_losses) for fate in simulated.fates)
    assert set(by_losses) == {(False, 0), (False, 1), (True, 2)}


def test_a_lost_worker_costs_its_share_only() -> None:
    """While one of two devices is away the other one paints everything, more slowly, and nothing is refused."""
    costs = replace(GPU, load_seconds=5.0)
    traffic = poisson_traffic(0.3 * 2 * costs.images_per_second(30), 60.0, (10, 50), (1.0,), seed=1)
    calm = simulate(Fleet((costs,) * 2), traffic)
    stormy = simulate(Fleet((costs,) * 2, mean_seconds_to_loss=40.0), traffic, seed=3)
    assert stormy.losses > 0
    assert calm.outcomes == stormy.outcomes == {PAINTED: len(traffic)}
    assert sum(fate.num_losses > 0 for fate in stormy.fates) > 0
    assert sum(fate.seconds for fate in stormy.fates) > sum(fate.seconds for fate in calm.fates)


def test_a_seed_gives_the_same_again() -> None:
    """Two runs of a seed are the same to the last figure; another seed gives other losses."""
    traffic = poisson_traffic(10.0, 10.0, (10, 50), (0.5, 0.5), seed=4)
    fleet = Fleet((replace(GPU, load_seconds=1.0),) * 2, mean_seconds_to_loss=5.0)
    runs = [replace(simulate(fleet, traffic, seed), router_seconds=0.0) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


# --- placement, with the real queue and router ---------------------------------------------


@pytest.mark.parametrize("load", [0.6, 0.9])
def test_two_populations_keep_to_their_workers(load: float) -> None:
    """Of two LoRAs on two devices each keeps to one: switches become rare, and latency sinks."""
    traffic = poisson_traffic(load * 2 * ROOMY.images_per_second(30), 40.0, (10, 50), (0.0, 0.5, 0.5), seed=1)
    placed, blind = (simulate(Fleet((ROOMY,) * 2, places_keys=places), traffic) for places in (True, False))
    assert len(placed.painted) == len(blind.painted) == len(traffic)
    assert placed.switches < 0.65 * blind.switches
    assert sum(fate.seconds for fate in placed.fates) < sum(fate.seconds for fate in blind.fates)


def test_a_full_queue_is_served_by_key_without_empty_places() -> None:
    """Devices that are kept full switch weights seldom, and paint more for it."""
    traffic = poisson_traffic(1.3 * 4 * ROOMY.images_per_second(30), 12.0, (10, 50), (0.5, 0.25, 0.25), seed=1)
    placed, blind = (simulate(Fleet((ROOMY,) * 4, places_keys=places), traffic) for places in (True, False))
    assert placed.switches < 0.8 * blind.switches
    assert len(placed.painted) > len(blind.painted)


@pytest.mark.parametrize(("num_devices", "loras"), [(3, (1.0,)), (1, (0.5, 0.5))])
def test_where_there_is_no_choice_nothing_changes(num_devices: int, loras: tuple[float, ...]) -> None:
    """Requests of one kind are placed, and one device serves, as if keys were not looked at."""
    rate = 0.9 * num_devices * GPU.images_per_second(30)
    traffic = poisson_traffic(rate, 20.0, (10, 50), loras, seed=1)
    placed, blind = (simulate(Fleet((GPU,) * num_devices, places_keys=places), traffic) for places in (True, False))
    assert placed.fates == blind.fates


def test_a_slow_device_gets_less() -> None:
    """Of two devices one of which is three times as slow, that one makes far fewer steps, and nobody waits for it."""
    slow = replace(GPU, step_seconds={rows: 3 * seconds for rows, seconds in GPU.step_seconds.items()})
    traffic = poisson_traffic(0.7 * 4 / 3 * GPU.images_per_second(30), 40.0, (10, 50), (1.0,), seed=1)
    mixed, fast_alone = simulate(Fleet((slow, GPU)), traffic), simulate(Fleet((GPU,)), traffic)
    assert len(mixed.painted) == len(traffic)
    assert sum(fate.seconds for fate in mixed.fates) < sum(fate.seconds for fate in fast_alone.fates)


# --- the command ---------------------------------------------------------------------------


def test_the_page_has_every_question() -> None:
    """Loads, losses and placement of each number of devices are asked for, and answered in the page's tables."""
    asked = questions((1, 2), (0.5,))
    assert asked == [
        Question(1, 0.5),
        Question(2, 0.5),
        Question(1, 0.5, has_losses=True),
        Question(2, 0.5, has_losses=True),
        Question(1, 0.5, places_keys=False),
        Question(2, 0.5, places_keys=False),
    ]
    setting = Setting(GPU, mean_seconds_to_loss=5.0, device_seconds=10.0, min_seconds=5.0)
    points = [answer(question, setting) for question in asked]
    assert all(sum(point.outcomes.values()) == round(point.offered_per_second * point.seconds) for point in points)
    text = page(points, setting, 20.0, {"command": "x"})
    assert "| 2 | 0.5 |" in text
    assert "about 50 requests/s" in text


def test_step_times_of_a_file(tmp_path: Path) -> None:
    """Plain step times and results of `benchmarks.gpu` are taken; what is neither is refused."""
    plain, results, wrong = (tmp_path / name for name in ("plain.json", "results.json", "wrong.json"))
    plain.write_text('{"4": 0.2, "2": 0.1}', encoding="utf-8")
    results.write_text(
        json.dumps({"served": {"workers": [{"step_seconds": {"2": 0.1, "4": 0.2}}]}, "pieces": []}), encoding="utf-8"
    )
    wrong.write_text('{"2": 0}', encoding="utf-8")
    assert read_steps(plain) == read_steps(results) == {2: 0.1, 4: 0.2}
    with pytest.raises(ValueError, match="not positive"):
        read_steps(wrong)


def results_of(costs: Costs, *, factor: float = 1.0) -> dict[str, Any]:
    """Results of `benchmarks.gpu`, made up of what the simulation gives, times a factor."""
    steps = [job.num_steps for job in draw_jobs(MAX_CLOSED_JOBS, Mix((10, 30), {64: 1.0}), 1)]
    one = as_round(simulate_closed(Fleet((costs,)), steps, 8, 4.0), 4.0)
    figures = figures_of(one, steady_rates(one)[0])
    return {
        "served": {
            "native_size": 64,
            "workers": [{"step_seconds": {str(k): v for k, v in costs.step_seconds.items()}, "max_images": 4}],
        },
        "pieces": [
            {
                "server": server,
                "kind": "saturated",
                "title": "8 clients",
                "steps": [10, 30],
                "seconds": 4.0,
                "clients": 8,
                "max_jobs": 0,
                "figures": {
                    "latency": {"p50_seconds": factor * figures.p50_seconds, "p95_seconds": figures.p95_seconds}
                },
                "steady_requests_per_second": figures.per_second,
                "service": None,
            }
            for server in ("service", "stock")
        ],
    }


def test_validation_against_results() -> None:
    """Of this service's pieces what the simulation gives itself agrees exactly, and what is far from it does not."""
    (same,) = against_results(results_of(PLAIN), PLAIN, seed=1)
    assert same.agrees
    assert same.error("p50_seconds") == pytest.approx(0.0)
    (far,) = against_results(results_of(PLAIN, factor=1.3), PLAIN, seed=1)
    assert not far.agrees
    assert "1 of 1 loads are off" in markdown([far])


def saturated(costs: Costs) -> dict[str, Any]:
    """A piece of results as a simulated device gives it."""
    steps = [job.num_steps for job in draw_jobs(MAX_CLOSED_JOBS, Mix((20, 20), {64: 1.0}), 1)]
    one = as_round(simulate_closed(Fleet((costs,)), steps, 32, 10.0), 10.0)
    figures = {"latency": {"p50_seconds": 1.0, "p95_seconds": 1.0}}
    return {
        "kind": "saturated",
        "title": "32 clients",
        "steps": [20, 20],
        "seconds": 10.0,
        "clients": 32,
        "max_jobs": None,
        "steady_requests_per_second": steady_rates(one)[0],
        "figures": figures,
    }


def test_device_time_follows_from_a_saturated_load() -> None:
    """What a simulated device was told to take beside its steps is found again in the throughput of the last one."""
    piece = saturated(GPU)
    other = replace(GPU, prepare=replace(GPU.prepare, device_seconds=0.0))
    found = device_time_from([{**piece, "steady_requests_per_second": 1.0}, piece], other, 64, 1)
    assert found.prepare.device_seconds == 0.0
    assert found.finish.device_seconds == pytest.approx(
        GPU.prepare.device_seconds + GPU.finish.device_seconds, rel=0.02
    )
    none = replace(other, finish=replace(other.finish, device_seconds=0.0))
    halves = device_time_from([piece], none, 64, 1)
    assert halves.prepare.device_seconds == halves.finish.device_seconds > 0
    impossible = device_time_from([{**piece, "steady_requests_per_second": 1000.0}], other, 64, 1)
    assert impossible.finish.device_seconds == 0.0
    assert device_time_from([], other, 64, 1) is other


def test_comparison_of_medians() -> None:
    """Medians are taken of each figure; throughput and p50 have to be within 15 %, p95 need not."""
    measured = median_of([Figures(1.0, 3.0, 9.0), Figures(2.0, 1.0, 9.0), Figures(3.0, 2.0, 9.0)])
    assert measured == Figures(2.0, 2.0, 9.0)
    assert Comparison("x", measured, Figures(2.2, 1.8, 1.0)).agrees
    assert not Comparison("x", measured, Figures(2.4, 2.0, 9.0)).agrees
    assert not Comparison("x", measured, Figures(2.0, 1.6, 9.0)).agrees
