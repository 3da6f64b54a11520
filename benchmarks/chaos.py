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
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.assassin import Assassin, Attack
from benchmarks.bad_requests import bad_requests
from benchmarks.cases import Known, WrongAnswerError, mixed_cases, served_model, take_references
from benchmarks.chaos_log import RECOVERY_SECONDS, WorkersLog, read_log
from benchmarks.checkpoints import make_checkpoint
from benchmarks.exchange import Address, address_of, exchange
from benchmarks.fault_plan import CODE_OF_KIND, PLAN_VARIABLE, Fault, FaultPlan
from benchmarks.load import GOOD
from benchmarks.mixed import (
    HUNG_UP,
    MixedTraffic,
    Outcome,
    faults_of,
    is_answered,
    num_good,
    num_unanswered,
    num_wrong,
    tally,
)
from benchmarks.paced import OVERLOADED, SERVER_ERROR
from benchmarks.report import machine_facts, words
from benchmarks.scrape import scrape
from benchmarks.servers import Server, ServerFailedError, Where, inpaint_service
from benchmarks.tables import table
from benchmarks.verdicts import Verdict, all_hold, equals, verdict_table

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
POLL_SECONDS = 0.2

NOT_READY, WORKER_LOST = "503 not_ready", "503 worker_lost"
DOCUMENTED = frozenset({OVERLOADED, NOT_READY, WORKER_LOST, *CODE_OF_KIND.values()})
LOSSES_OF_WORKER_LOST = 2
"""A request is run again after the first worker that it is lost with."""


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


@dataclass(frozen=True, slots=True)
class Left:
    """What there is at rest.

    Attributes:
        descriptors: Of the API process.
        processes: That it started, and they.
        files: In the service's temporary folder.
    """

    descriptors: int
    processes: int
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Chaos:
    """What was seen.

    Attributes:
        outcomes: Of every request sent while things went wrong.
        faults: Injected inside.
        attacks: From outside.
        log: What the service said of its workers.
        is_ready_again: Whether both workers were ready in the end.
        num_cases: Requests sent once more in the end, alone.
        num_good_in_the_end: Those of them that were answered as before.
        before: At rest, before anything went wrong.
        after: At rest, in the end.
        num_processes_left: When the service had ended.
        files_left: In its temporary folder then.
        exit_status: Its own, after SIGTERM; None when it had to be killed.
    """

    outcomes: tuple[Outcome, ...]
    faults: tuple[Fault, ...]
    attacks: tuple[Attack, ...]
    log: WorkersLog
    is_ready_again: bool
    num_cases: int
    num_good_in_the_end: int
    before: Left
    after: Left
    num_processes_left: int
    files_left: tuple[str, ...]
    exit_status: int | None


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
        cases = mixed_cases(served.size, self._plan.steps, served.adapters, self._seed)
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
            num_processes_left=_num_in_session(server.pid),
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
        give_up_at = time.monotonic() + READY_SECONDS
        async with httpx.AsyncClient(base_url=server.base_url, trust_env=False, timeout=30.0) as client:
            while time.monotonic() < give_up_at:
                workers = (await client.get("/readyz")).json()["workers"]
                if all(worker["state"] == "ready" for worker in workers):
                    return True
                await asyncio.sleep(POLL_SECONDS)
        return False

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


def _num_in_session(leader: int) -> int:
    """Processes of the session that a process has led."""
    count = 0
    for pid in psutil.pids():
        try:
            count += os.getsid(pid) == leader
        except (ProcessLookupError, PermissionError):
            continue
    return count


# --- the verdicts -----------------------------------------------------------------------


def is_explained(outcome: Outcome, faults: Sequence[Fault], num_losses: int) -> bool:
    """Whether an answer of 5xx is one that the faults account for."""
    if outcome.outcome in (NOT_READY, WORKER_LOST):
        return num_losses >= (LOSSES_OF_WORKER_LOST if outcome.outcome == WORKER_LOST else 1)
    if outcome.outcome in CODE_OF_KIND.values():
        return any(
            CODE_OF_KIND.get(fault.kind) == outcome.outcome and outcome.request_id in fault.victims for fault in faults
        )
    return outcome.fault is None  # A deadline that the client itself has set.


