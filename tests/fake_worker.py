"""A worker without a model: the same messages, a real little batch loop, and pictures that give mix-ups away.

The picture is a function of seed, prompt, image and mask (`paint`), so a test
knows what the right answer is. A word in the prompt makes a request misbehave:

    fail    answered with INTERNAL after its first step
    nan     answered with NAN_OUTPUT after its first step
    crash   the process kills itself after the first step
    hang    the process stops looking at its pipe after the first step
    linger  the worker fails after the first step, and its process does not come to its end
    slow    ten times as many steps
    nsfw    flagged, and black
    hold    its last step is not done before the file named by `gate` exists

Words in a LoRA's header (its metadata, or names of tensors) do the same while it is inspected:

    refuse  it is refused
    crash   the process kills itself; with `"crash": PATH` in the metadata only if there is no such file yet
    hang    the process stops looking at its pipe
    hold    it is not answered before the file named by `gate` exists

`Settings.model` carries the worker's own behaviour, as a query: `fake?name=value&…`

    step_seconds=0.002   duration of a step
    max_images=4         images in a batch
    gate=PATH            see "hold"
    cannot_start=TEXT    answered with CannotStart
    fails_on=DEVICE      only this device is answered with CannotStart
    starts=PATH          a line is appended for each start
    die_from_start=N     the N-th start (of this device; needs `starts`) and later ones die while loading
    die_after_ready=1    it dies as soon as it is ready
    load_forever=1       it never becomes ready
    startup_gate=PATH    it becomes ready when the file exists
    native_size=64       side of the square that the model was trained on
    schedulers=A,B       its noise schedulers, the default one first
    ip_adapter=KIND      the model has an IP-Adapter: plain or plus, or bare, which is plain without an image encoder
"""

import dataclasses
import hashlib
import json
import os
import signal
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import parse_qsl

import numpy as np
from numpy.typing import NDArray

from service.errors import ErrorCode
from service.messages import (
    Cancel,
    CannotStart,
    Drain,
    EmbeddingInfo,
    Failed,
    Finished,
    InspectLora,
    IpAdapterInfo,
    Loading,
    LoraInfo,
    LoraInspected,
    ModelInfo,
    Ping,
    Pong,
    Ready,
    StepProgress,
    Submit,
    Ticked,
)
from service.request import InpaintParams, InpaintRequest, InpaintResult, Moments, Timings
from service.settings import Settings

MODEL = ModelInfo(
    id="fake",
    kind="demo",
    native_size=64,
    size_multiple=8,
    unet_in_channels=9,
    schedulers=("ddim", "euler"),
    default_scheduler="ddim",
    default_steps=4,
    has_safety_checker=True,
    embeds_width=32,
    max_tokens=77,
    timesteps_schedulers=("euler",),
    sigmas_schedulers=("euler",),
    embeddings=(EmbeddingInfo("<pirate>", 2),),
)


IP_ADAPTERS = {
    "plain": IpAdapterInfo("plain.safetensors", "plain", 12, None, takes_images=True),
    "plus": IpAdapterInfo("plus.safetensors", "plus", 16, 26, takes_images=True),
    "bare": IpAdapterInfo("bare.safetensors", "plain", 12, None, takes_images=False),
}


