"""Keeps one worker process alive on each device.

A worker's life is a sequence of *runs*: start, load, ready, lost. Whatever the
end of a run, the next one starts after a pause that grows as long as runs end
early. Only the first run of all workers may fail the service as a whole, and
that is the engine's judgement.
"""

import asyncio
import logging
import time
from typing import Protocol

from service.engine.dispatch import Load
from service.engine.process import WorkerProcess, WorkerSpec
from service.messages import CannotStart, Command, Drain, Loading, Ping, Ready, Report

logger = logging.getLogger(__name__)

MIN_BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 30.0
HEALTHY_SECONDS = 60.0

_WATCH_SECONDS = 0.25
_EXIT_SECONDS = 0.5
_KILL_SECONDS = 10.0


class Observer(Protocol):
    """Who is told about a worker; on the event loop."""

    def worker_ready(self, worker: "Worker") -> None:
        """The worker has loaded and takes requests."""

    def worker_reported(self, worker: "Worker", report: Report) -> None:
        """A ready worker says something about its requests."""

    def worker_lost(self, worker: "Worker", load: Load) -> None:
        """The worker was ready and is gone, with all that it had to do."""

    def worker_never_ready(self, worker: "Worker", reason: str) -> None:
        """A run ended before the worker was ready; `reason` is for the operator."""

    def worker_restarted(self, worker: "Worker") -> None:
        """The worker's process is about to be started again."""


class Backoff:
    """Seconds to wait before the next start."""

    def __init__(self) -> None:
        self._next_seconds = MIN_BACKOFF_SECONDS

    def after(self, healthy_seconds: float) -> float:
        """The pause after a run that was ready for so long."""
        if healthy_seconds >= HEALTHY_SECONDS:
            self._next_seconds = MIN_BACKOFF_SECONDS
        pause = self._next_seconds
        self._next_seconds = min(2 * pause, MAX_BACKOFF_SECONDS)
        return pause


class Watchdog:
    """Counts a worker's silence.

    Only time that this process was awake counts: after a pause of the whole
    machine nobody has had a chance to speak.

    Args:
        now: `time.monotonic()`.
    """

    def __init__(self, now: float) -> None:
        self.silent_seconds = 0.0
        self._looked_at = now

    def heard(self) -> None:
        """The worker gave a sign of life."""
        self.silent_seconds = 0.0

    def look(self, now: float) -> float:
        """Seconds of silence up to now; to be called every `_WATCH_SECONDS`."""
        self.silent_seconds += min(now - self._looked_at, 2 * _WATCH_SECONDS)
        self._looked_at = now
        return self.silent_seconds


