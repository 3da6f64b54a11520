"""`stream=true`: OpenAI's server-sent events, as its own client reads them."""

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai.types import ImageEditCompletedEvent, ImageEditPartialImageEvent

from service.api.openai.events import _is_due
from service.messages import StepProgress
from tests.http.openai_pictures import KEY, connected, decoded, edit, file_of, hole, native_file
from tests.http.serving import LiveServer, eventually, png, scene, serving, square_mask

RECORDED = Path(__file__).parent / "recorded" / "openai" / "stream.txt"
REPAINTED = square_mask() == 255


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Name and data of each event."""
    events = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            events.append((lines["event"], json.loads(lines["data"])))
    return events


def streamed(server: LiveServer, **fields: str) -> str:
    """The bytes of a stream."""
    files = {"image": ("a.png", png(scene())), "mask": ("m.png", hole())}
    data = {"prompt": "a red house", "seed": "7", "stream": "true", **fields}
    response = server.client.post("/v1/images/edits", files=files, data=data)
    assert response.status_code == 200
    assert response.headers["Content-Type"].startswith("text/event-stream")
    assert response.headers["Cache-Control"] == "no-store"
    return response.text


def test_events_have_the_names_and_members_of_the_reference(server: LiveServer) -> None:
    """Event by event what OpenAI's reference shows, and strictly what its client's types require."""
    events = events_of(streamed(server, partial_images="1"))
    recorded = events_of(RECORDED.read_text())

    assert [name for name, _ in events] == [name for name, _ in recorded]
    for (name, data), (_, example) in zip(events, recorded, strict=True):
        assert set(data) >= set(example)
        assert data["type"] == name
    ImageEditPartialImageEvent.model_validate(events[0][1], strict=True)
    completed = ImageEditCompletedEvent.model_validate(events[1][1], strict=True)
    assert set(events[1][1]["usage"]) >= set(recorded[1][1]["usage"])
    assert (completed.size, completed.quality, completed.output_format) == ("64x64", "medium", "png")
    assert (events[1][1]["seed"], events[1][1]["nsfw_content_detected"]) == (7, False)


@pytest.mark.parametrize("num_wanted", [None, 0, 1, 2, 3])
def test_as_many_partial_images_as_asked_for(tmp_path: Path, num_wanted: int | None) -> None:
    """`partial_images` of them, numbered from 0, before the finished one; none by default."""
    gate = tmp_path / "gate"
    with serving(model=f"fake?gate={gate}") as server, connected(server) as client:
        stream = edit(client, stream=True, partial_images=num_wanted, prompt="slow hold")
        partial = [next(stream) for _ in range(num_wanted or 0)]
        eventually(lambda: server.metric("inpaint_batch_images_count") > 50)  # More than the request has steps.
        gate.touch()
        (completed,) = stream
        assert file_of(completed) == native_file(server, prompt="slow hold")
    assert [event.partial_image_index for event in partial] == list(range(num_wanted or 0))
    assert {event.type for event in partial} <= {"image_edit.partial_image"}
    assert completed.type == "image_edit.completed"


def test_partial_images_are_spread_over_the_steps() -> None:
    """Three of forty steps are due after a quarter, half and three quarters of them; then there are enough."""
    due = []
    for step in range(1, 41):
        if _is_due(StepProgress("a", step, 40), len(due), 3):
            due.append(step)
    assert due == [10, 20, 30]
    assert not _is_due(StepProgress("a", 40, 40), 0, 0)


def test_partial_image_looks_as_the_finished_one_will(server: LiveServer) -> None:
    """Of the same size and format, with the upload's own pixels outside the mask."""
    picture, mask = ("a.png", png(scene(160, 240))), ("m.png", hole(160, 240))
    with connected(server) as client:
        partial, completed = edit(client, stream=True, partial_images=1, image=picture, mask=mask, size="120x80")
        whole, _ = edit(client, stream=True, partial_images=1, image=picture, mask=mask)
        webp, _ = edit(client, stream=True, partial_images=1, output_format="webp")
    assert partial.size == completed.size == "120x80"
    assert decoded(partial).shape == (80, 120, 3)
    kept = square_mask(160, 240) == 0
    assert np.array_equal(decoded(whole)[kept], scene(160, 240)[kept])
    assert file_of(webp)[8:12] == b"WEBP"
    assert webp.output_format == "webp"


def test_without_a_stream_partial_images_make_no_difference(server: LiveServer) -> None:
    """`partial_images` is of streams alone."""
    with connected(server) as client:
        assert file_of(edit(client, partial_images=2).data[0]) == native_file(server)


