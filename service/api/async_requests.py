"""All asynchronous requests: from their admission to when they are forgotten."""

import asyncio
import logging
import time

from starlette.requests import Request

from service.api.async_documents import state_text
from service.api.async_request import AsyncRequest, Job, Outcome, wait_unless_gone, without_traceback
from service.api.deliveries import Deliveries
from service.api.kept_answers import Answer
from service.api.kept_requests import KeptRequests
from service.api.kept_result import KeptResult
from service.api.webhook import WebhookPolicy
from service.api.work import outcome_of
from service.engine.clients import Client
from service.errors import ErrorCode, InpaintError

logger = logging.getLogger(__name__)


class AsyncRequests:
    """Runs them, keeps them, and has their end told.

    A request is begun before anybody is told of it. Then its client either is
    told to come back (`tell`), and from then on it can be asked for; or it had
    the patience to wait for the outcome, and takes it along (`take`).

    Args:
        kept: Where they are found.
        policy: Which webhooks may be named.
        deliveries: Sends those; None where none may.
    """

    def __init__(self, kept: KeptRequests[AsyncRequest], policy: WebhookPolicy, deliveries: Deliveries | None) -> None:
        self.kept = kept
        self.policy = policy
        self._deliveries = deliveries
        self._tasks: dict[AsyncRequest, asyncio.Task[None]] = {}  # Else nothing might refer to them.

    @property
    def num_unfinished(self) -> int:
        """Requests that have no outcome yet, deleted ones included."""
        return len(self._tasks)

    def begin(self, client: Client, job: Job) -> AsyncRequest:
        """Have an admitted request run, whether or not its client waits.

        Args:
            client: Whose it is.
            job: What it takes.
        """
        one = AsyncRequest(self.kept.new_id(client), client, job)
        self.kept.add(one.id, client, one)
        task = self._tasks[one] = asyncio.create_task(self._run(one, job))
        task.add_done_callback(lambda _: self._tasks.pop(one))
        return one

    async def wait_outcome(self, one: AsyncRequest, seconds: float, request: Request) -> None:
        """Wait for a request that its client was not told of, as long as it does, and not longer than this.

        Raises:
            ClientDisconnect: It went away.
        """
        if one in self._tasks:
            await wait_unless_gone(asyncio.shield(self._tasks[one]), seconds, request)

    def take(self, one: AsyncRequest) -> KeptResult:
        """The outcome of a request that nobody was told of, which is forgotten.

        Raises:
            InpaintError: It failed.
        """
        self.kept.forget(one.id, one.client)
        assert one.outcome is not None  # noqa: S101 - for the type checker: see `wait_outcome`
        if isinstance(one.outcome, InpaintError):
            raise one.outcome
        return one.outcome

    def tell(self, one: AsyncRequest, answer: Answer) -> None:
        """Its client is told to come back. From now on it gets the same answer if it repeats its request.

        Args:
            one: The request.
            answer: What the client gets.
        """
        one.told = answer
        if one.job is not None and one.job.claim is not None:
            one.job.claim.early = answer
        if one.outcome is not None:
            self._end(one, one.outcome)

    def delete(self, one: AsyncRequest) -> None:
        """Forget it; out of the queue, or of the batch at the next step, where it still runs."""
        self.kept.forget(one.id, one.client)
        if one.job is not None:
            one.is_given_up = True
            one.job.handle.cancel("client")

    async def close(self, grace_seconds: float) -> None:
        """The end of the service: results are made of what was painted, and webhooks are sent, for a little while."""
        give_up_at = time.monotonic() + grace_seconds
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=grace_seconds)
        if self._deliveries is not None:
            await self._deliveries.close(max(0.0, give_up_at - time.monotonic()))

    async def _run(self, one: AsyncRequest, job: Job) -> None:
        try:
            outcome: Outcome = await outcome_of(job.handle, job.finish)
        except InpaintError as error:
            outcome = without_traceback(error)
        if one.told is None:
            one.outcome = outcome  # Its client has the patience to wait for it.
        else:
            self._end(one, outcome)

    def _end(self, one: AsyncRequest, outcome: Outcome) -> None:
        job, answer = one.job, one.told
        assert job is not None  # noqa: S101 - for the type checker: it ends once
        assert answer is not None  # noqa: S101 - the same: nobody is to miss it
        if one.is_given_up:
            outcome = InpaintError(ErrorCode.CANCELLED, "The request was deleted.")
        elif not self.kept.end(one.id, outcome.num_bytes if isinstance(outcome, KeptResult) else 0):
            message = "There is no room to keep a result of this size."
            outcome = InpaintError(ErrorCode.OUT_OF_MEMORY, message)
            if not self.kept.end(one.id, 0):
                self.kept.forget(one.id, one.client)
        one.end(outcome, int(time.time() + self.kept.max_age_seconds))
        if job.claim is not None:
            job.claim.keep(answer)
        _log(one, job)
        if job.webhook is not None and self._deliveries is not None:
            self._deliveries.deliver(job.webhook, one.client, f"msg_{one.id}", state_text(one).encode())


def _log(one: AsyncRequest, job: Job) -> None:
    """What the line of the answer could not say yet."""
    fields: dict[str, object] = {"request_id": one.post_id, "outcome": one.status}
    if one.client.name is not None:
        fields["client"] = one.client.name
    if one.ended is not None and one.ended.error is not None:
        fields["code"] = one.ended.error.code
    fields.update({f"{stage}_seconds": round(spent, 4) for stage, spent in job.record.stages.items()})
    if job.record.mean_images is not None:
        fields["mean_images"] = round(job.record.mean_images, 2)
    logger.info("asynchronous request ended", extra={"fields": fields})
