"""A Ray cluster of several nodes on this machine, an application on it, and clients that count what comes back.

Nodes are raylets of their own, each with room for one replica. All of them listen on loopback.
"""

import asyncio
import os
import shutil
import socket
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import Any

import httpx
import psutil
import pytest

from tests.http.serving import FAKE_WORKER, eventually, form

# Read when Ray is imported. Every address is loopback's; it is named for systems on which Ray does nothing else.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
# And a token is asked for, or whoever is on this machine could have the cluster run code.
os.environ["RAY_AUTH_MODE"] = "token"

pytest.importorskip("ray", reason="the [ray] extra is not installed: pip install -c constraints.txt -e '.[ray]'")

from ray import init, serve, shutdown
from ray.cluster_utils import Cluster

ROOT = Path(__file__).parents[2]
APP = "inpaint"
_STORE_BYTES = 100 * 1024 * 1024

# Inherited by every process of the cluster.
_ENVIRONMENT = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "service.ray_app:proxy_middlewares",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONPATH": str(ROOT),
}


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class RayNodes:
    """A head without room for replicas, and nodes with room for one each."""

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="ray-")  # Short: paths of sockets must be.
        environment = {**_ENVIRONMENT, "RAY_TMPDIR": self._folder, "RAY_AUTH_TOKEN": token_hex(32)}
        self._old = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        head = {"num_cpus": 0, "dashboard_port": free_port(), **self._common()}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes: list[Any] = []
        self.port = free_port()
        init(address=self._cluster.address, log_to_driver=False)
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": self.port})

    @staticmethod
    def _common() -> dict[str, Any]:
        return {
            "object_store_memory": _STORE_BYTES,
            "node_ip_address": "127.0.0.1",
            "include_dashboard": False,
        }

    def have(self, num_nodes: int) -> None:
        """Add nodes until there are so many."""
        while len(self._nodes) < num_nodes:
            self._nodes.append(self._cluster.add_node(num_cpus=1, **self._common()))
        self._cluster.wait_for_nodes()

    def replicas(self) -> list[psutil.Process]:
        """The processes of replicas, by node."""
        return [one for node in self._nodes for one in _children(node) if "ServeReplica" in " ".join(_words(one))]

    def kill_node_of(self, replica: psutil.Process) -> None:
        """SIGKILL of everything on a replica's node, as when a machine loses its power."""
        (node,) = (node for node in self._nodes if replica in _children(node))
        self._nodes.remove(node)
        for process in _children(node):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._cluster.remove_node(node, allow_graceful=False)

    def log(self) -> str:
        """All that any process of the cluster has logged."""
        logs = Path(self._folder).glob("ray/session_latest/logs/**/*")
        return "\n".join(path.read_text(errors="replace") for path in logs if path.is_file())

    def close(self) -> None:
        """End everything; nothing is left."""
        serve.shutdown()
        shutdown()
        self._cluster.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)
        for name, value in self._old.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _raylet(node: Any) -> psutil.Process:
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def _children(node: Any) -> list[psutil.Process]:
    try:
        return _raylet(node).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


# --- an application --------------------------------------------------------------------