def test_several_images_end_the_stream_one_by_one(server: LiveServer) -> None:
    """With `n`, one `image_edit.completed` for each image, in the order of their seeds."""
    with connected(server) as client:
        events = list(edit(client, stream=True, n=3))
        images = edit(client, n=3).data
    assert [event.type for event in events] == ["image_edit.completed"] * 3
    assert [event.seed for event in events] == [7, 8, 9]
    assert [event.b64_json for event in events] == [image.b64_json for image in images]


def test_flagged_image_in_a_stream(server: LiveServer) -> None:
    """Black and flagged, as without a stream."""
    with connected(server) as client:
        (completed,) = edit(client, stream=True, prompt="nsfw")
    assert completed.nsfw_content_detected is True
    assert not decoded(completed).any()


def test_failure_is_an_error_event(server: LiveServer) -> None:
    """The client raises `APIError` with message and code; the event is called `error`, all four keys in it."""
    with connected(server) as client:
        stream = edit(client, stream=True, prompt="fail")
        with pytest.raises(openai.APIError) as caught:
            list(stream)
    assert (caught.value.code, caught.value.type, caught.value.param) == ("internal", "server_error", None)
    ((name, data),) = events_of(streamed(server, prompt="nan"))
    assert (name, data["type"]) == ("error", "error")
    assert set(data["error"]) == {"message", "type", "param", "code"}
    assert data["error"]["code"] == "nan_output"


def test_fault_of_ours_is_an_error_event(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails unexpectedly in the stream ends it with an event that tells nothing of it."""
    monkeypatch.setattr("service.api.openai.events.partial_image_event", lambda *_: 1 / 0)
    ((name, data),) = events_of(streamed(server, partial_images="1"))
    assert (name, data["error"]["code"]) == ("error", "internal")
    assert "ZeroDivision" not in str(data)


def test_wrong_request_is_no_stream(server: LiveServer) -> None:
    """What can be refused at once is: with its status, before any event."""
    with connected(server) as client, pytest.raises(openai.BadRequestError) as caught:
        edit(client, stream=True, mask=None)
    assert caught.value.param == "mask"


def test_silence_is_bridged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comments keep the connection alive while nothing happens; the client passes over them."""
    monkeypatch.setattr("service.api.events.KEEP_ALIVE_SECONDS", 0.02)
    gate = tmp_path / "gate"
    form = {
        "files": {"image": ("a.png", png(scene())), "mask": ("m.png", hole())},
        "data": {"prompt": "a", "stream": "true"},
    }
    with serving(model=f"fake?gate={gate}", max_images=1) as server, connected(server) as client:
        held = edit(client, stream=True, prompt="hold")
        eventually(lambda: server.metric("inpaint_in_flight") == 1)
        # One at a time is painted: whoever comes now hears nothing of it.
        with server.client.stream("POST", "/v1/images/edits", **form) as response:
            lines = response.iter_lines()
            assert next(lines) == ": waiting"
            waiting = edit(client, stream=True)
            assert [next(lines) for _ in range(9)].count(": waiting") >= 4
            gate.touch()
            assert "event: image_edit.completed" in list(lines)
        assert [event.type for stream in (held, waiting) for event in stream] == ["image_edit.completed"] * 2


def test_hanging_up_cancels(tmp_path: Path) -> None:
    """A client that closes the stream takes its request out of the batch."""
    with serving(model=f"fake?gate={tmp_path / 'gate'}") as server, connected(server) as client:
        stream = edit(client, stream=True, prompt="hold", partial_images=1)
        assert next(iter(stream)).type == "image_edit.partial_image"
        assert server.metric("inpaint_in_flight") == 1
        stream.close()
        eventually(lambda: server.metric("inpaint_in_flight") == 0)
        assert server.metric('inpaint_cancelled_total{reason="disconnect"}') == 1
        assert server.metric("inpaint_images_total") == 0


def test_hanging_up_without_a_stream_cancels(tmp_path: Path) -> None:
    """So does one that closes its connection while it waits for the whole answer."""
    with serving(model=f"fake?gate={tmp_path / 'gate'}") as server:

        async def impatient() -> None:
            url = f"http://127.0.0.1:{server.port}/v1"
            async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=1) as client:
                await client.images.edit(image=("a.png", png(scene())), mask=("m.png", hole()), prompt="hold")

        with pytest.raises(openai.APITimeoutError):
            asyncio.run(impatient())
        eventually(lambda: server.metric("inpaint_in_flight") == 0)
        assert server.metric('inpaint_cancelled_total{reason="disconnect"}') == 1


def test_async_stream(server: LiveServer) -> None:
    """`AsyncOpenAI` reads the same events."""

    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=KEY) as client:
            stream = await client.images.edit(
                image=("a.png", png(scene())),
                mask=("m.png", hole()),
                prompt="a slow house",
                stream=True,
                partial_images=1,
                extra_body={"seed": 7},
            )
            return [event async for event in stream]

    events = asyncio.run(ask())
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    assert file_of(events[-1]) == native_file(server, prompt="a slow house")
