"""A `serve` process with real workers, and a client's tools."""

import asyncio
import base64
import io
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.request import InpaintRequest

ROOT = Path(__file__).parents[2]


class Service:
    """A `serve` process with two CPU workers.

    Args:
        model: The checkpoint.
        flags: Further flags of `serve`.
    """

    def __init__(self, model: Path, *flags: str) -> None:
        command = [sys.executable, "-m", "service", "serve", "--model", str(model), "--port", "0"]
        command += ["--devices", "cpu,cpu", "--cpu-threads", "1", "--log-format", "text", *flags]
        # One client, since making one takes a while, but no connection that would still be open at the end.
        self._client = httpx.Client(timeout=30, limits=httpx.Limits(max_keepalive_connections=0), trust_env=False)
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        self.log = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._wait_for(lambda: re.search(r"listens on (http://\S+)", self.log) is not None)
        address = re.search(r"listens on (http://[0-9.:]+)", self.log)
        assert address is not None
        self.url = address[1]
        self._wait_for(lambda: [one["state"] for one in self.get("/readyz").json()["workers"]] == ["ready", "ready"])

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log += line

    def _wait_for(self, condition: Any, seconds: float = 240.0) -> None:
        """Wait for as long as a machine that is busy with more than this may take."""
        give_up_at = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < give_up_at, self.log
            time.sleep(0.05)

    def get(self, path: str) -> httpx.Response:
        """A GET on a connection of its own."""
        return self._client.get(self.url + path)

    def metric(self, sample: str) -> float:
        """A sample's value, 0 while it does not exist."""
        lines = self.get("/metrics").text.splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(sample + " ")), 0.0)

    def wait_for_metric(self, sample: str, value: float) -> None:
        """Wait until the sample has reached a value."""
        self._wait_for(lambda: self.metric(sample) >= value)

    def worker_pids(self) -> list[int]:
        """The worker processes, in the order they were started."""
        return [int(pid) for pid in re.findall(r"worker \d+ \(cpu\) started, pid (\d+)", self.log)]

    def end(self) -> int:
        """SIGTERM, then the exit status."""
        self.process.terminate()
        status = self.process.wait(timeout=120)
        self._reader.join(timeout=30)
        return status

    def close(self) -> None:
        """Whatever is left of it."""
        self.process.kill()
        self.process.wait(timeout=30)
        self._reader.join(timeout=30)
        self._client.close()
        assert self.process.stderr is not None
        self.process.stderr.close()


@contextmanager
def serving(model: Path, *flags: str) -> Iterator[Service]:
    """Serve until the block ends, and kill what is left then."""
    running = Service(model, *flags)
    try:
        yield running
    finally:
        running.close()


def png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def form_of(request: InpaintRequest, **changes: str) -> dict[str, Any]:
    """What a client sends to have this request painted; `composite=false` answers what the pipeline painted."""
    names = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "strength", "seed", "scheduler")
    names += ("num_images_per_prompt", "eta", "clip_skip", "height", "width", "batching")
    data = {name: str(getattr(request.params, name)) for name in names}
    files = {"image": ("image.png", png(request.image)), "mask": ("mask.png", png(request.mask))}
    return {"data": {**data, "composite": "false", **changes}, "files": files}


async def post_all(service: Service, forms: Sequence[dict[str, Any]]) -> list[httpx.Response]:
    """All forms at once, on a connection each; answers as JSON."""
    limits = httpx.Limits(max_connections=len(forms))
    async with httpx.AsyncClient(base_url=service.url, timeout=240, limits=limits, trust_env=False) as client:
        headers = {"Accept": "application/json"}
        posts = [client.post("/v1/inpaint", headers=headers, **form) for form in forms]
        return list(await asyncio.gather(*posts))


def pictures(response: httpx.Response) -> list[NDArray[np.uint8]]:
    files = [base64.b64decode(image["b64_json"]) for image in response.json()["images"]]
    return [np.asarray(Image.open(io.BytesIO(data))) for data in files]
