"""`POST /v1/images/edits` as OpenAI's own client and curl send it: what is painted, and what each field means."""

import asyncio
import base64
import dataclasses
import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any, get_args

import httpx
import numpy as np
import openai
import pytest
from openai.types import ImageModel, ImagesResponse
from PIL import Image
from safetensors.numpy import save

from service.api.fields import InpaintFields
from tests.http.openai_pictures import (
    KEY,
    connected,
    decoded,
    edit,
    file_of,
    hole,
    native_file,
    scene_with_hole,
)
from tests.http.serving import LiveServer, eventually, pixels_of, png, scene, serving, square_mask

RECORDED = Path(__file__).parent / "recorded" / "openai"
REPAINTED = square_mask() == 255


def json_edit(server: LiveServer, **changes: Any) -> httpx.Response:
    """The usual edit as JSON, changed; fields that are None are null."""
    usual = {"images": [{"image_url": data_url(png(scene()))}], "mask": {"image_url": data_url(hole())}}
    body = {**usual, "prompt": "a red house", "seed": 7, **changes}
    return server.client.post("/v1/images/edits", json=body)


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def picture_in(response: httpx.Response) -> bytes:
    assert response.status_code == 200, response.text
    return base64.b64decode(response.json()["data"][0]["b64_json"])


def refusal(response: httpx.Response) -> tuple[int, str, str]:
    """Status, field and message of an error in OpenAI's form."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["param"], error["message"]


# --- what is painted ------------------------------------------------------------------------


def test_what_is_transparent_in_the_mask_is_repainted_and_nothing_else(server: LiveServer) -> None:
    """OpenAI's polarity: fully transparent is edited; all other pixels are the upload's, bit for bit."""
    with connected(server) as client:
        painted = decoded(edit(client).data[0])

    changed = (painted != scene()).any(axis=-1)
    assert not changed[~REPAINTED].any()
    assert changed[REPAINTED].mean() > 0.9


def test_same_bytes_as_natively(server: LiveServer) -> None:
    """The wire format is a translation: one seed, one file, whichever endpoint paints it."""
    with connected(server) as client:
        answer = edit(client, extra_body={"guidance_scale": 3, "scheduler": "euler"})
    assert file_of(answer.data[0]) == native_file(server, guidance_scale="3", scheduler="euler")


def test_without_a_mask_the_images_own_transparency_says_where(server: LiveServer) -> None:
    """As OpenAI has it: the image's transparency is the mask, and the answer is opaque."""
    with connected(server) as client:
        answer = edit(client, image=("a.png", scene_with_hole()), mask=None)
    assert file_of(answer.data[0]) == native_file(server)
    assert answer.background == "opaque"


def test_answer_is_what_the_clients_types_say(server: LiveServer) -> None:
    """Strictly validated against OpenAI's own model of the answer; our additions beside."""
    with connected(server) as client:
        raw = client.images.with_raw_response.edit(
            image=("a.png", png(scene())), mask=("m.png", hole()), prompt="a red house", extra_body={"seed": 7}
        )
    answer = json.loads(raw.text)
    typed = ImagesResponse.model_validate(answer, strict=True)

    assert raw.headers["Content-Type"] == "application/json"
    assert typed.created > 1_700_000_000
    assert (typed.size, typed.output_format, typed.quality, typed.background) == ("64x64", "png", "medium", "opaque")
    assert typed.usage is not None
    assert typed.usage.total_tokens == 0
    assert (answer["data"][0]["seed"], answer["data"][0]["nsfw_content_detected"]) == (7, False)
    assert set(answer["data"][0]) == {"b64_json", "seed", "nsfw_content_detected"}


def test_several_images_have_seeds_that_follow_each_other(server: LiveServer) -> None:
    """`n` images, the i-th with seed + i: each can be had again alone."""
    with connected(server) as client:
        several = edit(client, n=3)
        alone = edit(client, extra_body={"seed": 9})
    assert [image.seed for image in several.data] == [7, 8, 9]
    assert len({image.b64_json for image in several.data}) == 3
    assert several.data[2].b64_json == alone.data[0].b64_json


def test_a_random_seed_is_reported(server: LiveServer) -> None:
    """Without a seed one is drawn, and what it was repeats the picture."""
    with connected(server) as client:
        first = edit(client, extra_body={"seed": None})
        again = edit(client, extra_body={"seed": first.data[0].seed})
    assert file_of(first.data[0]) == file_of(again.data[0])


