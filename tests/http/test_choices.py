"""Fields that choose how to denoise: lists of steps, FreeU, prompt syntax, previews."""

import base64
import json

import httpx
import numpy as np
import pytest

from tests.fake_worker import MODEL
from tests.http.serving import SIZE, LiveServer, assert_problem, form, pixels_of, png, scene, square_mask


@pytest.mark.parametrize(
    ("fields", "faulty", "code"),
    [
        ({"timesteps": "[900, 500]"}, "scheduler", "invalid_field"),  # the default one takes none
        ({"timesteps": "[900, 500]", "scheduler": "ddim"}, "scheduler", "invalid_field"),
        ({"timesteps": "[500, 900]", "scheduler": "euler"}, "timesteps", "out_of_range"),
        ({"timesteps": "[500, 500]", "scheduler": "euler"}, "timesteps", "out_of_range"),
        ({"timesteps": "[1000, 500]", "scheduler": "euler"}, "timesteps", "out_of_range"),
        ({"timesteps": "[500, -1]", "scheduler": "euler"}, "timesteps", "out_of_range"),
        ({"timesteps": "[]", "scheduler": "euler"}, "timesteps", "out_of_range"),
        ({"timesteps": json.dumps([*range(200, 0, -1)]), "scheduler": "euler"}, "timesteps", "out_of_range"),
        ({"timesteps": "[500.5]", "scheduler": "euler"}, "timesteps", "invalid_field"),
        ({"timesteps": "[true]", "scheduler": "euler"}, "timesteps", "invalid_field"),
        ({"timesteps": '["500"]', "scheduler": "euler"}, "timesteps", "invalid_field"),
        ({"timesteps": "900,500", "scheduler": "euler"}, "timesteps", "invalid_field"),
        ({"timesteps": '{"a": 1}', "scheduler": "euler"}, "timesteps", "invalid_field"),
        ({"timesteps": "[" * 5000, "scheduler": "euler"}, "timesteps", "invalid_field"),
        ({"sigmas": "[10, NaN]", "scheduler": "euler"}, "sigmas", "out_of_range"),
        ({"sigmas": "[10, 1e999]", "scheduler": "euler"}, "sigmas", "out_of_range"),
        ({"sigmas": "[10, 0]", "scheduler": "euler"}, "sigmas", "out_of_range"),
        ({"sigmas": "[10]", "scheduler": "euler"}, "sigmas", "out_of_range"),
        ({"sigmas": "[10, 1]", "timesteps": "[900, 500]", "scheduler": "euler"}, "sigmas", "invalid_field"),
        ({"freeu": "{}"}, "freeu", "invalid_field"),
        ({"freeu": '{"s1": 1, "s2": 1, "b1": 1, "b2": 1, "b3": 1}'}, "freeu", "invalid_field"),
        ({"freeu": '{"s1": 1, "s1": 1, "s2": 1, "b1": 1, "b2": 1}'}, "freeu", "invalid_field"),
        ({"freeu": '{"s1": -1, "s2": 1, "b1": 1, "b2": 1}'}, "freeu", "out_of_range"),
        ({"freeu": '{"s1": true, "s2": 1, "b1": 1, "b2": 1}'}, "freeu", "invalid_field"),
        ({"prompt_syntax": "latex"}, "prompt_syntax", "invalid_field"),
        ({"previews": "yes"}, "previews", "invalid_field"),
    ],
)
def test_wrong_choices_are_refused(server: LiveServer, fields: dict[str, str], faulty: str, code: str) -> None:
    """422 with the field named, and nothing of what was sent repeated."""
    problem = assert_problem(server.inpaint(**fields), 422, code)
    assert {error["field"] for error in problem["errors"]} == {faulty}


def test_lists_replace_the_number_of_steps(server: LiveServer) -> None:
    """`timesteps` and `sigmas` count as steps; the effective parameters say so."""
    response = server.inpaint({"Accept": "application/json"}, timesteps="[900, 600, 300]", scheduler="euler")
    parameters = response.json()["parameters"]
    assert (parameters["num_inference_steps"], parameters["timesteps"]) == (3, [900, 600, 300])
    response = server.inpaint({"Accept": "application/json"}, sigmas="[9.5, 2, 0.25]", scheduler="euler")
    assert response.json()["parameters"]["sigmas"] == [9.5, 2, 0.25]


