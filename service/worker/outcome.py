"""What a worker tells of a generation that has ended: its pictures, and where its time went."""

from dataclasses import replace

from service.request import InpaintResult, Moments, Timings
from service.worker.batcher import Generation
from service.worker.stages import Finish


def result_of(generation: Generation, finish: Finish, finish_started_at: float) -> InpaintResult:
    """The pictures, and where the time went: whatever was not work on it counts as queue."""
    admitted_at = generation.request.admitted_at
    return InpaintResult(
        images=finish.images,
        nsfw=finish.nsfw,
        timings=Timings(
            queue=(generation.prepare_started_at - admitted_at)
            + (generation.joined_at - generation.prepared_at)
            + (finish_started_at - generation.denoised_at),
            prepare=generation.prepared_at - generation.prepare_started_at,
            denoise=generation.denoised_at - generation.joined_at,
            vae_decode=finish.decoded_at - finish.decode_started_at,
            safety=finish.checked_at - finish.decoded_at,
            time_to_first_step=generation.first_step_at - admitted_at,
        ),
        mean_images=generation.shared_images / generation.steps_done,
        moments=replace(
            moments_of(generation),
            finish_started_at=finish_started_at,
            decode_started_at=finish.decode_started_at,
            decoded_at=finish.decoded_at,
            checked_at=finish.checked_at,
        ),
    )


def moments_of(generation: Generation) -> Moments:
    """How far it came, up to its last step; what it did not come to is 0 there."""
    return Moments(
        prepare_started_at=generation.prepare_started_at or None,
        prepared_at=generation.prepared_at or None,
        joined_at=generation.joined_at or None,
        first_step_at=generation.first_step_at or None,
        denoised_at=generation.denoised_at or None,
    )
