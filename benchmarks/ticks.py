"""Where a saturated worker's time goes: a profile of the real loop, with nothing of HTTP around it.

    python -m benchmarks.ticks --out DIR [--model FOLDER] [--device cuda:0] [--dtype float16] [--images N]
        [--steps 20] [--seconds 3] [--tiny]

Loads a worker as its process does, keeps as many requests in flight as the service
does, and profiles some seconds in the middle: how long the device is busy, with what,
how long it waits for the host, and what the loop spends between steps. Settings of the
environment, `INPAINT_*`, hold. Writes `DIR/ticks.json`, of which `python -m
benchmarks.page --ticks` makes a section, and prints its tables. Without `--model` the
checkpoint is one of the true size with random weights. `--tiny` tries everything on a
CPU in less than a minute.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import make_checkpoint
from benchmarks.report import card, machine_facts, num_cores, run_facts
from benchmarks.servers import CPU_ENVIRONMENT
from benchmarks.ticks_section import reading, ticks_tables
from benchmarks.timeline import device_intervals, kernel_part, operator_part, timeline_of, top_level_operators
from service.errors import StartupError
from service.settings import load_settings


def measure(model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Profile a worker; returns what is written.

    Raises:
        StartupError: It cannot be loaded.
        NoProfileError: It ended too early.
    """
    # Here, not above: torch must not be loaded before its environment is set, nor by the process that sends requests.
    from benchmarks import worker_profile  # noqa: PLC0415

    overrides = {
        "model": model,
        "devices": (arguments.device,),
        "dtype": arguments.dtype,
        "max_images": arguments.images,
        "offline": True,
    }
    facts = _facts(arguments)  # Among them the load of the machine before this.
    profile = worker_profile.take(
        load_settings(overrides),
        arguments.device,
        threads=arguments.threads,
        steps=arguments.steps,
        seconds=arguments.seconds,
        seed=arguments.seed,
        on_stage=_stages(),
    )
    is_cuda = arguments.device.startswith("cuda")
    intervals = device_intervals(profile.events) if is_cuda else top_level_operators(profile.events)
    if not intervals:
        raise worker_profile.NoProfileError("the profiler recorded nothing of the device")
    timeline = timeline_of(intervals, kernel_part if is_cuda else operator_part)
    requests = (
        f"{profile.size}x{profile.size}, {arguments.steps} steps, guidance on, five schedulers, seed {arguments.seed}"
    )
    return {
        "facts": facts | {"requests": requests, "images that may share a step": profile.max_images},
        "unit": "kernels" if is_cuda else "operators",
        "device": asdict(timeline),
        "host": asdict(profile.host),
        "without_profiler": asdict(profile.before),
    }


def main() -> int:
    """Measure and report; 0 when there is a profile."""
    arguments = _arguments()
    # As in a worker's process.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if arguments.device.startswith("cpu"):
        for name, value in CPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ticks-") as folder:
        model = arguments.model or str(make_checkpoint(Path(folder) / "checkpoint", is_tiny=arguments.tiny))
        from benchmarks.worker_profile import NoProfileError  # noqa: PLC0415 - as in `measure`

        try:
            document = measure(model, arguments)
        except (StartupError, NoProfileError) as error:
            print(error, file=sys.stderr)
            return 1
    (arguments.out / "ticks.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"{ticks_tables(document)}\n\n{reading(document)}")
    return 0


def _stages() -> Callable[[str], None]:
    """Prints what is being done, and when, from now on: on a GPU all this takes minutes."""
    began_at = time.monotonic()

    def on_stage(stage: str) -> None:
        print(f"{time.monotonic() - began_at:6.1f} s  {stage}", file=sys.stderr, flush=True)

    return on_stage


def _facts(arguments: argparse.Namespace) -> dict[str, Any]:
    return machine_facts() | {
        "device": arguments.device,
        "card": card(arguments.device),
        "model": "synthetic, random weights" if arguments.model is None else Path(arguments.model).name,
        "dtype": arguments.dtype,
        **run_facts("benchmarks.ticks"),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Where a saturated worker's time goes.")
    parser.add_argument("--out", type=Path, required=True, help="folder for ticks.json")
    parser.add_argument(
        "--model", help="'demo' or a folder in diffusers format; without, one with random weights of the true size"
    )
    parser.add_argument("--device", help="cuda:0; cpu with --tiny")
    parser.add_argument("--dtype", help="float16 on a GPU, float32 on a CPU")
    parser.add_argument("--images", type=int, help="that may share a step; by default as many as the service allows")
    parser.add_argument("--steps", type=int, help="of each request, 2 or more; 20, with --tiny 4")
    parser.add_argument("--seconds", type=float, help="that are profiled; 3, with --tiny 2")
    parser.add_argument("--threads", type=int, default=num_cores(), help="threads of torch on a CPU")
    parser.add_argument("--seed", type=int, default=1, help="of the requests")
    parser.add_argument("--tiny", action="store_true", help="a dry run on the CPU with a tiny checkpoint")
    arguments = parser.parse_args()
    arguments.device = arguments.device or ("cpu" if arguments.tiny else "cuda:0")
    arguments.dtype = arguments.dtype or ("float32" if arguments.device.startswith("cpu") else "float16")
    arguments.steps = arguments.steps or (4 if arguments.tiny else 20)
    arguments.seconds = arguments.seconds or (2.0 if arguments.tiny else 3.0)
    if arguments.steps < 2:
        parser.error("--steps must be at least 2")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