def test_scripts_in_browsers_send_json_as_blobs(server: LiveServer) -> None:
    """A part with the content type of JSON may have a file name where the field is JSON, and nowhere else."""
    sent = {"timesteps": "[900, 600]", "freeu": '{"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4}', "loras": "[]"}
    usual, data = form(scheduler="euler")

    def post(blobs: dict[str, str], content_type: str) -> httpx.Response:
        files = {**usual, **{name: ("blob", text, content_type) for name, text in blobs.items()}}
        fields = {name: value for name, value in data.items() if name not in blobs}
        accept = {"Accept": "application/json"}
        return server.client.post("/v1/inpaint", files=files, data=fields, headers=accept)

    parameters = post(sent, "application/json; charset=utf-8").json()["parameters"]
    assert (parameters["timesteps"], parameters["freeu"]["b2"], parameters["loras"]) == ([900, 600], 1.4, [])
    problem = assert_problem(post(sent, "text/plain"), 422, "invalid_field")
    assert [error["field"] for error in problem["errors"]] == ["timesteps", "loras", "freeu"]
    for name in ("prompt", "seed", "scheduler"):
        problem = assert_problem(post({name: "7"}, "application/json"), 422, "invalid_field")
        assert problem["detail"] == f"Send {name} as text, not as a file."
    wrong = assert_problem(post({"timesteps": '["900"]'}, "application/json"), 422, "invalid_field")
    assert {error["field"] for error in wrong["errors"]} == {"timesteps"}, wrong


def test_choices_are_told_with_the_answer(server: LiveServer) -> None:
    """FreeU's factors and the prompt's syntax are among the effective parameters."""
    factors = {"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4}
    response = server.inpaint(
        {"Accept": "application/json"}, freeu=json.dumps(factors), prompt_syntax="a1111", prompt="a (red:1.3) house"
    )
    parameters = response.json()["parameters"]
    assert parameters["freeu"] == factors
    assert (parameters["prompt_syntax"], parameters["prompt"]) == ("a1111", "a (red:1.3) house")


def test_models_tell_what_can_be_chosen(server: LiveServer) -> None:
    """Everything that a client needs to know of the model beforehand."""
    (model,) = server.client.get("/v1/models").json()["data"]
    assert model["timesteps_schedulers"] == ["euler"]
    assert model["sigmas_schedulers"] == ["euler"]
    assert (model["embeds_width"], model["max_tokens"]) == (MODEL.embeds_width, MODEL.max_tokens)
    assert (model["latent_channels"], model["latent_multiple"], model["unet_in_channels"]) == (4, 8, 9)
    assert model["embeddings"] == [{"token": "<pirate>", "num_vectors": 2}]
    assert model["prediction_type"] == "epsilon"
    assert model["embeds_guidance"] is False


def test_previews_come_with_the_progress_where_asked_for(server: LiveServer) -> None:
    """With `previews`, progress events carry JPEG pictures of the working size; without, none do."""
    accept = {"Accept": "text/event-stream"}
    for previews in ("true", "false"):
        text = server.inpaint(accept, num_inference_steps="20", previews=previews).text
        progress = [
            json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith('data: {"step"')
        ]
        shown = [event["preview"] for event in progress if "preview" in event]
        assert bool(shown) == (previews == "true")
        for preview in shown:
            assert preview["media_type"] == "image/jpeg"
            assert pixels_of(base64.b64decode(preview["b64_json"])).shape == (SIZE, SIZE, 3)


def test_previews_show_the_upload_outside_the_mask(server: LiveServer) -> None:
    """What is kept looks in a preview as it will in the answer, but for JPEG's loss."""
    image = np.full((SIZE, SIZE, 3), 90, np.uint8)
    text = server.inpaint(
        {"Accept": "text/event-stream"}, image=png(image), num_inference_steps="20", previews="true"
    ).text
    line = next(line for line in text.splitlines() if '"preview"' in line)
    picture = pixels_of(base64.b64decode(json.loads(line.removeprefix("data: "))["preview"]["b64_json"]))
    kept = square_mask() == 0
    kept[8:40, 8:40] = False  # JPEG's blocks reach beyond the mask
    assert np.abs(picture[kept].astype(int) - 90).max() <= 2


def test_other_answers_make_no_previews(server: LiveServer) -> None:
    """A picture or JSON is one answer: `previews` costs nothing there."""
    assert server.inpaint(previews="true").status_code == 200
    assert server.inpaint({"Accept": "application/json"}, previews="true", image=png(scene())).status_code == 200
