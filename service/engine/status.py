"""What the service tells of its workers."""

from dataclasses import dataclass

from service.engine.supervisor import Worker


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker at one moment.

    Attributes:
        name: "0", "1", …
        device: Where it runs, e.g. "cpu" or "cuda:0".
        state: "loading: …", "ready", "restarting", "draining" or "stopped".
        pid: Its process; None between runs.
        restarts: How often it was started again.
        max_images: Images that its running batch may hold; None until it was ready once.
        num_in_flight: Requests in it.
        num_running_images: Images in its latest step; 0 when idle.
        step_seconds: Seconds of one step by UNet rows, as measured at warm-up.
        dtype: Weights' type; None until it was ready once.
        load_seconds: How long its latest loading took; None until it was ready once.
    """

    name: str
    device: str
    state: str
    pid: int | None
    restarts: int
    max_images: int | None
    num_in_flight: int
    num_running_images: int
    step_seconds: dict[int, float]
    dtype: str | None
    load_seconds: float | None


def status_of(worker: Worker) -> WorkerStatus:
    """What is known of a worker now."""
    ready, load = worker.ready, worker.load
    return WorkerStatus(
        name=worker.name,
        device=worker.device,
        state=worker.state,
        pid=worker.pid,
        restarts=worker.restarts,
        max_images=load.max_images if load is not None else ready.max_images if ready is not None else None,
        num_in_flight=load.num_requests if load is not None else 0,
        num_running_images=load.num_running_images if load is not None else 0,
        step_seconds=dict(ready.step_seconds) if ready is not None else {},
        dtype=ready.dtype if ready is not None else None,
        load_seconds=ready.load_seconds if ready is not None else None,
    )
