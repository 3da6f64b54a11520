"""One cluster for all tests here, which takes half a minute to start."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.http.serving import serving

if TYPE_CHECKING:
    from tests.ray.cluster import RayNodes


@pytest.fixture(scope="session")
def nodes() -> "Iterator[RayNodes]":
    """A cluster; tests add the nodes that they need."""
    from tests.ray.cluster import RayNodes  # noqa: PLC0415 - skips the test modules, and not this one, without Ray

    cluster = RayNodes()
    try:
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="session")
def expected() -> dict[int, bytes]:
    """The usual request's PNG by seed, of the service as it is without Ray."""
    with serving() as server:
        return {seed: server.inpaint(seed=str(seed)).content for seed in range(24)}
