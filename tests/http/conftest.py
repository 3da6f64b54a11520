"""One server for all tests that only ask it things; others start their own with `serving`."""

from collections.abc import Iterator

import pytest

from tests.http.serving import LiveServer, serving


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    """A ready server with default settings."""
    with serving(max_pixels=1_000_000, max_body_mib=1.0) as live:
        yield live
