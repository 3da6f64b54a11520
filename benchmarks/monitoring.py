"""Alerts and panels on the real thing: a loaded service, a real Prometheus, and the faults that alerts watch for.

    python -m benchmarks.monitoring --out DIR [--model FOLDER] [--seed 1]

The service runs on 127.0.0.1 with two CPU workers and the bundled model; Debian's Prometheus (`apt-get install
prometheus`, or its files on the PATH) reads the configuration and the rules of `deploy/prometheus` in a copy in which a
minute is a second, so that an alert that waits ten minutes is seen in ten seconds. After a stretch without faults, in
which no alert may fire, one fault after the other is provoked until the alerts that watch for it fire: flagged
pictures, a growing and then a full queue, workers stopped by SIGSTOP and killed by SIGKILL, latents that are no
numbers, a lack of memory, a service that does not answer, and a Prometheus without a target. Then every query of
every panel of `deploy/grafana` is asked for that time, and has to give data. Takes three minutes at most.

Prints Markdown, writes `monitoring.json` and `monitoring.md` into the folder, exits non-zero when an alert did not
fire, one fired without a fault, or a panel stayed empty.
"""

import argparse
import asyncio
import json
import re
import shlex
import signal
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.cases import JSON, Case, Served, equal_cases, served_model
from benchmarks.crowd import Crowd
from benchmarks.demand import FOLDER_VARIABLE, Demand
from benchmarks.exchange import Address, Wire, address_of, exchange
from benchmarks.fast_prometheus import Prometheus, find_binary, prometheus
from benchmarks.monitoring_report import Found, Phase, panels_of, report, verdicts
from benchmarks.report import machine_facts
from benchmarks.servers import Server, ServerFailedError, Where, inpaint_service, wait_for_all_workers
from benchmarks.verdicts import all_hold
from tests.http.receiver import receiving

BUNDLED = "demo"
QUEUE_SIZE = 64
FEWER_IMAGES = (">= 20", ">= 4")
"""Requests do not get faster with the rules' minutes: there are fewer in one."""
SLOW = 4.0
"""And seconds of a request mean more: it is slow when it takes so many times what it took before the run."""

QUIET_SECONDS = 12.0
GIVE_UP_SECONDS = 30.0
CALM_SECONDS = 15.0
POLL_SECONDS = 0.25
FEW = 3
MANY = 24
"""More than are prepared ahead, uploaded or decoded at once: of so many clients beyond all places some are refused."""


