"""Two workers that are killed, stopped and made to fail while good and bad traffic runs.

    python -m benchmarks.chaos --out DIR [--minutes 10] [--quick] [--model FOLDER] [--seed 1]

The service runs on 127.0.0.1 with two CPU workers. From outside they get SIGKILL and SIGSTOP; inside, the
benchmark's own entry wraps their pipeline so that steps run out of memory, raise, give no
numbers, exit, lose the device or hang (`benchmarks.chaos_worker`). All of it is drawn from a seed.

Every request must get exactly one answer; every picture must be what its request gave alone;
an answer of 5xx must be of a documented kind, and those that say a request failed must name one that
a fault struck. In the end both workers are ready, and no process, descriptor or file is left. Prints
Markdown, writes `chaos.json` and `chaos.md` into the folder, exits non-zero when something of this does not hold.
"""

import argparse
import asyncio
import json
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.assassin import Assassin, Attack
from benchmarks.bad_requests import bad_requests
from benchmarks.cases import mixed_cases, served_model
from benchmarks.chaos_log import WorkersLog, read_log
from benchmarks.chaos_report import DOCUMENTED, Chaos, Left, chaos_document, chaos_markdown, chaos_verdicts
from benchmarks.checkpoints import make_checkpoint
from benchmarks.exchange import Address, address_of, exchange
from benchmarks.fault_plan import PLAN_VARIABLE, FaultPlan
from benchmarks.load import GOOD
from benchmarks.mixed import MixedTraffic, Outcome, faults_of
from benchmarks.references import Known, WrongAnswerError, take_references
from benchmarks.report import machine_facts
from benchmarks.scrape import scrape
from benchmarks.servers import Server, ServerFailedError, Where, inpaint_service, wait_for_all_workers
from benchmarks.verdicts import all_hold

BUNDLED = "demo"
DEVICES = "cpu,cpu"
KEY = "chaos-key"
HEADERS = {"Authorization": f"Bearer {KEY}"}
MAX_BODY_MIB = 2
MEBIBYTE = 1024 * 1024
HANG_TIMEOUT_SECONDS = 5.0
NUM_CLIENTS = 8
ANSWER_SECONDS = 200.0
READY_SECONDS = 150.0
REST_SECONDS = 40.0
STOP_SECONDS = 30.0
LEAVING_SECONDS = 5.0
POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Plan:
    """How long, and how much goes wrong.

    Attributes:
        seconds: Of traffic with faults.
        steps: Least and most steps of good requests.
        attack_seconds: Mean time from attack to attack from outside.
        fault_seconds: Mean time from fault to fault in each worker that has work.
    """

    seconds: float
    steps: tuple[int, int]
    attack_seconds: float
    fault_seconds: float


