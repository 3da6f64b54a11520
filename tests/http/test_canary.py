"""What clients send stays between them and the worker: nothing of it is in logs, metrics or errors.

A marked word stands in everything that a request can carry. Afterwards it is
looked for in all that the process and its worker have written, at the most
talkative level, and in all that was answered.
"""

import base64
import contextlib
import hashlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image, PngImagePlugin

from tests.http.collector import collecting
from tests.http.receiver import Receiver, receiving
from tests.http.serving import (
    CLOSING,
    eventually,
    form,
    head,
    multipart_head,
    part,
    png,
    read_answer,
    scene,
    square_mask,
    usual_parts,
)

ROOT = Path(__file__).parents[2]
MARK = "xyzzy"
CLIENT, ADMIN, HASHED = f"{MARK}-client-key", f"{MARK}-admin-key", f"{MARK}-hashed-key"


def traces(text: str) -> list[str]:
    """Where the mark is in a text: as it is, reversed case, in hexadecimal or in base64; and hashes of keys."""
    raw = MARK.encode()
    forms = [MARK, raw.hex()]
    for offset in range(3):  # base64 has three forms, by where the word begins; of each what its letters alone decide.
        encoded = base64.b64encode(bytes(offset) + raw).decode()
        forms.append(encoded[ceil(offset * 8 / 6) : (offset + len(raw)) * 8 // 6])
    forms += [hashlib.sha256(key.encode()).hexdigest() for key in (CLIENT, ADMIN, HASHED)]
    patterns = [re.compile(re.escape(one), re.IGNORECASE if one.isalnum() and one.islower() else 0) for one in forms]
    return [text[max(0, found.start() - 80) : found.end() + 40] for one in patterns for found in one.finditer(text)]


def test_traces_are_found() -> None:
    """The search finds the mark in every form that it claims to know."""
    for text in (f"a {MARK} b", MARK.upper(), repr(MARK.encode()), MARK.encode().hex()):
        assert traces(text), text
    for offset in range(3):
        assert traces(base64.b64encode(b"a" * offset + MARK.encode() + b"bcdefg").decode()), offset
    assert traces(hashlib.sha256(CLIENT.encode()).hexdigest())
    assert not traces("nothing of it")


# --- the process ---------------------------------------------------------------------


@contextlib.contextmanager
def served(folder: Path, log_format: str, *flags: str, **variables: str) -> Iterator["Sender"]:
    """Requests to a `serve` with keys that writes all it has to say into a file."""
    written = folder / "written"
    keys = f"shop={CLIENT},hashed=sha256:{hashlib.sha256(HASHED.encode()).hexdigest()}"
    arguments = ["--port", "0", "--devices", "cpu", "--log-level", "debug", "--log-format", log_format]
    arguments += ["--model", f"fake?gate={folder / 'gate'}", "--lora-dir", str(folder / "loras")]
    arguments += ["--allowed-hosts", "127.0.0.1,localhost", *flags]
    environment = {**os.environ, "INPAINT_API_KEYS": keys, "INPAINT_ADMIN_KEYS": f"root={ADMIN}", **variables}
    with written.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.http.serve_fake", "serve", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        eventually(lambda: "ready: " in written.read_text() or process.poll() is not None, 30)
        port = int(re.search(r"listens on http://127\.0\.0\.1:(\d+)", written.read_text())[1])
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
            yield Sender(port, client)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait(timeout=30)


# --- requests that carry the mark everywhere ---------------------------------------------


def marked_png() -> bytes:
    """A picture with the mark in its metadata and in its pixels."""
    pixels = scene()
    pixels[0, : len(MARK)] = [[ord(letter)] * 3 for letter in MARK]
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", f"{MARK}-png-text")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def marked_jpeg() -> bytes:
    """A picture with the mark in its EXIF data."""
    exif = Image.Exif()
    exif[0x010E] = f"{MARK}-exif-description"
    buffer = io.BytesIO()
    Image.fromarray(scene()).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


HEADERS = {
    "User-Agent": f"{MARK}-agent",
    "Cookie": f"session={MARK}-cookie",
    "Referer": f"https://{MARK}.example/referer",
    "X-Forwarded-For": f"{MARK}-address",
    "X-Request-Id": f"{MARK} with spaces",
    "X-Unknown": f"{MARK}-header",
    f"X-{MARK}": "name",
}

TEXTS = {"prompt": f"{MARK}-prompt", "negative_prompt": f"{MARK}-negative"}


@dataclass
class Sender:
    """Sends requests and keeps what was answered to those that failed."""

    port: int
    client: httpx.Client
    statuses: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def note(self, status: int, headers: Any, body: bytes) -> None:
        """Keep an answer: all of a failure, the headers of a success, and a stream that ends in a failure."""
        self.statuses.append(status)
        text = body.decode("utf-8", "replace")
        is_failure = status >= 400 or "event: failed" in text
        self.failures.append(repr(dict(headers)) + (text if is_failure else ""))

    def send(self, method: str = "POST", path: str = "/v1/inpaint", key: str = CLIENT, **options: Any) -> int:
        """Any request."""
        own = {"Authorization": f"Bearer {key}", "Idempotency-Key": f"{MARK}-idempotency-{len(self.statuses)}"}
        headers = {**own, **HEADERS, **options.pop("headers", {})}
        response = self.client.request(method, path, headers=headers, **options)
        self.note(response.status_code, response.headers, response.content)
        return response.status_code

    def inpaint(self, headers: dict[str, str] | None = None, key: str = CLIENT, **fields: Any) -> int:
        """An inpainting request, its files named by the mark."""
        files, data = form(**{"image": marked_png(), **TEXTS, **fields})
        named = {name: (f"{MARK}-{name}.png", content) for name, (_, content) in files.items()}
        return self.send(files=named, data=data, headers=headers or {}, key=key)

    def later(self, headers: dict[str, str], **fields: Any) -> None:
        """An inpainting request that is asked for until it has ended, in every way."""
        files, data = form(**{"image": marked_png(), **TEXTS, **fields})
        named = {name: (f"{MARK}-{name}.png", content) for name, (_, content) in files.items()}
        own = {"Authorization": f"Bearer {CLIENT}", "Idempotency-Key": f"{MARK}-{len(self.statuses)}", **HEADERS}
        sent = {**own, "Prefer": "respond-async", **headers}
        response = self.client.post("/v1/inpaint", files=named, data=data, headers=sent)
        assert response.status_code == 202
        self.note(response.status_code, response.headers, response.content)
        url = response.headers["Location"]
        assert self.send("GET", f"{url}?wait=20&include=b64_json&{MARK}=query") == 200
        for path in ("/events", "/images/0", f"/images/{MARK}"):
            self.send("GET", url + path)
        assert self.send("DELETE", url) == 204

    def raw(self, *pieces: bytes) -> int:
        """Bytes."""
        with self.connect(*pieces) as connection:
            status, headers, body = read_answer(connection)
        self.note(status, headers, body)
        return status

    def hang_up(self, *lines: str) -> None:
        """A request whose client goes away while the worker paints."""
        body = usual_parts().replace(b"a red house", f"hold {MARK}".encode()) + CLOSING
        opening = multipart_head(f"Content-Length: {len(body)}", f"X-API-Key: {CLIENT}", *lines)
        connection = self.connect(opening, body)
        eventually(lambda: self.in_flight() == 1)
        connection.close()
        eventually(lambda: self.in_flight() == 0)

    def connect(self, *pieces: bytes) -> socket.socket:
        """A connection over which bytes were sent as they are."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        connection.sendall(b"".join(pieces))
        return connection

    def in_flight(self) -> float:
        """Requests in the worker."""
        text = self.metrics()
        return float(re.search(r"^inpaint_in_flight (\S+)$", text, re.MULTILINE)[1])

    def metrics(self) -> str:
        """All of them."""
        return self.client.get("/metrics", headers={"Authorization": f"Bearer {HASHED}"}).text


def send_good(sender: Sender) -> None:
    """Requests that succeed, in every shape of answer."""
    assert sender.inpaint() == 200
    assert sender.inpaint({"Accept": "application/json"}, key=HASHED, image=marked_jpeg()) == 200
    assert sender.inpaint({"Accept": "text/event-stream"}, previews="true") == 200
    assert sender.send("GET", f"/v1/models?{MARK}=query") == 200


def send_async(sender: Sender, receiver: Receiver) -> None:
    """Requests that are asked for later, well and badly, and addresses that are told of their end."""
    sender.later(receiver.url(f"/{MARK}?{MARK}=query"))
    sender.later(receiver.url(f"/{MARK}"), prompt=f"fail {MARK}")
    for host in (f"{MARK}.example", f"{MARK}@127.0.0.1:{receiver.port}"):
        url = {"X-Webhook-URL": f"http://{host}/{MARK}", "Prefer": f"respond-async, {MARK}={MARK}"}
        assert sender.inpaint(url) in (403, 422)
    assert sender.inpaint(receiver.url(f"/{MARK}")) == 422
    for path in (f"/v1/requests/{MARK}", f"/v1/requests/{MARK}/events", f"/v1/requests/{MARK}/images/{MARK}"):
        assert sender.send("GET", path, headers={"Last-Event-ID": MARK, "If-None-Match": MARK}) == 404
    assert sender.send("GET", f"/v1/requests/{MARK}?include={MARK}&wait={MARK}") == 422
    sender.later({"X-Webhook-URL": f"{receiver.host}/{MARK}"}, prompt=f"hold {MARK}", timeout="0.2")
    eventually(lambda: len(receiver.calls) == 3)
    assert all(MARK in call.path for call in receiver.calls)


def send_bad(sender: Sender) -> None:
    """Requests that are refused for what they hold."""
    bad: dict[str, Any] = {
        "seed": MARK,
        "num_inference_steps": f"{MARK}9",
        "scheduler": MARK,
        "loras": f'[{{"name": "{MARK}"}}]',
        "freeu": f'{{"{MARK}": 1}}',
        "timesteps": f"[{MARK}]",
        "output_format": MARK,
        "prompt_syntax": MARK,
        "prompt": f"{MARK}\0",
        "height": MARK,
        "image": MARK.encode() * 100,
        "mask": b"\x89PNG\r\n\x1a\n" + MARK.encode() * 100,
        "latents": b"\x93NUMPY\x01\x00" + MARK.encode() * 100,
        f"{MARK}-field": "x",
    }
    for name, value in bad.items():
        assert sender.inpaint(**{name: value}) == 422, name
    assert sender.inpaint(mask=png(square_mask(128, 64))) == 422
    assert sender.inpaint({"Accept": f"{MARK}/{MARK}"}) == 406
    assert sender.inpaint({"Content-Encoding": MARK}) == 415
    assert sender.send(json={MARK: MARK}) == 415
    assert sender.send(content=MARK, headers={"Content-Type": MARK}) == 415
    broken = part(MARK, MARK.encode(), MARK)
    assert sender.send(content=broken, headers={"Content-Type": "multipart/form-data; boundary=frontier"}) == 400
    assert sender.send(content=broken, headers={"Content-Type": f"multipart/form-data; boundary={MARK}"}) == 400


def send_refused(sender: Sender) -> None:
    """Requests that are refused for who sends them, or for what they ask for."""
    assert sender.inpaint(key=f"{MARK}-wrong-key") == 401
    other = {"Authorization": f"Basic {MARK}", "X-API-Key": f"{MARK}-wrong"}
    assert sender.send("GET", "/v1/models", headers=other) == 401
    assert sender.inpaint({"Origin": f"https://{MARK}.example"}) == 403
    assert sender.send("DELETE", f"/v1/adapters/{MARK}") == 403
    assert sender.send("DELETE", f"/v1/adapters/{MARK}", key=ADMIN) == 404
    assert sender.send("PUT", "/v1/adapters/pencil", key=ADMIN, content=MARK.encode() * 100) == 422
    assert sender.send("GET", f"/{MARK}/{MARK}.php") == 404
    assert sender.send(MARK.upper(), "/v1/inpaint") == 405
    assert sender.send("GET", "/v1/models", headers={"Host": f"{MARK}.example"}) == 400
    assert sender.raw(head("Host: localhost", f"{MARK} without a colon")) == 400
    assert sender.raw(head("Host: localhost", f"X-Long: {MARK * 20_000}", method="GET", path="/healthz")) == 431
    assert sender.raw(f"{MARK} {MARK} {MARK}\r\n\r\n".encode()) == 400


def send_failing(sender: Sender) -> None:
    """Requests that fail later: in the worker, with it, with time, with their client."""
    assert sender.inpaint(prompt=f"fail {MARK}") == 500
    assert sender.inpaint({"Accept": "text/event-stream"}, prompt=f"fail {MARK}") == 200
    assert sender.inpaint(prompt=f"hold {MARK}", timeout="0.2") == 504
    eventually(lambda: sender.in_flight() == 0)
    sender.hang_up()
    sender.hang_up("Accept: text/event-stream")
    assert sender.inpaint(prompt=f"crash {MARK}") == 503


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_nothing_of_a_request_is_logged_counted_or_answered(tmp_path: Path, log_format: str) -> None:
    """Prompts, pictures, file names, keys, header values: in no line of the log, no metric, no error."""
    (tmp_path / "loras").mkdir()
    secret = tmp_path / "secret"
    secret.write_text("whsec_" + base64.b64encode(f"{MARK}-of-thirty-two-bytes-or-more".encode()).decode())
    flags = ["--webhook-secret-file", str(secret)]
    with receiving() as receiver, served(tmp_path, log_format, "--webhook-hosts", receiver.host, *flags) as sender:
        send_good(sender)
        send_async(sender, receiver)
        send_bad(sender)
        send_refused(sender)
        send_failing(sender)
        metrics = sender.metrics()

    written = (tmp_path / "written").read_text()
    num_lines = len(re.findall(r"client=shop" if log_format == "text" else r'"client": "shop"', written))
    assert num_lines > 30  # It did write, and knew whom about.
    assert traces(written) == []
    assert "inpaint_requests_total" in metrics
    assert traces(metrics) == []
    assert len(sender.failures) > 40
    assert [found for failure in sender.failures for found in traces(failure)] == []


def test_nothing_of_a_request_is_in_a_trace(tmp_path: Path) -> None:
    """Nor in any byte that is sent to a collector, nor logged for it; and FastAPI sends none of its own beside ours."""
    (tmp_path / "loras").mkdir()
    variables = {"OTEL_BSP_SCHEDULE_DELAY": "100", "FASTAPI_OTEL_AUTO_CONFIGURE": "true"}
    with collecting() as collector:
        with served(tmp_path, "json", OTEL_EXPORTER_OTLP_ENDPOINT=collector.endpoint, **variables) as sender:
            send_good(sender)
            send_bad(sender)
            send_refused(sender)
            send_failing(sender)
            context = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01", "tracestate": f"{MARK} is no state"}
            assert sender.send("GET", "/v1/models", headers=context) == 200
            assert sender.send("GET", "/v1/models", headers={**context, "baggage": f"{MARK}={MARK}"}) == 200
        bodies = list(collector.bodies)
        assert set(collector.paths) == {"/v1/traces"}
        assert bytes.fromhex("ab" * 16) in collector.traces()
        assert len(collector.traces()) > 40
    assert [found for body in bodies for found in traces(body.decode("latin-1"))] == []
    assert traces((tmp_path / "written").read_text()) == []
