"""What the service promises under load, measured on the service itself, with a verdict on each.

    python -m benchmarks.promises --out DIR [--quick] [--parts overload,soak,connections] [--model FOLDER]

The service is started as a process on 127.0.0.1, as `inpaint-service serve` starts it, with
the bundled demo model on a CPU, which takes about 17 minutes on two idle cores; `--quick` serves a
tiny model of random weights, and takes about two minutes in all.

1. overload: its capacity in a closed loop, then Poisson arrivals of five times that.
2. soak: valid requests of many kinds, requests that must be refused and clients that hang up,
   in rounds, after each of which memory, descriptors, threads and tasks are counted. A control
   that leaks on purpose has to fail the same check.
3. connections: goodput beside hundreds of idle and tens of slow connections, and without
   them, in rounds that take turns.

In all of them every returned picture is compared with what its request gave alone. Prints
Markdown, writes `promises.json` and `promises.md` into the folder, and exits non-zero when a
promise does not hold.
"""

import argparse
import asyncio
import json
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import make_checkpoint
from benchmarks.connections import (
    ConnectionsPlan,
    connections_document,
    connections_facts,
    connections_verdicts,
    measure_connections,
)
from benchmarks.overload import OverloadPlan, measure_overload, overload_document, overload_facts, overload_verdicts
from benchmarks.references import WrongAnswerError
from benchmarks.report import machine_facts, num_cores, words
from benchmarks.servers import Server, ServerFailedError, Where, inpaint_service
from benchmarks.soak import MAX_BODY_MIB, SoakPlan, soak, soak_document, soak_facts, soak_verdicts
from benchmarks.soak_server import LEAK_FLAG
from benchmarks.verdicts import Verdict, all_hold, verdict_table

