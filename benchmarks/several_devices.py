"""What a second device brings, and what a worker that is killed on it costs.

    python -m benchmarks.several_devices --out DIR [--devices cuda:0,cuda:1] [--model FOLDER] [--compile-cache FOLDER]
        [--max-seconds 500] [--tiny]

Starts this service with one worker per device and, in turn,

1. sends the same request of `batching=solo` to all workers at once, and compares the pictures;
2. keeps all of them busy with requests of mixed steps;
3. does so again, and kills one worker a third of the way;
4. starts the service on the first device alone, and keeps it busy with as many clients per device.

`DIR/several_devices.json` has the figures, what is printed is its table; the services' logs are beside it. The
status is 1 when a request got no good answer. Without `--model` the checkpoint is one of the true size with random
weights. `--tiny` tries everything on a CPU with two workers, in a minute or two.
"""

import argparse
import asyncio
import io
import json
import signal
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from benchmarks import servers
from benchmarks.checkpoints import make_checkpoint
from benchmarks.figures import rate_within, steady_rates, summary_of
from benchmarks.load import Round, closed_loop, open_client
from benchmarks.report import card, machine_facts, num_cores, run_facts
from benchmarks.several_devices_report import Copies, Load, Loss, Report
from benchmarks.traffic import Job, Mix, draw_jobs
from benchmarks.watch import Watch, workers_of

CLIENTS_PER_DEVICE = 24
COPIES_PER_DEVICE = 4
MAX_JOBS_PER_SECOND = 40
KILL_SHARE = 1 / 3
TIMEOUT_SECONDS = 120.0
CPU_DEVICES = ("cpu", "cpu")


