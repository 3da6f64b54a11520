"""Asynchronous requests that can be asked for: those that run, and those that ended, for a bounded time and memory.

Everything happens on the event loop. What a request is does not matter here.

That an id once stood for something is not remembered but proved: an id is a
random number and a code of it, of the client's number and of a secret of this
process. So what is gone is told from what never was without any memory, and
only to the client that it was of.
"""

import hmac
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from secrets import token_bytes
from typing import Generic, TypeVar

from service.engine.clients import Client
from service.errors import ErrorCode, InpaintError

ENTRY_BYTES = 8192
"""What keeping an ended request takes beside its pictures and their JSON."""

_PREFIX = "inp_"
_NUM_RANDOM_BYTES = 12
_NUM_CODE_BYTES = 16

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Kept(Generic[_T]):
    """An ended request, what it takes, since when it is kept, and its place among all that ended."""

    request: _T
    num_bytes: int
    kept_at: float
    number: int


class _Shelf(Generic[_T]):
    """What ended of one client, the oldest first."""

    def __init__(self) -> None:
        self.kept: OrderedDict[str, _Kept[_T]] = OrderedDict()
        self.num_bytes = 0

    def add(self, request_id: str, kept: _Kept[_T]) -> None:
        """It is the newest."""
        self.kept[request_id] = kept
        self.num_bytes += kept.num_bytes

    def pop(self, request_id: str) -> None:
        """It is there."""
        self.num_bytes -= self.kept.pop(request_id).num_bytes


class KeptRequests(Generic[_T]):
    """Requests by their ids, each for its client alone.

    Where there is no room, the client that holds most of what is short loses its oldest: nobody can push out what
    others hold less of. Of equal ones the oldest goes. What runs is never dropped; how much that can be, others bound.

    Args:
        max_bytes: Memory for ended ones.
        max_ended: How many ended ones are kept.
        max_age_seconds: How long after their end.
        now: A clock in seconds.
    """

    def __init__(
        self, max_bytes: int, max_ended: int, max_age_seconds: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_bytes = max_bytes
        self._max_ended = max_ended
        self._max_age_seconds = max_age_seconds
        self._now = now
        self._secret = token_bytes(32)
        self._running: dict[str, tuple[Client, _T]] = {}
        self._shelves: dict[Client, _Shelf[_T]] = {}  # None is empty.
        self._num_ended_ever = 0

    @property
    def max_age_seconds(self) -> float:
        """How long a request is kept after its end."""
        return self._max_age_seconds

    @property
    def num_running(self) -> int:
        """Requests that have not ended."""
        return len(self._running)

    @property
    def num_kept(self) -> int:
        """Requests that ended and are kept."""
        return sum(len(shelf.kept) for shelf in self._shelves.values())

    @property
    def num_bytes(self) -> int:
        """Memory that those take."""
        return sum(shelf.num_bytes for shelf in self._shelves.values())

    def new_id(self, client: Client) -> str:
        """An id that nobody can guess, for a request of this client."""
        random = token_bytes(_NUM_RANDOM_BYTES)
        return _PREFIX + (random + self._code(random, client)).hex()

    def add(self, request_id: str, client: Client, request: _T) -> None:
        """A request runs from now on.

        Args:
            request_id: From `new_id` for this client.
            client: Whose it is.
            request: The request.
        """
        self._running[request_id] = (client, request)

    def find(self, request_id: str, client: Client) -> _T:
        """A request of this client.

        Raises:
            InpaintError: `GONE`, there was one; `NOT_FOUND`, there was none, or it is of somebody else.
        """
        self.drop_expired()
        owner, request = self._running.get(request_id, (None, None))
        if request is not None and owner == client:
            return request
        shelf = self._shelves.get(client)
        if shelf is not None and request_id in shelf.kept:
            return shelf.kept[request_id].request
        if self._was_issued(request_id, client):
            raise InpaintError(ErrorCode.GONE, "The request was deleted, or its result is not kept any more.")
        raise InpaintError(ErrorCode.NOT_FOUND, "There is no such request.")

    def end(self, request_id: str, num_bytes: int) -> bool:
        """A request has ended and is kept, where there is room for it.

        Args:
            request_id: Which; of no effect where it does not run.
            num_bytes: What its result takes.

        Returns:
            Whether it is kept. It is not where it would be the first to make room itself: where it takes more than
            there is, or its client would hold more than any other with it alone. Then nothing has happened, and it
            may end with less.
        """
        client, request = self._running.get(request_id, (None, None))
        if client is None or request is None:
            return False
        self.drop_expired()
        kept = _Kept(request, num_bytes + ENTRY_BYTES, self._now(), self._num_ended_ever)
        shelf = self._shelves.setdefault(client, _Shelf())
        shelf.add(request_id, kept)
        too_many = self._too_many()
        if (client, request_id) in too_many:
            self._drop(client, request_id)
            return False
        for owner, other_id in too_many:
            self._drop(owner, other_id)
        del self._running[request_id]
        self._num_ended_ever += 1
        return True

    def forget(self, request_id: str, client: Client) -> None:
        """It is gone, running or ended; of no effect where it is gone already."""
        if self._running.get(request_id, (None, None))[0] == client:
            del self._running[request_id]
        shelf = self._shelves.get(client)
        if shelf is not None and request_id in shelf.kept:
            self._drop(client, request_id)

    def drop_expired(self) -> None:
        """Forget what ended too long ago."""
        kept_since = self._now() - self._max_age_seconds
        for client in list(self._shelves):
            for request_id, kept in list(self._shelves[client].kept.items()):
                if kept.kept_at > kept_since:
                    break
                self._drop(client, request_id)

    def _too_many(self) -> list[tuple[Client, str]]:
        """What has to go, so that the rest has room."""
        gone: list[tuple[Client, str]] = []
        num_bytes = {client: shelf.num_bytes for client, shelf in self._shelves.items()}
        num_kept = {client: len(shelf.kept) for client, shelf in self._shelves.items()}
        oldest_first = {client: iter(list(shelf.kept.items())) for client, shelf in self._shelves.items()}
        heads = {client: next(line) for client, line in oldest_first.items()}
        while sum(num_bytes.values()) > self._max_bytes or sum(num_kept.values()) > self._max_ended:
            holds = num_bytes if sum(num_bytes.values()) > self._max_bytes else num_kept
            client = max(heads, key=lambda one: (holds[one], -heads[one][1].number))
            request_id, kept = heads.pop(client)
            gone.append((client, request_id))
            num_bytes[client] -= kept.num_bytes
            num_kept[client] -= 1
            following = next(oldest_first[client], None)
            if following is not None:
                heads[client] = following
        return gone

    def _drop(self, client: Client, request_id: str) -> None:
        shelf = self._shelves[client]
        shelf.pop(request_id)
        if not shelf.kept:
            del self._shelves[client]

    def _code(self, random: bytes, client: Client) -> bytes:
        said = random + str(client.number).encode()
        return blake2b(said, key=self._secret, digest_size=_NUM_CODE_BYTES).digest()

    def _was_issued(self, request_id: str, client: Client) -> bool:
        try:
            said = bytes.fromhex(request_id.removeprefix(_PREFIX))
        except ValueError:
            return False
        random, code = said[:_NUM_RANDOM_BYTES], said[_NUM_RANDOM_BYTES:]
        is_canonical = request_id == _PREFIX + said.hex()  # Of each id there is one spelling.
        return is_canonical and hmac.compare_digest(code, self._code(random, client))
