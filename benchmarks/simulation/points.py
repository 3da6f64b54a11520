"""The figures of one simulated fleet under one load."""

from dataclasses import dataclass

from benchmarks.figures import percentile
from benchmarks.simulation.costs import Costs
from benchmarks.simulation.fleet import PAINTED, Fleet, simulate
from benchmarks.simulation.traffic import poisson_traffic

STEPS = (10, 50)
MEAN_STEPS = sum(STEPS) / 2
LORAS = (0.5, 0.25, 0.125, 0.125)
"""Half of the requests use no LoRA, a quarter one, and two more share the rest."""

BOUND = 10.0
"""An answer counts within so many times what its request takes alone. A full batch takes 8.5 times as long per step,
what is beside the steps included: that is what a device at its capacity gives, and little waiting may come on top."""

NUM_LOSSES = 2.0


@dataclass(frozen=True, slots=True)
class Question:
    """What to simulate.

    Attributes:
        num_devices: How many.
        load: Requests sent, as a share of `Costs.images_per_second` of all devices.
        has_losses: Whether workers are lost.
        places_keys: Whether the dispatcher is told which requests can share steps.
    """

    num_devices: int
    load: float
    has_losses: bool = False
    places_keys: bool = True


@dataclass(frozen=True, slots=True)
class Point:
    """What came of it.

    Attributes:
        question: What was simulated.
        capacity_per_second: Images that all devices paint at most, with full batches of one key.
        seconds: Length of the window in which requests were sent.
        offered_per_second: Requests sent a second.
        outcomes: How many came to what.
        goodput_per_second: Pictures within the bound, a second of the window.
        good_share: Share of the requests sent that got one.
        p50_seconds: Of the pictures' latencies.
        p99_seconds: Of the same.
        rows_per_step: Mean of UNet rows that shared a step.
        switches_per_minute: Changes of weights, of each device.
        losses: Workers lost.
        run_again: Pictures of requests that a worker was lost with.
        router_milliseconds: Real CPU time of the service's router for a request.
    """

    question: Question
    capacity_per_second: float
    seconds: float
    offered_per_second: float
    outcomes: dict[str, int]
    goodput_per_second: float
    good_share: float
    p50_seconds: float
    p99_seconds: float
    rows_per_step: float
    switches_per_minute: float
    losses: int
    run_again: int
    router_milliseconds: float


@dataclass(frozen=True, slots=True)
class Setting:
    """What all questions have in common.

    Attributes:
        costs: Of each device.
        queue_size: Requests that may wait.
        mean_seconds_to_loss: Of each worker, where workers are lost.
        device_seconds: Length of a window times devices, and `min_seconds` at least; where workers are lost, it is
            so long that `NUM_LOSSES` are to be expected.
        min_seconds: See there.
        bound: Times what a request takes alone.
        seed: Of requests and losses.
    """

    costs: Costs
    queue_size: int = 64
    mean_seconds_to_loss: float = 600.0
    device_seconds: float = 300.0
    min_seconds: float = 10.0
    bound: float = BOUND
    seed: int = 1


def answer(question: Question, setting: Setting) -> Point:
    """Simulate it."""
    costs, num_devices = setting.costs, question.num_devices
    capacity = num_devices * costs.images_per_second(MEAN_STEPS)
    device_seconds = setting.device_seconds
    if question.has_losses:
        device_seconds = max(device_seconds, NUM_LOSSES * setting.mean_seconds_to_loss)
    seconds = max(setting.min_seconds, device_seconds / num_devices)
    traffic = poisson_traffic(question.load * capacity, seconds, STEPS, LORAS, setting.seed)
    fleet = Fleet(
        (costs,) * num_devices,
        queue_size=setting.queue_size,
        places_keys=question.places_keys,
        mean_seconds_to_loss=setting.mean_seconds_to_loss if question.has_losses else None,
    )
    simulated = simulate(fleet, traffic, setting.seed)
    latencies = [fate.seconds for fate in simulated.painted]
    num_good = sum(
        fate.seconds <= setting.bound * costs.alone_seconds(fate.wanted.num_steps) for fate in simulated.painted
    )
    return Point(
        question=question,
        capacity_per_second=capacity,
        seconds=seconds,
        offered_per_second=len(traffic) / seconds,
        outcomes={PAINTED: 0} | {str(outcome): count for outcome, count in simulated.outcomes.most_common()},
        goodput_per_second=num_good / seconds,
        good_share=num_good / len(traffic) if traffic else 0.0,
        p50_seconds=percentile(latencies, 50) if latencies else 0.0,
        p99_seconds=percentile(latencies, 99) if latencies else 0.0,
        rows_per_step=simulated.step_rows / simulated.steps if simulated.steps else 0.0,
        switches_per_minute=60 * simulated.switches / simulated.seconds / num_devices,
        losses=simulated.losses,
        run_again=sum(fate.num_losses > 0 for fate in simulated.painted),
        router_milliseconds=1000 * simulated.router_seconds / len(traffic),
    )
