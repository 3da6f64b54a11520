"""The engine: requests in, pictures out; whatever happens to workers in between.

Calls and messages go down (`submit` → queue → worker), futures and reports come
back up. Everything here runs on one event loop; nothing blocks it.
"""

import asyncio
import logging
import time
from itertools import count
from pathlib import Path

from service.engine.adapters import adapter_folder
from service.engine.admission import retry_after
from service.engine.clients import ANONYMOUS, Client
from service.engine.devices import resolve_devices, threads_per_worker
from service.engine.dispatch import Load
from service.engine.handle import Handle
from service.engine.inspection import Inspections
from service.engine.process import WorkerSpec
from service.engine.routing import Router
from service.engine.status import WorkerStatus, status_of
from service.engine.supervisor import Worker
from service.errors import ErrorCode, InpaintError, StartupError
from service.messages import LoraInfo, LoraInspected, ModelInfo, Report
from service.metrics import Metrics
from service.request import NO_TENSORS, InpaintParams, InpaintRequest, InpaintTensors, Pixels
from service.settings import Settings

__all__ = ["ANONYMOUS", "Client", "Engine", "Handle", "WorkerStatus"]

logger = logging.getLogger(__name__)

WORKER_TARGET = "service.worker.process:run"

# What an idle worker needs to read `Drain` and exit.
_EXIT_SECONDS = 5.0
# Assumed until a worker has told how long loading takes.
_USUAL_LOAD_SECONDS = 10.0


