"""One request's failure is its own.

A batch that fails is halved until the culprit stands alone; the others go on
from where they were. Nothing here changes a generation, so it may run in any
thread.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from service.errors import ErrorCode, InpaintError
from service.worker.batcher import Generation
from service.worker.faults import BatchTooLarge, DeviceLost

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Attempt(Generic[_T]):
    """What became of work on some generations.

    Attributes:
        outcomes: Each generation, in order, with its result or the error that it is answered with.
        too_many_images: Images of the smallest batch of several for which the device's memory did not suffice;
            None where it always did.
    """

    outcomes: tuple[tuple[Generation, _T | InpaintError], ...]
    too_many_images: int | None = None


def attempt(
    generations: Sequence[Generation], work: Callable[[Sequence[Generation]], Sequence[_T | InpaintError]]
) -> Attempt[_T]:
    """Do `work` on all at once or, where that fails, on halves.

    Args:
        generations: What to work on.
        work: Gives one result, or error, for each of those it is called with; leaves them as they were if it raises.

    Raises:
        DeviceLost: Smaller batches would not help.
    """
    if not generations:
        return Attempt(())
    too_many: list[int] = []
    try:
        return Attempt(tuple(zip(generations, work(generations), strict=True)))
    except DeviceLost:
        raise
    except Exception as error:
        if len(generations) == 1:
            return Attempt(((generations[0], as_inpaint_error(error)),))
        if isinstance(error, BatchTooLarge):
            too_many.append(sum(generation.num_images for generation in generations))
        else:
            logger.warning("a batch of %d failed and is tried in halves", len(generations), exc_info=error)
    # Out here the error is gone, and with its frames the device memory that they held on to.
    half = len(generations) // 2
    halves = [attempt(generations[:half], work), attempt(generations[half:], work)]
    too_many += [part.too_many_images for part in halves if part.too_many_images is not None]
    return Attempt(halves[0].outcomes + halves[1].outcomes, min(too_many, default=None))


def as_inpaint_error(error: Exception) -> InpaintError:
    """What a client is told of a failure; what it is not told goes to the log."""
    if isinstance(error, InpaintError):
        return error.with_traceback(None)
    if isinstance(error, BatchTooLarge):
        return InpaintError(ErrorCode.OUT_OF_MEMORY, "The device has not enough memory for this request.")
    logger.error("a request failed", exc_info=error)
    return InpaintError(ErrorCode.INTERNAL, "The request failed inside the service.")
