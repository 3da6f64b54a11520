"""`Prefer: respond-async`: a request that is answered at once, and asked for later, as often as its client likes."""

import asyncio
import base64
import gc
import io
import logging
import os
import signal
import socket
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from service.api import async_events, async_inpaint
from service.api.pictures import Canvas
from tests.http.async_clients import ASYNC, begin, checked, ended, events, fill, is_idle, reading, state
from tests.http.serving import (
    CLOSING,
    LiveServer,
    assert_problem,
    eventually,
    form,
    multipart_head,
    serving,
    usual_parts,
)

# --- the answer, and what it leads to -----------------------------------------------------


def test_a_result_is_what_the_request_would_have_been_answered(server: LiveServer) -> None:
    """202 at once and, where it says, the very pictures, seeds and flags of the same request with patience."""
    usual = server.inpaint({"Accept": "application/json"}, num_images_per_prompt="2").json()
    response = server.inpaint({**ASYNC, "X-Request-Id": "my-own"}, num_images_per_prompt="2")

    assert response.status_code == 202
    assert response.headers["Preference-Applied"] == "respond-async"
    assert int(response.headers["Retry-After"]) >= 1
    first = checked(response.json())
    assert response.headers["Location"] == first["links"]["self"] == f"/v1/requests/{first['id']}"
    assert first["status"] in ("queued", "running")

    last = ended(server, response.headers["Location"])
    assert (last["id"], last["status"], last["error"]) == (first["id"], "completed", None)
    assert (last["position"], last["eta"], last["progress"]) == (None, None, {"step": 4, "steps": 4})
    assert last["expires"] - time.time() == pytest.approx(3600, abs=60)
    result = last["result"]
    assert result["id"] == "my-own"
    assert result["parameters"] == usual["parameters"]
    for index, (linked, image) in enumerate(zip(result["images"], usual["images"], strict=True)):
        assert linked["url"] == f"/v1/requests/{first['id']}/images/{index}"
        file = server.client.get(linked["url"])
        assert file.content == base64.b64decode(image["b64_json"])
        assert file.headers["Content-Type"] == linked["media_type"] == "image/png"
        assert file.headers["X-Seed"] == str(linked["seed"]) == str(7 + index)
        assert file.headers["X-NSFW-Content-Detected"] == "false"
        assert linked["b64_json"] is None
        assert {name: linked[name] for name in image if name != "b64_json"} == {
            name: value for name, value in image.items() if name != "b64_json"
        }
    whole = ended(server, response.headers["Location"], "?include=b64_json")["result"]
    assert [image["b64_json"] for image in whole["images"]] == [image["b64_json"] for image in usual["images"]]


def test_a_flagged_picture_says_so(server: LiveServer) -> None:
    """The safety checker's flag is in the state and beside the image."""
    image = ended(server, begin(server, prompt="nsfw"))["result"]["images"][0]
    assert image["nsfw_content_detected"] is True
    assert server.client.get(image["url"]).headers["X-NSFW-Content-Detected"] == "true"


@pytest.mark.parametrize(
    ("output_format", "media_type", "ending"),
    [
        ("jpeg", "image/jpeg", "jpeg"),
        ("webp", "image/webp", "webp"),
        ("npy", "application/x-npy", "npy"),
        ("latent", "application/x-npy", "npy"),
    ],
)
def test_the_format_is_the_forms(server: LiveServer, output_format: str, media_type: str, ending: str) -> None:
    """`output_format` says what images are encoded as, and their names end so."""
    (image,) = ended(server, begin(server, output_format=output_format))["result"]["images"]
    file = server.client.get(image["url"])
    assert file.headers["Content-Type"] == image["media_type"] == media_type
    assert file.headers["Content-Disposition"].startswith("inline; filename=")
    assert file.headers["Content-Disposition"].endswith(f'-0.{ending}"')
    if ending == "npy":
        assert np.load(io.BytesIO(file.content)).dtype == np.float32


@pytest.mark.parametrize("accept", ["image/png", "text/event-stream", "image/webp", "text/html"])
def test_accept_does_not_matter_to_what_is_fetched_later(server: LiveServer, accept: str) -> None:
    """Whatever shapes a client names for the answer that it does not wait for, it gets the state and later the PNG."""
    response = server.inpaint({**ASYNC, "Accept": accept})
    assert response.status_code == 202
    assert response.headers["Content-Type"] == "application/json"
    assert ended(server, response.headers["Location"])["result"]["images"][0]["media_type"] == "image/png"


