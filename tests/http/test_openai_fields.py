"""The fields of `POST /v1/images/edits`: quality, models, those of our own, and those that are refused."""

import base64
import dataclasses
import json
from typing import Any, get_args

import numpy as np
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types import ImageModel
from safetensors.numpy import save

from service.api.fields import InpaintFields
from service.api.forms import FILES
from service.api.openai.fields import IGNORED, EditFields
from tests.http.openai_pictures import (
    USUAL_JSON,
    connected,
    edit,
    file_of,
    hole,
    json_edit,
    native_file,
    picture_in,
    refusal,
)
from tests.http.serving import LiveServer, eventually, png, scene, serving

# --- quality and steps ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quality", "steps", "named"),
    [
        (None, 4, "medium"),
        ("auto", 4, "medium"),
        ("low", 2, "low"),
        ("medium", 4, "medium"),
        ("standard", 4, "medium"),
        ("high", 6, "high"),
        ("hd", 6, "high"),
        ("xhigh", 8, "xhigh"),
        ("max", 12, "max"),
    ],
)
def test_quality_is_a_share_of_the_default_steps(
    server: LiveServer, quality: str | None, steps: int, named: str
) -> None:
    """By the table in the README, of the fake model's four steps; each step is one tick."""
    before = server.metric("inpaint_batch_images_count")
    with connected(server) as client:
        answer = edit(client, quality=quality)
    assert server.metric("inpaint_batch_images_count") - before == steps
    assert answer.quality == named


def test_steps_of_ones_own_go_without_a_quality(server: LiveServer) -> None:
    """The client's own number of steps is taken, and beside a quality refused."""
    before = server.metric("inpaint_batch_images_count")
    with connected(server) as client:
        answer = edit(client, quality="auto", extra_body={"num_inference_steps": 3})
        assert answer.quality is None
        assert server.metric("inpaint_batch_images_count") - before == 3
        for own in ({"num_inference_steps": 3}, {"timesteps": "[900, 100]", "scheduler": "euler"}):
            with pytest.raises(openai.BadRequestError) as caught:
                edit(client, quality="high", extra_body=own)
            assert caught.value.param == "quality"


# --- models -------------------------------------------------------------------------------------------


def test_the_served_model_and_openais_names_are_taken(server: LiveServer) -> None:
    """The served id, and every name that OpenAI's client knows, since front ends have them built in."""
    known = get_args(ImageModel)
    assert len(known) >= 5
    with connected(server) as client:
        for name in ("fake", *known):
            assert edit(client, model=name).data


@pytest.mark.parametrize(
    "name", ["stable-diffusion-9", "gpt-4", "gpt-image-", "gpt-image-1 ", "", "../fake", "é" * 500]
)
def test_other_models_are_not_found(server: LiveServer, name: str) -> None:
    """404 in OpenAI's shape; what was asked for is not repeated."""
    with connected(server) as client, pytest.raises(openai.NotFoundError) as caught:
        edit(client, model=name)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert "stable-diffusion-9" not in caught.value.message


def test_models_are_listed_and_found(server: LiveServer) -> None:
    """`models.list` and `models.retrieve` of the client work; an unknown one is 404 in OpenAI's shape."""
    with connected(server) as client:
        (listed,) = client.models.list().data
        found = client.models.retrieve(listed.id)
        assert (found.id, found.object, found.owned_by) == ("fake", "model", listed.owned_by)
        assert found.model_dump() == listed.model_dump()
        for name in ("gpt-image-1", "a/b", "fake/", "%2e"):
            with pytest.raises(openai.NotFoundError) as caught:
                client.models.retrieve(name)
            assert caught.value.code == "model_not_found"


