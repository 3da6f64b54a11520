"""Replicas, workers and nodes that die, and new versions, under load: every request is counted, by how it ended."""

import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import psutil
import pytest

from tests.http.serving import eventually
from tests.ray.cluster import APP, Load, RayNodes, deploy, deployed, free_port, sample, serve

pytestmark = pytest.mark.ray

SLOW = f"fake?{urlencode({'step_seconds': 0.05})}"
"""A picture takes 0.2 s, so that whatever dies has some in its batch."""

NUM_CLIENTS = 8

RUN_AGAIN = "its replica was lost; another one runs it"
"""What a proxy logs of each request that it sends to a second replica."""


@pytest.fixture(autouse=True)
def _figures(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], nodes: RayNodes) -> Iterator[None]:
    """Show what was counted, also of a test that passes."""
    counted: list[Counter[str]] = []
    request.node.counted = counted
    before = nodes.log().count(RUN_AGAIN)
    yield
    with capsys.disabled():
        for one in counted:
            again = nodes.log().count(RUN_AGAIN) - before
            sys.stdout.write(f"\n{request.node.name}: {dict(one)}, run again: {again}\n")


@pytest.fixture
def load(nodes: RayNodes, expected: dict[int, bytes], request: pytest.FixtureRequest) -> Load:
    """Clients, whose figures are shown."""
    clients = Load(f"http://127.0.0.1:{nodes.port}", expected)
    request.node.counted.append(clients.outcomes)
    return clients


def test_a_killed_replica_costs_no_request(nodes: RayNodes, load: Load) -> None:
    """What a replica had when it was killed is run again by another one: the same bytes, and no error."""
    lost_before = nodes.log().count(RUN_AGAIN)
    with deployed(nodes, {"model": SLOW}, num_replicas=2):
        with load.running(NUM_CLIENTS):
            load.wait_for(16)
            nodes.replicas()[0].kill()
            load.wait_for(48)
        assert set(load.outcomes) == {"right"}
        assert nodes.log().count(RUN_AGAIN) > lost_before
        eventually(lambda: len(nodes.replicas()) == 2, seconds=60)


def test_a_killed_node_costs_no_request(nodes: RayNodes, load: Load) -> None:
    """The same of all that a replica had whose machine is gone. Clients talk to a proxy on another one."""
    lost_before = nodes.log().count(RUN_AGAIN)
    with deployed(nodes, {"model": SLOW}, num_replicas=2):
        with load.running(NUM_CLIENTS):
            load.wait_for(16)
            nodes.kill_node_of(nodes.replicas()[0])
            load.wait_for(48)
        assert set(load.outcomes) == {"right"}
        assert nodes.log().count(RUN_AGAIN) > lost_before


def test_the_only_replica_killed_costs_no_request(nodes: RayNodes, load: Load) -> None:
    """Without another replica, requests wait for the successor."""
    lost_before = nodes.log().count(RUN_AGAIN)
    with deployed(nodes, {"model": SLOW}):
        with load.running(NUM_CLIENTS):
            load.wait_for(16)
            nodes.replicas()[0].kill()
            load.wait_for(32)
        assert set(load.outcomes) == {"right"}
        assert nodes.log().count(RUN_AGAIN) > lost_before


def test_a_stream_whose_replica_is_killed_ends_with_an_event(nodes: RayNodes, load: Load, tmp_path: Path) -> None:
    """A stream that has begun is not begun anew: it ends with `failed`, whatever else happened to others."""
    gate = tmp_path / "gate"
    load.accept, load.fields = "text/event-stream", {"prompt": "hold"}
    with deployed(nodes, {"model": f"fake?{urlencode({'gate': str(gate)})}"}, num_replicas=2):
        with load.running(NUM_CLIENTS):
            eventually(lambda: load.num_begun >= NUM_CLIENTS)
            nodes.replicas()[0].kill()
            load.wait_for(1)
            gate.touch()
            load.wait_for(16)
        assert set(load.outcomes) == {"right", "event: failed"}
        assert 1 <= load.outcomes["event: failed"] <= NUM_CLIENTS


def test_a_killed_worker_costs_no_request(nodes: RayNodes, load: Load) -> None:
    """A replica whose worker process was killed keeps what it had, and lets others wait until the next one is ready."""
    with deployed(nodes, {"model": SLOW}):
        (replica,) = nodes.replicas()
        with load.running(NUM_CLIENTS):
            load.wait_for(16)
            os.kill(_worker(replica).pid, signal.SIGKILL)
            load.wait_for(32)
        assert set(load.outcomes) == {"right"}
        assert nodes.replicas() == [replica]


def test_a_new_version_costs_no_request(nodes: RayNodes, load: Load) -> None:
    """While one version takes the place of another, and while there become fewer replicas, all are answered."""
    with deployed(nodes, {"model": SLOW}, num_replicas=2):
        first = nodes.replicas()
        with load.running(NUM_CLIENTS):
            load.wait_for(16)
            deploy({"model": SLOW, "default_steps": 4}, num_replicas=2)
            second = nodes.replicas()
            load.wait_for(16)
            deploy({"model": SLOW, "default_steps": 4}, num_replicas=1)
            eventually(lambda: len(nodes.replicas()) == 1, seconds=60)
            load.wait_for(16)
        assert set(load.outcomes) == {"right"}
        assert not set(first) & set(second)


def test_a_replica_that_is_stopped_drains(nodes: RayNodes, tmp_path: Path) -> None:
    """Work that nobody waits for any more, of a client that will come back for it, is done before a replica ends."""
    gate, port = tmp_path / "gate", free_port()
    settings = {"model": f"fake?{urlencode({'gate': str(gate)})}", "metrics_port": port}
    with deployed(nodes, settings) as app:
        (replica,) = nodes.replicas()
        worker = _worker(replica)
        with app.stream({"Idempotency-Key": "mine"}, prompt="hold") as response:
            next(response.iter_lines())
        eventually(lambda: sample([port], "inpaint_in_flight") == 1)
        deleting = threading.Thread(target=serve.delete, args=[APP])
        deleting.start()
        eventually(lambda: "draining: 1 requests to answer" in nodes.log(), seconds=30)
        assert worker.is_running()
        gate.touch()
        deleting.join(timeout=60)
    eventually(lambda: not worker.is_running())
    assert "drain time is over" not in nodes.log()


def _worker(replica: psutil.Process) -> psutil.Process:
    (found,) = (one for one in replica.children() if "multiprocessing.spawn" in " ".join(one.cmdline()))
    return found
