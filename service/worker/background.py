"""Work beside the loop: jobs that run in threads of their own, or at once where threads would not help.

A job has two halves: `work` runs anywhere and touches nothing that the loop
changes; `then` is given what it returned, on the loop's thread. So the loop
needs no locks.
"""

import itertools
import math
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from enum import Enum
from functools import partial
from types import TracebackType
from typing import Protocol, Self, TypeVar

from service.worker.faults import DeviceLost

_T = TypeVar("_T")

CLOSE_SECONDS = 2.0
"""How long a job that is under way at the end may take; a thread that hangs is left to the process's exit."""


class Lane(Enum):
    """Jobs of one lane run one at a time."""

    PREPARE = "prepare"
    FINISH = "finish"


class Jobs(Protocol):
    """Where jobs run. Used as a context manager, on the loop's thread alone."""

    @property
    def are_background(self) -> bool:
        """Whether jobs run while the loop goes on."""

    @property
    def is_idle(self) -> bool:
        """Whether every job has been collected."""

    @property
    def wake_ups(self) -> Sequence[socket.socket]:
        """What `multiprocessing.connection.wait` should watch: readable when a job has ended."""

    def submit(
        self, lane: Lane, work: Callable[[], _T], then: Callable[[_T], None], *, is_courtesy: bool = False
    ) -> None:
        """Do `work` after the lane's earlier jobs, and `then` when it is collected.

        Args:
            lane: Whose turn it waits for.
            work: The job; what it raises is raised again on the loop's thread.
            then: Given what `work` returned.
            is_courtesy: Jobs that are none go first.
        """

    def collect(self) -> None:
        """Do the `then` of every job that has ended, in the order of their ends.

        Raises:
            BaseException: Whatever a job raised.
            DeviceLost: A job takes so long that it is taken to hang.
        """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class InlineJobs(AbstractContextManager["InlineJobs"]):
    """Every job runs where it is submitted: on a CPU, threads would only take turns with the running batch."""

    are_background = False
    is_idle = True
    wake_ups = ()

    def submit(
        self, lane: Lane, work: Callable[[], _T], then: Callable[[_T], None], *, is_courtesy: bool = False
    ) -> None:
        """Do it now."""
        del lane, is_courtesy
        then(work())

    def collect(self) -> None:
        """Nothing is left to collect."""

    def __exit__(self, *_: object) -> None:
        """Nothing to end."""


class ThreadedJobs:
    """One thread for each lane, from `with` to its end.

    Args:
        max_job_seconds: A job that takes longer is taken to hang: it waits for a device that never answers. The loop
            goes on meanwhile, so that nobody else would notice.
    """

    are_background = True

    def __init__(self, max_job_seconds: float = math.inf) -> None:
        self._max_job_seconds = max_job_seconds
        self._bell = _Bell()
        self._ended: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._num_pending = 0
        self._lanes = {lane: _LaneThread(lane.value, self._end) for lane in Lane}

    @property
    def is_idle(self) -> bool:
        """Whether every job has been collected."""
        return self._num_pending == 0

    @property
    def wake_ups(self) -> Sequence[socket.socket]:
        """Readable when a job has ended."""
        return (self._bell.ear,)

    def submit(
        self, lane: Lane, work: Callable[[], _T], then: Callable[[_T], None], *, is_courtesy: bool = False
    ) -> None:
        """Hand it to the lane's thread."""
        self._num_pending += 1
        self._lanes[lane].put(partial(_run, work, then), is_courtesy=is_courtesy)

    def collect(self) -> None:
        """Do the `then` of every job that has ended; those that hang lose the device."""
        for lane, thread in self._lanes.items():
            if thread.seconds_at_job > self._max_job_seconds:
                raise DeviceLost(f"{lane.value}: a job has not ended within {self._max_job_seconds:g} s")
        # First: a job that ends from here on rings again.
        self._bell.hush()
        with suppress(queue.Empty):
            while True:
                end = self._ended.get_nowait()
                self._num_pending -= 1
                end()

    def _end(self, end: Callable[[], None]) -> None:
        """Called by the lanes' threads."""
        self._ended.put(end)
        self._bell.ring()

    def __enter__(self) -> Self:
        for lane in self._lanes.values():
            lane.start()
        return self

    def __exit__(self, *_: object) -> None:
        for lane in self._lanes.values():
            lane.stop()
        for lane in self._lanes.values():
            lane.join(CLOSE_SECONDS)
        self._bell.close()


class _LaneThread(threading.Thread):
    """Does one job after the other. A daemon: should one hang, the process can still end.

    Args:
        name: The lane's.
        end: Given each job's second half.
    """

    def __init__(self, name: str, end: Callable[[Callable[[], None]], None]) -> None:
        super().__init__(name=name, daemon=True)
        self._end = end
        self._began_at: float | None = None
        self._numbers = itertools.count()
        # (rank, number, job): by rank, then in order. The end of the thread outranks every job.
        self._jobs: queue.PriorityQueue[tuple[int, int, Callable[[], Callable[[], None]] | None]] = (
            queue.PriorityQueue()
        )

    @property
    def seconds_at_job(self) -> float:
        """How long the job under way has taken so far; 0 where none is. Asked by other threads."""
        began_at = self._began_at
        return 0.0 if began_at is None else time.monotonic() - began_at

    def put(self, job: Callable[[], Callable[[], None]], *, is_courtesy: bool) -> None:
        """Do it when its turn comes."""
        self._jobs.put((2 if is_courtesy else 1, next(self._numbers), job))

    def stop(self) -> None:
        """End after the job under way; those that wait are dropped."""
        self._jobs.put((0, next(self._numbers), None))

    def run(self) -> None:
        """Work until stopped."""
        while (job := self._jobs.get()[2]) is not None:
            self._began_at = time.monotonic()
            ended = job()
            self._began_at = None
            self._end(ended)
            del ended
            del job  # What it holds must not stay until the next one comes.


def _run(work: Callable[[], _T], then: Callable[[_T], None]) -> Callable[[], None]:
    """A job's first half; returns its second."""
    try:
        return partial(then, work())
    except BaseException as error:  # noqa: BLE001 - raised again on the loop's thread, which ends by it
        return partial(_raise, error)


def _raise(error: BaseException) -> None:
    raise error


class _Bell:
    """Wakes the loop out of `multiprocessing.connection.wait`; ringing it never blocks and never fails.

    Attributes:
        ear: Readable once it has been rung.
    """

    def __init__(self) -> None:
        self.ear, self._clapper = socket.socketpair()
        self.ear.setblocking(False)
        self._clapper.setblocking(False)

    def ring(self) -> None:
        """Called by any thread. A full socket has been heard already, a closed one is not listened to."""
        with suppress(OSError):
            self._clapper.send(b"\0")

    def hush(self) -> None:
        """Forget every ring so far."""
        with suppress(BlockingIOError):
            while self.ear.recv(4096):
                pass

    def close(self) -> None:
        """Let go of the sockets."""
        self.ear.close()
        self._clapper.close()