def test_ids_are_the_services_own(server: LiveServer) -> None:
    """Clients may repeat their `X-Request-Id`; what they ask for stays apart, and cannot be guessed from it."""
    urls = [begin(server, {"X-Request-Id": "same"}, seed=str(seed)) for seed in (1, 2)]
    assert len(set(urls)) == 2
    seeds = [ended(server, url)["result"]["images"][0]["seed"] for url in urls]
    assert seeds == [1, 2]
    assert all("same" not in url for url in urls)


def test_what_is_refused_is_refused_at_once(tmp_path: Path) -> None:
    """Bad fields, a full queue, no worker: errors of the request come as its answer, and nothing is kept."""
    gate = tmp_path / "gate"
    with serving(model=f"fake?gate={gate}", max_images=1, queue_size=1) as server:
        assert_problem(server.inpaint(ASYNC, num_inference_steps="0"), 422, "out_of_range")
        assert_problem(server.inpaint(ASYNC, image=b"no picture"), 422, "invalid_image")
        fill(server, 3)
        response = server.inpaint(ASYNC)
        assert_problem(response, 429, "overloaded")
        assert int(response.headers["Retry-After"]) >= 1
        assert server.state.async_requests.kept.num_running == 3
        gate.touch()
    with serving(model="fake?load_forever=1", wait_ready=False) as server:
        assert_problem(server.inpaint(ASYNC), 503, "not_ready")


# --- while it runs --------------------------------------------------------------------------


def test_states_from_the_queue_to_the_end(tmp_path: Path) -> None:
    """Places in the queue, estimates, steps: each state says how far the request is; then all have their pictures."""
    gate = tmp_path / "gate"
    with serving(model=f"fake?gate={gate}&step_seconds=0.01", max_images=1) as server:
        urls = fill(server, 5)  # One runs, one is ready to follow, three wait.
        eventually(lambda: state(server, urls[0])["progress"] == {"step": 3, "steps": 4})
        states = [state(server, url) for url in urls]

        assert [one["status"] for one in states] == ["running", "running", "queued", "queued", "queued"]
        assert [one["position"] for one in states] == [None, None, 0, 1, 2]
        assert states[2]["progress"] == {"step": 0, "steps": 4}
        assert states[1]["eta"] is None  # It has done no step yet.
        etas = [one["eta"] for one in states[2:]]
        assert 0 < etas[0] < etas[1] < etas[2]
        assert all(one["expires"] is one["result"] is one["error"] is None for one in states)

        gate.touch()
        assert {ended(server, url)["status"] for url in urls} == {"completed"}
        eventually(lambda: is_idle(server))


