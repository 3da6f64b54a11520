"""A torch-free `Pipeline` that counts, records and fails on request, and a pipe to drive a worker with."""

import threading
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import numpy as np

from service.errors import ErrorCode, InpaintError
from service.messages import Command, LoraInfo, Report
from service.request import InpaintParams, InpaintRequest
from service.worker.batcher import Batcher, Generation
from service.worker.loop import Finish, Worker


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


class FakePipeline:
    """Paints each request in its seed's grey; `fail_on` decides what raises, and where."""

    def __init__(self, fail_on: Callable[[str, Sequence[Generation]], Exception | None] | None = None) -> None:
        self._fail_on = fail_on or (lambda _stage, _generations: None)
        self.calls: list[tuple[str, list[str]]] = []

    def _enter(self, stage: str, generations: Sequence[Generation]) -> None:
        self.calls.append((stage, [generation.request_id for generation in generations]))
        error = self._fail_on(stage, generations)
        if error is not None:
            raise error

    def prepare(self, generations: Sequence[Generation]) -> None:
        """Set the number of steps."""
        self._enter("prepare", generations)
        for generation in generations:
            generation.steps = generation.request.params.num_inference_steps

    def step(self, generations: Sequence[Generation]) -> None:
        """Do nothing."""
        self._enter("step", generations)

    def finish(self, generations: Sequence[Generation]) -> list[Finish | InpaintError]:
        """Grey pictures."""
        self._enter("finish", generations)
        return [
            Finish(np.stack([generation.request.image] * generation.num_images), (False,) * generation.num_images, 0, 0)
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
    """

    def __init__(self, pipeline: object, max_images: int = 4) -> None:
        ours, theirs = Pipe()
        self.connection: Connection = ours
        self.batcher = Batcher(max_images)
        self._worker = Worker(theirs, pipeline, self.batcher)  # type: ignore[arg-type]
        self._theirs = theirs
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self._worker.run()
        except BaseException as error:  # noqa: BLE001 - handed to the test
            self.error = error
        finally:
            self._theirs.close()

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
                self._thread.join(10)
                assert not self._thread.is_alive()
                return reports
