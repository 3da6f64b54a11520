"""What a request costs the API process: its CPU time, and how long it keeps its event loop busy.

    python -m benchmarks.edges [--requests N] [--size 512] [--json FILE] [--profile]

The service is started as a process on 127.0.0.1 with a worker that paints without a
model (`benchmarks.edge_server`). Clients of another process send it photo-like
pictures with a mask as PNG files in a closed loop, and check every answer.

1. CPU time, user and system, of the API process alone, all of its threads, over the
   good answers of a round: the median over rounds.
2. `/healthz`, asked again and again while one more round runs: it needs nothing but
   the event loop, so that its latency is how long others hold it, and the machine's noise.

With `--profile` every stage that a request passes is also called by itself, in a loop
in this process. Exits non-zero when an answer was not a PNG of the right size.
"""

import argparse
import asyncio
import io
import json
import multiprocessing
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import httpx
import numpy as np
import psutil
from PIL import Image

from benchmarks.edge_server import NATIVE_SIZE, photo_like
from benchmarks.figures import percentile
from benchmarks.load import Round, closed_loop, open_client
from benchmarks.report import machine_facts
from benchmarks.traffic import Job
from service import fitting, imaging
from service.api.multipart import read_parts
from service.engine.frames import make_pipe, read_message, write_message

ROOT = Path(__file__).parent.parent

NUM_CLIENTS = 8
WARM_UP_REQUESTS = 16
PROBE_PAUSE_SECONDS = 0.01
START_SECONDS = 60.0
STOP_SECONDS = 20.0
POLL_SECONDS = 0.1

_STAGE_CALLS = 30
_CHUNK_BYTES = 64 * 1024
_BOUNDARY = "----frontier7MA4YWxkTrZu0gW"


@dataclass(frozen=True, slots=True)
class Cost:
    """What a round cost.

    Attributes:
        cpu_milliseconds: CPU time of the API process per good answer.
        requests_per_second: Good answers a second.
        faults: Why answers did not count.
        probe_milliseconds: Latency of each `/healthz` asked meanwhile; empty where none was.
    """

    cpu_milliseconds: float
    requests_per_second: float
    faults: tuple[str, ...]
    probe_milliseconds: tuple[float, ...]


# --- the load -------------------------------------------------------------------------


