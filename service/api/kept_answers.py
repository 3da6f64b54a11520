"""Answers that are kept, to be given again to a client that repeats its request.

A *name* stands for one request of one client. While it runs, its name is
claimed; once it was answered, the answer is kept under the name, for a bounded
time and in bounded memory. Everything happens on the event loop.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from service.errors import ErrorCode, InpaintError

ENTRY_BYTES = 2048
"""What keeping an answer takes beside its body. It bounds the number of answers, too, however small they are."""

_MAX_RETRY_AFTER_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One whole answer.

    Attributes:
        request_id: The request that it was made for.
        media_type: What the body is.
        headers: What is said beside the body.
        body: The bytes that the client gets.
        status: 200; or 202, the request is known by then, and its result is to be fetched elsewhere.
    """

    request_id: str
    media_type: str
    headers: Mapping[str, str]
    body: bytes
    status: int = 200

    @property
    def num_bytes(self) -> int:
        """Memory that keeping it takes."""
        return len(self.body) + ENTRY_BYTES


class Claim:
    """A request's hold on its name from when its body was read to its end.

    Args:
        answers: Where the name is claimed.
        name: The name.
        digest: Of the request's body.
        claimed_at: When, by the clock of `answers`.
    """

    def __init__(self, answers: "KeptAnswers", name: bytes, digest: bytes, claimed_at: float) -> None:
        self.name = name
        self.digest = digest
        self.claimed_at = claimed_at
        self.early: Answer | None = None
        """What the client was answered while the request still runs, where it was."""
        self._answers = answers

    def keep(self, answer: Answer) -> None:
        """The request was answered: whoever repeats it gets the same."""
        self._answers.settle(self, answer)

    def release(self) -> None:
        """The request ended. Without an answer that was kept, its name is free. Idempotent."""
        self._answers.settle(self, None)


@dataclass(frozen=True, slots=True)
class _Kept:
    """An answer, what it answers, and since when it is kept."""

    digest: bytes
    answer: Answer
    kept_at: float


class KeptAnswers:
    """Names that are claimed, and answers that are kept.

    Args:
        max_bytes: Memory for answers; the oldest ones make room.
        max_age_seconds: How long an answer is kept.
        now: A clock in seconds.
    """

    def __init__(self, max_bytes: int, max_age_seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._max_age_seconds = max_age_seconds
        self._now = now
        self._claims: dict[bytes, Claim] = {}  # As many as there are requests; never dropped for room or age.
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()  # The oldest first.
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Memory that the kept answers take."""
        return self._num_bytes

    @property
    def num_kept(self) -> int:
        """How many answers are kept."""
        return len(self._kept)

    @property
    def num_claimed(self) -> int:
        """How many names are claimed."""
        return len(self._claims)

    def is_known(self, name: bytes) -> bool:
        """Whether a name is claimed, or has an answer."""
        self.drop_expired()
        return name in self._claims or name in self._kept

    def begin(self, name: bytes, digest: bytes) -> Claim | Answer:
        """A request has come.

        Args:
            name: Its name.
            digest: Of its body.

        Returns:
            The answer, where the request is a repetition; else a claim, to be released when the request ends.

        Raises:
            InpaintError: `KEY_REUSE`, the name stands for a request with another body; `IN_PROGRESS`, for one that
                still runs and was not answered early.
        """
        self.drop_expired()
        found = self._claims.get(name) or self._kept.get(name)
        if found is None:
            claim = Claim(self, name, digest, self._now())
            self._claims[name] = claim
            return claim
        if found.digest != digest:
            raise InpaintError(
                ErrorCode.KEY_REUSE, "This key was sent with another body; each request takes a new one."
            )
        if isinstance(found, Claim) and found.early is not None:
            return found.early
        if isinstance(found, Claim):
            # As long again as it has run so far: no client asks often, and none waits much longer than it has to.
            seconds = min(self._now() - found.claimed_at, _MAX_RETRY_AFTER_SECONDS)
            message = "The first request with this key is still running."
            raise InpaintError(ErrorCode.IN_PROGRESS, message, retry_after_seconds=seconds)
        return found.answer

    def drop_expired(self) -> None:
        """Forget the answers that are too old."""
        kept_since = self._now() - self._max_age_seconds
        while self._kept and next(iter(self._kept.values())).kept_at <= kept_since:
            self._drop_oldest()

    def settle(self, claim: Claim, answer: Answer | None) -> None:
        """End a claim, once. An answer larger than all the room is not kept: it would drive out the others in vain."""
        if self._claims.get(claim.name) is not claim:
            return
        del self._claims[claim.name]
        if answer is None or answer.num_bytes > self._max_bytes:
            return
        self._kept[claim.name] = _Kept(claim.digest, answer, self._now())
        self._num_bytes += answer.num_bytes
        while self._num_bytes > self._max_bytes:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, kept = self._kept.popitem(last=False)
        self._num_bytes -= kept.answer.num_bytes