def measure(arguments: argparse.Namespace, model: str, compile_cache: Path) -> Report:
    """Start, load, kill, compare.

    Raises:
        ServerFailedError: The service did not start, or a worker took longer than there is time.
    """
    gives_up_at = time.monotonic() + arguments.max_seconds
    environment = {"INPAINT_COMPILE_CACHE": str(compile_cache), "INPAINT_LOG_LEVEL": "info"}
    facts = _facts(arguments)
    devices: Sequence[str] = arguments.devices

    def service(of: Sequence[str]) -> servers.Server:
        where = servers.Where(",".join(of), arguments.dtype, max(1, num_cores() // len(devices)))
        log = arguments.out / f"service-on-{len(of)}.log"
        return stack.enter_context(servers.inpaint_service(model, where, environment=environment, log=log))

    with ExitStack() as stack:
        started_at = time.monotonic()
        server = service(devices)
        servers.wait_for_all_workers(server, gives_up_at)
        start_seconds = time.monotonic() - started_at
        _say(f"{len(devices)} workers ready after {start_seconds:.0f} s")
        copies = asyncio.run(_copies(server, _jobs(arguments, 1)[0], COPIES_PER_DEVICE * len(devices)))
        _say(f"{copies.different} different pictures of {copies.requests} requests for one, {copies.failed} failed")
        together, _ = _load(server, devices, arguments)
        _say(f"{len(devices)} devices: {together.images_per_second:.2f} images/s, {together.summary.outcomes}")
        killing = KILL_SHARE * arguments.seconds
        began_at = time.monotonic()
        load, one = _load(server, devices, arguments, kill_after_seconds=killing)
        _say(f"one worker killed: {load.summary.outcomes}")
        single = service(devices[:1])
        servers.wait_for_all_workers(server, gives_up_at)
        loss = Loss(
            load,
            killing,
            rate_within(one, killing, one.sending_seconds),
            time.monotonic() - began_at - killing,
        )
        servers.wait_for_all_workers(single, gives_up_at)
        alone, _ = _load(single, devices[:1], arguments)
        return Report(facts, start_seconds, copies, together, loss, alone)


def _load(
    server: servers.Server,
    devices: Sequence[str],
    arguments: argparse.Namespace,
    *,
    kill_after_seconds: float | None = None,
) -> tuple[Load, Round]:
    clients = arguments.clients * len(devices)
    jobs = _jobs(arguments, round(MAX_JOBS_PER_SECOND * len(devices) * arguments.seconds) + clients)
    # Not looked at until the first requests are in; NVML's figure is that of its last period.
    settle_seconds = arguments.seconds / 5
    with ExitStack() as stack:
        watches = [
            stack.enter_context(Watch(server.pid, device, None, arguments.seconds, settle_seconds))
            for device in devices
        ]
        one = asyncio.run(_closed(server, jobs, clients, arguments.seconds, kill_after_seconds))
    cpu_seconds = watches[0].seen.cpu_seconds("api")
    return Load(
        devices=len(devices),
        clients=clients,
        summary=summary_of(one),
        images_per_second=steady_rates(one)[0],
        busy_ratio=tuple(watch.seen.gpu.busy_ratio for watch in watches if watch.seen.gpu is not None),
        api_cpu_seconds=cpu_seconds / len(one.answers),
    ), one


async def _closed(
    server: servers.Server, jobs: Sequence[Job], clients: int, seconds: float, kill_after_seconds: float | None
) -> Round:
    async with asyncio.TaskGroup() as tasks:
        if kill_after_seconds is not None:
            tasks.create_task(_kill_worker(server, kill_after_seconds))
        async with open_client() as client:
            return await closed_loop(
                client, server.url, jobs, clients, seconds, timeout_seconds=TIMEOUT_SECONDS, checks_pixels=True
            )


async def _kill_worker(server: servers.Server, after_seconds: float) -> None:
    """The one that was started last: of those on several devices, not the first's."""
    await asyncio.sleep(after_seconds)
    max(workers_of(server.pid), key=lambda worker: worker.create_time()).kill()


async def _copies(server: servers.Server, job: Job, count: int) -> Copies:
    """The same request so often at once, each painted with nobody beside it."""
    files = {"image": ("image.png", job.image, "image/png"), "mask": ("mask.png", job.mask, "image/png")}
    fields = job.fields | {"batching": "solo"}
    async with open_client() as client:

        async def one() -> bytes | None:
            try:
                response = await client.post(server.url, data=fields, files=files, headers={"Accept": "image/png"})
                return response.raise_for_status().content
            except httpx.HTTPError as error:
                _say(f"{type(error).__name__}: {error}")
                return None

        answers = await asyncio.gather(*(one() for _ in range(count)))
    pictures = {answer for answer in answers if answer is not None}
    return Copies(count, answers.count(None), len(pictures), largest_difference(pictures))


def largest_difference(pictures: Collection[bytes]) -> int:
    """Of any two pictures of one size, at any pixel and channel, in levels of 255; 0 where there are not two."""
    if not pictures:
        return 0
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")) for picture in pictures])
    return int((pixels.max(axis=0).astype(int) - pixels.min(axis=0)).max())


def _jobs(arguments: argparse.Namespace, count: int) -> tuple[Job, ...]:
    return draw_jobs(count, Mix(arguments.steps, {arguments.size: 1.0}), arguments.seed)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Measure and report; 0 when every request got its picture, and 1 when not."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # So that the servers end, too.
    arguments = _arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        model = arguments.model or make_checkpoint(Path(folder) / "checkpoint", is_tiny=arguments.tiny)
        try:
            report = measure(arguments, str(model), arguments.compile_cache or Path(folder) / "compile-cache")
        except servers.ServerFailedError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    document = json.dumps(asdict(report), indent=1) + "\n"
    (arguments.out / "several_devices.json").write_text(document, encoding="utf-8")
    print(report.markdown())
    return 1 if report.has_failed else 0


def _facts(arguments: argparse.Namespace) -> dict[str, Any]:
    steps = "{} to {}".format(*arguments.steps)
    return machine_facts() | {
        "devices": list(arguments.devices),
        "cards": [card(device) for device in arguments.devices],
        "model": "synthetic, random weights" if arguments.model is None else arguments.model.name,
        "dtype": arguments.dtype,
        "requests": f"{arguments.size}x{arguments.size} PNG, {steps} steps, guidance on, five schedulers, "
        f"seed {arguments.seed}; every picture compared with its upload outside the mask",
        "seconds": arguments.seconds,
        **run_facts("benchmarks.several_devices"),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What a second device brings, and what a killed worker costs.")
    parser.add_argument("--out", type=Path, required=True, help="folder for several_devices.json")
    parser.add_argument("--devices", type=_devices, help="cuda:0,cuda:1; with --tiny cpu,cpu")
    parser.add_argument("--model", type=Path, help="folder in diffusers format; without, one with random weights")
    parser.add_argument("--dtype", help="float16 on a GPU, float32 on a CPU")
    parser.add_argument("--compile-cache", type=Path, help="folder; a filled one spares the cold start")
    parser.add_argument("--seconds", type=float, help="of each load; 18, with --tiny 6")
    parser.add_argument("--clients", type=int, default=CLIENTS_PER_DEVICE, help="for each device")
    parser.add_argument("--max-seconds", type=float, default=500.0, help="workers that are not ready by then never are")
    parser.add_argument("--seed", type=int, default=1, help="of the requests")
    parser.add_argument("--tiny", action="store_true", help="a dry run on the CPU with a tiny checkpoint")
    arguments = parser.parse_args()
    arguments.devices = arguments.devices or (CPU_DEVICES if arguments.tiny else ("cuda:0", "cuda:1"))
    arguments.dtype = arguments.dtype or ("float32" if "cpu" in arguments.devices else "float16")
    arguments.seconds = arguments.seconds or (6.0 if arguments.tiny else 18.0)
    arguments.size, arguments.steps = (64, (2, 6)) if arguments.tiny else (512, (10, 30))
    return arguments


def _devices(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


if __name__ == "__main__":
    sys.exit(main())