class Run:
    """One run.

    Args:
        folder: For the log, the faults and the service's temporary files.
        plan: How much goes wrong.
        seed: Of traffic and faults.
    """

    def __init__(self, folder: Path, plan: Plan, seed: int) -> None:
        self._plan = plan
        self._seed = seed
        self._log_path = folder / "service.log"
        self._temporary = folder / "tmp"
        self._faults = FaultPlan(folder / "faults", seed, plan.fault_seconds)
        for needed in (self._temporary, self._faults.folder):
            needed.mkdir()
        self._faults.write()

    def take(self, model: str) -> Chaos:
        """Start the service, let things go wrong, and end it.

        Raises:
            ServerFailedError: The service did not start.
            WrongAnswerError: It does not answer well even a request alone.
        """
        environment = {
            "INPAINT_HANG_TIMEOUT": str(HANG_TIMEOUT_SECONDS),
            "INPAINT_API_KEYS": KEY,
            "INPAINT_MAX_BODY_MIB": str(MAX_BODY_MIB),
            "INPAINT_LOG_LEVEL": "info",
            "INPAINT_LOG_FORMAT": "text",
            "TMPDIR": str(self._temporary),
            PLAN_VARIABLE: str(self._faults.folder),
        }
        where = Where(DEVICES, "float32", 1)
        entry = ["benchmarks.chaos_server"]
        with inpaint_service(model, where, environment=environment, entry=entry, log=self._log_path) as server:
            return asyncio.run(self._measure(server))

    async def _measure(self, server: Server) -> Chaos:
        address = address_of(server.base_url)
        if not await self._becomes_ready(server):
            raise ServerFailedError(f"only some workers became ready:\n{self._log_text()[-2000:]}")
        served = served_model(server.base_url, HEADERS)
        cases = mixed_cases(served, self._plan.steps, self._seed)
        known = await take_references(address, cases, HEADERS)
        before = await asyncio.to_thread(self._left, server)

        outcomes, attacks = await self._let_go_wrong(address, known)

        is_ready_again = await self._becomes_ready(server)
        findings = [
            known.judged(number, await exchange(address, case.wire(HEADERS), ANSWER_SECONDS))
            for number, case in enumerate(cases)
        ]
        after = await asyncio.to_thread(self._left, server)
        log = self._look(attacks)
        exit_status = await asyncio.to_thread(_end, server.pid)
        return Chaos(
            outcomes=tuple(outcomes),
            faults=tuple(self._faults.noted()),
            attacks=tuple(attacks),
            log=log,
            is_ready_again=is_ready_again,
            num_cases=len(findings),
            num_good_in_the_end=sum(one.outcome == GOOD for one in findings),
            before=before,
            after=after,
            num_processes_left=await asyncio.to_thread(_num_left, server.pid),
            files_left=self._files(),
            exit_status=exit_status,
        )

    async def _let_go_wrong(self, address: Address, known: Known) -> tuple[list[Outcome], list[Attack]]:
        traffic = MixedTraffic(
            address,
            known,
            bad_requests(known.cases[0].job, HEADERS, MAX_BODY_MIB * MEBIBYTE),
            HEADERS,
            timeout_seconds=ANSWER_SECONDS,
            may_be=DOCUMENTED,
        )
        assassin = Assassin(self._look, HANG_TIMEOUT_SECONDS, self._plan.attack_seconds, self._seed)
        end_at = time.monotonic() + self._plan.seconds

        def is_over() -> bool:
            return time.monotonic() >= end_at

        self._faults.begin()
        attacking = asyncio.create_task(assassin.run(is_over))
        try:
            outcomes = await traffic.send(NUM_CLIENTS, str(self._seed), is_over=is_over)
            await attacking
        finally:
            attacking.cancel()
            self._faults.end()
        return outcomes, assassin.attacks

    # --- looking ---------------------------------------------------------------------

    async def _becomes_ready(self, server: Server) -> bool:
        """Whether all workers are ready within a time that longer pauses have room in, too."""
        try:
            await asyncio.to_thread(wait_for_all_workers, server, time.monotonic() + READY_SECONDS)
        except ServerFailedError:
            return False
        return True

    def _left(self, server: Server) -> Left:
        """At rest, when nothing is in flight and connections are closed."""
        process = psutil.Process(server.pid)
        seen: list[Left] = []
        give_up_at = time.monotonic() + REST_SECONDS
        with httpx.Client(base_url=server.base_url, headers=HEADERS, timeout=30.0, trust_env=False) as client:
            while time.monotonic() < give_up_at and not (len(seen) >= 3 and seen[-1] == seen[-2] == seen[-3]):
                time.sleep(POLL_SECONDS)
                is_busy = any(
                    sum(scrape(client, "").values(f"inpaint_{name}", "").values())
                    for name in ("in_flight", "queue_depth")
                )
                left = Left(process.num_fds(), len(process.children(recursive=True)), self._files())
                seen = [] if is_busy else [*seen, left]
        return seen[-1] if seen else left

    def _look(self, attacks: Sequence[Attack] = ()) -> WorkersLog:
        causes = {fault.pid: fault.at for fault in self._faults.noted()}
        return read_log(self._log_text(), causes | {attack.pid: attack.at for attack in attacks})

    def _log_text(self) -> str:
        return self._log_path.read_text(encoding="utf-8", errors="replace")

    def _files(self) -> tuple[str, ...]:
        return tuple(sorted(str(path.relative_to(self._temporary)) for path in self._temporary.rglob("*")))


