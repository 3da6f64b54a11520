"""What a run of `benchmarks.chaos` saw, and whether the service kept its promises in it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.assassin import Attack
from benchmarks.chaos_log import RECOVERY_SECONDS, WorkersLog
from benchmarks.fault_plan import CODE_OF_KIND, Fault
from benchmarks.load import GOOD
from benchmarks.mixed import (
    HUNG_UP,
    Outcome,
    faults_of,
    is_answered,
    num_good,
    num_unanswered,
    num_wrong,
    tally,
)
from benchmarks.paced import OVERLOADED, SERVER_ERROR
from benchmarks.report import words
from benchmarks.tables import table
from benchmarks.verdicts import Verdict, equals, verdict_table

NOT_READY, WORKER_LOST = "503 not_ready", "503 worker_lost"
DOCUMENTED = frozenset({OVERLOADED, NOT_READY, WORKER_LOST, *CODE_OF_KIND.values()})
LOSSES_OF_WORKER_LOST = 2
"""A request is run again after the first worker that it is lost with."""


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
        equals("processes left in the end", found.num_processes_left, 0),
        equals("temporary files left, beside those at the start", len(_new_files(found)), 0),
        Verdict("exit status after SIGTERM", "0", str(found.exit_status), found.exit_status == 0),
        Verdict(
            "faults were injected, from inside and outside",
            "yes",
            f"{len(found.faults)} and {len(found.attacks)}",
            bool(found.faults and found.attacks),
        ),
    ]


def _new_files(found: Chaos) -> set[str]:
    return (set(found.after.files) | set(found.files_left)) - set(found.before.files)


def injected(found: Chaos) -> dict[str, int]:
    """How many faults of each kind."""
    return dict(Counter([one.kind for one in found.attacks] + [one.kind for one in found.faults]).most_common())


def chaos_markdown(found: Chaos, verdicts: Sequence[Verdict], facts: Mapping[str, Any]) -> str:
    """The report."""
    sent = [["sent", str(len(found.outcomes))], ["painted, as each was alone", str(num_good(found.outcomes))]]
    answers = [[outcome, str(count)] for outcome, count in tally(found.outcomes).items() if outcome != GOOD]
    recoveries = [one.seconds for one in found.log.recoveries if one.num_losses == 1]
    beside = [one.beside_seconds for one in found.log.recoveries if one.num_losses == 1]
    summary: dict[str, Any] = {"worker losses": found.log.num_losses, "worker processes": len(found.log.pids)}
    if recoveries:
        summary |= {
            "ready after a loss, longest": f"{max(recoveries):.1f} s",
            "of it beside loading and pauses, longest": f"{max(beside):.1f} s",
        }
    parts = [
        verdict_table(verdicts),
        table(("requests", "count"), sent + answers),
        table(("fault", "injected"), [[kind, str(count)] for kind, count in injected(found).items()]),
        "\n".join(f"- {name}: {words(value)}" for name, value in {**summary, **facts}.items()),
    ]
    return "\n\n".join(parts)


def chaos_document(found: Chaos, verdicts: Sequence[Verdict], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Everything, for `json.dump`."""
    log = asdict(found.log) | {"ready": sorted(found.log.ready)}
    return {
        "facts": dict(facts),
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "answers": tally(found.outcomes),
        "unexpected": faults_of(found.outcomes),
        "injected": injected(found),
        **asdict(found),
        "log": log,
    }