def test_ids_of_models_may_have_slashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id is found, however the client writes its slash."""
    with serving() as server, connected(server) as client:
        model = server.engine.model
        assert model is not None
        monkeypatch.setattr(server.engine, "model", dataclasses.replace(model, id="runway/sd 1.5"))
        assert client.models.retrieve("runway/sd 1.5").id == "runway/sd 1.5"
        assert server.client.get("/v1/models/runway%2Fsd%201.5").status_code == 200
        assert edit(client, model="runway/sd 1.5").data


# --- fields of our own -----------------------------------------------------------------------------------

OWN: dict[str, Any] = {
    "negative_prompt": "blurry",
    "num_inference_steps": 3,
    "prompt_syntax": "a1111",
    "timesteps": [900, 400],
    "sigmas": [9.5, 1.5],
    "guidance_scale": 2.5,
    "strength": 0.5,
    "seed": 8,
    "scheduler": "euler",
    "eta": 0.5,
    "height": 128,
    "width": 128,
    "padding_mask_crop": 4,
    "clip_skip": 1,
    "loras": [{"name": "pencil", "scale": 0.5}],
    "ip_adapter_scale": 0.5,
    "freeu": {"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4},
    "mask_blur": 2,
    "mask_grow": 3,
    "mask_invert": True,
    "composite": False,
    "batching": "solo",
    "timeout": 60,
}
NEEDS = {"timesteps": {"scheduler": "euler"}, "sigmas": {"scheduler": "euler"}}


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server with a LoRA and an IP-Adapter, and whatever parameters it last gave to its engine."""
    folder = tmp_path_factory.mktemp("loras")
    (folder / "pencil.safetensors").write_bytes(save({"unet.a": np.zeros((4, 64), np.float32)}))
    with serving(lora_dir=folder, model="fake?ip_adapter=plain") as server:
        yield server


