"""What the web UI's clients ask beside pictures: progress, interruption, lists, settings, keys."""

import base64
import io
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from service.api.a1111.lists import EMPTY_LISTS, REFRESHES
from tests.http.a1111 import LIKE_STABLE_DIFFUSION, client_of, payload, recorded
from tests.http.serving import SIZE, LiveServer, eventually, scene, serving

FACTS = recorded("answers")
KEYS = ("first-key", "second-key")


@contextmanager
def holding(gate: Path, **settings: Any) -> Iterator[LiveServer]:
    """A server whose requests with "hold" do not end before the gate is opened; it is, at the end."""
    with serving(model=f"fake?gate={gate}", **settings) as server:
        try:
            yield server
        finally:
            gate.touch()


def begin(pool: ThreadPoolExecutor, server: LiveServer, key: str | None = None, **changes: Any) -> Future[Any]:
    """Post a request that does not end by itself."""
    headers = {} if key is None else {"X-API-Key": key}
    body = payload(**{"prompt": "hold", "steps": 6, "denoising_strength": 1, **changes})
    return pool.submit(server.client.post, "/sdapi/v1/img2img", json=body, headers=headers)


def progress(server: LiveServer, key: str | None = None, **query: Any) -> dict[str, Any]:
    """What is told of progress."""
    headers = {} if key is None else {"X-API-Key": key}
    response = server.client.get("/sdapi/v1/progress", params=query, headers=headers)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


# --- progress -----------------------------------------------------------------------------


def test_nothing_runs(server: LiveServer) -> None:
    """An idle service tells the progress that the web UI's client takes for readiness."""
    answer = progress(server)
    assert set(answer) == set(FACTS["progress"])
    assert set(answer["state"]) == set(FACTS["state"])
    assert (answer["progress"], answer["state"]["job_count"], answer["current_image"]) == (0, 0, None)
    client_of(server).util_wait_for_ready(check_interval=0.01)


def test_progress_of_a_running_request(tmp_path: Path) -> None:
    """Steps done and to do are told while a request runs, and nothing is left of it afterwards."""
    with holding(tmp_path / "gate") as server, ThreadPoolExecutor() as pool:
        api = client_of(server)
        running = begin(pool, server)
        eventually(lambda: api.get_progress()["state"]["sampling_step"] == 5)
        answer = api.get_progress()
        assert answer["progress"] == pytest.approx(0.01 + 5 / 6)
        assert answer["eta_relative"] > 0
        state = answer["state"]
        assert (state["job_count"], state["sampling_steps"], state["interrupted"]) == (1, 6, False)
        (tmp_path / "gate").touch()
        info = json.loads(running.result(timeout=30).json()["info"])
        assert info["job_timestamp"] == state["job_timestamp"]
        assert progress(server)["state"]["job_count"] == 0


def test_current_image_where_it_is_asked_for(tmp_path: Path) -> None:
    """Live previews cost the others time: only requests that ask for them have them, and answers can leave them out."""
    with holding(tmp_path / "gate") as server, ThreadPoolExecutor() as pool:
        begin(pool, server, override_settings={"live_previews_enable": True})
        eventually(lambda: progress(server)["current_image"] is not None)
        picture = Image.open(io.BytesIO(base64.b64decode(progress(server)["current_image"])))
        assert picture.size == (SIZE, SIZE)
        assert progress(server, skip_current_image="true")["current_image"] is None
        (tmp_path / "gate").touch()


def test_no_current_image_by_default(tmp_path: Path) -> None:
    """Without the setting there are no previews."""
    with holding(tmp_path / "gate") as server, ThreadPoolExecutor() as pool:
        begin(pool, server)
        eventually(lambda: progress(server)["state"]["sampling_step"] == 5)
        assert progress(server)["current_image"] is None
        (tmp_path / "gate").touch()