def test_waiting_for_the_end(tmp_path: Path) -> None:
    """`wait` answers as soon as the request ends, or what there is after so many seconds; hanging up leaves nothing."""
    gate = tmp_path / "gate"
    with serving(model=f"fake?gate={gate}") as server:
        url = begin(server, prompt="hold")
        assert state(server, url, "?wait=1")["status"] == "running"
        sample = 'inpaint_requests_total{code="499",endpoint="/v1/requests/{request_id}"}'
        with server.raw(f"GET {url}?wait=60 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()):
            pass
        eventually(lambda: server.metric(sample) == 1)
        gate.touch()
        assert ended(server, url)["status"] == "completed"


@pytest.mark.parametrize(
    ("query", "field"), [("wait=-1", "wait"), ("wait=61", "wait"), ("wait=x", "wait"), ("include=all", "include")]
)
def test_strange_queries_are_refused(server: LiveServer, query: str, field: str) -> None:
    """A value that is none is 422 and names the parameter."""
    problem = assert_problem(server.client.get(f"{begin(server)}?{query}"), 422, "invalid_field")
    assert [error["field"] for error in problem["errors"]] == [field]


# --- images -----------------------------------------------------------------------------------


def test_images_before_the_end_and_those_that_are_not(tmp_path: Path) -> None:
    """409 with a time to come back while it runs; afterwards 404 for an image that was not asked for."""
    gate = tmp_path / "gate"
    with serving(model=f"fake?gate={gate}") as server:
        url = begin(server, prompt="hold", num_images_per_prompt="2")
        for index in (0, 7):
            response = server.client.get(f"{url}/images/{index}")
            assert_problem(response, 409, "in_progress")
            assert int(response.headers["Retry-After"]) >= 1
        gate.touch()
        ended(server, url)
        assert server.client.get(f"{url}/images/1").status_code == 200
        for index in ("2", "-1", "01", "+1", "x", "1.0", "%C2%B2", "9" * 5000):
            assert_problem(server.client.get(f"{url}/images/{index}"), 404, "not_found")


def test_images_of_a_failure_are_that_failure(server: LiveServer) -> None:
    """Who asks for the images of a request that failed learns why."""
    url = begin(server, prompt="please fail")
    last = ended(server, url)
    problem = assert_problem(server.client.get(f"{url}/images/0"), 500, "internal")
    assert (last["status"], last["result"]) == ("failed", None)
    assert (last["error"]["code"], last["error"]["detail"]) == ("internal", problem["detail"])


def test_an_image_is_not_sent_again_to_who_has_it(server: LiveServer) -> None:
    """`If-None-Match` with the image's `ETag` is 304 without the bytes, as long as the image is there."""
    url = begin(server)
    ended(server, url)
    first = server.client.get(f"{url}/images/0")
    tag = first.headers["ETag"]
    for sent in (tag, f'"other", W/{tag}', "*"):
        again = server.client.get(f"{url}/images/0", headers={"If-None-Match": sent})
        assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", tag)
    assert server.client.get(f"{url}/images/0", headers={"If-None-Match": '"other"'}).content == first.content
    assert server.client.delete(url).status_code == 204
    assert_problem(server.client.get(f"{url}/images/0", headers={"If-None-Match": tag}), 410, "gone")


# --- events -------------------------------------------------------------------------------------


def test_events_from_the_queue_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader sees each place in the queue that it looks at, then steps, then the result as the state has it."""
    monkeypatch.setattr(async_events, "_LOOK_SECONDS", 0.01)
    gate = tmp_path / "gate"
    with serving(model=f"fake?gate={gate}", max_images=1) as server:
        urls = fill(server, 4)
        with reading(server, urls[3]) as reader:
            first = reader.next()
            assert (first.name, first.data["position"]) == ("queued", 1)
            server.client.delete(urls[2])
            second = reader.next()
            assert (second.name, second.data["position"]) == ("queued", 0)
            gate.touch()
            rest = list(reader)
        assert {one.name for one in rest[:-1]} == {"progress"}
        steps = [one.data["step"] for one in rest[:-1]]
        assert steps == sorted(steps)
        assert len({one.id for one in (first, second, *rest)}) == len(rest) + 2
        assert rest[-1].name == "completed"
        assert rest[-1].data == ended(server, urls[3])["result"]


def test_readers_join_leave_and_come_back(tmp_path: Path) -> None:
    """Several readers see the same; each starts with what there is; who comes back is not told the last again."""
    gate = tmp_path / "gate"
    with serving(model=f"fake?gate={gate}") as server:
        url = begin(server, prompt="hold")
        eventually(lambda: state(server, url)["progress"]["step"] == 3)
        with reading(server, url) as one, reading(server, url) as other:
            first = one.next()
            assert (first.name, first.data["step"], first.data["steps"]) == ("progress", 3, 4)
            assert other.next().id == first.id
        # Both have left; the request is not cancelled.
        assert state(server, url)["status"] == "running"
        with reading(server, url, **{"Last-Event-ID": first.id}) as back, reading(server, url) as newcomer:
            assert newcomer.next().id == first.id
            gate.touch()
            assert back.next().id != first.id
            names = [event.name for event in back]
        assert names[-1:] in ([], ["completed"])
        late = events(server, url)
        assert [event.name for event in late] == ["completed"]
        assert [event.name for event in events(server, url, **{"Last-Event-ID": first.id})] == ["completed"]
        last = server.client.get(f"{url}/events", headers={"Last-Event-ID": late[0].id})
        assert (last.status_code, last.content) == (204, b"")
        assert server.metric('inpaint_cancelled_total{reason="disconnect"}') == 0


def test_events_can_hold_the_images(server: LiveServer) -> None:
    """`include=b64_json` puts them into the last event, as into the state."""
    url = begin(server)
    (last,) = [event for event in events(server, url, "?include=b64_json") if event.name == "completed"]
    assert last.data == ended(server, url, "?include=b64_json")["result"]
    assert last.data["images"][0]["b64_json"]


def test_previews_come_to_all_readers_if_asked_for(tmp_path: Path) -> None:
    """With `previews`, whoever joins gets the latest unfinished picture, which is encoded once; else nobody does."""
    gate = tmp_path / "gate"
    with serving(model=f"fake?gate={gate}") as server:
        with_previews, without = (begin(server, prompt="hold", previews=value) for value in ("true", "false"))
        eventually(lambda: all(state(server, url)["progress"]["step"] == 3 for url in (with_previews, without)))
        shown = []
        for _ in range(3):
            with reading(server, with_previews) as reader:
                shown.append(reader.next().data["preview"])
        assert shown[0]["media_type"] == "image/jpeg"
        assert base64.b64decode(shown[0]["b64_json"]).startswith(b"\xff\xd8")
        with reading(server, without) as reader:
            assert "preview" not in reader.next().data
        gate.touch()


@pytest.mark.parametrize(("prompt", "code"), [("please fail", "internal"), ("hold", "deadline")])
def test_a_failure_ends_the_events(tmp_path: Path, prompt: str, code: str) -> None:
    """The last event of a request that failed is the problem that its state has."""
    with serving(model=f"fake?gate={tmp_path / 'gate'}") as server:
        url = begin(server, prompt=prompt, timeout="0.3")
        last = events(server, url)[-1]
        assert (last.name, last.data["code"]) == ("failed", code)
        assert last.data == ended(server, url)["error"]


def test_silence_is_broken_by_comments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream without events is kept alive, lest a proxy takes it for dead."""
    monkeypatch.setattr(async_events, "KEEP_ALIVE_SECONDS", 0.05)
    monkeypatch.setattr(async_events, "_LOOK_SECONDS", 0.01)
    gate = tmp_path / "gate"
    with serving(model=f"fake?gate={gate}") as server:
        url = begin(server, prompt="hold", timeout="1.5")
        with reading(server, url) as reader:
            assert [event.name for event in reader][-1] == "failed"
            assert reader.num_comments >= 1


# --- the end before its time ----------------------------------------------------------------------


def test_deleting_cancels_and_tells_whoever_watches(tmp_path: Path) -> None:
    """A running request leaves the batch; its readers and waiters are told; from then on it is gone."""
    gate = tmp_path / "gate"
    with serving(model=f"fake?gate={gate}") as server:
        url, neighbour = begin(server, prompt="hold"), begin(server, prompt="hold")
        with reading(server, url) as reader:
            reader.next()
            assert server.client.delete(url).status_code == 204
            last = list(reader)[-1]
        assert (last.name, last.data["code"]) == ("cancelled", "cancelled")
        eventually(lambda: server.metric("inpaint_in_flight") == 1)
        assert server.metric('inpaint_cancelled_total{reason="client"}') == 1
        for method, path in (("GET", ""), ("GET", "/events"), ("GET", "/images/0"), ("DELETE", "")):
            assert_problem(server.client.request(method, url + path), 410, "gone")
        gate.touch()
        assert ended(server, neighbour)["status"] == "completed"
        eventually(lambda: is_idle(server))


def test_deleting_in_the_queue_never_starts(tmp_path: Path) -> None:
    """A request that waits leaves the queue, and those before and after it are painted."""
    gate = tmp_path / "gate"
    with serving(model=f"fake?gate={gate}", max_images=1) as server:
        urls = fill(server, 4)
        assert server.client.delete(urls[2]).status_code == 204
        assert state(server, urls[3])["position"] == 0
        gate.touch()
        assert {ended(server, url)["status"] for url in (urls[0], urls[1], urls[3])} == {"completed"}
        assert server.metric("inpaint_images_total") == 3


def test_deleting_a_result_frees_its_memory(server: LiveServer) -> None:
    """A result that its client has no more use for is forgotten at once."""
    kept = server.state.async_requests.kept
    url = begin(server)
    ended(server, url)
    before = kept.num_kept, kept.num_bytes
    assert server.client.delete(url).status_code == 204
    assert kept.num_kept == before[0] - 1
    assert kept.num_bytes < before[1] - 8192
    assert_problem(server.client.get(url), 410, "gone")


def test_deleting_while_it_is_rendered(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request whose picture is painted but not encoded yet can still be given up, and its result is not kept."""
    entered, go_on = [], asyncio.Event()
    rendered = async_inpaint.rendered

    async def slowly(*arguments: object) -> object:
        entered.append(True)
        await go_on.wait()
        return await rendered(*arguments)

    monkeypatch.setattr(async_inpaint, "rendered", slowly)
    kept = server.state.async_requests.kept.num_kept
    url = begin(server)
    eventually(lambda: entered != [])
    with reading(server, url) as reader:
        reader.next()
        assert server.client.delete(url).status_code == 204
        server.loop.call_soon_threadsafe(go_on.set)
        assert list(reader)[-1].name == "cancelled"
    assert_problem(server.client.get(url), 410, "gone")
    assert server.state.async_requests.kept.num_kept == kept
    eventually(lambda: is_idle(server))


def test_the_deadline_ends_it(tmp_path: Path) -> None:
    """Nobody waits, but the request's time is limited all the same."""
    with serving(model=f"fake?gate={tmp_path / 'gate'}", timeout=0.2) as server:
        url = begin(server, prompt="hold", timeout="1e9")
        last = ended(server, url)
        assert (last["status"], last["error"]["code"]) == ("failed", "deadline")
        assert last["error"]["request_id"] != last["id"]
        response = server.client.get(f"{url}/images/0")
        assert_problem(response, 504, "deadline")
        assert "Retry-After" not in response.headers


def test_a_lost_worker_costs_nothing_and_a_second_one_the_request(tmp_path: Path) -> None:
    """What a lost worker had is run again, once; its client sees no more of it than steps that start anew."""
    gate, starts = tmp_path / "gate", tmp_path / "starts"
    with serving(model=f"fake?gate={gate}&starts={starts}") as server:
        url = begin(server, prompt="hold")
        eventually(lambda: state(server, url)["progress"]["step"] == 3)
        os.kill(int(starts.read_text().split()[-1]), signal.SIGKILL)
        eventually(lambda: len(starts.read_text().splitlines()) == 2)
        assert state(server, url)["status"] in ("queued", "running")
        gate.touch()
        assert ended(server, url)["status"] == "completed"

        last = ended(server, begin(server, prompt="crash"))
        assert (last["status"], last["error"]["code"]) == ("failed", "worker_lost")


def test_a_fault_of_ours_is_a_failure(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where making the result fails unexpectedly the request failed with `internal`, and the log has the reason."""
    with monkeypatch.context() as patch:
        patch.setattr(async_inpaint, "kept_result", lambda _: 1 / 0)
        last = ended(server, begin(server))
    assert (last["status"], last["error"]["code"]) == ("failed", "internal")
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError]


# --- patience: respond-async, wait=N ------------------------------------------------------------


@pytest.mark.parametrize("accept", ["*/*", "image/webp", "application/json"])
def test_who_waits_long_enough_is_answered(server: LiveServer, accept: str) -> None:
    """A request that is done in time is answered as it always is, in the shape that `Accept` names; nothing is kept."""
    kept = server.state.async_requests.kept.num_kept
    usual = server.inpaint({"Accept": accept})
    response = server.inpaint({"Prefer": "respond-async, wait=20", "Accept": accept})
    assert response.status_code == 200
    assert response.headers["Preference-Applied"] == "wait=20"
    assert "Location" not in response.headers
    assert set(usual.headers) <= set(response.headers)
    if accept == "application/json":
        assert {**response.json(), "id": 0, "timings": 0, "batch": 0, "created": 0} == {
            **usual.json(),
            "id": 0,
            "timings": 0,
            "batch": 0,
            "created": 0,
        }
    else:
        assert response.content == usual.content
    assert server.state.async_requests.kept.num_kept == kept
    eventually(lambda: is_idle(server))


def test_several_images_in_time_are_json(server: LiveServer) -> None:
    """Where one image is asked for by `Accept` and there are several, JSON has them all."""
    headers = {"Prefer": "respond-async, wait=20", "Accept": "image/png"}
    response = server.inpaint(headers, num_images_per_prompt="2")
    assert [image["seed"] for image in response.json()["images"]] == [7, 8]


def test_a_failure_in_time_is_the_answer(server: LiveServer) -> None:
    """A request that fails while its client waits fails as it always does."""
    assert_problem(server.inpaint({"Prefer": "respond-async, wait=20"}, prompt="please fail"), 500, "internal")
    eventually(lambda: is_idle(server))


def test_who_does_not_wait_long_enough_is_told_to_come_back(tmp_path: Path) -> None:
    """After the time that the client would wait it gets 202, and nothing is lost."""
    gate = tmp_path / "gate"
    with serving(model=f"fake?gate={gate}") as server:
        response = server.inpaint({"Prefer": "wait=1", "prefer": "respond-async, wait=1"}, prompt="hold")
        assert response.status_code == 202
        assert response.headers["Preference-Applied"] == "respond-async, wait=1"
        assert response.json()["progress"]["step"] == 3
        gate.touch()
        assert ended(server, response.headers["Location"])["status"] == "completed"


# --- hanging up and repeating -----------------------------------------------------------------------


def send(server: LiveServer, *lines: str) -> socket.socket:
    """A connection over which a held request was sent."""
    body = usual_parts().replace(b"a red house", b"hold") + CLOSING
    return server.raw(multipart_head(f"Content-Length: {len(body)}", *lines), body)


def again(server: LiveServer, key: str, **headers: str) -> httpx.Response:
    """The same request over another connection."""
    body = usual_parts().replace(b"a red house", b"hold") + CLOSING
    return server.post_body(body, **{**ASYNC, "Idempotency-Key": key, **headers})


def test_hanging_up_cancels_nothing(tmp_path: Path) -> None:
    """A client that goes away while it waits can repeat its request and is told where it is; it was painted once."""
    gate = tmp_path / "gate"
    with serving(model=f"fake?gate={gate}") as server:
        connection = send(server, "Prefer: respond-async, wait=60", "Idempotency-Key: k")
        eventually(lambda: server.metric("inpaint_in_flight") == 1)
        assert_problem(again(server, "k"), 409, "in_progress")  # It may still be answered.
        connection.close()
        eventually(lambda: server.metric('inpaint_requests_total{code="499",endpoint="/v1/inpaint"}') == 1)

        response = again(server, "k")
        assert response.status_code == 202
        gate.touch()
        assert ended(server, response.headers["Location"])["status"] == "completed"
        assert server.metric("inpaint_images_total") == 1
        assert server.metric('inpaint_cancelled_total{reason="disconnect"}') == 0
        eventually(lambda: is_idle(server))


@pytest.mark.parametrize("idempotency_mib", [256.0, 0.0])
def test_a_repetition_is_told_the_same_while_it_runs(tmp_path: Path, idempotency_mib: float) -> None:
    """The same key and form get the same answer at once, whatever they accept; another form is refused."""
    gate = tmp_path / "gate"
    with serving(model=f"fake?gate={gate}", idempotency_mib=idempotency_mib) as server:
        first = again(server, "k")
        second = again(server, "k", Accept="image/png")
        third = again(server, "k", Prefer="handling=strict")  # What is repeated is the request, not how it was asked.

        assert first.status_code == second.status_code == third.status_code == 202
        assert first.content == second.content == third.content
        assert {one.headers["Location"] for one in (first, second, third)} == {first.headers["Location"]}
        assert "Idempotent-Replayed" not in first.headers
        assert second.headers["Idempotent-Replayed"] == "true"
        assert second.headers["Original-Request"] == first.headers["X-Request-Id"]
        assert_problem(server.inpaint({**ASYNC, "Idempotency-Key": "k"}), 422, "key_reuse")
        gate.touch()
        ended(server, first.headers["Location"])
        assert server.metric("inpaint_images_total") == 1
        eventually(lambda: is_idle(server))


@pytest.mark.parametrize("prompt", ["a tree", "please fail"])
def test_a_repetition_is_told_the_same_after_the_end(server: LiveServer, prompt: str) -> None:
    """Nothing is painted twice, not even what failed; what was deleted is gone, and its key still stands for it."""
    key = {"Idempotency-Key": f"after {prompt}"}
    url = begin(server, key, prompt=prompt)
    ended(server, url)
    images = server.metric("inpaint_images_total")
    assert begin(server, key, prompt=prompt) == url
    server.client.delete(url)
    assert begin(server, key, prompt=prompt) == url
    assert_problem(server.client.get(url), 410, "gone")
    assert server.metric("inpaint_images_total") == images
    eventually(lambda: is_idle(server))


def test_a_repetition_of_what_was_answered_in_time(server: LiveServer) -> None:
    """A request that was answered with its picture is repeated by that picture."""
    headers = {"Prefer": "respond-async, wait=20", "Idempotency-Key": "in time"}
    first, second = server.inpaint(headers, seed=None), server.inpaint(headers, seed=None)
    assert first.status_code == second.status_code == 200
    assert first.content == second.content
    assert second.headers["Idempotent-Replayed"] == "true"


def test_of_many_at_once_one_is_painted(server: LiveServer) -> None:
    """Retries that cross each other are told of the same request."""
    files, data = form(seed="5")
    before = server.metric("inpaint_images_total")

    async def ask_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.client.base_url, trust_env=False, timeout=30) as client:
            headers = {**ASYNC, "Idempotency-Key": "many"}
            posts = [client.post("/v1/inpaint", files=files, data=data, headers=headers) for _ in range(12)]
            return await asyncio.gather(*posts)

    responses = asyncio.run(ask_all())

    assert {response.status_code for response in responses} <= {202, 409}
    (url,) = {response.headers["Location"] for response in responses if response.status_code == 202}
    ended(server, url)
    assert server.metric("inpaint_images_total") == before + 1


# --- whose it is ----------------------------------------------------------------------------------------


def test_others_cannot_tell_that_it_exists() -> None:
    """Only the key that made a request sees it or ends it; to other keys, administrators' too, there is none."""
    with serving(api_keys="alice,bob", admin_keys="root") as server:
        url = begin(server, {"Authorization": "Bearer alice"})
        ended(server, url, Authorization="Bearer alice")
        missing = "/v1/requests/inp_" + "0" * 56
        for key in ("bob", "root"):
            headers = {"Authorization": f"Bearer {key}"}
            for method, path in (("GET", ""), ("GET", "/events"), ("GET", "/images/0"), ("DELETE", "")):
                responses = [server.client.request(method, one + path, headers=headers) for one in (url, missing)]
                bodies = [assert_problem(response, 404, "not_found") for response in responses]
                assert bodies[0]["detail"] == bodies[1]["detail"]
        assert_problem(server.client.get(url), 401, "unauthorized")
        own = {"Authorization": "Bearer alice"}
        assert server.client.get(f"{url}/images/0", headers=own).status_code == 200
        assert server.client.delete(url, headers=own).status_code == 204
        assert_problem(server.client.get(url, headers=own), 410, "gone")
        assert_problem(server.client.get(url, headers={"Authorization": "Bearer bob"}), 404, "not_found")
        admins = {"Authorization": "Bearer root"}
        assert server.client.get(begin(server, admins), headers=admins).status_code == 200


# --- time and room ----------------------------------------------------------------------------------------


def test_results_are_kept_for_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """After `async_ttl` a request is gone, with all its memory, even where nobody asks any more."""
    monkeypatch.setattr("service.api.app._SWEEP_SECONDS", 0.02)
    with serving(async_ttl=100.0) as server:
        kept = server.state.async_requests.kept
        urls = [begin(server), begin(server, prompt="please fail")]
        expires = [ended(server, url)["expires"] for url in urls]
        assert all(one - time.time() == pytest.approx(100, abs=30) for one in expires)
        assert (server.metric("inpaint_async_kept"), server.metric("inpaint_async_kept_bytes")) == (2, kept.num_bytes)
        monkeypatch.setattr(kept, "_now", lambda: time.monotonic() + 90)
        assert server.client.get(urls[0]).status_code == 200

        monkeypatch.setattr(kept, "_now", lambda: time.monotonic() + 101)

        eventually(lambda: (kept.num_kept, kept.num_bytes) == (0, 0))
        for url in urls:
            assert_problem(server.client.get(url), 410, "gone")
        assert (server.metric("inpaint_async_kept"), server.metric("inpaint_async_kept_bytes")) == (0, 0)


def test_their_number_is_bounded() -> None:
    """Of more than `async_max` the oldest go; those that run do not count."""
    with serving(async_max=2) as server:
        urls = [begin(server, seed=str(seed)) for seed in range(4)]
        for url in urls:
            eventually(lambda url=url: server.client.get(url, params={"wait": 20}).status_code in (200, 410))
        eventually(lambda: is_idle(server))
        codes = [server.client.get(url).status_code for url in urls]
        assert sorted(codes) == [200, 200, 410, 410]


def test_their_memory_is_bounded_and_shared(server: LiveServer) -> None:
    """However many results there are, they take no more than `async_mib`; who has most loses the oldest."""
    size = 9000 + len(server.inpaint().content) + 8192
    with serving(async_mib=4.5 * size / 2**20, api_keys="alice,bob") as bounded:
        kept = bounded.state.async_requests.kept
        alice, bob = ({"Authorization": f"Bearer {key}"} for key in ("alice", "bob"))
        precious = begin(bounded, bob)
        ended(bounded, precious, **bob)
        urls = []
        for number in range(8):
            urls.append(begin(bounded, alice, seed=str(number)))
            ended(bounded, urls[-1], **alice)
            assert kept.num_bytes <= 4.5 * size
        assert bounded.client.get(precious, headers=bob).status_code == 200
        assert bounded.client.get(urls[-1], headers=alice).status_code == 200
        assert_problem(bounded.client.get(urls[0], headers=alice), 410, "gone")


def test_a_result_without_room_is_a_failure_that_says_so() -> None:
    """What cannot be kept is 507 rather than gone, and drives nobody else out."""
    with serving(async_mib=0.05) as server:
        small = begin(server)
        assert ended(server, small)["status"] == "completed"
        large = begin(server, num_images_per_prompt="8")
        last = ended(server, large)
        assert (last["status"], last["error"]["code"], last["error"]["status"]) == ("failed", "out_of_memory", 507)
        assert_problem(server.client.get(f"{large}/images/0"), 507, "out_of_memory")
        assert server.client.get(f"{small}/images/0").status_code == 200


def test_they_can_be_switched_off() -> None:
    """Where nothing may be kept, the preference is not heeded, as its standard allows: the answer is the picture."""
    with serving(async_max=0) as server:
        response = server.inpaint({"Prefer": "respond-async"})
        assert (response.status_code, response.headers["Content-Type"]) == (200, "image/png")
        assert "Preference-Applied" not in response.headers


def test_uploads_are_let_go_at_the_end() -> None:
    """Of a request that ended nothing is kept but its result: not the upload, the canvas, or what the worker said."""
    with serving() as server:
        for prompt in ("a tree", "please fail"):
            ended(server, begin(server, prompt=prompt, previews="true"))
        eventually(lambda: is_idle(server))
        gc.collect()
        assert [one for one in gc.get_objects() if isinstance(one, Canvas)] == []


def test_after_a_restart_there_was_none(server: LiveServer) -> None:
    """Nothing survives the process: another one does not even know that there was a request."""
    url = begin(server)
    with serving() as other:
        assert_problem(other.client.get(url), 404, "not_found")


# --- the end of the service -----------------------------------------------------------------------------------


def test_draining_finishes_what_was_accepted(tmp_path: Path) -> None:
    """While the service drains, new requests are refused; accepted ones can be watched, given up and fetched."""
    gate = tmp_path / "gate"
    with serving(model=f"fake?gate={gate}") as server:
        done, running, unwanted = begin(server), begin(server, prompt="hold"), begin(server, prompt="hold")
        ended(server, done)
        draining = asyncio.run_coroutine_threadsafe(server.engine.drain(20.0), server.loop)
        eventually(lambda: server.client.get("/readyz").status_code == 503)

        assert_problem(server.inpaint(ASYNC), 503, "draining")
        assert server.client.get(f"{done}/images/0").status_code == 200
        assert state(server, running)["status"] == "running"
        assert server.client.delete(unwanted).status_code == 204
        gate.touch()
        assert [event.name for event in events(server, running)][-1] == "completed"
        assert draining.result(timeout=20) is True
        assert server.client.get(f"{running}/images/0").status_code == 200


def test_what_is_not_done_in_time_ends_with_the_service(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A server that stops gives such work its drain time like any other, then ends it, and itself, in good order."""
    with serving(model=f"fake?gate={tmp_path / 'gate'}", drain_timeout=0.3) as server:
        begin(server, {"Idempotency-Key": "k"}, prompt="hold")
        eventually(lambda: server.metric("inpaint_in_flight") == 1)
    assert is_idle(server)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


# --- around it ------------------------------------------------------------------------------------------------


def test_the_log_has_what_became_of_it(server: LiveServer, caplog: pytest.LogCaptureFixture) -> None:
    """The line of the answer of 202 comes before the work is done; another line says what became of it."""
    caplog.set_level(logging.INFO)
    response = server.inpaint({**ASYNC, "X-Request-Id": "logged"})
    ended(server, response.headers["Location"])
    eventually(lambda: any(record.getMessage() == "asynchronous request ended" for record in caplog.records))
    (fields,) = [record.fields for record in caplog.records if record.getMessage() == "asynchronous request ended"]
    assert (fields["request_id"], fields["outcome"]) == ("logged", "completed")
    assert {"queue_seconds", "denoise_seconds", "render_seconds"} <= set(fields)

    def routes() -> set[str]:
        return {record.fields["route"] for record in caplog.records if record.getMessage() == "request"}

    eventually(lambda: "/v1/requests/{request_id}" in routes())  # A line is written once the client has its answer.


def test_pages_of_other_origins_can_use_it() -> None:
    """Scripts may send the headers, and read where the request is."""
    with serving(cors_origins="https://paint.example") as server:
        origin = {"Origin": "https://paint.example"}
        preflight = server.client.options("/v1/inpaint", headers={**origin, "Access-Control-Request-Method": "POST"})
        exposed = server.inpaint({**ASYNC, **origin}).headers["Access-Control-Expose-Headers"]
    allowed = preflight.headers["Access-Control-Allow-Headers"].split(", ")
    assert {"Prefer", "X-Webhook-URL", "Last-Event-ID", "If-None-Match"} <= set(allowed)
    assert "DELETE" in preflight.headers["Access-Control-Allow-Methods"]
    assert {"Location", "Preference-Applied", "ETag"} <= set(exposed.split(", "))


def test_the_documentation_has_it(server: LiveServer) -> None:
    """The OpenAPI document names header, answer and routes, with the codes that come of them."""
    paths = server.client.get("/openapi.json").json()["paths"]
    operation = paths["/v1/inpaint"]["post"]
    assert {"Prefer", "X-Webhook-URL"} <= {parameter["name"] for parameter in operation["parameters"]}
    assert {"Location", "Preference-Applied", "Retry-After"} <= set(operation["responses"]["202"]["headers"])
    one = "/v1/requests/{request_id}"
    assert set(paths[one]) == {"get", "delete"}
    for path in (one, f"{one}/events", f"{one}/images/{{index}}"):
        assert "gone" in paths[path]["get"]["responses"]["410"]["description"]
    assert "in_progress" in paths[f"{one}/images/{{index}}"]["get"]["responses"]["409"]["description"]
