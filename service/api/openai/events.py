"""An edit as server-sent events: unfinished pictures, where they are asked for, then the finished ones or an error."""

import logging
from collections.abc import AsyncIterator
from contextlib import aclosing

from service.api.events import KEEP_ALIVE, with_keep_alive
from service.api.openai.answers import error_event, partial_image_event
from service.api.openai.orders import EditOrder
from service.api.painting import Admitted, unfinished
from service.api.problems import internal_error
from service.api.work import Work
from service.errors import InpaintError
from service.messages import StepProgress

logger = logging.getLogger(__name__)


async def edit_events(admitted: Admitted, order: EditOrder, work: Work) -> AsyncIterator[str | bytes]:
    """The events of one admitted request. When the reader goes away, the work is told.

    Args:
        admitted: The request.
        order: What was asked for.
        work: Its answer is the last events.
    """
    num_shown, shown = 0, None
    try:
        async with aclosing(with_keep_alive(work.handle.progress())) as steps:
            async for progress in steps:
                if progress is None:
                    yield KEEP_ALIVE
                    continue
                picture = progress.preview
                if picture is None or picture is shown or not _is_due(progress, num_shown, order.partial_images):
                    continue
                shown = picture
                yield partial_image_event(order, await unfinished(admitted, picture, order.image_format), num_shown)
                num_shown += 1
        yield (await work.answer()).body
    except InpaintError as error:
        admitted.record.code = error.code
        yield error_event(error)
    except Exception:
        logger.exception("request %s failed unexpectedly", work.handle.request_id)
        unexpected = internal_error()
        admitted.record.code = unexpected.code
        yield error_event(unexpected)
    finally:
        work.client_left()


def _is_due(progress: StepProgress, num_shown: int, num_wanted: int) -> bool:
    """Whether to show another one: evenly over the steps, as long as any is wanted."""
    share = (num_shown + 1) / (num_wanted + 1)
    return num_shown < num_wanted and progress.step >= share * progress.steps
