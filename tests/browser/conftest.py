"""A real browser, a real service with the bundled model, and pages that fail a test which makes them complain."""

import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import Browser, Page, Request, sync_playwright

ROOT = Path(__file__).parents[2]

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
WAIT_MS = 60_000
"""Far beyond what anything here takes: it ends a test that would hang."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One Chromium for a module's tests; playwright keeps an event loop running, which others could not bear."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on PATH")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=FLAGS.split())
        yield running
        running.close()


@pytest.fixture(scope="module")
def service(browser: Browser) -> Iterator[str]:  # noqa: ARG001 - without a browser there is no use in starting one
    """The address of a service that serves the bundled model on the CPU."""
    command = [sys.executable, "-m", "service", "serve", "--port", "0", "--log-format", "text"]
    process = subprocess.Popen(
        [*command, "--devices", "cpu", "--cpu-threads", "2"], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    log: list[str] = []
    assert process.stderr is not None
    reader = threading.Thread(target=log.extend, args=(process.stderr,), daemon=True)
    reader.start()
    try:
        yield _address(process, log)
    finally:
        process.terminate()
        process.wait(timeout=60)
        reader.join(timeout=30)
        process.stderr.close()


def _address(process: subprocess.Popen[str], log: list[str]) -> str:
    give_up_at = time.monotonic() + 120
    while time.monotonic() < give_up_at:
        assert process.poll() is None, log
        listening = re.search(r"listens on (http://[0-9.:]+)", "".join(log))
        if listening and httpx.get(f"{listening[1]}/readyz", trust_env=False).status_code == 200:
            return listening[1]
        time.sleep(0.1)
    raise AssertionError(log)


@dataclass
class Complaints:
    """What pages have complained of.

    Attributes:
        found: Errors and warnings of the console, exceptions, and requests to other sites.
        statuses: Answers of the service that a test means to get; browsers note them as errors.
    """

    found: list[str] = field(default_factory=list)
    statuses: set[int] = field(default_factory=set)

    def watch(self, page: Page, url: str) -> None:
        """Listen to a page that may talk to this address only."""
        page.on("console", lambda message: self._note(message.type, message.text))
        page.on("pageerror", lambda error: self.found.append(f"exception: {error}"))
        page.on("request", lambda request: self._note_request(request, url))

    def _note(self, kind: str, text: str) -> None:
        failed = re.match(r"Failed to load resource: the server responded with a status of (\d+)", text)
        is_meant = failed is not None and int(failed[1]) in self.statuses
        if kind in ("error", "warning") and not is_meant:
            self.found.append(f"{kind}: {text}")

    def _note_request(self, request: Request, url: str) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("blob", "data") and parts.netloc != urlsplit(url).netloc:
            self.found.append(f"request to {request.url}")


@pytest.fixture
def complaints() -> Iterator[Complaints]:
    """Nobody may have complained when the test ends."""
    complaints = Complaints()
    yield complaints
    assert complaints.found == []


@pytest.fixture
def visit(browser: Browser, complaints: Complaints) -> Iterator[Callable[..., Page]]:
    """Opens a page of a service in a fresh profile; keyword arguments are playwright's for the profile."""
    contexts = []

    def visit(url: str, **profile: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **profile})
        contexts.append(context)
        context.set_default_timeout(WAIT_MS)
        page = context.new_page()
        complaints.watch(page, url)
        page.goto(url)
        return page

    yield visit
    for context in contexts:
        context.close()
