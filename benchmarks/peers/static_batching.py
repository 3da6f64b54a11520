"""Static micro-batching of this service's own pipeline: what "dynamic batching" of other servers is for diffusion.

    python -m benchmarks.peers.static_batching --model MODEL --port PORT --threads N [--device D] [--dtype T]

A batch is closed when it is full or its window is over. It is prepared together,
stepped until its longest request is done, and finished together; nobody joins
meanwhile, and nobody leaves. Requests of different sizes run one batch after
the other. The pipeline, the settings (`INPAINT_*`), and the decoding and encoding of
pictures are the service's: only the batching differs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.peers.front import Inbox, Waiting, open_front
from benchmarks.peers.options import peer_parser
from benchmarks.peers.wire import PeerRequest
from service.errors import InpaintError
from service.request import BatchKey, InpaintParams, InpaintRequest, Pixels
from service.settings import load_settings
from service.worker.batcher import Generation
from service.worker.checkpoint import load
from service.worker.pipeline import InpaintPipeline
from service.worker.runtime import open_device
from service.worker.warm_up import warm_up

WINDOW_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class _Place:
    """A request's place in a batch."""

    waiting: Waiting
    generation: Generation


def run(pipeline: InpaintPipeline, inbox: Inbox, max_images: int, window_seconds: float) -> None:
    """Paint batch by batch, for ever.

    Args:
        pipeline: Loaded and warm.
        inbox: Where requests wait.
        max_images: Of these a batch is full.
        window_seconds: How long its first request waits for others.
    """
    while True:
        by_key: dict[BatchKey, list[_Place]] = {}
        for number, waiting in enumerate(inbox.take(max_images, window_seconds)):
            place = _Place(waiting, Generation(str(number), to_inpaint_request(waiting.request)))
            by_key.setdefault(place.generation.key, []).append(place)
        for batch in by_key.values():
            _answer(pipeline, batch)


def paint(pipeline: InpaintPipeline, generations: Sequence[Generation]) -> list[Pixels | InpaintError]:
    """The (H, W, 3) pictures of one batch, all at its end, or why a request has none.

    A request whose own steps are over adds no rows to the UNet's batch any more.
    """
    pipeline.prepare(generations)
    while running := [generation for generation in generations if not generation.is_denoised]:
        pipeline.step(running)
        for generation in running:
            generation.steps_done += 1
    return [
        finish if isinstance(finish, InpaintError) else np.asarray(finish.images[0], np.uint8)
        for finish in pipeline.finish(generations)
    ]


def to_inpaint_request(request: PeerRequest) -> InpaintRequest:
    """The same for a worker; nothing expires."""
    params = InpaintParams(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        strength=request.strength,
        num_images_per_prompt=1,
        seed=request.seed,
        scheduler=request.scheduler,
        eta=0.0,
        clip_skip=0,
        height=request.height,
        width=request.width,
    )
    return InpaintRequest(params, request.image, request.mask, admitted_at=0.0, deadline=float("inf"))


def _answer(pipeline: InpaintPipeline, batch: Sequence[_Place]) -> None:
    try:
        outcomes: Sequence[Pixels | Exception] = paint(pipeline, [place.generation for place in batch])
    except Exception as error:  # noqa: BLE001 - it is this batch's, whose requests are answered with 500
        outcomes = [error] * len(batch)
    for place, outcome in zip(batch, outcomes, strict=True):
        if isinstance(outcome, Exception):
            place.waiting.picture.set_exception(outcome)
        else:
            place.waiting.picture.set_result(outcome)


def main() -> None:
    """Load the service's pipeline, warm it up, serve until SIGTERM."""
    parser = peer_parser("Static micro-batching of this service's own pipeline.")
    parser.add_argument("--max-images", type=int, help="of a full batch; by default what the warm-up finds")
    parser.add_argument("--window-seconds", type=float, default=WINDOW_SECONDS, help="wait of a batch's first request")
    arguments = parser.parse_args()
    settings = load_settings(
        {"model": str(arguments.model), "dtype": arguments.dtype, "max_images": arguments.max_images}
    )
    components = load(settings, open_device(arguments.device, arguments.threads))
    pipeline = InpaintPipeline(components, settings.nsfw_policy)
    max_images = warm_up(pipeline, settings).max_images
    run(pipeline, open_front(arguments.port), max_images, arguments.window_seconds)


if __name__ == "__main__":
    main()
