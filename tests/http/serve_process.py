"""`serve` with the fake worker as a process of its own, for tests that only a process can have."""

import os
import re
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.http.serving import LiveServer, eventually

ROOT = Path(__file__).parents[2]


class Process:
    """A running `serve`, and what it wrote to standard error so far.

    Args:
        flags: Further flags.
        limits: `resource` limits by number, set before it starts, for it and its workers.
        environment: Variables beside this process's own.
    """

    def __init__(
        self, *flags: str, limits: Mapping[int, int] | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        arguments = [sys.executable, "-m", "tests.http.serve_fake", "serve", "--port", "0", "--devices", "cpu", *flags]

        def limit() -> None:
            for number, value in (limits or {}).items():
                resource.setrlimit(number, (value, value))

        self.process = subprocess.Popen(
            arguments,
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | dict(environment or {}),
            preexec_fn=limit,  # noqa: PLW1509 - no thread of this process holds a lock that it needs
        )
        self.output = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:
            self.output += line

    def live(self) -> LiveServer:
        """The server, once it is ready; without its engine, which is in another process."""
        eventually(lambda: "ready: " in self.output or self.process.poll() is not None, 30)
        port = int(re.search(r"listens on http://127\.0\.0\.1:(\d+)", self.output)[1])
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20, trust_env=False)
        return LiveServer(port, engine=None, loop=None, client=client)

    def worker_pids(self) -> list[int]:
        """Its worker's process, and those that were lost before."""
        return [int(pid) for pid in re.findall(r"worker 0 \(cpu\) started, pid (\d+)", self.output)]

    def exit_status(self) -> int:
        """Wait for the end."""
        status = self.process.wait(timeout=30)
        self._reader.join(timeout=10)
        return status


@contextmanager
def process(
    *flags: str, limits: Mapping[int, int] | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[Process]:
    """A `serve` that is gone afterwards."""
    started = Process("--log-format", "text", *flags, limits=limits, environment=environment)
    try:
        yield started
    finally:
        started.process.kill()
        started.exit_status()
        started.process.stderr.close()