# --- interruption -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["interrupt", "skip"])
def test_interrupted_requests_are_answered_without_pictures(tmp_path: Path, how: str) -> None:
    """A client that interrupts gets its answer at once: no error, no pictures; queued requests never start."""
    with holding(tmp_path / "gate", max_images=1) as server, ThreadPoolExecutor() as pool:
        api = client_of(server)
        running = [begin(pool, server) for _ in range(2)]
        eventually(lambda: server.metric("inpaint_in_flight") + server.metric("inpaint_queue_depth") == 2)
        eventually(lambda: progress(server)["state"]["sampling_step"] > 0)
        assert getattr(api, how)() == {}
        for one in running:
            response = one.result(timeout=30)
            assert (response.status_code, response.json()["images"]) == (200, [])
            assert json.loads(response.json()["info"])["interrupted"] is True
        assert progress(server)["state"]["job_count"] == 0


def test_neighbours_are_neither_shown_nor_interrupted(tmp_path: Path) -> None:
    """Progress and interruption are of the requests that came with the same key, and of no others."""
    mine, theirs = KEYS
    with holding(tmp_path / "gate", api_keys=",".join(KEYS)) as server, ThreadPoolExecutor() as pool:
        running = begin(pool, server, theirs)
        eventually(lambda: progress(server, theirs)["state"]["sampling_step"] == 5)
        assert progress(server, mine) == {**progress(server, mine), "progress": 0, "current_image": None}
        assert progress(server, mine)["state"]["job_count"] == 0
        own = begin(pool, server, mine)
        eventually(lambda: progress(server, mine)["state"]["sampling_step"] == 5)
        interrupt = server.client.post("/sdapi/v1/interrupt", headers={"X-API-Key": mine})
        assert interrupt.json() == {}
        assert own.result(timeout=30).json()["images"] == []
        assert not running.done()
        assert progress(server, theirs)["state"]["interrupted"] is False
        (tmp_path / "gate").touch()
        assert len(running.result(timeout=30).json()["images"]) == 1


def test_interrupting_nothing(server: LiveServer) -> None:
    """There need be nothing to interrupt."""
    assert client_of(server).interrupt() == {}


def test_an_interrupted_key_is_free_again(tmp_path: Path) -> None:
    """What was interrupted is not kept as an answer: the same Idempotency-Key runs again."""
    gate = tmp_path / "gate"
    with holding(gate) as server, ThreadPoolExecutor() as pool:
        headers = {"Idempotency-Key": "again"}
        body = payload(prompt="hold")
        first = pool.submit(server.client.post, "/sdapi/v1/img2img", json=body, headers=headers)
        eventually(lambda: progress(server)["state"]["sampling_step"] > 0)
        server.client.post("/sdapi/v1/interrupt")
        assert first.result(timeout=30).json()["images"] == []
        gate.touch()
        again = server.client.post("/sdapi/v1/img2img", json=body, headers=headers)
        assert len(again.json()["images"]) == 1


# --- lists and settings --------------------------------------------------------------------------


def test_lists_have_the_recorded_names(server: LiveServer) -> None:
    """What the real client asks when it connects has the web UI's shapes."""
    api = client_of(server)
    assert api.util_get_sampler_names() == ["DDIM", "Euler"]
    assert set(api.get_samplers()[0]) == set(FACTS["sampler"])
    assert [one["label"] for one in api.get_schedulers()] == ["Automatic", "Uniform"]
    assert set(api.get_schedulers()[0]) == set(FACTS["scheduler"])
    (model,) = api.get_sd_models()
    assert set(model) == set(FACTS["sd_model"])
    assert api.util_get_model_names() == [api.util_get_current_model()] == ["fake"]
    (upscaler,) = api.get_upscalers()
    assert set(upscaler) == set(FACTS["upscaler"])
    embeddings = api.get_embeddings()
    assert embeddings["skipped"] == {}
    assert set(embeddings["loaded"]["<pirate>"]) == set(FACTS["embedding"])
    assert embeddings["loaded"]["<pirate>"]["vectors"] == 2
    assert set(api.get_memory()) == set(FACTS["memory"])
    assert api.get_cmd_flags()["api"] is True
    assert api.get_scripts() == {"txt2img": [], "img2img": []}
    assert api.get_loras() == []
    assert api.refresh_checkpoints() is None


