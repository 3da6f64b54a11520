"""What a server and its device do while a load runs: CPU time, GPU use, the service's own metrics."""

import os
import statistics
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

import httpx
import psutil

from benchmarks.scrape import Scrape, ServiceUse, scrape, use_between

try:
    import pynvml
except ImportError:  # A measurement works without: the device's figures are left out then.
    pynvml = None

SAMPLE_SECONDS = 0.1
SAMPLES_PER_LOOK = 10
BUSY_WINDOW_SECONDS = 10.0
"""The service's gauge looks back so far; until then it also tells of the time before the load."""

SCRAPE_TIMEOUT_SECONDS = 5.0

Role = Literal["api", "worker", "other"]


@dataclass(frozen=True, slots=True)
class ProcessUse:
    """One process of a server.

    Attributes:
        role: `api` is the process that was started, `worker` its children with the most
            memory, `other` the rest: what the workers or Python itself started.
        cpu_seconds: User and system time in the stretch.
        memory_bytes: Resident set at the end of it.
    """

    role: Role
    cpu_seconds: float
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class GpuUse:
    """The device as NVML sees it, whoever uses it.

    Attributes:
        busy_ratio: Share of time with a kernel running, 0 to 1: the mean of what NVML gives for its last period.
        max_memory_bytes: The most memory in use, of all processes together.
        num_samples: How often it was asked.
    """

    busy_ratio: float
    max_memory_bytes: int
    num_samples: int


@dataclass(frozen=True, slots=True)
class Watched:
    """What was seen in a stretch of time.

    Attributes:
        seconds: Its length.
        processes: The server's processes, the one that was started first.
        gpu: None without NVML or without a GPU.
        service: None for servers without our metrics.
        busy_ratio: Mean of the service's own gauge; None for other servers, and for loads shorter than its window.
        memory_bytes: Kind -> the service's own gauge of device memory at the end.
    """

    seconds: float
    processes: tuple[ProcessUse, ...]
    gpu: GpuUse | None
    service: ServiceUse | None
    busy_ratio: float | None
    memory_bytes: dict[str, float]

    def cpu_seconds(self, role: Role) -> float:
        """CPU time of all processes of a role."""
        return sum(process.cpu_seconds for process in self.processes if process.role == role)


class Watch:
    """Samples in a thread of its own from `with` to its end; then `seen` is there.

    Args:
        pid: The process that was started.
        device: Such as `cuda:0`; a CPU has no figures of its own.
        metrics_url: Where this service is, None for servers without its metrics.
        load_seconds: How long requests are sent. The device is not looked at after that: while
            the last answers come in it has less to do, and less the shorter the load is.
        settle_seconds: From the start of these, how long the device is not looked at either: until the first
            requests are in, and NVML's last period is one of the load.
    """

    seen: Watched

    def __init__(
        self, pid: int, device: str, metrics_url: str | None, load_seconds: float, settle_seconds: float = 0.0
    ) -> None:
        self._tree = _Tree(pid)
        self._gpu = _Gpu(device)
        self._metrics_url = metrics_url
        self._load_seconds = load_seconds
        self._settle_seconds = settle_seconds
        self._client = httpx.Client(trust_env=False, timeout=SCRAPE_TIMEOUT_SECONDS)
        self._busy_ratios: list[float] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="watch", daemon=True)

    def __enter__(self) -> Self:
        self._before = self._scrape()
        self._tree.begin()
        self._began_at = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = time.perf_counter() - self._began_at
        self._is_over.set()
        self._thread.join()
        after = self._scrape()
        self._client.close()
        before = self._before
        self.seen = Watched(
            seconds=seconds,
            processes=self._tree.end(),
            gpu=self._gpu.use(),
            service=None if before is None or after is None else use_between(before, after),
            busy_ratio=statistics.fmean(self._busy_ratios) if self._busy_ratios else None,
            memory_bytes={} if after is None else after.values("inpaint_gpu_memory_bytes", "kind"),
        )

    def _sample(self) -> None:
        number = 0
        while not self._is_over.wait(SAMPLE_SECONDS):
            number += 1
            seconds = time.perf_counter() - self._began_at
            if self._settle_seconds <= seconds <= self._load_seconds:
                self._gpu.sample()
            if number % SAMPLES_PER_LOOK == 0:  # Walking through all processes takes milliseconds of the load's lock.
                self._tree.sample()
                if BUSY_WINDOW_SECONDS <= seconds <= self._load_seconds:
                    self._note_busy_ratio()

    def _note_busy_ratio(self) -> None:
        ratios = {} if (now := self._scrape()) is None else now.values("inpaint_gpu_busy_ratio", "worker")
        if ratios:
            self._busy_ratios.append(statistics.fmean(ratios.values()))

    def _scrape(self) -> Scrape | None:
        try:
            return None if self._metrics_url is None else scrape(self._client, self._metrics_url)
        except httpx.HTTPError:
            return None  # A server that is overloaded, or lost: the load's figures say so.


