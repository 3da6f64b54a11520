"""One run of one worker process: start, send, kill, join. When to do so is the supervisor's business."""

import asyncio
import atexit
import logging
import multiprocessing
import os
import pkgutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import parent_process, resource_tracker
from multiprocessing.connection import Connection

from service.engine.frames import make_pipe
from service.engine.transport import Transport
from service.logs import configure_logging
from service.messages import CannotStart, Command, Report
from service.settings import Settings

logger = logging.getLogger(__name__)

# A terminal's Ctrl-C and a service manager's SIGTERM reach the whole process
# group; only the API process may act on them, or accepted work would be lost.
_GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_JOIN_POLL_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What a worker process is started with, the same for all of its runs.

    Attributes:
        name: "0", "1", …
        device: Where it computes, e.g. "cpu" or "cuda:0".
        cpu_threads: Threads of a worker on a CPU.
        settings: The operator's settings.
        target: Dotted name, "package.module:function", of what runs in the child; it is
            called with the child's end of the pipe, `settings`, `device` and `cpu_threads`.
    """

    name: str
    device: str
    cpu_threads: int
    settings: Settings
    target: str


class WorkerProcess:
    """A spawned worker and the pipe to it. Must be made on a running event loop.

    Args:
        spec: What to start.
        on_report: Called on the event loop with each report.

    Raises:
        OSError: The process or its pipe could not be made.
    """

    def __init__(self, spec: WorkerSpec, on_report: Callable[[Report], None]) -> None:
        context = multiprocessing.get_context("spawn")
        name = f"inpaint-worker-{spec.name}"
        ours, theirs = make_pipe()
        self._process = context.Process(target=_child, args=(spec, theirs), name=name)
        try:
            _start_unharmed_by_group_signals(self._process)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        # Without this the interpreter would wait at exit for a child that waits for its pipe to close.
        atexit.register(self.kill)
        self.pid = self._process.pid
        self._is_gone = False
        self.started_at = time.monotonic()
        self._transport = Transport(ours, name, on_report)

    @property
    def at_eof(self) -> asyncio.Future[None]:
        """Done when the worker's end of the pipe is closed, which is when it is dead or as good as."""
        return self._transport.at_eof

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return not self._is_gone and self._process.is_alive()

    def send(self, command: Command) -> None:
        """Queue a command; never blocks."""
        self._transport.send(command)

    def hang_up(self) -> None:
        """Close the pipe: nothing is heard of the worker any more."""
        self._transport.hang_up()

    def kill(self) -> None:
        """SIGKILL. It also ends a stopped process and one that is stuck in a driver call."""
        if self.is_alive:
            self._process.kill()

    async def join(self, timeout_seconds: float) -> str | None:
        """Wait for the process to be gone; then neither threads nor descriptors of it are left.

        Args:
            timeout_seconds: How long the process may take to exit.

        Returns:
            How it ended, e.g. "killed by SIGKILL" or "exited with status 1"; None if it still runs.
        """
        give_up_at = time.monotonic() + timeout_seconds
        while self.is_alive:
            if time.monotonic() >= give_up_at:
                return None
            await asyncio.sleep(_JOIN_POLL_SECONDS)
        await self._transport.close()
        how = _describe(self._process.exitcode)
        self._is_gone = True
        self._process.close()
        atexit.unregister(self.kill)
        return how


def _start_unharmed_by_group_signals(process: multiprocessing.context.SpawnProcess) -> None:
    """Start with the signals blocked that the child ignores, but only once its interpreter is up."""
    resource_tracker.ensure_running()  # Else start() would do it, and reset the mask.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _describe(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"exited with status {exitcode}"
    try:
        return f"killed by {signal.Signals(-exitcode).name}"
    except ValueError:
        return f"killed by signal {-exitcode}"


# --- in the child ------------------------------------------------------------------


def _child(spec: WorkerSpec, connection: Connection) -> None:
    """What a worker process runs first; it imports the worker only here, so that the API process never does."""
    for number in _GROUP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _GROUP_SIGNALS)
    threading.Thread(target=_exit_with_parent, name="exit-with-parent", daemon=True).start()
    configure_logging(spec.settings)
    if spec.device.startswith("cpu"):
        # libgomp's threads otherwise spin at every barrier: on cores that others use too, a step takes
        # five times as long.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        run = pkgutil.resolve_name(spec.target)
    except ImportError as error:
        connection.send(CannotStart(f"the worker cannot be imported: {error}"))
        return
    try:
        run(connection, spec.settings, spec.device, spec.cpu_threads)
    except Exception:
        # Python itself would print all that the exception says, which may be a client's text.
        logger.exception("worker %s (%s) failed", spec.name, spec.device)
        connection.close()  # To leave may take long, or never end, where a device hangs: its requests must not wait.
        sys.exit(1)


def _exit_with_parent() -> None:
    """End this process when the API process is gone, also while it loads and does not look at its pipe."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