def paint(params: InpaintParams, image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The only right answer to a request: noise of its own where the mask is white, (n, height, width, 3)."""
    images = []
    for index in range(params.num_images_per_prompt):
        digest = hashlib.sha256(f"{params.seed + index}|{params.prompt}|".encode() + image.tobytes() + mask.tobytes())
        noise = np.random.default_rng(int.from_bytes(digest.digest())).integers(0, 256, image.shape, dtype=np.uint8)
        images.append(np.where(mask[..., None] >= 128, noise, image))
    if "nsfw" in params.prompt:
        return np.zeros_like(np.stack(images))
    return np.stack(images)


def paint_output(request: InpaintRequest) -> NDArray[np.uint8] | NDArray[np.float32]:
    """The right answer in the form that is asked for; latents are a function of the seed and of what was sent."""
    params, painted = request.params, paint(request.params, request.image, request.mask)
    if params.output == "floats":
        return (painted / 255).astype(np.float32)
    if params.output == "latents":
        sides = (MODEL.latent_channels, params.height // 8, params.width // 8)
        sums = sum(float(tensor.sum()) for tensor in dataclasses.astuple(request.tensors) if tensor is not None)
        if params.ip_adapter is not None:
            sums += 1000 * params.ip_adapter.scale + sum(params.ip_adapter.embeds_shape)
        if request.ip_adapter_image is not None:
            sums += float(request.ip_adapter_image.mean())
        return np.stack(
            [np.full(sides, params.seed + index + sums, np.float32) for index in range(params.num_images_per_prompt)]
        )
    return painted


def run(connection: Connection, settings: Settings, device: str, cpu_threads: int) -> None:
    """The worker's whole life, as `service.worker.process.run`."""
    started_at = time.monotonic()
    options = Options.of(settings)
    connection.send(Loading("loading the model"))
    if options.cannot_start or options.fails_on == device:
        connection.send(CannotStart(options.cannot_start or f"no such device: {device}"))
        return
    if options.starts and options.count_start(device) >= options.die_from_start:
        os._exit(3)
    options.wait_until_loaded(connection)
    connection.send(
        Ready(
            model=options.model(),
            device=device,
            dtype="float32",
            max_images=settings.max_images or options.max_images,
            step_seconds=dict.fromkeys((1, 2, 4), options.step_seconds),
            load_seconds=time.monotonic() - started_at,
        )
    )
    if options.die_after_ready:
        os._exit(4)
    FakeWorker(connection, options, settings.max_images or options.max_images, cpu_threads).run()


@dataclass(frozen=True)
class Options:
    """What `Settings.model` asks for."""

    step_seconds: float = 0.002
    max_images: int = 4
    gate: str = ""
    cannot_start: str = ""
    fails_on: str = ""
    starts: str = ""
    die_from_start: int = 1_000_000
    die_after_ready: bool = False
    load_forever: bool = False
    startup_gate: str = ""
    native_size: int = MODEL.native_size
    schedulers: str = ",".join(MODEL.schedulers)
    ip_adapter: str = ""

    @classmethod
    def of(cls, settings: Settings) -> "Options":
        """Read the query, each value as the default's type."""
        pairs = dict(parse_qsl(settings.model.partition("?")[2]))
        return cls(**{name: type(getattr(cls, name))(value) for name, value in pairs.items()})

    def model(self) -> ModelInfo:
        """The model that is told of."""
        schedulers = tuple(self.schedulers.split(","))
        return dataclasses.replace(
            MODEL,
            native_size=self.native_size,
            schedulers=schedulers,
            default_scheduler=schedulers[0],
            ip_adapter=IP_ADAPTERS.get(self.ip_adapter),
        )

    def count_start(self, device: str) -> int:
        """Note this start; returns how many there were on this device."""
        path = Path(self.starts)
        with path.open("a") as file:
            file.write(f"{device} {os.getpid()}\n")
        return sum(line.startswith(f"{device} ") for line in path.read_text().splitlines())

    def wait_until_loaded(self, connection: Connection) -> None:
        """Load for as long as is asked for; like any load, it does not look at the pipe's messages."""
        while self.load_forever or (self.startup_gate and not Path(self.startup_gate).exists()):
            time.sleep(0.01)
        connection.send(Loading("warming up"))


@dataclass(eq=False)
class Generation:
    """One request here."""

    request_id: str
    request: InpaintRequest
    steps: int
    steps_done: int = 0
    started_at: float = 0.0
    first_step_at: float = 0.0
    batch_images: list[int] = field(default_factory=list)

    @property
    def num_images(self) -> int:
        """Images in the batch."""
        return self.request.params.num_images_per_prompt

    def asks_for(self, behaviour: str) -> bool:
        """Whether the prompt holds the word."""
        return behaviour in self.request.params.prompt.split()


class FakeWorker:
    """Receive, admit, step, retire."""

    def __init__(self, connection: Connection, options: Options, max_images: int, cpu_threads: int) -> None:
        self.connection = connection
        self.options = options
        self.max_images = max_images
        self.cpu_threads = cpu_threads
        self.waiting: list[Generation] = []
        self.running: list[Generation] = []
        self.is_draining = False

    def run(self) -> None:
        """Until drained, or until the pipe is closed."""
        try:
            while self.receive():
                self.admit()
                self.step()
                self.retire()
        except (EOFError, ConnectionError):
            return

    def receive(self) -> bool:
        """Handle what has arrived; False once drained."""
        while self.connection.poll() or not (self.waiting or self.running):
            if self.is_draining and not (self.waiting or self.running):
                return False
            match self.connection.recv():
                case Submit(request_id, request):
                    self.waiting.append(Generation(request_id, request, _steps(request.params)))
                case Cancel(request_id):
                    self.cancel(request_id)
                case Ping(number):
                    self.connection.send(Pong(number))
                case InspectLora(number, path):
                    self.connection.send(self.inspect(number, Path(path)))
                case Drain():
                    self.is_draining = True
            if self.is_draining and not (self.waiting or self.running):
                return False
        return True

    def inspect(self, number: int, path: Path) -> LoraInspected:
        """Judge a LoRA by the words in its header."""
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        metadata = header.pop("__metadata__", {})
        words = " ".join([*metadata, *header])
        if "refuse" in words:
            return LoraInspected(number, None, "The LoRA is for another model.")
        if "hang" in words:
            time.sleep(3600)
        if "crash" in words:
            self.crash_on(metadata.get("crash", ""))
        while "hold" in words and not Path(self.options.gate).exists():
            time.sleep(0.01)
        ranks = [tensor["shape"][0] for tensor in header.values()]
        num_unet_layers = sum(name.startswith("unet.") for name in header)
        return LoraInspected(number, LoraInfo(max(ranks), num_unet_layers, len(header) - num_unet_layers), None)

    def crash_on(self, once_file: str) -> None:
        """Die, unless another worker has died of the same file."""
        if once_file and Path(once_file).exists():
            return
        if once_file:
            Path(once_file).touch()
        os.kill(os.getpid(), signal.SIGKILL)

    def cancel(self, request_id: str) -> None:
        """Drop a request."""
        for generation in self.waiting + self.running:
            if generation.request_id == request_id:
                self.fail(generation, ErrorCode.CANCELLED)

    def fail(self, generation: Generation, code: ErrorCode) -> None:
        """Answer a request without a picture."""
        for generations in (self.waiting, self.running):
            if generation in generations:
                generations.remove(generation)
        moments = _moments(generation, None)
        self.connection.send(Failed(generation.request_id, code, "The request failed.", moments=moments))

    def admit(self) -> None:
        """Let the first ones in line join the batch."""
        while self.waiting:
            num_running = sum(generation.num_images for generation in self.running)
            if self.running and num_running + self.waiting[0].num_images > self.max_images:
                return
            generation = self.waiting.pop(0)
            generation.started_at = time.monotonic()
            self.running.append(generation)

    def step(self) -> None:
        """One step of everything that runs."""
        if not self.running:
            return
        time.sleep(self.options.step_seconds)
        now = time.monotonic()
        num_images = sum(generation.num_images for generation in self.running)
        for generation in self.running:
            is_held = generation.asks_for("hold") and not Path(self.options.gate).exists()
            if not (is_held and generation.steps_done == generation.steps - 1):
                generation.steps_done += 1
            generation.first_step_at = generation.first_step_at or now
            generation.batch_images.append(num_images)
        self.connection.send(
            Ticked(
                rows=sum(generation.request.params.num_rows for generation in self.running),
                images=num_images,
                step_seconds=self.options.step_seconds,
                max_images=self.max_images,
                busy_ratio=1.0,
                memory_bytes={},
                progress=tuple(StepProgress(g.request_id, g.steps_done, g.steps, _preview(g)) for g in self.running),
            )
        )

    def retire(self) -> None:
        """Misbehave as asked, and answer what is done."""
        for generation in list(self.running):
            if generation.asks_for("crash"):
                os.kill(os.getpid(), signal.SIGKILL)
            if generation.asks_for("hang"):
                time.sleep(3600)
            if generation.asks_for("linger"):
                threading.Thread(target=time.sleep, args=(3600,)).start()
                raise RuntimeError("lingers")
            if generation.asks_for("fail"):
                self.fail(generation, ErrorCode.INTERNAL)
            elif generation.asks_for("nan"):
                self.fail(generation, ErrorCode.NAN_OUTPUT)
            elif generation.steps_done == generation.steps:
                self.running.remove(generation)
                self.connection.send(Finished(generation.request_id, _result(generation)))


def _preview(generation: Generation) -> NDArray[np.uint8] | None:
    request = generation.request
    return paint(request.params, request.image, request.mask)[0] if request.params.previews else None


def _steps(params: InpaintParams) -> int:
    steps = max(1, int(params.num_inference_steps * params.strength))
    return 10 * steps if "slow" in params.prompt.split() else steps


def _result(generation: Generation) -> InpaintResult:
    request, now = generation.request, time.monotonic()
    is_flagged = "nsfw" in request.params.prompt
    return InpaintResult(
        images=paint_output(request),
        nsfw=(is_flagged,) * generation.num_images,
        timings=Timings(
            queue=generation.started_at - request.admitted_at,
            prepare=0.0,
            denoise=now - generation.started_at,
            vae_decode=0.0,
            safety=0.0,
            time_to_first_step=generation.first_step_at - request.admitted_at,
        ),
        mean_images=sum(generation.batch_images) / len(generation.batch_images),
        moments=_moments(generation, now),
    )


def _moments(generation: Generation, denoised_at: float | None) -> Moments:
    """Everything but the steps takes no time here."""
    started_at, first_step_at = generation.started_at or None, generation.first_step_at or None
    return Moments(started_at, started_at, started_at, first_step_at, *[denoised_at] * 5)