class _Tree:
    """CPU time of a process and of all that it started, also of those that have ended since."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._before: dict[psutil.Process, float] = {}
        self._now: dict[psutil.Process, tuple[float, int]] = {}

    def begin(self) -> None:
        self.sample()
        self._before = {process: cpu_seconds for process, (cpu_seconds, _) in self._now.items()}

    def sample(self) -> None:
        try:
            processes = [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in processes:
            try:
                times = process.cpu_times()
                self._now[process] = (times.user + times.system, process.memory_info().rss)
            except psutil.NoSuchProcess:
                continue  # Its last sample stays.

    def end(self) -> tuple[ProcessUse, ...]:
        self.sample()
        memory = {process.pid: rss for process, (_, rss) in self._now.items()}
        roles = roles_of(self._root.pid, self._children(), memory)
        return tuple(
            ProcessUse(roles[process.pid], cpu_seconds - self._before.get(process, 0.0), rss)
            for process, (cpu_seconds, rss) in self._now.items()
        )

    def _children(self) -> set[int]:
        try:
            return {process.pid for process in self._root.children()}
        except psutil.NoSuchProcess:
            return set()


def workers_of(pid: int) -> list[psutil.Process]:
    """The worker processes of a service, by the process that was started."""
    api = psutil.Process(pid)
    children = {child.pid: child for child in api.children()}
    memory = {pid: api.memory_info().rss} | {child: one.memory_info().rss for child, one in children.items()}
    roles = roles_of(pid, set(children), memory)
    return [children[child] for child in children if roles[child] == "worker"]


def roles_of(root: int, children: set[int], memory_bytes: dict[int, int]) -> dict[int, Role]:
    """Which process does what.

    Args:
        root: The process that was started.
        children: Those that it started itself.
        memory_bytes: Of all processes of the tree. Workers hold a model; what else
            the root started (Python's resource tracker) has less than half of that.
    """
    most = max((memory_bytes.get(pid, 0) for pid in children), default=0)
    roles: dict[int, Role] = {}
    for pid, used in memory_bytes.items():
        is_worker = pid in children and used >= most / 2
        roles[pid] = "api" if pid == root else "worker" if is_worker else "other"
    return roles


class _Gpu:
    """A device under NVML, or nothing where there is none."""

    def __init__(self, device: str) -> None:
        self._handle = _nvml_handle(device)
        self._busy: list[float] = []
        self._memory_bytes: list[int] = []

    def sample(self) -> None:
        if self._handle is None:
            return
        self._busy.append(pynvml.nvmlDeviceGetUtilizationRates(self._handle).gpu / 100)
        self._memory_bytes.append(pynvml.nvmlDeviceGetMemoryInfo(self._handle).used)

    def use(self) -> GpuUse | None:
        if not self._busy:
            return None
        return GpuUse(statistics.fmean(self._busy), max(self._memory_bytes), len(self._busy))


def _nvml_handle(device: str) -> object | None:
    kind, _, number = device.partition(":")
    if pynvml is None or kind != "cuda":
        return None
    try:
        pynvml.nvmlInit()
        chosen = visible_device(int(number or 0), os.environ.get("CUDA_VISIBLE_DEVICES"))
        by_id = pynvml.nvmlDeviceGetHandleByUUID if isinstance(chosen, str) else pynvml.nvmlDeviceGetHandleByIndex
        return by_id(chosen)
    except pynvml.NVMLError:
        return None


def visible_device(number: int, visible: str | None) -> int | str:
    """What NVML calls CUDA's device `number`: an index, or a UUID.

    Args:
        number: CUDA's number, which counts the visible devices only.
        visible: `CUDA_VISIBLE_DEVICES`, None or empty when all are visible.
    """
    if not visible:
        return number
    name = visible.split(",")[number].strip()
    return int(name) if name.isdigit() else name