def test_flagged_image_is_black_and_says_so(server: LiveServer) -> None:
    """The safety checker's verdict is in the answer, whatever `moderation` says."""
    with connected(server) as client:
        image = edit(client, prompt="nsfw", extra_body={"moderation": "low"}).data[0]
    assert image.nsfw_content_detected is True
    assert not decoded(image).any()


def test_async_client(server: LiveServer) -> None:
    """`AsyncOpenAI` gets the same."""

    async def ask() -> Any:
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=KEY) as client:
            return await client.images.edit(
                image=[("a.png", png(scene()))], mask=hole(), prompt="a red house", extra_body={"seed": 7}
            )

    assert file_of(asyncio.run(ask()).data[0]) == native_file(server)


def test_curl_of_the_reference(server: LiveServer, tmp_path: Path) -> None:
    """The commands of OpenAI's reference work as they stand, with the address changed."""
    (tmp_path / "body-lotion.png").write_bytes(png(scene()))
    (tmp_path / "mask.png").write_bytes(hole())
    lines = [line for line in (RECORDED / "curl.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == 2
    written = []
    for line in lines:
        options = line.replace("$BASE", f"http://127.0.0.1:{server.port}").replace("$OPENAI_API_KEY", KEY)
        done = subprocess.run(
            ["curl", *shlex.split(options)], cwd=tmp_path, capture_output=True, check=True, timeout=60
        )
        written.append(done.stdout)

    assert "x-request-id" in (tmp_path / "headers.txt").read_text().lower()
    answer = json.loads((tmp_path / "answer.json").read_text())
    seed = str(answer["data"][0]["seed"])
    expected = native_file(server, seed=seed, prompt="Create a lovely gift basket with these four items in it")
    assert base64.b64decode(answer["data"][0]["b64_json"]) == expected
    assert written[1].startswith(b"event: image_edit.completed\ndata: {")


# --- the same as JSON -------------------------------------------------------------------------


def test_json_body_of_the_reference(server: LiveServer) -> None:
    """The JSON variant with every parameter of the reference paints what form data does."""
    text = json.dumps(json.loads((RECORDED / "edit.json").read_text())["body"])
    for name, data in (("image", png(scene())), ("mask", hole())):
        text = text.replace(f"{{{name}}}", base64.b64encode(data).decode())
    body = {**json.loads(text), "seed": 7}
    response = server.client.post("/v1/images/edits", json=body)
    assert picture_in(response) == native_file(server)


def test_other_spellings_in_json(server: LiveServer) -> None:
    """One `image` on its own, bare Base64, and null for what is left out."""
    bare = base64.b64encode(png(scene())).decode()
    expected = native_file(server)
    assert picture_in(json_edit(server, images=None, image=data_url(png(scene())))) == expected
    assert picture_in(json_edit(server, images=[bare], size=None, quality=None, n=None, loras=None)) == expected
    assert picture_in(json_edit(server, images=[{"image_url": bare}], stream=False)) == expected


@pytest.mark.parametrize(
    ("changes", "field", "word"),
    [
        ({"images": [{"image_url": "https://example.org/a.png"}]}, "images", "fetches nothing"),
        ({"images": ["HTTP://example.org/a.png"]}, "images", "fetches nothing"),
        ({"mask": {"image_url": "https://example.org/a.png"}}, "mask", "fetches nothing"),
        ({"images": [{"file_id": "file-1"}]}, "images", "file_id"),
        ({"mask": {"file_id": "file-1"}}, "mask", "file_id"),
        ({"images": [{"image_url": "file:///etc/passwd"}]}, "images", "Base64"),
        ({"images": [{"url": "data:,"}]}, "images", "image_url"),
        ({"images": [{}]}, "images", "image_url"),
        ({"images": "data:image/png;base64,AA"}, "images", "list"),
        ({"images": []}, "image", "missing"),
        ({"images": ["AA==", "AA=="]}, "image", "one image"),
        ({"images": ["AA=="], "image": "AA=="}, "image", "one image"),
        ({"prompt": 5}, "prompt", "string"),
        ({"prompt": None}, "prompt", "missing"),
        ({"seed": 1.5}, "seed", "whole number"),
        ({"seed": [1]}, "seed", "whole number"),
        ({"n": "two"}, "n", "n: Input"),
        ({"stream": "maybe"}, "stream", "true"),
        ({"steps": {"a": 1}}, "steps", "no such field"),
        ({"no such": 1}, "?", "no such field"),
    ],
)
def test_what_json_may_not_say(server: LiveServer, changes: dict[str, Any], field: str, word: str) -> None:
    """Nothing is fetched or looked up, nothing is guessed: 400 with the field, never a 500."""
    status, param, message = refusal(json_edit(server, **changes))
    assert (status, param) == (400, field)
    assert word in message


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff", b'{"a": 1, "a": 2}', b'{"freeu": ' + b"[" * 5000 + b"]" * 5000]
)
def test_what_is_no_json(server: LiveServer, body: bytes) -> None:
    """A body that is no JSON object is 400, however it is broken."""
    headers = {"Content-Type": "application/json"}
    response = server.client.post("/v1/images/edits", content=body, headers=headers)
    assert refusal(response)[:2] == (400, None)


def test_nested_as_deeply_as_can_be(server: LiveServer) -> None:
    """Whatever depth the reader just takes is refused with its field, or as a body."""
    for depth in range(50, 1100, 25):
        body = b'{"prompt": "a", "image": "AA==", "freeu": ' + b"[" * depth + b"]" * depth + b"}"
        response = server.client.post("/v1/images/edits", content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 400, (depth, response.text)


# --- image and mask -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "param", "word"),
    [
        ({"mask": ("m.png", png(square_mask()))}, "mask", "alpha channel"),
        ({"mask": ("m.png", png(np.full((64, 64, 4), 255, np.uint8)))}, "mask", "transparent"),
        ({"mask": None}, "mask", "alpha channel"),
        ({"mask": None, "image": ("a.png", png(np.full((64, 64, 4), 255, np.uint8)))}, "mask", "transparent"),
        ({"mask": ("m.png", hole(32, 32))}, "mask", "32x32"),
        ({"image": [("a.png", png(scene())), ("b.png", png(scene()))]}, "image", "one image"),
        ({"image": ("a.png", b"GIF89a")}, "image", "PNG, JPEG or WebP"),
        ({"image": ("a.png", b"")}, "image", "empty"),
    ],
)
def test_images_and_masks_that_cannot_be_used(
    server: LiveServer, changes: dict[str, Any], param: str, word: str
) -> None:
    """A mask that says nothing is an error and is not ignored; so are several images."""
    with connected(server) as client, pytest.raises(openai.BadRequestError) as caught:
        edit(client, **changes)
    assert caught.value.param == param
    assert word in caught.value.message


def test_half_transparent_is_the_limit(server: LiveServer) -> None:
    """At least half transparent is repainted, less is kept."""
    mask = np.zeros((64, 64, 4), np.uint8)
    mask[..., 3] = 255
    mask[:16, :, 3], mask[16:32, :, 3] = 127, 128
    with connected(server) as client:
        painted = decoded(edit(client, mask=("m.png", png(mask))).data[0])
    changed = (painted != scene()).any(axis=-1)
    assert changed[:16].mean() > 0.9
    assert not changed[16:].any()


def test_transparency_of_the_picture_stays_or_goes(server: LiveServer) -> None:
    """`background`: auto keeps the upload's own transparency, opaque drops it, transparent cannot be painted."""
    pixels = np.dstack([scene(), np.full((64, 64), 255, np.uint8)])
    pixels[-8:, :, 3] = 0
    with connected(server) as client:
        kept = edit(client, image=("a.png", png(pixels)))
        dropped = edit(client, image=("a.png", png(pixels)), background="opaque")
        with pytest.raises(openai.BadRequestError) as caught:
            edit(client, background="transparent")
    assert kept.background == "transparent"
    assert (decoded(kept.data[0])[-8:, :, 3] == 0).all()
    assert dropped.background == "opaque"
    assert np.array_equal(decoded(dropped.data[0]), decoded(kept.data[0])[..., :3])
    assert caught.value.param == "background"


# --- size, format, quality ------------------------------------------------------------------------


def test_auto_is_the_pictures_own_size(server: LiveServer) -> None:
    """`auto`, which is the default: what comes back fits over what was sent."""
    with connected(server) as client:
        for size in ("auto", None):
            answer = edit(client, image=("a.png", png(scene(80, 120))), mask=("m.png", hole(80, 120)), size=size)
            assert answer.size == "120x80"
            assert decoded(answer.data[0]).shape == (80, 120, 3)


@pytest.mark.parametrize(("size", "shape"), [("240x160", (160, 240)), ("60x40", (40, 60)), ("151x100", (100, 151))])
def test_named_size_scales_the_result(server: LiveServer, size: str, shape: tuple[int, int]) -> None:
    """Width x height of the picture's shape: the result is scaled to exactly that."""
    with connected(server) as client:
        answer = edit(client, image=("a.png", png(scene(80, 120))), mask=("m.png", hole(80, 120)), size=size)
    assert answer.size == size
    assert decoded(answer.data[0]).shape == (*shape, 3)


@pytest.mark.parametrize(
    ("size", "own", "word"),
    [
        ("1024x1024", {}, "auto"),
        ("160x240", {}, "120x80"),
        ("153x100", {}, "auto"),
        ("1500x1000", {}, "at most 1000000 pixels"),
        ("99999x66666", {}, "at most"),
        ("120x80", {"composite": False}, "composite"),
        ("0x0", {}, "auto"),
        ("120X80", {}, "auto"),
        ("120", {}, "auto"),
        ("٣x٢", {}, "auto"),
        ("", {}, "auto"),
    ],
)
def test_sizes_that_cannot_be_had(server: LiveServer, size: str, own: dict[str, Any], word: str) -> None:
    """Another shape would stretch, and more pixels than a picture may have are too many: an error on `size`."""
    with connected(server) as client, pytest.raises(openai.BadRequestError) as caught:
        edit(
            client,
            image=("a.png", png(scene(80, 120))),
            mask=("m.png", hole(80, 120)),
            size=size,
            extra_body=own,
        )
    assert caught.value.param == "size"
    assert word in caught.value.message


@pytest.mark.parametrize(
    ("asked", "mode", "is_exact"),
    [
        ({}, "PNG", True),
        ({"output_format": "png", "output_compression": 100}, "PNG", True),
        ({"output_format": "webp"}, "WEBP", True),
        ({"output_format": "webp", "output_compression": 100}, "WEBP", True),
        ({"output_format": "webp", "output_compression": 40}, "WEBP", False),
        ({"output_format": "jpeg"}, "JPEG", False),
    ],
)
def test_formats(server: LiveServer, tmp_path: Path, asked: dict[str, Any], mode: str, is_exact: bool) -> None:
    """PNG, JPEG and WebP; 100, the default, loses nothing where the format can."""
    with connected(server) as client:
        answer = edit(client, **asked)
    file = tmp_path / "file"
    file.write_bytes(file_of(answer.data[0]))
    assert Image.open(file).format == mode
    assert answer.output_format == mode.lower()
    assert np.array_equal(pixels_of(file.read_bytes()), pixels_of(native_file(server))) is is_exact


def test_compression_is_the_encoders_quality(server: LiveServer) -> None:
    """Less of it makes smaller files; PNG has only 100."""
    with connected(server) as client:
        sizes = [
            len(file_of(edit(client, output_format="jpeg", output_compression=quality).data[0]))
            for quality in (0, 50, 100)
        ]
        by_default = len(file_of(edit(client, output_format="jpeg").data[0]))
        for fields in ({"output_compression": 90}, {"output_compression": 101, "output_format": "jpeg"}):
            with pytest.raises(openai.BadRequestError) as caught:
                edit(client, **fields)
            assert caught.value.param == "output_compression"
    assert sizes[0] < sizes[1] < sizes[2] == by_default


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


# --- repetitions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_repeated_request_gets_the_first_answer(server: LiveServer, stream: bool) -> None:
    """With an `Idempotency-Key`, also from a client that tries again: the same bytes, painted once."""
    files = {"image": ("a.png", png(scene())), "mask": ("m.png", hole())}
    data = {"prompt": "a red house", "stream": json.dumps(stream)}
    headers = {"Idempotency-Key": f"openai-{stream}"}
    before = server.metric("inpaint_images_total")
    first, second = (server.client.post("/v1/images/edits", files=files, data=data, headers=headers) for _ in range(2))

    assert first.status_code == second.status_code == 200
    assert first.content == second.content
    assert first.headers["Content-Type"] == second.headers["Content-Type"]
    assert second.headers["Idempotent-Replayed"] == "true"
    assert second.headers["Original-Request"] == first.headers["X-Request-Id"]
    assert server.metric("inpaint_images_total") - before == 1
    changed = server.client.post("/v1/images/edits", files=files, data={"prompt": "b"}, headers=headers)
    assert refusal(changed)[0] == 400
    assert changed.json()["error"]["code"] == "key_reuse"


def test_nothing_is_left_in_the_temporary_folder(server: LiveServer) -> None:
    """Uploads of a megabyte are read into memory, in either kind of body."""
    before = set(os.listdir("/tmp"))  # noqa: PTH208, S108
    with connected(server) as client:
        edit(client)
    json_edit(server)
    assert {name for name in set(os.listdir("/tmp")) - before if "tmp" in name} == set()  # noqa: PTH208, S108