@dataclass
class Deployed:
    """An application that runs.

    Attributes:
        nodes: Where it runs.
        client: An httpx client of it.
    """

    nodes: RayNodes
    client: httpx.Client

    @property
    def url(self) -> str:
        """Where the proxy listens."""
        return f"http://127.0.0.1:{self.nodes.port}"

    def inpaint(self, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        """Post the usual picture; `fields` are added, replaced, or left out where None."""
        files, data = form(**fields)
        return self.client.post("/v1/inpaint", files=files, data=data, headers=headers)

    def stream(self, headers: dict[str, str] | None = None, **fields: Any) -> Any:
        """The same as a stream of events."""
        files, data = form(**fields)
        headers = {"Accept": "text/event-stream", **(headers or {})}
        return self.client.stream("POST", "/v1/inpaint", files=files, data=data, headers=headers)


def deploy(settings: Mapping[str, Any], *, num_replicas: int = 1, worker_target: str = FAKE_WORKER) -> None:
    """Deploy the application, or another version of it; returns once its replicas run."""
    from service.ray_app import application  # noqa: PLC0415 - needs Ray

    defaults = {"model": "fake", "devices": "cpu", "drain_timeout": 20.0}
    built = application({**defaults, **settings}, worker_target=worker_target, num_replicas=num_replicas)
    serve.run(built, name=APP)


@contextmanager
def deployed(nodes: RayNodes, settings: Mapping[str, Any], **options: Any) -> Iterator[Deployed]:
    """Serve an application until the block ends."""
    nodes.have(options.get("num_replicas", 1))
    deploy(settings, **options)
    with httpx.Client(base_url=f"http://127.0.0.1:{nodes.port}", timeout=60, trust_env=False) as client:
        try:
            yield Deployed(nodes, client)
        finally:
            serve.delete(APP)


# --- what replicas count ---------------------------------------------------------------


def sample(ports: list[int], name: str) -> float:
    """The sum of a metric's series over replicas' ports."""
    total = 0.0
    for port in ports:
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=20, trust_env=False).text
        lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        total += sum(float(value) for key, _, value in lines if key == name)
    return total


# --- load ------------------------------------------------------------------------------


@dataclass
class Load:
    """Clients that keep asking, each for pictures of its own, and what they got by kind.

    Attributes:
        url: The service's.
        expected: PNG by seed.
        accept: What they ask for; the right answer to a stream ends with `completed`.
        fields: Further fields of each request.
        outcomes: How many requests ended how; "right" are those with the very bytes of `expected`.
        num_begun: How many answers have begun.
    """

    url: str
    expected: Mapping[int, bytes]
    accept: str = "image/png"
    fields: dict[str, Any] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    num_begun: int = 0

    @contextmanager
    def running(self, num_clients: int) -> Iterator["Load"]:
        """Ask until the block ends; every request that was sent is waited for."""
        stop = threading.Event()
        # A daemon: clients that are never answered fail the test below, and must not keep the process.
        thread = threading.Thread(target=lambda: asyncio.run(self._run(num_clients, stop)), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            stop.set()
            thread.join(timeout=120)
            assert not thread.is_alive(), "a request was never answered"

    def wait_for(self, more: int) -> None:
        """Wait until so many more requests were answered."""
        target = self.outcomes.total() + more
        eventually(lambda: self.outcomes.total() >= target, seconds=90)

    async def _run(self, num_clients: int, stop: threading.Event) -> None:
        seeds = iter(range(10**9))
        async with httpx.AsyncClient(base_url=self.url, timeout=90, trust_env=False) as client:
            await asyncio.gather(*(self._ask(client, seeds, stop) for _ in range(num_clients)))

    async def _ask(self, client: httpx.AsyncClient, seeds: Iterator[int], stop: threading.Event) -> None:
        while not stop.is_set():
            seed = next(seeds) % len(self.expected)
            files, data = form(seed=str(seed), **self.fields)
            try:
                request = client.build_request("POST", "/v1/inpaint", files=files, data=data)
                request.headers["Accept"] = self.accept
                response = await client.send(request, stream=True)
                self.num_begun += 1
                await response.aread()
            except httpx.TransportError as error:
                self.outcomes[type(error).__name__] += 1
                continue
            self.outcomes[self._judge(response, seed)] += 1

    def _judge(self, response: httpx.Response, seed: int) -> str:
        if self.accept == "text/event-stream" and response.status_code == 200:
            last = response.text.rstrip().rpartition("\n\n")[2]
            return "right" if last.startswith("event: completed") else last.partition("\n")[0]
        if response.status_code == 200:
            return "right" if response.content == self.expected[seed] else "wrong picture"
        return f"{response.status_code} {response.json().get('code')}"
