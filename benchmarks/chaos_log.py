"""What the service's log says of its workers: which process is which, losses, and how long recovery took."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime

CAUSE_SECONDS = 3.0
"""A loss is noted at most so long after what caused it, where that is known: the process has to be gone first."""

RECOVERY_SECONDS = 5.0
"""What a worker may take beside its pause and its loading."""

_LINE = re.compile(r"(\S+) [A-Z]+ worker (\d+) \([^)]*\) (.*)")
_STARTED = re.compile(r"started, pid (\d+)")
_READY = re.compile(r"ready after ([\d.]+) s")
_LOST = re.compile(r"lost: (.*); starting it again in ([\d.]+) s")


@dataclass(frozen=True, slots=True)
class Recovery:
    """One worker's way from ready to ready.

    Attributes:
        worker: Its name.
        reason: Why it was lost, as the log says.
        seconds: From the loss to ready.
        pause_seconds: The pauses before it was started again, together.
        load_seconds: What loading took, by its own account.
        num_losses: How often it was lost on the way; only those of one are judged.
    """

    worker: str
    reason: str
    seconds: float
    pause_seconds: float
    load_seconds: float
    num_losses: int

    @property
    def beside_seconds(self) -> float:
        """What it took beside pause and loading."""
        return self.seconds - self.pause_seconds - self.load_seconds

    @property
    def is_in_time(self) -> bool:
        """Whether it took no longer than promised."""
        return self.beside_seconds <= RECOVERY_SECONDS


@dataclass(slots=True)
class _Life:
    """What is known of a worker so far."""

    pid: int = 0
    is_ready: bool = False
    lost_at: float | None = None
    reason: str = ""
    pauses: float = 0.0
    num_losses: int = 0


@dataclass(frozen=True, slots=True)
class WorkersLog:
    """What a log says in all.

    Attributes:
        recoveries: In the order in which they ended.
        num_losses: Losses of all workers.
        pids: All worker processes there ever were.
        current: Process of each worker, by name.
        ready: Names of workers that are ready at the end.
    """

    recoveries: tuple[Recovery, ...]
    num_losses: int
    pids: tuple[int, ...]
    current: dict[str, int]
    ready: frozenset[str]


def read_log(text: str, causes: Mapping[int, float]) -> WorkersLog:
    """Follow the workers through a log.

    Args:
        text: The service's log, in its text form.
        causes: Process -> Unix time at which it was killed, where that is known.
    """
    lives: dict[str, _Life] = {}
    recoveries: list[Recovery] = []
    pids: list[int] = []
    num_losses = 0
    for at, worker, message in _lines(text):
        life = lives.setdefault(worker, _Life())
        if found := _STARTED.match(message):
            life.pid, life.is_ready = int(found[1]), False
            pids.append(life.pid)
        elif found := _LOST.match(message):
            num_losses += 1
            life.is_ready = False
            life.num_losses += 1
            life.pauses += float(found[2])
            if life.lost_at is None:
                cause = causes.get(life.pid, at)
                life.lost_at = cause if 0 <= at - cause <= CAUSE_SECONDS else at
                life.reason = found[1]
        elif found := _READY.match(message):
            if life.lost_at is not None:
                recoveries.append(
                    Recovery(worker, life.reason, at - life.lost_at, life.pauses, float(found[1]), life.num_losses)
                )
            lives[worker] = _Life(life.pid, is_ready=True)
    return WorkersLog(
        tuple(recoveries),
        num_losses,
        tuple(pids),
        {name: life.pid for name, life in lives.items()},
        frozenset(name for name, life in lives.items() if life.is_ready),
    )


def _lines(text: str) -> Iterator[tuple[float, str, str]]:
    """Unix time, worker and message of each line about a worker."""
    for line in text.splitlines():
        if found := _LINE.match(line):
            yield datetime.fromisoformat(found[1]).timestamp(), found[2], found[3]