def _end(pid: int) -> int | None:
    """SIGTERM, then the exit status; None where it takes too long."""
    process = psutil.Process(pid)
    process.send_signal(signal.SIGTERM)
    try:
        status: int | None = process.wait(STOP_SECONDS)
    except psutil.TimeoutExpired:
        return None
    return status


def _num_left(leader: int) -> int:
    """Processes of the session that a process has led, once they have had the time to notice that it is gone."""
    give_up_at = time.monotonic() + LEAVING_SECONDS
    while (count := sum(_is_in_session(pid, leader) for pid in psutil.pids())) and time.monotonic() < give_up_at:
        time.sleep(POLL_SECONDS)
    return count


def _is_in_session(pid: int, leader: int) -> bool:
    try:
        return os.getsid(pid) == leader
    except (ProcessLookupError, PermissionError):
        return False


def main() -> int:
    """Let things go wrong, report; 0 when every promise holds."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # So that the service ends, too.
    arguments.out.mkdir(parents=True, exist_ok=True)
    started_at = time.perf_counter()
    facts: dict[str, Any] = machine_facts()
    if arguments.quick:
        plan = Plan(60 * (arguments.minutes or 0.75), steps=(3, 6), attack_seconds=6.0, fault_seconds=4.0)
    else:
        plan = Plan(60 * (arguments.minutes or 10.0), steps=(2, 4), attack_seconds=25.0, fault_seconds=12.0)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, run_folder = Path(folder) / "model", Path(folder) / "run"
        run_folder.mkdir()
        model = arguments.model or (str(make_checkpoint(checkpoint, is_tiny=True)) if arguments.quick else BUNDLED)
        try:
            found = Run(run_folder, plan, arguments.seed).take(model)
        except (ServerFailedError, WrongAnswerError) as error:
            print(error, file=sys.stderr)
            return 1
        log = (run_folder / "service.log").read_bytes()
    (arguments.out / "chaos.log").write_bytes(log)
    verdicts = chaos_verdicts(found)
    facts["model"] = "tiny, random weights" if arguments.quick and not arguments.model else Path(model).name
    facts["traffic"] = f"{NUM_CLIENTS} clients for {plan.seconds:g} s, seed {arguments.seed}"
    facts["command"] = shlex.join(["python", "-m", "benchmarks.chaos", *sys.argv[1:]])
    facts["took"] = f"{time.perf_counter() - started_at:.0f} s"
    markdown = chaos_markdown(found, verdicts, facts)
    (arguments.out / "chaos.md").write_text(markdown + "\n", encoding="utf-8")
    document = json.dumps(chaos_document(found, verdicts, facts), indent=1)
    (arguments.out / "chaos.json").write_text(document + "\n", encoding="utf-8")
    print(markdown)
    for fault in faults_of(found.outcomes):
        print(fault, file=sys.stderr)
    return 0 if all_hold(verdicts) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Workers that are killed, stopped and made to fail under load.")
    parser.add_argument("--out", type=Path, required=True, help="folder for chaos.json, chaos.md and the service's log")
    parser.add_argument("--minutes", type=float, help="of traffic with faults; by default 10, with --quick 0.75")
    parser.add_argument("--quick", action="store_true", help="a tiny model, and faults in quick succession")
    parser.add_argument("--model", help="as in INPAINT_MODEL; by default the bundled one")
    parser.add_argument("--seed", type=int, default=1, help="of traffic and faults")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
