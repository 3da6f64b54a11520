"""One request to the service, as an event stream: progress while it runs, and a sign of life at least every 15 s."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import httpx

from service.client.answers import Answer, read_answer
from service.client.events import Event, read_events
from service.client.failures import PaintFailed, Refused, Unreachable, WrongUsage, problem_of, seconds_until

_PATH = "v1/inpaint"
_EVENT_STREAM = "text/event-stream"

# Reading: the stream is silent while a large picture is decoded or encoded, and never else for so long.
_TIMEOUT = httpx.Timeout(60, connect=10, read=120, pool=None)

_BAD_GATEWAY = 502


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be painted.

    Attributes:
        fields: Texts by form field.
        files: Bytes by form field.
    """

    fields: Mapping[str, str] = field(repr=False)
    files: Mapping[str, bytes] = field(repr=False)


class Connection:
    """Connections to one service. As an async context manager it closes them.

    Args:
        url: Where it is; a path is kept.
        key: What to send as a bearer token.
        max_connections: At once.

    Raises:
        WrongUsage: The address or the key cannot be one, or a proxy or certificates that the environment names.
    """

    def __init__(self, url: str, key: str | None, max_connections: int) -> None:
        base_url, headers = _checked(url), [(b"Accept", _EVENT_STREAM.encode()), *_authorization(key)]
        limits = httpx.Limits(max_connections=max_connections)
        try:
            self._client = httpx.AsyncClient(base_url=base_url, headers=headers, timeout=_TIMEOUT, limits=limits)
        except (ImportError, OSError, ValueError) as error:  # Of proxies and certificates.
            raise WrongUsage(f"what the environment says of connections cannot be used: {error}") from None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def paint(self, order: Order, on_event: Callable[[Event], None], idempotency_key: str | None) -> Answer:
        """Send a request once, and wait for its pictures. When this is cancelled, the connection ends.

        Args:
            order: What to paint.
            on_event: Told of each event but the last.
            idempotency_key: What the request is called, should it be sent again.

        Raises:
            PaintFailed: There is no picture.
        """
        headers = {} if idempotency_key is None else {"Idempotency-Key": idempotency_key}
        # A file's own name is nobody's business.
        files = {name: (name, data) for name, data in order.files.items()} or None
        try:
            async with self._client.stream(
                "POST", _PATH, data=dict(order.fields), files=files, headers=headers
            ) as response:
                if response.status_code != httpx.codes.OK:
                    raise _refusal(response, await response.aread())
                if not response.headers.get("Content-Type", "").startswith(_EVENT_STREAM):
                    raise PaintFailed("what answers there is not this service")
                async for event in read_events(response.aiter_bytes()):
                    if event.name == "completed":
                        return read_answer(event.data)
                    if event.name == "failed":
                        problem = problem_of(event.data)
                        status = problem.get("status")
                        raise Refused(status if isinstance(status, int) else 500, problem)
                    on_event(event)
        except httpx.TimeoutException:
            raise Unreachable(f"{self._shown_url} does not answer") from None
        except httpx.TransportError as error:
            raise Unreachable(f"{self._shown_url} cannot be reached: {error or type(error).__name__}") from None
        except httpx.DecodingError:
            raise PaintFailed("the answer cannot be decoded") from None
        raise Unreachable(f"{self._shown_url} ended the connection before the picture was there")

    @property
    def _shown_url(self) -> str:
        """Without a password that may be in it."""
        return str(self._client.base_url.copy_with(userinfo=b"")).rstrip("/")


def _refusal(response: httpx.Response, body: bytes) -> PaintFailed:
    if response.status_code == _BAD_GATEWAY:
        return Unreachable("a proxy cannot reach the service (502)")
    if response.is_redirect:
        return PaintFailed(f"the service is elsewhere: {response.status_code} to {response.headers['Location']}")
    retry_after_seconds = seconds_until(response.headers.get("Retry-After"))
    return Refused(response.status_code, problem_of(body), retry_after_seconds)


def _checked(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise WrongUsage("the service's address does not begin with http:// or https:// and a host")
    return parsed


def _authorization(key: str | None) -> list[tuple[bytes, bytes]]:
    if key is None:
        return []
    if not key.isprintable() or " " in key:
        raise WrongUsage("the API key has characters that no key has")
    return [(b"Authorization", b"Bearer " + key.encode())]
