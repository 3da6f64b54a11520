"""A `serve` process with the bundled demo model on the CPU."""

import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[1]
SECONDS = 120
"""Far beyond what starting or ending takes."""


@contextmanager
def serving_bundled(*flags: str) -> Iterator[str]:
    """The address of a service that is ready, until the block ends.

    Args:
        flags: Further flags of `serve`.
    """
    command = [sys.executable, "-m", "service", "serve", "--port", "0", "--devices", "cpu", "--log-format", "text"]
    process = subprocess.Popen([*command, *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    log: list[str] = []
    assert process.stderr is not None
    reader = threading.Thread(target=log.extend, args=(process.stderr,), daemon=True)
    reader.start()
    try:
        yield _address(process, log)
    finally:
        process.terminate()
        process.wait(timeout=SECONDS)
        reader.join(timeout=30)
        process.stderr.close()


def _address(process: subprocess.Popen[str], log: list[str]) -> str:
    give_up_at = time.monotonic() + SECONDS
    while time.monotonic() < give_up_at:
        assert process.poll() is None, log
        found = re.search(r"listens on (http://[0-9.:]+)", "".join(log))
        if found and httpx.get(f"{found[1]}/readyz", trust_env=False).status_code == 200:
            return found[1]
        time.sleep(0.1)
    raise AssertionError(log)
