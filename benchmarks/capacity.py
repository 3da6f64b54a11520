"""How much 1, 8 or 64 devices can do: the service's own engine and batcher on a virtual clock.

    python -m benchmarks.capacity --out DIR [--steps FILE] [--devices 1,8,64] [--loads 0.3,…] [--api-ms 20]
    python -m benchmarks.capacity --validate [--out DIR]
    python -m benchmarks.capacity --validate-against results.json

1. A simulation: requests arrive at random at shares of the devices' capacity, with and
   without workers that are lost, with and without placement of LoRAs. Writes
   `DIR/capacity.json`, `DIR/capacity.png` and the page `DIR/capacity.md`.
2. `--validate` proves it on this machine's CPU: the service with the bundled model, a
   closed and an open loop, and the same simulated from the times that were measured.
   Exits non-zero where throughput or p50 differ by more than 15 %.
3. `--validate-against` does so with what `benchmarks.gpu` has measured.

Steps are those of an H200; `--steps` takes others: a JSON object of UNet rows to
seconds, or what `benchmarks.gpu` wrote.
"""

import argparse
import json
import platform
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.plots import NoMatplotlibError, need_matplotlib
from benchmarks.simulation.costs import H200, Costs
from benchmarks.simulation.page import PLOT, page
from benchmarks.simulation.plot import against_load
from benchmarks.simulation.points import BOUND, Point, Question, Setting, answer

LOADS = (0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.3)
COMPARED_LOADS = (0.5, 0.8, 1.0)
"""At these it is also asked what losses and placement do."""

API_MILLISECONDS = 20.0


def questions(devices: Sequence[int], loads: Sequence[float]) -> list[Question]:
    """Everything that the page needs, in the order of its tables."""
    compared = [load for load in loads if load in COMPARED_LOADS]
    plain = [Question(num_devices, load) for num_devices in devices for load in loads]
    with_losses = [Question(num_devices, load, has_losses=True) for num_devices in devices for load in compared]
    blind = [Question(num_devices, load, places_keys=False) for num_devices in devices for load in compared]
    return plain + with_losses + blind


