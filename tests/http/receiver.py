"""A receiver of webhooks on loopback."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Received:
    """One call of the receiver."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Receiver:
    """A receiver on loopback.

    Attributes:
        port: Where it listens.
        statuses: What it answers, one after the other; the last one for ever.
        behave: Called before it answers.
        calls: What came.
    """

    port: int = 0
    statuses: list[int] = field(default_factory=lambda: [204])
    behave: Any = None
    calls: list[Received] = field(default_factory=list)
    num_at_once: int = 0
    most_at_once: int = 0

    @property
    def host(self) -> str:
        """As the operator allows it."""
        return f"http://127.0.0.1:{self.port}"

    def url(self, path: str = "/done?token=xyzzy") -> dict[str, str]:
        """The header that names it."""
        return {"X-Webhook-URL": f"{self.host}{path}"}


@contextmanager
def receiving(**options: Any) -> Iterator[Receiver]:
    """A receiver until the block ends."""
    receiver, lock = Receiver(**options), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                receiver.num_at_once += 1
                receiver.most_at_once = max(receiver.most_at_once, receiver.num_at_once)
                receiver.calls.append(Received(self.command, self.path, dict(self.headers), body))
                status = receiver.statuses[min(len(receiver.calls), len(receiver.statuses)) - 1]
            try:
                if receiver.behave is not None:
                    receiver.behave(self)
                self.send_response(status)
                self.send_header("Location", f"{receiver.host}/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()
            except OSError:
                pass  # The service has hung up.
            finally:
                with lock:
                    receiver.num_at_once -= 1

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    receiver.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