@pytest.fixture
def submitted(adapted: LiveServer, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the engine was given, request by request."""
    given: list[Any] = []
    submit = type(adapted.engine).submit

    def noting(self: Any, params: Any, image: Any, mask: Any, **more: Any) -> Any:
        given.append((params, image.tobytes(), mask.tobytes(), more["timeout_seconds"]))
        return submit(self, params, image, mask, **more)

    monkeypatch.setattr(type(adapted.engine), "submit", noting)
    return given


@pytest.mark.parametrize("name", OWN)
def test_native_fields_go_along(adapted: LiveServer, submitted: list[Any], name: str) -> None:
    """Every scalar field of `/v1/inpaint` means the same here: in `extra_body` as text, in JSON as values."""
    more = NEEDS.get(name, {})
    files = {"ip_adapter_image": png(scene(8, 8))} if name == "ip_adapter_scale" else {}
    form = {name: as_text(OWN[name]), **more}
    expected = native_file(adapted, **{"seed": "7", **form}, **files)
    with connected(adapted) as client:
        if not files:  # The client has no place for further files.
            answer = edit(
                client, extra_body={name: OWN[name] if isinstance(OWN[name], bool) else as_text(OWN[name]), **more}
            )
            assert file_of(answer.data[0]) == expected
    of_files = {file: base64.b64encode(data).decode() for file, data in files.items()}
    assert picture_in(json_edit(adapted, **{name: OWN[name]}, **more, **of_files)) == expected
    assert len(submitted) == 2 + (not files)
    assert all(one == submitted[0] for one in submitted[1:])


def test_every_native_field_is_among_them() -> None:
    """The table above has all scalar fields but those that OpenAI's format says in its own words."""
    assert set(OWN) | {"prompt", "num_images_per_prompt", "output_format", "previews"} == set(
        InpaintFields.model_fields
    )


@pytest.mark.parametrize(
    ("own", "param", "word"),
    [
        ({"num_images_per_prompt": 2}, "num_images_per_prompt", "Send n instead"),
        ({"previews": True}, "previews", "partial_images"),
        # What the client makes of lists and objects: loras[][name], freeu[s1], timesteps[].
        ({"loras": [{"name": "pencil"}]}, "loras", "JSON text"),
        ({"freeu": {"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4}}, "freeu", "JSON text"),
        ({"timesteps": [900, 400]}, "timesteps", "JSON text"),
        ({"response_format": "url"}, "response_format", "b64_json"),
        ({"output_format": "npy"}, "output_format", "png"),
        ({"partial_images": 4}, "partial_images", "less than or equal to 3"),
        ({"quality": "best"}, "quality", "low"),
        ({"moderation": "off"}, "moderation", "low"),
        ({"complexity": "high"}, "complexity", "no such field"),
        ({"frame_count": 3}, "frame_count", "no such field"),
        ({"svg": {"model": "a"}}, "?", "no such field"),
        ({"num_inference_steps": 151}, "num_inference_steps", "150"),
        ({"n": 9}, "n", "n: Input should be less than or equal to 8"),
        ({"n": 0}, "n", "n: Input should be greater than or equal to 1"),
    ],
)
def test_fields_that_are_refused(server: LiveServer, own: dict[str, Any], param: str, word: str) -> None:
    """Nothing that would change the picture is passed over: 400 that names the field and the word to use."""
    with connected(server) as client, pytest.raises(openai.BadRequestError) as caught:
        edit(client, extra_body=own)
    assert caught.value.param == param
    assert word in caught.value.message


def test_markup_is_refused(server: LiveServer) -> None:
    """A picture to guide the edit would change it."""
    with connected(server) as client, pytest.raises(openai.BadRequestError) as caught:
        edit(client, markup=("m.png", hole()))
    assert caught.value.param == "markup"


def test_fields_that_make_no_difference(server: LiveServer, caplog: pytest.LogCaptureFixture) -> None:
    """Who the end user is, moderation and fidelity: taken, and neither painted by nor logged."""
    assert set(IGNORED) == {"user", "safety_identifier", "moderation", "input_fidelity"}
    with caplog.at_level("DEBUG"), connected(server) as client:
        answer = edit(
            client,
            user="xyzzy-user",
            extra_body={"safety_identifier": "xyzzy-id", "moderation": "low"},
            input_fidelity="high",
            response_format="b64_json",
        )
        eventually(lambda: "/v1/images/edits" in repr([record.__dict__ for record in caplog.records]))
    assert file_of(answer.data[0]) == native_file(server)
    assert "xyzzy" not in repr([record.__dict__ for record in caplog.records])


@pytest.mark.parametrize(
    ("name", "content", "filename", "word"),
    [
        ("size", b"auto", "file", "as text"),
        ("n", b"2", "file", "as text"),
        ("model", b"\xff", None, "UTF-8"),
        ("prompt", b"\xff", None, "UTF-8"),
        ("image", b"data:image/png;base64,AA==", None, "as a file"),
    ],
)
def test_parts_of_the_wrong_kind(
    server: LiveServer, name: str, content: bytes, filename: str | None, word: str
) -> None:
    """Text sent as a file, a file as text, text that is none."""
    files = {"image": ("a.png", png(scene())), "mask": ("m.png", hole()), "prompt": (None, b"a")}
    response = server.client.post("/v1/images/edits", files={**files, name: (filename, content)})
    status, param, message = refusal(response)
    assert (status, word in message) == (400, True), message
    assert param == name


def test_repeated_fields(server: LiveServer) -> None:
    """A field sent twice is ambiguous, whichever format it is of."""
    files = [("image", ("a.png", png(scene()))), ("mask", ("m.png", hole())), ("prompt", (None, b"a"))]
    for name, value in (("size", b"auto"), ("seed", b"1"), ("n", b"1")):
        sent = [*files, (name, (None, value)), (name, (None, value))]
        status, param, message = refusal(server.client.post("/v1/images/edits", files=sent))
        assert (status, param) == (400, name)
        assert message == f"The field {name} is sent 2 times."


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = ("images", "image", "mask", "n", *FILES, *EditFields.model_fields, *InpaintFields.model_fields)


@settings(max_examples=200, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(NAMES), value=VALUES)
def test_any_value_in_any_field(server: LiveServer, name: str, value: Any) -> None:
    """Whatever JSON a field holds, there is a picture or an error in OpenAI's form, and never a fault of ours."""
    body = json.dumps({**USUAL_JSON, "num_inference_steps": 1, name: value})
    response = server.client.post(
        "/v1/images/edits", content=body, headers={"Content-Type": "application/json", "X-Request-Id": "any"}
    )
    if response.status_code == 200:
        return
    assert refusal(response)[0] in {400, 404} or (name, response.status_code) == ("timeout", 504)


def test_document_has_the_fields_that_are_taken(server: LiveServer) -> None:
    """The OpenAPI document describes both kinds of body with every field, and no field that is refused."""
    document = server.client.get("/openapi.json").json()
    content = document["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]
    scalars = {"n", *EditFields.model_fields, *InpaintFields.model_fields} - {"num_images_per_prompt", "previews"}
    form, json_body = (content[kind]["schema"] for kind in ("multipart/form-data", "application/json"))
    assert set(form["properties"]) == {*FILES, "image[]", *scalars}
    assert set(json_body["properties"]) == {*FILES, "images", *scalars}
    assert all(field["description"] for field in form["properties"].values())
