"""The page on capacity: what was simulated, its tables, and what they mean for how many devices and processes."""

from collections.abc import Mapping, Sequence
from statistics import median

from benchmarks.simulation.costs import Costs
from benchmarks.simulation.points import LORAS, MEAN_STEPS, STEPS, Point, Setting
from benchmarks.tables import table

PLOT = "capacity.png"
HIGH_LOAD = 0.8


def page(points: Sequence[Point], setting: Setting, api_milliseconds: float, facts: Mapping[str, str]) -> str:
    """The whole page, Markdown."""
    return "\n\n".join(
        [
            "# Capacity of 1, 8 and 64 devices",
            _introduction(setting),
            "\n".join(f"- {name}: {value}" for name, value in facts.items()),
            "## Load, goodput, latency",
            f"![Goodput and latency against load]({PLOT})",
            load_table([point for point in points if point.question.places_keys and not point.question.has_losses]),
            "## With workers lost",
            _losses(setting),
            load_table([point for point in points if point.question.places_keys and point.question.has_losses]),
            "## LoRAs kept apart",
            "The same requests, once with a dispatcher that is not told which of them can share steps.",
            placement_table(points),
            "## Where the API process ends",
            api_section(points, setting.costs, api_milliseconds),
        ]
    )


def _introduction(setting: Setting) -> str:
    shares = ", ".join(f"{share / sum(LORAS):g}" for share in LORAS[1:])
    costs = setting.costs
    return (
        "Simulated, not measured: the service's own queue, router, dispatcher, batcher and worker loop run on a "
        "virtual clock, and only the devices are replaced by the times that one was measured to take. "
        f"Requests arrive at random (Poisson), {STEPS[0]} to {STEPS[1]} steps, guidance on, one image each; shares of "
        f"{shares} use three LoRAs, the rest none. One device of these paints at most "
        f"{costs.images_per_second(MEAN_STEPS):.2f} images/s of {MEAN_STEPS:g} steps; load is the share of that. "
        f"Good is an answer within {setting.bound:g} times what its request takes alone "
        f"({costs.alone_seconds(round(MEAN_STEPS)):.2f} s for {MEAN_STEPS:g} steps). The queue holds "
        f"{setting.queue_size} requests, as by default, however many devices there are."
    )


def _losses(setting: Setting) -> str:
    load_seconds, mean_seconds = setting.costs.load_seconds, setting.mean_seconds_to_loss
    return (
        f"Each worker is lost once in {mean_seconds / 60:g} minutes on average, and ready again {load_seconds:g} s "
        f"later: {load_seconds / (load_seconds + mean_seconds):.0%} of the devices are missing at any time. What a "
        "worker had is run again once, by the others. `not_ready` is there being no worker at all, which is a single "
        "device's lot."
    )


def load_table(points: Sequence[Point]) -> str:
    """A row for each number of devices and load."""
    header = ["devices", "load", "sent/s", "painted", "good", "good/s", "p50, s", "p99, s", "rows/step", "refused"]
    return table(header, [_load_row(point) for point in points], num_texts=0)


def _load_row(point: Point) -> list[str]:
    sent, painted = sum(point.outcomes.values()), point.outcomes["painted"]
    others = [f"{count} {outcome}" for outcome, count in point.outcomes.items() if outcome != "painted"]
    return [
        str(point.question.num_devices),
        f"{point.question.load:.1f}",
        f"{point.offered_per_second:.1f}",
        f"{painted / sent:.1%}",
        f"{point.good_share:.1%}",
        f"{point.goodput_per_second:.1f}",
        f"{point.p50_seconds:.2f}",
        f"{point.p99_seconds:.2f}",
        f"{point.rows_per_step:.1f}",
        ", ".join(others) or "none",
    ]


def placement_table(points: Sequence[Point]) -> str:
    """Pairs of points that differ in placement alone."""
    placed = {point.question: point for point in points if point.question.places_keys}
    rows = []
    for blind in (point for point in points if not point.question.places_keys):
        question = blind.question
        with_keys = next(
            point
            for other, point in placed.items()
            if (other.num_devices, other.load, other.has_losses)
            == (question.num_devices, question.load, question.has_losses)
        )
        pair = (blind, with_keys)
        rows.append(
            [
                str(question.num_devices),
                f"{question.load:.1f}",
                *(f"{point.switches_per_minute:.0f}" for point in pair),
                *(f"{point.p50_seconds:.2f}" for point in pair),
                *(f"{point.p99_seconds:.2f}" for point in pair),
                *(f"{point.good_share:.0%}" for point in pair),
            ]
        )
    header = ["devices", "load"] + [
        f"{figure}{placement}"
        for figure in ("switches/min and device", "p50, s", "p99, s", "good")
        for placement in (", blind", ", placed")
    ]
    return table(header, rows, num_texts=0)


def api_section(points: Sequence[Point], costs: Costs, api_milliseconds: float) -> str:
    """Requests a second at which one core of the API process is used up, and how many devices that is."""
    per_device = costs.images_per_second(MEAN_STEPS)
    router = {
        num_devices: median(point.router_milliseconds for point in points if point.question.num_devices == num_devices)
        for num_devices in dict.fromkeys(point.question.num_devices for point in points)
    }
    rows = []
    for num_devices, router_milliseconds in router.items():
        num_cores = num_devices * per_device * (api_milliseconds + router_milliseconds) / 1000
        rows.append(
            [
                str(num_devices),
                f"{num_devices * per_device:.0f}",
                f"{router_milliseconds:.1f}",
                f"{num_cores:.1f}",
            ]
        )
    limit = 1000 / api_milliseconds
    measured = (
        "The simulation leaves the API process as much CPU as it likes. A real one has Python's lock: pictures are "
        "decoded and encoded in threads, most of the time without it, and everything else is one core's. "
        f"`python -m benchmarks.gpu` measured {api_milliseconds:.0f} ms of CPU for a request of 512x512 and 20 steps "
        "beside one device kept busy; what the router takes beside so many of them, the reports of all steps included, "
        "was measured here, and is counted on top."
    )
    beyond = (
        f"Counted as one core, one API process ends at about {limit:.0f} requests/s, which is "
        f"{limit / per_device:.0f} of these devices. Threads stretch that somewhat, but plan without. Beyond, run "
        "several instances, each with its own devices (`INPAINT_DEVICES`, or `CUDA_VISIBLE_DEVICES`), behind a "
        "load balancer: Kubernetes with a pod for every few GPUs and `/readyz` as its probe, Ray Serve, or an "
        "HTTP proxy that sends to the instance with the fewest open requests and tries another one after a 429 "
        "or 503. Instances share nothing; only answers that are kept for an `Idempotency-Key` are an instance's own."
    )
    split = (
        "Poisson arrivals that are split at random are Poisson again, so eight instances of eight devices behave "
        "like the rows of 8 devices, not like those of 64. Requests of a rare LoRA are best sent to one and the same."
    )
    cores = table(["devices", "requests/s", "router, ms/request", "cores of the API process"], rows, num_texts=0)
    return f"{measured}\n\n{cores}\n\n{beyond}\n\n{split}"
