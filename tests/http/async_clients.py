"""What tests of asynchronous requests have in common: sending them, asking for them, reading their events."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from service.api.async_schemas import RequestState
from tests.http.serving import LiveServer, eventually

ASYNC = {"Prefer": "respond-async"}


def begin(server: LiveServer, headers: dict[str, str] | None = None, **fields: Any) -> str:
    """Post a request that is to be answered later; where it is."""
    response = server.inpaint({**ASYNC, **(headers or {})}, **fields)
    assert response.status_code == 202, response.text
    return response.headers["Location"]


def checked(document: dict[str, Any]) -> dict[str, Any]:
    """A state that is exactly as the API's document has it."""
    assert RequestState.model_validate(document).model_dump(mode="json", by_alias=True) == document
    return document


def state(server: LiveServer, url: str, query: str = "", **headers: str) -> dict[str, Any]:
    """What there is to say of a request."""
    response = server.client.get(url + query, headers=headers)
    assert response.status_code == 200, response.text
    assert response.headers["Cache-Control"] == "no-store"
    document = checked(response.json())
    assert ("Retry-After" in response.headers) == (document["status"] in ("queued", "running"))
    return document


def ended(server: LiveServer, url: str, query: str = "?wait=20", **headers: str) -> dict[str, Any]:
    """The same once it has ended."""
    document = state(server, url, query, **headers)
    assert document["status"] not in ("queued", "running")
    return document


def is_idle(server: LiveServer) -> bool:
    """Whether nothing runs, waits or holds a key."""
    requests = server.state.async_requests
    return (requests.num_unfinished, requests.kept.num_running, server.state.kept_answers.num_claimed) == (0, 0, 0)


def fill(server: LiveServer, count: int, **fields: Any) -> list[str]:
    """So many held requests, one after the other."""
    urls = []
    for number in range(1, count + 1):
        urls.append(begin(server, prompt="hold", **fields))
        eventually(
            lambda number=number: server.metric("inpaint_in_flight") + server.metric("inpaint_queue_depth") == number
        )
    return urls


@dataclass(frozen=True)
class Event:
    """One server-sent event."""

    id: str
    name: str
    data: dict[str, Any]


class Reader:
    """Reads a stream's events; comments are counted."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.num_comments = 0
        self._lines = response.iter_lines()

    def __iter__(self) -> Iterator[Event]:
        fields: dict[str, str] = {}
        for line in self._lines:
            if line.startswith(":"):
                self.num_comments += 1
            elif line:
                name, _, value = line.partition(": ")
                fields[name] = value
            elif fields:
                yield Event(fields["id"], fields["event"], json.loads(fields["data"]))
                fields = {}

    def next(self) -> Event:
        """The next event."""
        return next(iter(self))


@contextmanager
def reading(server: LiveServer, url: str, query: str = "", **headers: str) -> Iterator[Reader]:
    """Read a request's events until the block ends."""
    with server.client.stream("GET", f"{url}/events{query}", headers=headers) as response:
        assert response.status_code == 200
        assert response.headers["Content-Type"].startswith("text/event-stream")
        yield Reader(response)


def events(server: LiveServer, url: str, query: str = "", **headers: str) -> list[Event]:
    """All events from now to the end."""
    with reading(server, url, query, **headers) as reader:
        return list(reader)
