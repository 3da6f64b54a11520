"""`POST /v1/inpaint` when all goes well: the shapes of the answer and what is in them."""

import base64
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest

from service.request import InpaintParams
from tests.fake_worker import paint
from tests.http.serving import SIZE, LiveServer, assert_problem, pixels_of, png, scene, serving, square_mask


def expected(seed: int = 7) -> np.ndarray:
    """What the fake worker paints for the usual request."""
    params = InpaintParams(
        prompt="a red house",
        negative_prompt="",
        num_inference_steps=4,
        guidance_scale=7.5,
        strength=1.0,
        num_images_per_prompt=1,
        seed=seed,
        scheduler="ddim",
        eta=0.0,
        clip_skip=0,
        height=SIZE,
        width=SIZE,
    )
    return paint(params, scene(), square_mask())[0]


def test_default_answer_is_one_png_with_its_facts_in_headers(server: LiveServer) -> None:
    """Without an Accept of note, the answer is a PNG; seed, verdict, timings and id are headers."""
    response = server.inpaint()

    assert response.status_code == 200
    assert response.headers["Content-Type"] == "image/png"
    assert response.headers["X-Seed"] == "7"
    assert response.headers["X-NSFW-Content-Detected"] == "false"
    assert response.headers["X-Request-Id"].startswith("req_")
    stages = dict(entry.split(";dur=") for entry in response.headers["Server-Timing"].split(", "))
    assert list(stages) == ["queue", "prepare", "denoise", "decode", "safety", "render", "total"]
    assert float(stages["denoise"]) > 0
    assert float(stages["total"]) > float(stages["denoise"])
    assert np.array_equal(pixels_of(response.content), expected())


def test_pixels_outside_the_mask_are_the_uploads_own(server: LiveServer) -> None:
    """Whatever the working size, pixels under black mask come back bit for bit, at the upload's own size."""
    image, mask = scene(150, 220), square_mask(150, 220)

    painted = pixels_of(server.inpaint(image=png(image), mask=png(mask)).content)

    assert painted.shape == image.shape
    assert np.array_equal(painted[mask < 128], image[mask < 128])
    assert not np.array_equal(painted[mask >= 128], image[mask >= 128])


def test_json_answer_has_images_effective_parameters_timings_and_batch(server: LiveServer) -> None:
    """`application/json` answers several images with a seed each, and every default filled in."""
    response = server.inpaint({"Accept": "application/json"}, num_images_per_prompt="2", guidance_scale="3")

    assert response.status_code == 200
    answer = response.json()
    assert answer["id"] == response.headers["X-Request-Id"]
    assert answer["model"] == "fake"
    assert [image["seed"] for image in answer["images"]] == [7, 8]
    assert {image["media_type"] for image in answer["images"]} == {"image/png"}
    assert [(image["height"], image["width"]) for image in answer["images"]] == [(SIZE, SIZE)] * 2
    assert [image["nsfw_content_detected"] for image in answer["images"]] == [False, False]
    for image, seed in zip(answer["images"], (7, 8), strict=True):
        assert np.array_equal(pixels_of(base64.b64decode(image["b64_json"])), expected(seed))
    parameters = answer["parameters"]
    assert parameters["scheduler"] == "ddim"
    assert parameters["num_inference_steps"] == 4
    assert parameters["guidance_scale"] == 3
    assert (parameters["height"], parameters["width"], parameters["seed"]) == (SIZE, SIZE, 7)
    assert set(answer["timings"]) == {"queue", "prepare", "denoise", "decode", "safety", "render", "total"}
    assert answer["batch"]["mean_images"] >= 2


def test_a_seed_is_made_up_and_reported_and_repeats_the_picture(server: LiveServer) -> None:
    """A request without a seed gets a random one, and the reported seed paints the same picture again."""
    first = server.inpaint(seed=None)
    second = server.inpaint(seed=None)

    assert first.headers["X-Seed"] != second.headers["X-Seed"]
    assert server.inpaint(seed=first.headers["X-Seed"]).content == first.content


def test_events_tell_position_progress_and_the_answer(server: LiveServer) -> None:
    """`text/event-stream` sends queued, progress up to the last step, and the JSON answer."""
    response = server.inpaint({"Accept": "text/event-stream"}, num_inference_steps="20")

    assert response.headers["Content-Type"].startswith("text/event-stream")
    events = [_event(block) for block in response.text.strip().split("\n\n")]
    names = [name for name, _ in events]
    assert names[0] == "queued"
    assert names[-1] == "completed"
    assert set(names[1:-1]) == {"progress"}
    assert events[0][1]["position"] == 0
    assert (events[-2][1]["step"], events[-2][1]["steps"], events[-2][1]["eta"]) == (20, 20, 0)
    assert np.array_equal(pixels_of(base64.b64decode(events[-1][1]["images"][0]["b64_json"])).shape, (SIZE, SIZE, 3))


def test_failure_after_admission_is_an_event_with_the_problem(server: LiveServer) -> None:
    """A request that fails in the worker ends its event stream with `failed` and the same document."""
    response = server.inpaint({"Accept": "text/event-stream"}, prompt="please fail")

    name, problem = _event(response.text.strip().split("\n\n")[-1])
    assert name == "failed"
    assert (problem["status"], problem["code"]) == (500, "internal")
    assert problem["request_id"] == response.headers["X-Request-Id"]


def _event(block: str) -> tuple[str, dict]:
    name, data = block.split("\n")
    return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