@pytest.mark.parametrize("path", EMPTY_LISTS)
def test_what_there_is_none_of(server: LiveServer, path: str) -> None:
    """Lists of what is not served are empty, not errors."""
    assert server.client.get(f"/sdapi/v1/{path}").json() == []


@pytest.mark.parametrize("path", REFRESHES)
def test_nothing_to_refresh(server: LiveServer, path: str) -> None:
    """Clients may ask for what happens by itself."""
    response = server.client.post(f"/sdapi/v1/{path}")
    assert (response.status_code, response.json()) == (200, None)


def test_every_listed_sampler_paints() -> None:
    """A client that offers what is listed is never told that it is not found."""
    with serving(model=LIKE_STABLE_DIFFUSION) as server:
        names = [sampler["name"] for sampler in client_of(server).get_samplers()]
        assert len(names) >= 13
        for name in names:
            response = server.client.post("/sdapi/v1/img2img", json=payload(sampler_name=name))
            assert response.status_code == 200, response.text


def test_options_that_are_so_may_be_set(server: LiveServer) -> None:
    """Every option can be set to what it is, and its other values are refused by name."""
    api = client_of(server)
    options = api.get_options()
    assert options["sd_model_checkpoint"] == "fake"
    assert api.set_options(options) is None
    api.util_set_model("fake")
    for name, value in options.items():
        response = server.client.post("/sdapi/v1/options", json={name: f"not {value}"})
        assert response.status_code == 422
        assert response.json()["detail"][0]["loc"] == ["body", name]
    assert server.client.post("/sdapi/v1/options", json={"CLIP_stop_at_last_layers": 2}).status_code == 422
    assert api.get_options() == options


# --- keys and states --------------------------------------------------------------------------------


def test_a_password_is_the_key() -> None:
    """The web UI's user and password: any user, and a key as the password; else 401 in its words."""
    with serving(api_keys=",".join(KEYS)) as server:
        api = client_of(server, username="anybody", password=KEYS[0])
        assert api.util_get_sampler_names() == ["DDIM", "Euler"]
        result = api.img2img(
            images=[Image.fromarray(scene())], prompt="a red house", width=SIZE, height=SIZE, inpaint_full_res=False
        )
        assert np.asarray(result.image).shape == (SIZE, SIZE, 3)
        api.set_auth("anybody", "wrong")
        response = api.session.get(f"{api.baseurl}/progress")
        assert response.status_code == 401
        assert response.json() == {
            "error": "HTTPException",
            "detail": "Incorrect username or password",
            "body": "",
            "errors": "",
        }


def test_not_ready_and_cross_origin_have_the_web_uis_shape() -> None:
    """What is refused before a route is known has the shape, too, and says when to come back."""
    with serving(model="fake?load_forever=1", wait_ready=False) as server:
        for response in (
            server.client.get("/sdapi/v1/samplers"),
            server.client.post("/sdapi/v1/img2img", json=payload()),
        ):
            assert (response.status_code, response.json()["error"]) == (503, "not_ready")
            assert set(response.json()) == set(FACTS["error"])
            assert int(response.headers["Retry-After"]) >= 1
        refused = server.client.post("/sdapi/v1/interrupt", headers={"Origin": "null"})
        assert (refused.status_code, refused.json()["error"]) == (403, "cross_origin")


def test_a_request_that_fails_is_forgotten(tmp_path: Path) -> None:
    """Nothing is told any more of requests that failed, or whose clients hung up."""
    with holding(tmp_path / "gate") as server, ThreadPoolExecutor() as pool:
        assert begin(pool, server, prompt="fail").result(timeout=30).status_code == 500
        assert progress(server)["state"]["job_count"] == 0
        with pytest.raises(httpx.ReadTimeout):
            server.client.post("/sdapi/v1/img2img", json=payload(prompt="hold"), timeout=1)
        eventually(lambda: progress(server)["state"]["job_count"] == 0)