def read_steps(path: Path) -> dict[int, float]:
    """UNet rows -> seconds of a step.

    Args:
        path: A JSON object of just that, or the results of `benchmarks.gpu`.

    Raises:
        ValueError: It is neither.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(document, dict) and "served" in document:
        document = document["served"]["workers"][0]["step_seconds"]
    if not isinstance(document, dict) or not document:
        raise ValueError(f"{path} has no step times")
    steps = {int(rows): float(seconds) for rows, seconds in document.items()}
    if any(rows < 1 or seconds <= 0 for rows, seconds in steps.items()):
        raise ValueError(f"{path} has step times that are not positive")
    return dict(sorted(steps.items()))


def sweep(asked: Sequence[Question], setting: Setting) -> list[Point]:
    """Simulate one after the other, and say so."""
    points = []
    for number, question in enumerate(asked, start=1):
        began_at = time.perf_counter()
        point = answer(question, setting)
        points.append(point)
        took = time.perf_counter() - began_at
        print(
            f"{number}/{len(asked)}: {question.num_devices} devices, load {question.load:g}"
            f"{', workers lost' if question.has_losses else ''}{'' if question.places_keys else ', blind'}: "
            f"{point.good_share:.1%} good, p50 {point.p50_seconds:.2f} s, p99 {point.p99_seconds:.2f} s; "
            f"took {took:.1f} s",
            file=sys.stderr,
            flush=True,
        )
    return points


def write(folder: Path, points: Sequence[Point], setting: Setting, api_milliseconds: float) -> None:
    """The page, the plot, and every figure."""
    facts = {
        "command": shlex.join(["python", "-m", "benchmarks.capacity", *sys.argv[1:]]),
        "simulated on": f"Python {platform.python_version()}, {datetime.now(UTC):%Y-%m-%d}, seed {setting.seed}",
        "step times": ", ".join(f"{rows}: {1000 * s:.1f}" for rows, s in setting.costs.step_seconds.items())
        + " (UNet rows: ms)",
    }
    folder.mkdir(parents=True, exist_ok=True)
    document = {"facts": facts, "setting": _plain(setting), "points": [asdict(point) for point in points]}
    (folder / "capacity.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    against_load(points, setting.bound, folder / PLOT)
    (folder / "capacity.md").write_text(page(points, setting, api_milliseconds, facts) + "\n", encoding="utf-8")


def _plain(setting: Setting) -> dict[str, Any]:
    costs = {name: getattr(setting.costs, name) for name in Costs.__dataclass_fields__}
    costs |= {"step_seconds": dict(setting.costs.step_seconds)}
    costs |= {name: asdict(costs[name]) for name in ("prepare", "finish")}
    others = {name: getattr(setting, name) for name in Setting.__dataclass_fields__ if name != "costs"}
    return others | {"costs": costs}


def _validate(arguments: argparse.Namespace) -> int:
    from benchmarks.simulation import measured, validation  # noqa: PLC0415 - a simulation needs neither

    if arguments.validate_against is not None:
        document: Mapping[str, Any] = json.loads(arguments.validate_against.read_text(encoding="utf-8"))
        comparisons = validation.against_results(document, H200, arguments.seed)
    else:
        comparisons = measured.on_this_machine(arguments.rounds, arguments.seed)
    print(validation.markdown(comparisons))
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps([asdict(one) for one in comparisons], indent=1) + "\n"
        (arguments.out / "validation.json").write_text(text, encoding="utf-8")
    return 0 if comparisons and all(one.agrees for one in comparisons) else 1


def main() -> int:
    """Simulate, or validate; 0 when that went well."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # So that a service ends, too.
    arguments = _arguments()
    if arguments.validate or arguments.validate_against is not None:
        return _validate(arguments)
    try:
        need_matplotlib()
        costs = H200 if arguments.steps is None else replace(H200, step_seconds=read_steps(arguments.steps))
    except (NoMatplotlibError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    costs = replace(costs, max_images=arguments.max_images or costs.max_images)
    setting = Setting(
        costs,
        queue_size=arguments.queue_size,
        mean_seconds_to_loss=60 * arguments.minutes_to_loss,
        device_seconds=arguments.device_seconds,
        bound=arguments.bound,
        seed=arguments.seed,
    )
    points = sweep(questions(arguments.devices, arguments.loads), setting)
    write(arguments.out, points, setting, arguments.api_ms)
    print((arguments.out / "capacity.md").read_text(encoding="utf-8"))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How much several devices can do, simulated.")
    parser.add_argument("--out", type=Path, help="folder for the page, the plot and every figure")
    parser.add_argument("--validate", action="store_true", help="measure this machine, and simulate that")
    parser.add_argument("--validate-against", type=Path, help="results.json of benchmarks.gpu")
    parser.add_argument("--rounds", type=int, default=3, help="of --validate; medians over them count")
    parser.add_argument("--steps", type=Path, help="JSON of UNet rows to seconds; by default those of an H200")
    parser.add_argument("--devices", type=_numbers(int), default=(1, 8, 64))
    parser.add_argument("--loads", type=_numbers(float), default=LOADS, help="shares of the capacity")
    parser.add_argument("--max-images", type=int, help="that may share a step; by default as many as an H200 chooses")
    parser.add_argument("--queue-size", type=int, default=64, help="requests that may wait")
    parser.add_argument("--minutes-to-loss", type=float, default=10.0, help="of each worker, where workers are lost")
    parser.add_argument(
        "--device-seconds", type=float, default=300.0, help="of traffic, over all devices; 10 s at least"
    )
    parser.add_argument(
        "--bound", type=float, default=BOUND, help="good answers take so many times what they take alone"
    )
    parser.add_argument(
        "--api-ms",
        type=float,
        default=API_MILLISECONDS,
        help="CPU of the API process for a request, as benchmarks.gpu or benchmarks.edges measured it",
    )
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.out is None and not arguments.validate and arguments.validate_against is None:
        parser.error("--out is needed")
    return arguments


def _numbers(kind: type[int] | type[float]) -> Any:  # noqa: ANN401 - what argparse takes as a type
    def parse(text: str) -> tuple[float, ...]:
        numbers = tuple(kind(part) for part in text.split(","))
        if any(number <= 0 for number in numbers):
            raise argparse.ArgumentTypeError("numbers must be positive")
        return numbers

    return parse


if __name__ == "__main__":
    sys.exit(main())
