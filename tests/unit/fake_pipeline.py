"""A torch-free `Pipeline` that counts, records, and fails or stops on request, and a pipe to drive a worker with."""

import threading
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import numpy as np

from service.errors import ErrorCode, InpaintError
from service.messages import Command, LoraInfo, Report
from service.request import InpaintParams, InpaintRequest
from service.worker.background import Jobs
from service.worker.batcher import Batcher, Generation
from service.worker.loop import Worker
from service.worker.stages import Finish


def make_request(prompt: str = "a red house", *, admitted_at: float = 0.0, **changes: object) -> InpaintRequest:
    """A small request; `changes` are fields of `InpaintParams`."""
    fields: dict[str, object] = {
        "prompt": prompt,
        "negative_prompt": "",
        "num_inference_steps": 3,
        "guidance_scale": 7.5,
        "strength": 1.0,
        "num_images_per_prompt": 1,
        "seed": 1,
        "scheduler": "ddim",
        "eta": 0.0,
        "clip_skip": 0,
        "height": 8,
        "width": 8,
    }
    params = InpaintParams(**(fields | changes))  # type: ignore[arg-type]
    image = np.full((params.height, params.width, 3), params.seed % 256, np.uint8)
    return InpaintRequest(params, image, np.full(image.shape[:2], 255, np.uint8), admitted_at, float("inf"))


Hook = Callable[[str, Sequence[Generation]], BaseException | None]
"""Called on entry of a stage with its generations; what it returns is raised."""


class Hold:
    """A hook that stops one stage of one request (of any, without an id) until it is released.

    Attributes:
        reached: Set when the pipeline stands there for the first time.
    """

    def __init__(self, stage: str, request_id: str | None = None) -> None:
        self._stage = stage
        self._request_id = request_id
        self._gate = threading.Event()
        self.reached = threading.Event()

    def __call__(self, stage: str, generations: Sequence[Generation]) -> None:
        """Stop there."""
        if stage == self._stage and self._request_id in {None, *(one.request_id for one in generations)}:
            self.reached.set()
            assert self._gate.wait(60), "nobody released the pipeline"

    def release(self) -> None:
        """Go on, for good."""
        self._gate.set()


class Turnstile:
    """A hook that lets through as many steps as the test allows."""

    def __init__(self) -> None:
        self._allowed = threading.Semaphore(0)
        self._asked = threading.Semaphore(0)

    def __call__(self, stage: str, _generations: Sequence[Generation]) -> None:
        """Stop at a step that is not allowed yet."""
        if stage == "step":
            self._asked.release()
            assert self._allowed.acquire(timeout=60), "nobody let the pipeline step"

    def let(self, num_steps: int) -> None:
        """Allow so many more."""
        self._allowed.release(num_steps)

    def wait_for_step(self) -> None:
        """Until the next step is asked for; each step is waited for once."""
        assert self._asked.acquire(timeout=60), "the worker asked for no step"


class FakePipeline:
    """Paints each request in its seed's grey; `hooks` decide what raises or stops, and where.

    Attributes:
        calls: Every call's stage and request ids, in order.
        generations: Every generation that was prepared, by its request's id.
    """

    def __init__(self, *hooks: Hook) -> None:
        self._hooks = hooks
        self.calls: list[tuple[str, list[str]]] = []
        self.generations: dict[str, Generation] = {}

    def calls_of(self, stage: str) -> list[list[str]]:
        """Request ids of each call of one stage."""
        return [request_ids for at, request_ids in self.calls if at == stage]

    def _enter(self, stage: str, generations: Sequence[Generation]) -> None:
        self.calls.append((stage, [generation.request_id for generation in generations]))
        if stage == "prepare":
            self.generations.update({generation.request_id: generation for generation in generations})
        for hook in self._hooks:
            error = hook(stage, generations)
            if error is not None:
                raise error
        assert all((generation.latents is None) == (stage == "prepare") for generation in generations)

    def prepare(self, generations: Sequence[Generation]) -> None:
        """Set the number of steps."""
        self._enter("prepare", generations)
        for generation in generations:
            generation.latents = f"latents of {generation.request_id}"
            generation.steps = generation.request.params.num_inference_steps

    def step(self, generations: Sequence[Generation]) -> None:
        """Do nothing."""
        self._enter("step", generations)

    def finish(self, generations: Sequence[Generation]) -> list[Finish | InpaintError]:
        """Grey pictures."""
        self._enter("finish", generations)
        return [
            Finish(
                np.stack([generation.request.image] * generation.num_images), (False,) * generation.num_images, 0, 0, 0
            )
            for generation in generations
        ]

    def preview(self, generations: Sequence[Generation]) -> list[np.ndarray | None]:
        """The request's own picture; nothing of those whose prompt says so."""
        self._enter("preview", generations)
        return [
            None if "flagged" in generation.request.params.prompt else generation.request.image
            for generation in generations
        ]

    def inspect_lora(self, path: str) -> LoraInfo:
        """A LoRA, unless the path says otherwise."""
        if "other" in path:
            raise InpaintError(ErrorCode.INVALID_LORA, "This LoRA does not fit the served model.")
        return LoraInfo(rank=4, num_unet_layers=2, num_text_encoder_layers=1)

    def memory_bytes(self) -> dict[str, int]:
        """None on a CPU."""
        return {}


class DrivenWorker:
    """A worker in a thread, with its pipe in hand.

    Args:
        pipeline: What it runs.
        max_images: Its cap.
        jobs: Where it prepares and finishes; by default where it steps.

    Attributes:
        gone: Set when it has ended.
    """

    def __init__(self, pipeline: object, max_images: int = 4, jobs: Jobs | None = None) -> None:
        ours, theirs = Pipe()
        self.connection: Connection = ours
        self.batcher = Batcher(max_images)
        self._worker = Worker(theirs, pipeline, self.batcher, jobs)  # type: ignore[arg-type]
        self._theirs = theirs
        self.error: BaseException | None = None
        self.gone = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self._worker.run()
        except BaseException as error:  # noqa: BLE001 - handed to the test
            self.error = error
        finally:
            self._theirs.close()
            self.gone.set()

    def start(self) -> None:
        """Let it read what was sent."""
        self._thread.start()

    def send(self, *commands: Command) -> None:
        """Send commands in order."""
        for command in commands:
            self.connection.send(command)

    def receive(self, timeout: float = 60.0) -> Report:
        """The next report."""
        assert self.connection.poll(timeout), "the worker said nothing"
        report: Report = self.connection.recv()
        return report

    def reports(self) -> list[Report]:
        """Everything until the worker ends."""
        reports: list[Report] = []
        while True:
            try:
                reports.append(self.receive())
            except EOFError:
                self.join()
                return reports

    def join(self) -> None:
        """Wait until the worker has ended."""
        self._thread.join(10)
        assert not self._thread.is_alive()
