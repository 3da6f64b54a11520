"""What is to go wrong in a worker, and when: drawn from a seed, and noted before it is done."""

import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PLAN_VARIABLE = "CHAOS_PLAN"
"""Environment variable of the benchmark's own worker: the folder of its plan."""

TOO_LARGE = "out of memory, a batch"
TOO_LARGE_ALONE = "out of memory, one request"
NOT_A_NUMBER = "not a number"
FAILS_ONCE = "an exception, once"
FAILS_ALONE = "an exception, one request"
EXITS = "exit in a step"
LOSES_DEVICE = "device lost"
HANGS = "hangs in a step"

KINDS = (TOO_LARGE, TOO_LARGE_ALONE, NOT_A_NUMBER, FAILS_ONCE, FAILS_ALONE, EXITS, LOSES_DEVICE, HANGS)
WEIGHTS = (2, 2, 4, 4, 4, 1, 1, 1)

BEFORE, WITHIN = "before the model", "within the model"
PLACES = (BEFORE, WITHIN)

CODE_OF_KIND = {
    TOO_LARGE: "507 out_of_memory",
    TOO_LARGE_ALONE: "507 out_of_memory",
    NOT_A_NUMBER: "500 nan_output",
    FAILS_ONCE: "500 internal",
    FAILS_ALONE: "500 internal",
}
"""What the victims of a fault are answered, where there are any."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault that was injected.

    Attributes:
        at: Unix time.
        pid: Of the worker.
        kind: One of `KINDS`.
        place: One of `PLACES`.
        num_requests: Requests of the batch that it struck.
        victims: Request ids that may fail for it; the others of the batch may not.
    """

    at: float
    pid: int
    kind: str
    place: str
    num_requests: int
    victims: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """How often workers fail.

    Attributes:
        folder: Holds the plan, the file that lets faults begin, and the notes.
        seed: Of what goes wrong.
        interval_seconds: Mean time from fault to fault of a worker that has work.
    """

    folder: Path
    seed: int
    interval_seconds: float

    def write(self) -> None:
        """For the workers."""
        plan = {"seed": self.seed, "interval_seconds": self.interval_seconds}
        (self.folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "FaultPlan":
        """What was written there."""
        return cls(folder, **json.loads((folder / "plan.json").read_text(encoding="utf-8")))

    # --- whether to fail at all --------------------------------------------------------

    @property
    def _begun(self) -> Path:
        return self.folder / "begun"

    @property
    def has_begun(self) -> bool:
        """Whether faults may strike now."""
        return self._begun.exists()

    def begin(self) -> None:
        """From now on workers fail."""
        self._begun.touch()

    def end(self) -> None:
        """No longer."""
        self._begun.unlink(missing_ok=True)

    # --- notes --------------------------------------------------------------------------

    def number_of_start(self) -> int:
        """Note that this process has started; returns how many did before it."""
        _append(self.folder / "starts", str(os.getpid()))
        starts = (self.folder / "starts").read_text(encoding="utf-8").split()
        return starts.index(str(os.getpid()))

    def note(self, kind: str, place: str, request_ids: Sequence[str], victims: Sequence[str]) -> None:
        """Note a fault that is about to strike this process."""
        fault = {"at": time.time(), "pid": os.getpid(), "kind": kind, "place": place}
        fault |= {"num_requests": len(request_ids), "victims": list(victims)}
        _append(self.folder / "faults.jsonl", json.dumps(fault))

    def noted(self) -> list[Fault]:
        """All faults so far."""
        path = self.folder / "faults.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [Fault(**{**(fault := json.loads(line)), "victims": tuple(fault["victims"])}) for line in lines]


@dataclass(frozen=True, slots=True)
class Strike:
    """The next fault.

    Attributes:
        wait_seconds: From the one before.
        kind: One of `KINDS`.
        place: One of `PLACES`.
        victim: Which request of the batch, from 0 to 1.
    """

    wait_seconds: float
    kind: str
    place: str
    victim: float


class Strikes:
    """The faults of one run of one worker.

    Args:
        plan: How often.
        number: Of the run, counted over all workers.
    """

    def __init__(self, plan: FaultPlan, number: int) -> None:
        self._draw = random.Random(f"{plan.seed} {number}")  # noqa: S311 - no secret
        self._rate = 1 / plan.interval_seconds

    def next(self) -> Strike:
        """Draw one."""
        draw = self._draw
        return Strike(draw.expovariate(self._rate), draw.choices(KINDS, WEIGHTS)[0], draw.choice(PLACES), draw.random())


def _append(path: Path, line: str) -> None:
    """One write, so that lines of several processes do not mix, and that it is there before a process dies."""
    with path.open("ab", buffering=0) as file:
        file.write(f"{line}\n".encode())