class Run:
    """One run.

    Args:
        server: The service, ready.
        watcher: Prometheus, scraping it.
        demand: Of faults in the workers.
        log: The service's.
        webhook: Headers that ask to be told of a request's end.
        seed: Of the requests.
    """

    def __init__(
        self,
        server: Server,
        watcher: Prometheus,
        demand: Demand,
        log: Path,
        *,
        webhook: Mapping[str, str],
        seed: int,
    ) -> None:
        self._server = server
        self._webhook = webhook
        self._watcher = watcher
        self._demand = demand
        self._log = log
        self._seed = seed
        self._process = psutil.Process(server.pid)
        self._phases: list[Phase] = []
        self._alerts: dict[str, dict[str, str]] = {}

    async def take(self) -> Found:
        """Let things go wrong, one after the other."""
        address = address_of(self._server.base_url)
        served = served_model(self._server.base_url, {})
        started_at = time.time()
        quick = Crowd(address, [case.wire({}) for case in _small(served, served.size // 4, 3, self._seed)])
        slower = Crowd(address, [case.wire({}) for case in _small(served, served.size // 2, 3, self._seed)])
        pirates = Crowd(address, [_flagged(case).wire({}) for case in _small(served, served.size // 2, 4, self._seed)])
        try:
            await _ask_otherwise(address, served, self._webhook, self._seed)
            await self._ask_too_much(quick, slower, pirates, served)
            await self._break_workers(quick)
        finally:
            for crowd in (quick, slower, pirates):
                await crowd.leave()
        await self._take_away()
        ended_at = time.time()
        panels = await asyncio.to_thread(panels_of, self._watcher, started_at, ended_at)
        statuses = quick.statuses + slower.statuses + pirates.statuses
        return Found(tuple(self._phases), tuple(panels), self._alerts, dict(statuses))

    async def _ask_too_much(self, quick: Crowd, slower: Crowd, pirates: Crowd, served: Served) -> None:
        quick.become(FEW)
        await self._phase("no fault, a little load", set(), at_least=QUIET_SECONDS)

        await quick.leave()
        pirates.become(FEW)
        await self._phase("pirate flags alone are asked for", {"InpaintFlaggedShareHigh"})
        await pirates.leave()

        slower.become(served.max_images)
        growing = asyncio.create_task(slower.grow(served.max_images + QUEUE_SIZE, 30.0))
        await self._phase("each second two clients more", {"InpaintQueueGrowing", "InpaintSlow"})
        growing.cancel()
        slower.become(served.max_images + QUEUE_SIZE + MANY)
        await self._phase("more clients than places", {"InpaintRejecting"})

        slower.become(served.max_images + QUEUE_SIZE // 2)
        with self._stopped(0):
            await self._phase("SIGSTOP of one worker, requests wait", {"InpaintDeviceIdle"})
            with self._stopped(1):
                await self._phase("SIGSTOP of both workers", {"InpaintNoGoodput"})
        await slower.leave()

    async def _break_workers(self, quick: Crowd) -> None:
        quick.become(3 * FEW)
        with self._demand.not_a_number():
            await self._phase("latents are no numbers", {"InpaintNaNOutput"})
        with self._demand.little_memory():
            await self._phase("steps of several images lack memory", {"InpaintBatchCapLowered"})
        with self._demand.no_memory():
            await self._phase("every step lacks memory", {"InpaintOutOfMemory", "InpaintServerErrors"})

        self._signal_worker(1, signal.SIGKILL)
        await self._phase("SIGKILL of a worker", {"InpaintWorkerRestarted"})
        await self._phase(
            "SIGKILL of the same one whenever it starts",
            {"InpaintWorkerCrashLoop", "InpaintWorkerDown"},
            meanwhile=lambda: self._signal_worker(1, signal.SIGKILL),
        )
        await self._phase("SIGKILL of both whenever they start", {"InpaintNoWorker"}, meanwhile=self._kill_workers)

    async def _take_away(self) -> None:
        self._process.suspend()
        try:
            await self._phase("SIGSTOP of the service", {"InpaintNotScraped"})
        finally:
            self._process.resume()
        self._watcher.forget_targets()
        await self._phase("no target in the configuration", {"InpaintNotConfigured"})

    async def _phase(
        self,
        fault: str,
        expected: set[str],
        *,
        at_least: float = 0.0,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        """Wait until all expected alerts fire, or for so long; not before those that fire already are silent."""
        calm_until = time.time() + CALM_SECONDS
        before = await asyncio.to_thread(self._watcher.firing)
        while before & expected and time.time() < calm_until:
            await asyncio.sleep(POLL_SECONDS)
            before = await asyncio.to_thread(self._watcher.firing)
        started_at = time.time()
        fired: dict[str, float] = {}
        while True:
            if meanwhile is not None:
                meanwhile()
            for alert in await asyncio.to_thread(self._watcher.alerts):
                name = alert["labels"]["alertname"]
                if alert["state"] == "firing":
                    self._alerts.setdefault(name, alert["annotations"])
                    fired.setdefault(name, time.time() - started_at)
            spent = time.time() - started_at
            if (expected <= set(fired) and spent >= at_least) or spent > GIVE_UP_SECONDS:
                break
            await asyncio.sleep(POLL_SECONDS)
        self._phases.append(Phase(fault, tuple(sorted(expected)), tuple(sorted(before)), fired))
        print(f"{time.time() - started_at:5.1f} s  {fault}: {', '.join(sorted(fired)) or 'nothing fires'}", flush=True)

    # --- workers -----------------------------------------------------------------------

    @contextmanager
    def _stopped(self, worker: int) -> Iterator[None]:
        self._signal_worker(worker, signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal_worker(worker, signal.SIGCONT)

    def _kill_workers(self) -> None:
        for worker in (0, 1):
            self._signal_worker(worker, signal.SIGKILL)

    def _signal_worker(self, worker: int, number: signal.Signals) -> None:
        """To the worker's process, where it has one now."""
        text = self._log.read_text(encoding="utf-8", errors="replace")
        pids = [int(pid) for pid in re.findall(rf"worker {worker} \(cpu\) started, pid (\d+)", text)]
        for child in self._process.children():
            if child.pid == pids[-1]:
                with suppress(psutil.NoSuchProcess):
                    child.send_signal(number)


def _small(served: Served, size: int, num_steps: int, seed: int) -> list[Case]:
    """Requests that are done soon, also on a busy machine."""
    sides = {"height": str(size), "width": str(size)}
    return [case.with_fields(**sides) for case in equal_cases(served, num_steps, seed)]


def _flagged(case: Case) -> Case:
    """The same request for what the bundled model's safety checker flags."""
    fields = {"prompt": "a pirate flag", "num_images_per_prompt": "2"}
    return Case("a pirate flag", case.with_fields(**fields).job, JSON)


async def _usual_seconds(server: Server, seed: int) -> float:
    """The longest that a request takes under a little load."""
    address = address_of(server.base_url)
    served = await asyncio.to_thread(served_model, server.base_url, {})
    wires = [case.wire({}) for case in _small(served, served.size // 4, 3, seed)]
    longest = 0.0
    for first in range(0, len(wires) - FEW, FEW):
        answers = await asyncio.gather(*(exchange(address, wire, 60.0) for wire in wires[first : first + FEW]))
        longest = max(longest, *(answer.seconds_after_sending for answer in answers))
    return longest


async def _ask_otherwise(address: Address, served: Served, webhook: Mapping[str, str], seed: int) -> None:
    """What panels show besides pictures: an answer given again, one that is kept and told of, and a hang-up."""
    case = equal_cases(served, 3, seed)[0]
    for _ in range(2):
        await exchange(address, case.wire({"Idempotency-Key": "monitoring"}), 60.0)
    await exchange(address, case.wire({"Prefer": "respond-async", **webhook}), 60.0)
    long: Wire = equal_cases(served, 100, seed)[0].wire({})
    await exchange(address, long, 1.0)


def main() -> int:
    """Watch, report; 0 when every alert fired on its fault and every panel has data."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # So that the others end, too.
    binary = find_binary()
    if binary is None:
        print("Prometheus is not installed; Debian's package prometheus has it", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    started_at = time.perf_counter()
    facts: dict[str, Any] = machine_facts()
    try:
        found = _watch(binary, arguments)
    except (ServerFailedError, httpx.HTTPError) as error:
        print(error, file=sys.stderr)
        return 1
    facts["command"] = shlex.join(["python", "-m", "benchmarks.monitoring", *sys.argv[1:]])
    facts["took"] = f"{time.perf_counter() - started_at:.0f} s"
    markdown = report(found, facts)
    (arguments.out / "monitoring.md").write_text(markdown + "\n", encoding="utf-8")
    document = {"facts": facts, "phases": [asdict(one) for one in found.phases], "alerts": found.annotations}
    document["panels"] = [asdict(one) for one in found.panels]
    (arguments.out / "monitoring.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(markdown)
    return 0 if all_hold(verdicts(found)) else 1


def _watch(binary: str, arguments: argparse.Namespace) -> Found:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        demand = Demand(folder / "faults")
        demand.folder.mkdir()
        log = folder / "service.log"
        receiver = stack.enter_context(receiving())
        environment = {
            "INPAINT_WEBHOOK_HOSTS": receiver.host,
            "INPAINT_WEBHOOK_SECRET": f"whsec_{b64encode(bytes(32)).decode()}",
            "INPAINT_LOG_LEVEL": "info",
            "INPAINT_LOG_FORMAT": "text",
            "INPAINT_QUEUE_SIZE": str(QUEUE_SIZE),
            FOLDER_VARIABLE: str(demand.folder),
        }
        entry = ["benchmarks.monitoring_server"]
        where = Where("cpu,cpu", "float32", 1)
        server = stack.enter_context(
            inpaint_service(arguments.model, where, environment=environment, entry=entry, log=log)
        )
        wait_for_all_workers(server, time.monotonic() + 2 * GIVE_UP_SECONDS)
        target = "{}:{}".format(*address_of(server.base_url))
        (folder / "prometheus").mkdir()
        slow_seconds = max(1.0, SLOW * asyncio.run(_usual_seconds(server, arguments.seed)))
        bounds = {"InpaintSlow": ("> 30", f"> {slow_seconds:.3g}"), "InpaintFlaggedShareHigh": FEWER_IMAGES}
        watcher = stack.enter_context(prometheus(binary, folder / "prometheus", target, bounds))
        try:
            return asyncio.run(Run(server, watcher, demand, log, webhook=receiver.url(), seed=arguments.seed).take())
        finally:
            (arguments.out / "monitoring.log").write_bytes(log.read_bytes())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Alerts and panels of deploy/ on a real service and its faults.")
    parser.add_argument("--out", type=Path, required=True, help="folder for monitoring.json, .md and the service's log")
    parser.add_argument(
        "--model", default=BUNDLED, help="as in INPAINT_MODEL; has to flag pirate flags (default: demo)"
    )
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