class Worker:
    """One device's worker, over all of its runs.

    Args:
        spec: What to start, over and over.
        observer: Told of everything.
    """

    def __init__(self, spec: WorkerSpec, observer: Observer) -> None:
        self.name = spec.name
        self.device = spec.device
        self.state = "loading: starting"
        self.restarts = 0
        self.ready: Ready | None = None
        """The latest `Ready`, also of a run that is over."""
        self.load: Load | None = None
        """What it has to do; None unless it is ready."""
        self._spec = spec
        self._observer = observer
        self._process: WorkerProcess | None = None
        self._backoff = Backoff()
        self._watchdog = Watchdog(time.monotonic())
        self._num_pings = 0
        self._is_ping_unanswered = False
        self._ready_at: float | None = None
        self._fault: str | None = None
        self._cannot_start: str | None = None
        self._is_last_run = False
        self._stop_now = asyncio.get_running_loop().create_future()

    @property
    def pid(self) -> int | None:
        """Process id; None between runs."""
        return self._process.pid if self._process is not None else None

    @property
    def is_ready(self) -> bool:
        """Whether it takes requests."""
        return self.load is not None and not self._is_last_run

    def send(self, command: Command) -> None:
        """Queue a command; it is dropped when the worker is gone, and `worker_lost` follows."""
        if self._process is not None:
            self._process.send(command)

    def stop(self, drain_seconds: float = 0.0) -> None:
        """End the run and start no other; `keep_alive` returns when the process is gone. Idempotent.

        Args:
            drain_seconds: How long a ready worker may take to finish what it has.
        """
        is_drainable = self.is_ready and drain_seconds > 0
        self._is_last_run = True
        if is_drainable:
            self.state = "draining"
            self.send(Drain())
            asyncio.get_running_loop().call_later(drain_seconds, self._end_run)
        else:
            self._end_run()

    def _end_run(self) -> None:
        if not self._stop_now.done():
            self._stop_now.set_result(None)

    # --- keep alive ---------------------------------------------------------------

    async def keep_alive(self) -> None:
        """Run after run until `stop`."""
        while not self._stop_now.done():
            reason = await self._run()
            healthy_seconds = time.monotonic() - self._ready_at if self._ready_at is not None else 0.0
            self._ready_at = None
            if self._is_last_run:
                logger.info("worker %s (%s) stopped: %s", self.name, self.device, reason)
                break
            pause = self._backoff.after(healthy_seconds)
            logger.warning("worker %s (%s) lost: %s; starting it again in %g s", self.name, self.device, reason, pause)
            await asyncio.wait({self._stop_now}, timeout=pause)
            if not self._stop_now.done():
                self.restarts += 1
                self._observer.worker_restarted(self)
        self.state = "stopped"

    async def _run(self) -> str:
        """One run; returns in one line how it ended."""
        self._fault = self._cannot_start = None
        self.state = "loading: starting"
        try:
            process = WorkerProcess(self._spec, self._on_report)
        except OSError as error:
            return self._end_of_run(f"its process could not be started: {error.strerror}")
        self._process = process
        logger.info("worker %s (%s) started, pid %s", self.name, self.device, process.pid)
        try:
            await self._watch(process)
        finally:
            how = await self._bury(process)
        return self._end_of_run(how)

    async def _watch(self, process: WorkerProcess) -> None:
        """Until the process is gone, overdue, silent for too long, or to be stopped."""
        self._watchdog = Watchdog(time.monotonic())
        while True:
            await asyncio.wait({process.at_eof, self._stop_now}, timeout=_WATCH_SECONDS)
            if process.at_eof.done() or self._stop_now.done() or not process.is_alive:
                return
            self._fault = self._find_fault(process)
            if self._fault is not None:
                process.kill()
            if self._fault is not None or self._cannot_start is not None:
                return

    def _find_fault(self, process: WorkerProcess) -> str | None:
        """Why a living process has to be replaced; None if it need not be."""
        limit = self._spec.settings.hang_timeout
        now = time.monotonic()
        silent_seconds = self._watchdog.look(now)
        if self.load is None:
            limit = self._spec.settings.load_timeout
            return f"not ready within {limit:g} s" if now - process.started_at > limit else None
        if silent_seconds > limit:
            return f"no sign of life for {limit:g} s"
        if silent_seconds > limit / 4 and not self._is_ping_unanswered:
            self._num_pings += 1
            self._is_ping_unanswered = True
            process.send(Ping(self._num_pings))
        return None

    async def _bury(self, process: WorkerProcess) -> str:
        """Make sure that the process is gone; returns how it went."""
        self._process = None
        self._forget_load()  # First of all: its requests go elsewhere while it may still linger.
        process.hang_up()
        how = await process.join(_EXIT_SECONDS)
        if how is None:
            process.kill()
            how = await process.join(_KILL_SECONDS)
        if how is None:
            logger.error("worker %s, pid %s, survives SIGKILL, and is left alone", self.name, process.pid)
        return self._cannot_start or self._fault or how or "stuck in the kernel"

    def _forget_load(self) -> None:
        self.state = "stopped" if self._is_last_run else "restarting"
        load, self.load = self.load, None
        if load is not None:
            self._observer.worker_lost(self, load)

    def _end_of_run(self, reason: str) -> str:
        if self._ready_at is None and not self._is_last_run:
            self.state = "restarting"
            line = self._cannot_start or f"worker {self.name} ({self.device}) could not load: {reason}"
            self._observer.worker_never_ready(self, line)
        return reason

    # --- what the worker says -------------------------------------------------------

    def _on_report(self, report: Report) -> None:
        if self._process is None:
            return  # The last words of a run that is over.
        self._watchdog.heard()
        self._is_ping_unanswered = False
        match report:
            case Loading(stage):
                self.state = f"loading: {stage}"
                logger.info("worker %s (%s): %s", self.name, self.device, stage)
            case CannotStart(message):
                self._cannot_start = message
            case Ready():
                self._on_ready(report)
            case _:
                self._observer.worker_reported(self, report)

    def _on_ready(self, ready: Ready) -> None:
        self.ready = ready
        self.load = Load(ready)
        self._ready_at = time.monotonic()
        self.state = "draining" if self._is_last_run else "ready"
        logger.info(
            "worker %s (%s) ready after %.1f s: %s, %s, at most %d images at once",
            self.name,
            ready.device,
            ready.load_seconds,
            ready.model.id,
            ready.dtype,
            ready.max_images,
        )
        self._observer.worker_ready(self)
