"""A real service with the bundled model, and pages that fail a test which makes them complain."""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, Request

from tests.bundled_service import serving_bundled
from tests.chromium import browser
from tests.http.serving import LiveServer, serving

__all__ = ["browser"]

WAIT_MS = 60_000
"""Far beyond what anything here takes: it ends a test that would hang."""


@pytest.fixture(scope="module")
def service(browser: Browser) -> Iterator[str]:  # noqa: ARG001 - without a browser there is no use in starting one
    """The address of a service that serves the bundled model on the CPU."""
    with serving_bundled("--cpu-threads", "2") as address:
        yield address


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
def serve() -> Iterator[Callable[..., LiveServer]]:
    """Starts services over the fake worker; keyword arguments are settings."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(serving(**settings))


@pytest.fixture
def visit(
    browser: Browser,
    complaints: Complaints,
    serve: Callable[..., LiveServer],  # noqa: ARG001 - pages close before services do, and miss none
) -> Iterator[Callable[..., Page]]:
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
