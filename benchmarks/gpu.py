"""This service beside what others run, on one GPU.

    python -m benchmarks.gpu --out DIR [--model FOLDER] [--peers static,stock] [--max-seconds 560] [--tiny]

All servers run on one device with the same checkpoint; while one is measured the
others are idle. Without `--model` that is one of the true size with random weights,
which neither time nor memory depends on. This service starts twice, without and with
its compile cache. Then, as far as the time allows, the most telling first:

1. one request alone, at two numbers of steps;
2. closed loops that keep a server busy, with equal and with mixed steps: its capacity;
3. Poisson arrivals of mixed steps, all servers at the same rate;
4. bursts, and Poisson arrivals at shares of each server's own capacity.

`DIR/results.json` is written anew after every piece, so that a run that is cut off
leaves what it has; `DIR/answers.jsonl` has every single answer. `python -m benchmarks.page`
makes tables and plots of it. `--tiny` tries everything on a CPU in two minutes.
"""

import argparse
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from benchmarks import pieces, servers
from benchmarks.checkpoints import make_checkpoint
from benchmarks.measurement import Measurement
from benchmarks.page import overview
from benchmarks.pieces import FULL, TINY, Budget, Plan
from benchmarks.report import card, machine_facts, num_cores, run_facts

LITSERVE_MAX_BATCH = 8
COMPILE_CACHE = "INPAINT_COMPILE_CACHE"
END_SECONDS = 10.0
"""Kept for ending the servers."""

TINY_PEERS = tuple(peer for peer in pieces.PEERS if peer != pieces.COMPILED)
"""Compiling stock takes minutes on a CPU, and more than the dry run has."""

Starter = Callable[[], AbstractContextManager[servers.Server]]


def starters(model: str, where: "servers.Where", compile_cache: Path) -> dict[str, Starter]:
    """How each server is started, by key.

    The static batches run this service's own pipeline, so they get its compile cache, too.
    """
    environment = {COMPILE_CACHE: str(compile_cache)}
    return {
        pieces.SERVICE: lambda: servers.inpaint_service(model, where, environment=environment),
        pieces.STATIC: lambda: servers.static_batching(model, where, environment=environment),
        pieces.STOCK: lambda: servers.stock_lock(model, where),
        pieces.COMPILED: lambda: servers.stock_lock(model, where, compiled=True),
        pieces.LITSERVE: lambda: servers.litserve_stock(model, where, LITSERVE_MAX_BATCH),
    }


def start_all(
    stack: ExitStack, chosen: dict[str, Starter], on_failure: Callable[[str, str], None]
) -> dict[str, servers.Server]:
    """Start servers at once, each in a thread; those that fail are told of and left out.

    Args:
        stack: Ends them.
        chosen: How to start them, by key.
        on_failure: Called with a key and the reason.
    """
    running = {}
    with ThreadPoolExecutor(max(1, len(chosen))) as threads:
        starting = {key: threads.submit(stack.enter_context, start()) for key, start in chosen.items()}
    for key, start in starting.items():
        try:
            running[key] = start.result()
        except servers.ServerFailedError as error:
            on_failure(key, str(error))
    return running


def run(measurement: Measurement, all_starters: dict[str, Starter], *, is_cache_filled: bool = False) -> None:
    """Start, measure, end.

    Args:
        measurement: Takes what is measured.
        all_starters: How to start each server, by key.
        is_cache_filled: Whether there is no cold start to be timed.

    Raises:
        ServerFailedError: This service did not start; peers that do not are left out.
    """
    if not is_cache_filled:
        with all_starters[pieces.SERVICE]() as service:
            measurement.note_start(pieces.SERVICE, "cold", service)
    with ExitStack() as stack:
        service = stack.enter_context(all_starters[pieces.SERVICE]())
        measurement.note_start(pieces.SERVICE, "cached", service)
        peers = {key: start for key, start in all_starters.items() if key != pieces.SERVICE}
        running = start_all(stack, peers, measurement.note_failure)
        for key, server in running.items():
            measurement.note_start(key, None, server)
        measurement.take_all({pieces.SERVICE: service} | {key: running[key] for key in peers if key in running})


def main() -> int:
    """Measure and report; 0 when every server that was asked for was measured, and 1 when not."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # So that the servers end, too.
    arguments = _arguments()
    plan = TINY if arguments.tiny else FULL
    budget = Budget(arguments.max_seconds - END_SECONDS)
    arguments.out.mkdir(parents=True, exist_ok=True)
    where = servers.Where(arguments.device, arguments.dtype, arguments.threads)
    measurement = Measurement(
        arguments.out, _facts(arguments, plan), plan, budget, arguments.device, seed=arguments.seed
    )
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        model = arguments.model or make_checkpoint(Path(folder) / "checkpoint", is_tiny=arguments.tiny)
        compile_cache = arguments.compile_cache or Path(folder) / "compile-cache"
        compile_cache.mkdir(parents=True, exist_ok=True)
        all_starters = starters(str(model), where, compile_cache)
        chosen = {key: start for key, start in all_starters.items() if key in (pieces.SERVICE, *arguments.peers)}
        try:
            run(measurement, chosen, is_cache_filled=any(compile_cache.iterdir()))
        except servers.ServerFailedError as error:
            measurement.note_failure(pieces.SERVICE, str(error))
    document = measurement.document()
    print(overview(document))
    return 1 if measurement.has_failed else 0


def _facts(arguments: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    steps = "{} to {}".format(*plan.mixed_steps)
    return machine_facts() | {
        "device": arguments.device,
        "card": card(arguments.device),
        "model": "synthetic, random weights" if arguments.model is None else arguments.model.name,
        "dtype": arguments.dtype,
        "requests": f"{plan.size}x{plan.size} PNG, {plan.steps} or {steps} steps, guidance on, five schedulers, "
        f"seed {arguments.seed}",
        **run_facts("benchmarks.gpu"),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="This service beside what others run, on one GPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json and answers.jsonl")
    parser.add_argument("--model", type=Path, help="folder in diffusers format; without, one with random weights")
    parser.add_argument("--device", help="cuda:0; cpu with --tiny")
    parser.add_argument("--dtype", help="float16 on a GPU, float32 on a CPU")
    parser.add_argument("--peers", type=_peers, help=f"some of {','.join(pieces.PEERS)}, or none")
    parser.add_argument("--max-seconds", type=float, help="everything ends by then; 560, with --tiny 115")
    parser.add_argument("--threads", type=int, default=num_cores(), help="threads of torch in each server on a CPU")
    parser.add_argument("--compile-cache", type=Path, help="folder; a filled one spares the cold start")
    parser.add_argument("--seed", type=int, default=1, help="of the requests and their arrivals")
    parser.add_argument("--tiny", action="store_true", help="a dry run on the CPU with a tiny checkpoint")
    arguments = parser.parse_args()
    arguments.device = arguments.device or ("cpu" if arguments.tiny else "cuda:0")
    arguments.dtype = arguments.dtype or ("float32" if arguments.device == "cpu" else "float16")
    if arguments.peers is None:
        arguments.peers = TINY_PEERS if arguments.tiny else pieces.PEERS
    arguments.max_seconds = arguments.max_seconds or (115.0 if arguments.tiny else 560.0)
    return arguments


def _peers(text: str) -> Sequence[str]:
    names = [] if text == "none" else text.split(",")
    if unknown := set(names) - set(pieces.PEERS):
        raise argparse.ArgumentTypeError(f"no peer is called {', '.join(sorted(unknown))}")
    return names


if __name__ == "__main__":
    sys.exit(main())