def chaos_verdicts(found: Chaos) -> list[Verdict]:
    """What is promised whatever goes wrong."""
    owed = [one for one in found.outcomes if one.outcome != HUNG_UP]
    errors = [one for one in owed if one.status is not None and one.status >= SERVER_ERROR]
    unexplained = [one for one in errors if not is_explained(one, found.faults, found.log.num_losses)]
    judged = [one for one in found.log.recoveries if one.num_losses == 1]
    late = [one for one in judged if not one.is_in_time]
    return [
        equals("requests answered exactly once, of those that waited", sum(map(is_answered, owed)), len(owed)),
        equals("unanswered", num_unanswered(found.outcomes), 0),
        equals("wrong pictures and wrong refusals", num_wrong(found.outcomes), 0),
        equals("answers of 5xx that no fault accounts for", len(unexplained), 0),
        equals("unexpected answers of any kind", sum(one.fault is not None for one in found.outcomes), 0),
        Verdict(
            f"ready again within load time + {RECOVERY_SECONDS:g} s (+ the pause after repeated losses)",
            "all",
            f"{len(judged) - len(late)} of {len(judged)}",
            bool(judged) and not late,
        ),
        Verdict("both workers ready in the end", "yes", "yes" if found.is_ready_again else "no", found.is_ready_again),
        equals("right answers in the end, each request alone", found.num_good_in_the_end, found.num_cases),
        equals("processes at rest", found.after.processes, found.before.processes),
        Verdict(
            "descriptors of the API process at rest",
            f"at most {found.before.descriptors}",
            str(found.after.descriptors),
            found.after.descriptors <= found.before.descriptors,
        ),
        equals("temporary files at rest, beside those at the start", len(_new_files(found)), 0),
        equals("processes left", found.num_processes_left, 0),
        equals("temporary files left", len(found.files_left), 0),
        Verdict("exit status after SIGTERM", "0", str(found.exit_status), found.exit_status == 0),
        Verdict(
            "faults were injected, from inside and outside",
            "yes",
            f"{len(found.faults)} and {len(found.attacks)}",
            bool(found.faults and found.attacks),
        ),
    ]


def _new_files(found: Chaos) -> set[str]:
    return set(found.after.files) - set(found.before.files)


def injected(found: Chaos) -> dict[str, int]:
    """How many faults of each kind."""
    return dict(Counter([one.kind for one in found.attacks] + [one.kind for one in found.faults]).most_common())


def chaos_markdown(found: Chaos, verdicts: Sequence[Verdict], facts: dict[str, Any]) -> str:
    """The report."""
    sent = [["sent", str(len(found.outcomes))], ["painted, as each was alone", str(num_good(found.outcomes))]]
    answers = [[outcome, str(count)] for outcome, count in tally(found.outcomes).items() if outcome != GOOD]
    recoveries = [one.seconds for one in found.log.recoveries if one.num_losses == 1]
    beside = [one.beside_seconds for one in found.log.recoveries if one.num_losses == 1]
    summary = {"worker losses": found.log.num_losses, "worker processes": len(found.log.pids)}
    if recoveries:
        summary |= {
            "ready after a loss, longest": f"{max(recoveries):.1f} s",
            "of it beside loading and pauses, longest": f"{max(beside):.1f} s",
        }
    parts = [
        verdict_table(verdicts),
        table(("requests", "count"), sent + answers),
        table(("fault", "injected"), [[kind, str(count)] for kind, count in injected(found).items()]),
        "\n".join(f"- {name}: {words(value)}" for name, value in (summary | facts).items()),
    ]
    return "\n\n".join(parts)


def chaos_document(found: Chaos, verdicts: Sequence[Verdict], facts: dict[str, Any]) -> dict[str, Any]:
    """Everything, for `json.dump`."""
    log = asdict(found.log) | {"ready": sorted(found.log.ready)}
    return {
        "facts": facts,
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "answers": tally(found.outcomes),
        "unexpected": faults_of(found.outcomes),
        "injected": injected(found),
        **asdict(found),
        "log": log,
    }


def main() -> int:
    """Let things go wrong, report; 0 when every promise holds."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # So that the service ends, too.
    arguments.out.mkdir(parents=True, exist_ok=True)
    started_at = time.perf_counter()
    facts: dict[str, Any] = machine_facts()
    if arguments.quick:
        plan = Plan(60 * (arguments.minutes or 0.75), steps=(4, 12), attack_seconds=6.0, fault_seconds=3.0)
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