class Engine:
    """Admits requests, sends them to workers, and sees that each gets exactly one answer.

    Args:
        settings: The operator's settings.
        metrics: Where to count.
        worker_target: Dotted name of what runs in a worker process.
    """

    def __init__(self, settings: Settings, metrics: Metrics, *, worker_target: str = WORKER_TARGET) -> None:
        self.model: ModelInfo | None = None
        """The served model; None until a worker was ready."""
        self.adapters = adapter_folder(settings)
        """The LoRAs that requests can name."""
        self._settings = settings
        self._metrics = metrics
        self._worker_target = worker_target
        self._workers: list[Worker] = []
        self._keep_alives: list[asyncio.Task[None]] = []
        self._numbers = count(1)
        self._start_failures: dict[str, str] = {}
        self._draining_until: float | None = None
        self._has_given_up = False
        self._first_ready = asyncio.Event()
        self._failed = asyncio.Event()
        self._startup_error: StartupError | None = None
        self._router = Router(settings.queue_size, metrics, self._workers)
        self._inspections = Inspections(self._workers)

    # --- start ----------------------------------------------------------------------

    async def start(self) -> None:
        """Start one worker process per device; they load while this returns."""
        devices = await resolve_devices(self._settings.devices)
        if self.is_draining:
            return  # Stopped before it started.
        cpu_threads = self._settings.cpu_threads or threads_per_worker(devices)
        for index, device in enumerate(devices):
            spec = WorkerSpec(str(index), device, cpu_threads, self._settings, self._worker_target)
            worker = Worker(spec, self)
            self._workers.append(worker)
            self._metrics.worker_lost(worker.name)
            task = asyncio.create_task(worker.keep_alive(), name=f"keep-alive-{worker.name}")
            task.add_done_callback(self._on_keep_alive_done)
            self._keep_alives.append(task)

    async def wait_ready(self) -> None:
        """Wait until a worker is ready.

        Raises:
            StartupError: No worker can start.
        """
        waits = [asyncio.ensure_future(event.wait()) for event in (self._first_ready, self._failed)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self._startup_error is not None:
            raise self._startup_error

    async def wait_failed(self) -> StartupError:
        """Wait until the service cannot go on; the error says why in one line. For most services, for ever."""
        await self._failed.wait()
        return self._startup_error or StartupError("the service failed")

    @property
    def is_ready(self) -> bool:
        """Whether a worker takes requests now."""
        return not self.is_draining and any(worker.is_ready for worker in self._workers)

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused for good."""
        return self._draining_until is not None

    @property
    def drain_seconds_left(self) -> float:
        """What is left of the drain time; 0 where nothing is, or the engine does not drain."""
        return 0.0 if self._draining_until is None else max(0.0, self._draining_until - time.monotonic())

    def workers(self) -> list[WorkerStatus]:
        """Every worker, in the order of the devices."""
        return [status_of(worker) for worker in self._workers]

    # --- admission --------------------------------------------------------------------

    def check_room(self, client: Client = ANONYMOUS) -> None:
        """Refuse early what `submit` would refuse anyway.

        Args:
            client: Who asks.

        Raises:
            InpaintError: DRAINING, NOT_READY or OVERLOADED, with `retry_after_seconds`.
        """
        self._refuse(self._unready() or self._full(client))

    def check_ready(self) -> None:
        """Refuse early what needs a worker, but no place in the queue.

        Raises:
            InpaintError: DRAINING or NOT_READY, with `retry_after_seconds`.
        """
        self._refuse(self._unready())

    def submit(
        self,
        params: InpaintParams,
        image: Pixels,
        mask: Pixels,
        *,
        tensors: InpaintTensors = NO_TENSORS,
        ip_adapter_image: Pixels | None = None,
        timeout_seconds: float | None = None,
        request_id: str,
        client: Client = ANONYMOUS,
    ) -> Handle:
        """Admit a request.

        Args:
            params: Resolved parameters.
            image: (height, width, 3) uint8 RGB at working size.
            mask: (height, width) uint8; ≥ 128 repaints.
            tensors: What the client has computed itself.
            ip_adapter_image: A picture to paint by, of any size.
            timeout_seconds: The client's own limit; the operator's applies anyway.
            request_id: For logs.
            client: Whose it is: clients share the workers and the queue.

        Raises:
            InpaintError: DRAINING, NOT_READY or OVERLOADED, with `retry_after_seconds`.
        """
        self.check_room(client)
        limit = self._settings.timeout if timeout_seconds is None else min(timeout_seconds, self._settings.timeout)
        now = time.monotonic()
        request = InpaintRequest(params, image, mask, now, now + limit, tensors, ip_adapter_image)
        handle = Handle(
            request_id,
            f"{request_id}.{next(self._numbers)}",
            request,
            position_of=self._router.queue.position,
            on_cancel=self._router.cancel,
            client=client,
        )
        handle.deadline_timer = asyncio.get_running_loop().call_later(limit, self._router.expire, handle)
        self._router.add(handle)
        return handle

    def eta_seconds(self, handle: Handle) -> float | None:
        """Estimated time until a request is painted: by what is before it while it waits, then by its own steps.

        None where nobody can tell yet.
        """
        if handle.position is None:
            return handle.eta_seconds
        native_size = self.model.native_size if self.model is not None else 1
        return self._router.eta_seconds(native_size, handle)

    async def inspect_lora(self, path: Path) -> LoraInfo:
        """Have a ready worker look at a file that may become a LoRA.

        Raises:
            InpaintError: `INVALID_LORA`, with the worker's own sentence; `NOT_READY`, `DRAINING`, `WORKER_LOST` or
                `DEADLINE`.
        """
        self.check_ready()
        return await self._inspections.inspect(path, self._settings.timeout)

    def _refuse(self, refusal: InpaintError | None) -> None:
        if refusal is not None:
            self._metrics.rejected(refusal.code)
            raise refusal

    def _unready(self) -> InpaintError | None:
        if self._draining_until is not None:
            return InpaintError(
                ErrorCode.DRAINING,
                "The service is shutting down.",
                retry_after_seconds=retry_after(self._draining_until - time.monotonic()),
            )
        if not self.is_ready:
            return InpaintError(
                ErrorCode.NOT_READY,
                "No worker is ready.",
                retry_after_seconds=retry_after(self._expected_load_seconds()),
            )
        return None

    def _full(self, client: Client) -> InpaintError | None:
        if not self._router.queue.is_full(client):
            return None
        native_size = self.model.native_size if self.model is not None else 1
        return InpaintError(
            ErrorCode.OVERLOADED,
            "Too many requests are waiting.",
            retry_after_seconds=retry_after(self._router.backlog_seconds(native_size, client)),
        )

    def _expected_load_seconds(self) -> float:
        known = [worker.ready.load_seconds for worker in self._workers if worker.ready is not None]
        return min(known, default=_USUAL_LOAD_SECONDS)

    # --- what workers say -----------------------------------------------------------------

    def worker_ready(self, worker: Worker) -> None:
        """A worker has loaded."""
        if worker.ready is not None:
            self.model = self.model or worker.ready.model
            self._metrics.worker_ready(worker.name, worker.ready)
        self._first_ready.set()
        self._router.dispatch()

    def worker_reported(self, worker: Worker, report: Report) -> None:
        """A worker says something about its requests, or about a LoRA."""
        if isinstance(report, LoraInspected):
            self._inspections.answered(worker, report)
        else:
            self._router.worker_reported(worker, report)

    def worker_lost(self, worker: Worker, load: Load) -> None:
        """A ready worker is gone."""
        self._metrics.worker_lost(worker.name)
        was_inspecting = self._inspections.worker_lost(worker)
        self._router.worker_lost(worker, load, are_suspect=not was_inspecting)

    def worker_never_ready(self, worker: Worker, reason: str) -> None:
        """A worker could not load; when none ever could, the service has failed."""
        self._start_failures.setdefault(worker.name, reason)
        if self._first_ready.is_set() or self._startup_error is not None:
            return
        if len(self._start_failures) == len(self._workers):
            first = next(iter(self._start_failures.values()))
            self._startup_error = StartupError(" ".join(first.split()))
            self._failed.set()

    def worker_restarted(self, worker: Worker) -> None:
        """A worker's process is started again."""
        self._metrics.worker_restarted(worker.name)

    def _on_keep_alive_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            logger.critical("%s ended: its worker is not restarted", task.get_name(), exc_info=task.exception())

    # --- drain and stop -----------------------------------------------------------------------

    async def drain(self, timeout_seconds: float) -> bool:
        """Refuse new requests, answer the accepted ones, stop the workers.

        Args:
            timeout_seconds: How long the accepted ones may take; the rest get DRAINING.

        Returns:
            Whether all were answered in time.
        """
        self._draining_until = time.monotonic() + timeout_seconds
        logger.info("draining: %d requests to answer within %g s", len(self._router.unanswered()), timeout_seconds)
        try:
            await asyncio.wait_for(self._router.all_answered.wait(), timeout_seconds)
        except TimeoutError:
            logger.warning("drain time is over: %d requests are given up", len(self._router.unanswered()))
            await self.stop()
            return False
        await self._stop_workers(_EXIT_SECONDS)
        return not self._has_given_up

    async def stop(self) -> None:
        """Answer whatever is left with DRAINING and end all workers at once. Idempotent.

        Afterwards no process, thread or descriptor of the engine is left.
        """
        if self._draining_until is None:
            self._draining_until = time.monotonic()
        for handle in self._router.unanswered():
            self._has_given_up = True
            error = InpaintError(ErrorCode.DRAINING, "The service is shutting down.", retry_after_seconds=1)
            self._router.give_up(handle, error)
        await self._stop_workers(0.0)

    async def _stop_workers(self, drain_seconds: float) -> None:
        for worker in self._workers:
            worker.stop(drain_seconds)
        if self._keep_alives:
            await asyncio.wait(self._keep_alives)