def photo_job(size: int) -> Job:
    """A photo-like picture and a mask over a quarter of it."""
    mask = np.zeros((size, size), np.uint8)
    mask[size // 4 : size * 3 // 4, size // 4 : size * 3 // 4] = 255
    fields = {"prompt": "a red house", "num_inference_steps": "10", "seed": "7"}
    return Job(fields, _png(photo_like(size, size, seed=1)), _png(mask), size, num_steps=10)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def send_round(url: str, job: Job, num_requests: int, max_seconds: float) -> Round:
    """One round of load; runs in a process of its own, whose work is nobody's cost."""

    async def send() -> Round:
        async with open_client() as client:
            return await closed_loop(client, url, [job] * num_requests, NUM_CLIENTS, max_seconds)

    return asyncio.run(send())


# --- the measurement ------------------------------------------------------------------


@contextmanager
def _serving() -> Iterator[tuple[str, psutil.Process]]:
    """The service: its address and its API process."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.edge_server", "serve", "--port", str(port)]
    settings = {
        "INPAINT_MODEL": f"fake?native_size={NATIVE_SIZE}",
        "INPAINT_DEVICES": "cpu",
        "INPAINT_MAX_IMAGES": str(NUM_CLIENTS),
    }
    environment = {key: value for key, value in os.environ.items() if not key.startswith("INPAINT_")}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment | settings, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            if not _is_ready(process, url):
                log.seek(0)
                sys.exit(f"the service did not start:\n{log.read()[-2000:].decode(errors='replace')}")
            yield url, psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()  # Its worker ends with it.
                process.wait()


def _is_ready(process: subprocess.Popen[bytes], url: str) -> bool:
    deadline = time.monotonic() + START_SECONDS
    with httpx.Client(trust_env=False) as client:
        while process.poll() is None and time.monotonic() < deadline:
            try:
                if client.get(f"{url}/readyz").status_code == httpx.codes.OK:
                    return True
            except httpx.TransportError:
                pass  # The port is not open yet.
            time.sleep(POLL_SECONDS)
    return False


def _cost(sending: Callable[[], "Future[Round]"], url: str, api: psutil.Process, *, is_probed: bool) -> Cost:
    """Run a round and see what it costs."""
    before = api.cpu_times()
    sent = sending()
    probes = tuple(_probe(url, sent)) if is_probed else ()
    one = sent.result()
    after = api.cpu_times()
    faults = tuple(answer.fault for answer in one.answers if answer.fault is not None)
    cpu_seconds = after.user + after.system - before.user - before.system
    num_good = max(1, len(one.answers) - len(faults))
    return Cost(cpu_seconds / num_good * 1000, one.requests_per_second, faults, probes)


def _probe(url: str, sent: "Future[Round]") -> Iterator[float]:
    """Latencies of `/healthz` in milliseconds until the round is over."""
    with httpx.Client(trust_env=False, timeout=30.0) as client:
        while not sent.done():
            started_at = time.perf_counter()
            client.get(f"{url}/healthz").raise_for_status()
            yield (time.perf_counter() - started_at) * 1000
            time.sleep(PROBE_PAUSE_SECONDS)


# --- the stages -----------------------------------------------------------------------


def stage_milliseconds(job: Job) -> dict[str, float]:
    """CPU time of each stage of a request called by itself, the median of some calls."""
    loop = asyncio.new_event_loop()
    body, content_type = _body(job), f"multipart/form-data; boundary={_BOUNDARY}"
    upload = imaging.decode_upload(job.image, job.mask, max_pixels=job.size**2)

    def fit() -> fitting.Fitted:
        return fitting.fit(
            upload.image,
            upload.mask,
            native_size=NATIVE_SIZE,
            size_multiple=8,
            height=None,
            width=None,
            padding_mask_crop=None,
        )

    fitted = fit()
    painted = photo_like(*fitted.mask.shape, seed=2)
    pasted = fitting.paste_back(upload.image, upload.mask, fitted.placement, painted)
    ours, theirs = make_pipe()
    peer = threading.Thread(target=_answer, args=(theirs, painted), daemon=True)
    peer.start()

    def exchange() -> None:
        write_message(ours, (fitted.image, fitted.mask))
        read_message(ours)

    stages: dict[str, Callable[[], object]] = {
        "read the form": lambda: loop.run_until_complete(read_parts(content_type, _chunks(body))),
        "decode picture and mask": lambda: imaging.decode_upload(job.image, job.mask, max_pixels=job.size**2),
        "fit": fit,
        "to the worker and back": exchange,
        "paste back": lambda: fitting.paste_back(upload.image, upload.mask, fitted.placement, painted),
        "encode": lambda: imaging.encode_image(pasted, "png"),
    }
    try:
        return {name: _median_milliseconds(stage) for name, stage in stages.items()}
    finally:
        loop.close()
        ours.close()
        peer.join()


def _answer(connection: Connection, picture: np.ndarray) -> None:
    """A worker that has painted already, until the pipe is closed."""
    with connection, suppress(EOFError):
        while True:
            connection.recv()
            connection.send(picture)


def _median_milliseconds(stage: Callable[[], object]) -> float:
    def once() -> float:
        started_at = time.thread_time()
        stage()
        return (time.thread_time() - started_at) * 1000

    once()
    return statistics.median(once() for _ in range(_STAGE_CALLS))


def _body(job: Job) -> bytes:
    parts = [(f'"{name}"', value.encode()) for name, value in job.fields.items()]
    parts += [('"image"; filename="image.png"', job.image), ('"mask"; filename="mask.png"', job.mask)]
    encoded = [
        f"--{_BOUNDARY}\r\nContent-Disposition: form-data; name={name}\r\n\r\n".encode() + data + b"\r\n"
        for name, data in parts
    ]
    return b"".join(encoded) + f"--{_BOUNDARY}--\r\n".encode()


async def _chunks(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), _CHUNK_BYTES):
        yield body[start : start + _CHUNK_BYTES]


# --- the report -----------------------------------------------------------------------


def main() -> int:
    """Measure, report; 0 when every answer was good."""
    arguments = _arguments()
    facts = machine_facts()
    job = photo_job(arguments.size)
    spawned = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    with _serving() as (url, api), spawned as sender:

        def sending(num_requests: int) -> Future[Round]:
            return sender.submit(send_round, f"{url}/v1/inpaint", job, num_requests, arguments.max_seconds)

        sending(WARM_UP_REQUESTS).result()
        rounds = [
            _cost(lambda: sending(arguments.requests), url, api, is_probed=False) for _ in range(arguments.rounds)
        ]
        probed = _cost(lambda: sending(arguments.requests), url, api, is_probed=True)
    stages = stage_milliseconds(job) if arguments.profile else {}

    print(f"{arguments.size}x{arguments.size}, picture {len(job.image)} bytes, {NUM_CLIENTS} clients\n")
    print("| measure | |\n|---|---:|")
    print(f"| CPU of the API process, ms a request | {_median(rounds, 'cpu_milliseconds'):.2f} |")
    print(f"| requests/s | {_median(rounds, 'requests_per_second'):.1f} |")
    for percent in (50, 99):
        print(f"| /healthz meanwhile, p{percent}, ms | {percentile(probed.probe_milliseconds, percent):.1f} |")
    for name, milliseconds in stages.items():
        print(f"| {name}, ms | {milliseconds:.2f} |")
    if arguments.json is not None:
        document = {
            "facts": facts,
            "rounds": [asdict(one) for one in rounds],
            "probed": asdict(probed),
            "stages": stages,
        }
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    faults = [fault for one in (*rounds, probed) for fault in one.faults]
    for fault in faults:
        print(f"not answered well: {fault}", file=sys.stderr)
    return 1 if faults else 0


def _median(rounds: list[Cost], figure: str) -> float:
    return statistics.median(getattr(one, figure) for one in rounds)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="CPU time of the API process for a request, without a model.")
    parser.add_argument("--requests", type=int, default=300, help="in each round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that CPU time is measured in")
    parser.add_argument("--max-seconds", type=float, default=15.0, help="a round sends nothing after these")
    parser.add_argument("--size", type=int, default=512, help="side of the pictures in pixels")
    parser.add_argument("--json", type=Path, help="where every figure goes")
    parser.add_argument("--profile", action="store_true", help="also time each stage by itself")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
