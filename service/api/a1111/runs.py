"""The `img2img` requests that run, by whose they are: for `progress`, `interrupt` and `skip`."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from starlette.requests import Request

from service.api.a1111.answers import timestamp
from service.api.painting import Admitted
from service.engine.clients import Client


@dataclass(slots=True, eq=False)
class Run:
    """One request between its admission and its answer.

    Attributes:
        admitted: The request.
        job_timestamp: When it came, as the web UI writes it.
        started_at: `time.monotonic()` of then.
        is_interrupted: Whether its client gave it up.
    """

    admitted: Admitted
    job_timestamp: str = field(default_factory=timestamp)
    started_at: float = field(default_factory=time.monotonic)
    is_interrupted: bool = False

    @property
    def progress(self) -> float:
        """Share of the steps that are done, as the web UI counts: it begins at a hundredth."""
        latest = self.admitted.handle.latest
        return min(0.01 + (latest.step / latest.steps if latest is not None and latest.steps else 0), 1)

    @property
    def eta_seconds(self) -> float:
        """Seconds that the rest will take at the pace so far."""
        spent = time.monotonic() - self.started_at
        return spent / self.progress - spent

    def interrupt(self) -> None:
        """Leave the batch at the next step."""
        self.is_interrupted = True
        self.admitted.handle.cancel("client")


class Runs:
    """All of them. Everything happens on the event loop."""

    def __init__(self) -> None:
        self._runs: list[Run] = []

    @contextmanager
    def run(self, admitted: Admitted) -> Iterator[Run]:
        """Know of a request until the block ends.

        Args:
            admitted: The request.
        """
        run = Run(admitted)
        self._runs.append(run)
        try:
            yield run
        finally:
            self._runs.remove(run)

    def of(self, client: Client) -> list[Run]:
        """A client's own, the oldest first. Without keys, everybody is one client."""
        return [run for run in self._runs if run.admitted.record.client == client]


def runs_of(request: Request) -> Runs:
    """Those of the service that a request is for."""
    runs = request.app.state.a1111_runs
    assert isinstance(runs, Runs)  # noqa: S101 - for the type checker
    return runs