PARTS = ("overload", "soak", "connections")
BUNDLED = "demo"
KEY = "soak-key"
WITH_KEY: Mapping[str, str] = {"Authorization": f"Bearer {KEY}"}
NO_KEY: Mapping[str, str] = {}
FREED_AT_ONCE = str(128 * 1024)
SOAK_ENVIRONMENT: Mapping[str, str] = {
    "INPAINT_API_KEYS": KEY,
    "INPAINT_MAX_BODY_MIB": str(MAX_BODY_MIB),
    # glibc raises these bounds as it goes, and keeps tens of megabytes that are free: more than what is looked for.
    "MALLOC_MMAP_THRESHOLD_": FREED_AT_ONCE,
    "MALLOC_TRIM_THRESHOLD_": FREED_AT_ONCE,
}


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to send in each part."""

    overload: OverloadPlan
    soak: SoakPlan
    connections: ConnectionsPlan


FULL = Plan(
    OverloadPlan(num_steps=6, capacity_seconds=40.0, open_seconds=90.0),
    SoakPlan(
        steps=(2, 4),
        rounds=24,
        round_requests=60,
        control_rounds=10,
        control_requests=20,
        max_seconds=900.0,
    ),
    ConnectionsPlan(num_steps=6, round_seconds=30.0, pairs=4, num_idle=500, num_slow=50),
)
QUICK = Plan(
    # Many steps: a load generator that had to send more than this would take the cores from the service.
    OverloadPlan(num_steps=30, capacity_seconds=8.0, open_seconds=10.0),
    SoakPlan(steps=(2, 4), rounds=10, round_requests=50, control_rounds=8, control_requests=20, max_seconds=60.0),
    ConnectionsPlan(num_steps=30, round_seconds=5.0, pairs=2, num_idle=500, num_slow=50),
)


@dataclass(frozen=True, slots=True)
class Result:
    """What one part came to.

    Attributes:
        verdicts: On its promises.
        facts: What a reader needs beside them.
        document: Everything, for `json.dump`.
    """

    verdicts: list[Verdict]
    facts: dict[str, str]
    document: dict[str, Any]


class Runs:
    """The parts, each on services of its own.

    Args:
        model: As in `INPAINT_MODEL`.
        plan: How much to send.
        seed: Of all traffic.
    """

    def __init__(self, model: str, plan: Plan, seed: int) -> None:
        self._model = model
        self._plan = plan
        self._seed = seed
        self._where = Where("cpu", "float32", num_cores())

    def take(self, part: str) -> Result:
        """One of `PARTS`.

        Raises:
            ServerFailedError: The service did not start.
            WrongAnswerError: It does not answer well even a request alone.
            ValueError: There is too little to judge.
        """
        parts = {"overload": self._overload, "soak": self._soak, "connections": self._connections}
        return parts[part]()

    def _overload(self) -> Result:
        with self._service() as server:
            found = asyncio.run(measure_overload(server, NO_KEY, self._plan.overload, self._seed))
        return Result(overload_verdicts(found), overload_facts(found), overload_document(found))

    def _soak(self) -> Result:
        plan = self._plan.soak
        with self._soak_service() as server:
            found = asyncio.run(soak(server, WITH_KEY, plan, self._seed))
        with self._soak_service(LEAK_FLAG) as server:
            control = asyncio.run(soak(server, WITH_KEY, plan, self._seed, is_control=True))
        return Result(soak_verdicts(found, control), soak_facts(found, control), soak_document(found, control))

    def _connections(self) -> Result:
        with self._service() as server:
            found = asyncio.run(measure_connections(server, NO_KEY, self._plan.connections, self._seed))
        return Result(connections_verdicts(found), connections_facts(found), connections_document(found))

    def _service(self) -> AbstractContextManager[Server]:
        return inpaint_service(self._model, self._where)

    def _soak_service(self, *flags: str) -> AbstractContextManager[Server]:
        entry = ["benchmarks.soak_server", *flags]
        return inpaint_service(self._model, self._where, environment=SOAK_ENVIRONMENT, entry=entry)


def main() -> int:
    """Measure, report; 0 when every promise holds."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # So that the servers end, too.
    arguments.out.mkdir(parents=True, exist_ok=True)
    started_at = time.perf_counter()
    facts: dict[str, Any] = machine_facts()
    verdicts: list[Verdict] = []
    documents: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or (str(make_checkpoint(Path(folder), is_tiny=True)) if arguments.quick else BUNDLED)
        facts["model"] = "tiny, random weights" if arguments.quick and not arguments.model else Path(model).name
        runs = Runs(model, QUICK if arguments.quick else FULL, arguments.seed)
        for part in arguments.parts:
            _say(f"{part} …")
            try:
                result = runs.take(part)
            except (ServerFailedError, WrongAnswerError, ValueError, OSError, ExceptionGroup) as error:
                verdicts.append(Verdict(f"{part}: could be measured", "yes", f"{type(error).__name__}", holds=False))
                _say(f"{part} failed: {error}")
                continue
            verdicts += result.verdicts
            facts |= result.facts
            documents[part] = result.document
    facts["command"] = shlex.join(["python", "-m", "benchmarks.promises", *sys.argv[1:]])
    facts["took"] = f"{time.perf_counter() - started_at:.0f} s"
    markdown = "\n".join([verdict_table(verdicts), "", *(f"- {name}: {words(value)}" for name, value in facts.items())])
    (arguments.out / "promises.md").write_text(markdown + "\n", encoding="utf-8")
    document = {"facts": facts, "verdicts": [_entry(verdict) for verdict in verdicts], "parts": documents}
    (arguments.out / "promises.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(markdown)
    return 0 if all_hold(verdicts) else 1


def _entry(verdict: Verdict) -> dict[str, Any]:
    return {name: getattr(verdict, name) for name in ("promise", "bound", "measured", "holds")}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What the service promises under load, with a verdict on each.")
    parser.add_argument("--out", type=Path, required=True, help="folder for promises.json and promises.md")
    parser.add_argument("--quick", action="store_true", help="a tiny model, about two minutes in all")
    parser.add_argument("--parts", type=_parts, default=PARTS, help="some of overload,soak,connections")
    parser.add_argument("--model", help="as in INPAINT_MODEL; by default the bundled one")
    parser.add_argument("--seed", type=int, default=1, help="of the traffic")
    return parser.parse_args()


def _parts(text: str) -> tuple[str, ...]:
    parts = tuple(text.split(","))
    if unknown := set(parts) - set(PARTS):
        raise argparse.ArgumentTypeError(f"no part is called {', '.join(sorted(unknown))}")
    return parts


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