def test_failure_in_the_worker_is_a_problem_of_its_own_request(server: LiveServer) -> None:
    """A failed request is answered 500 without internals; the next one succeeds."""
    problem = assert_problem(server.inpaint(prompt="please fail"), 500, "internal")

    assert "Traceback" not in problem["detail"]
    assert server.inpaint().status_code == 200


@pytest.mark.parametrize(
    ("accept", "output_format", "media_type"),
    [
        (None, None, "image/png"),
        ("*/*", "jpeg", "image/jpeg"),
        ("image/*", "webp", "image/webp"),
        ("image/webp", None, "image/webp"),
        ("image/jpeg;q=0.5, image/png;q=0.4", None, "image/jpeg"),
        ("application/json, text/plain, */*", None, "application/json"),
        ("application/json;q=0.1, image/png", None, "image/png"),
        ("image/png, application/json;q=0.9", "jpeg", "application/json"),
        ("text/html, image/webp, */*;q=0.8", None, "image/webp"),
    ],
)
def test_accept_is_negotiated(
    server: LiveServer, accept: str | None, output_format: str | None, media_type: str
) -> None:
    """The best of what the client accepts is answered, and the bytes are what the type says."""
    response = server.inpaint(None if accept is None else {"Accept": accept}, output_format=output_format)

    assert response.status_code == 200
    assert response.headers["Content-Type"] == media_type
    magic = {"image/png": b"\x89PNG", "image/jpeg": b"\xff\xd8", "image/webp": b"RIFF", "application/json": b"{"}
    assert response.content.startswith(magic[media_type])


@pytest.mark.parametrize(
    ("accept", "output_format"),
    [("text/html", None), ("image/gif", None), ("image/png", "jpeg"), ("*/*;q=0", None), ("nonsense", None)],
)
def test_nothing_acceptable_is_406(server: LiveServer, accept: str, output_format: str | None) -> None:
    """A client that accepts nothing on offer is told what is."""
    problem = assert_problem(server.inpaint({"Accept": accept}, output_format=output_format), 406, "not_acceptable")
    assert "application/json" in problem["detail"]


def test_several_images_as_an_image_name_json(server: LiveServer) -> None:
    """More than one image cannot be answered as bytes: 422, naming application/json."""
    problem = assert_problem(server.inpaint(num_images_per_prompt="2"), 422, "invalid_field")

    assert problem["errors"][0]["field"] == "num_images_per_prompt"
    assert "application/json" in problem["detail"]


def test_without_a_mask_file_the_alpha_is_the_mask(server: LiveServer) -> None:
    """Transparent pixels of the picture are repainted, and the answer is opaque."""
    rgba = np.dstack([scene(), 255 - square_mask()])

    painted = pixels_of(server.inpaint(image=png(rgba), mask=None).content)

    assert np.array_equal(painted, expected())


def test_uncomposited_answer_is_the_whole_working_picture(server: LiveServer) -> None:
    """`composite=false` answers what was painted, at working size."""
    response = server.inpaint(
        image=png(scene(150, 220)), mask=png(square_mask(150, 220)), composite="false", height="96", width="128"
    )

    assert pixels_of(response.content).shape == (96, 128, 3)


def test_padded_crop_without_composite_is_stocks_overlay(server: LiveServer) -> None:
    """`padding_mask_crop` with `composite=false` answers the whole upload, as the stock pipeline does."""
    image, mask = scene(150, 220), square_mask(150, 220)

    painted = pixels_of(
        server.inpaint(image=png(image), mask=png(mask), composite="false", padding_mask_crop="4").content
    )

    assert painted.shape == image.shape
    assert np.array_equal(painted[:20], image[:20])


@pytest.mark.parametrize("composite", ["true", "false"])
def test_flagged_picture_is_entirely_black_at_the_answers_size(server: LiveServer, composite: str) -> None:
    """A flagged picture shows nothing, neither of the painting nor of the upload, and says so."""
    response = server.inpaint(
        image=png(scene(150, 220)), mask=png(square_mask(150, 220)), prompt="nsfw", composite=composite
    )

    assert response.headers["X-NSFW-Content-Detected"] == "true"
    pixels = pixels_of(response.content)
    assert pixels.shape == ((150, 220, 3) if composite == "true" else (SIZE, SIZE, 3))
    assert not pixels.any()


def test_flag_policies_of_the_operator() -> None:
    """`blur` shows no pixel as it was, `flag` shows the picture; both still say that it was flagged."""
    with serving(nsfw_policy="blur") as server:
        blurred = server.inpaint(prompt="nsfw")
    with serving(nsfw_policy="flag") as server:
        flagged = server.inpaint({"Accept": "application/json"}, prompt="nsfw").json()["images"][0]

    assert blurred.headers["X-NSFW-Content-Detected"] == "true"
    keep = square_mask() < 128
    assert pixels_of(blurred.content)[keep].std() < scene()[keep].std() / 4
    assert flagged["nsfw_content_detected"] is True
    assert np.array_equal(pixels_of(base64.b64decode(flagged["b64_json"]))[keep], scene()[keep])


def test_uploads_leave_no_file_behind(server: LiveServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Uploads stay in memory: a temporary directory that cannot be written is never missed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    noise = scene(480, 512)

    assert server.inpaint(image=png(noise), mask=png(square_mask(480, 512))).status_code == 200
    assert not list(tmp_path.iterdir())
