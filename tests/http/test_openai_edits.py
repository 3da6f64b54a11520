"""`POST /v1/images/edits` as OpenAI's own client and curl send it: what is painted, and in what form."""

import asyncio
import base64
import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai.types import ImagesResponse
from PIL import Image

from tests.http.openai_pictures import (
    KEY,
    connected,
    data_url,
    decoded,
    edit,
    file_of,
    hole,
    json_edit,
    native_file,
    picture_in,
    refusal,
    scene_with_hole,
)
from tests.http.serving import LiveServer, pixels_of, png, scene, serving, square_mask

RECORDED = Path(__file__).parent / "recorded" / "openai"
REPAINTED = square_mask() == 255


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


# --- size and format ------------------------------------------------------------------------


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


def test_nothing_is_put_into_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uploads are read into memory, in either kind of body: where nothing can be put aside, all goes well."""
    noise, mask = png(scene(700, 700)), hole(700, 700)
    assert len(noise) > 2**20  # From here on frameworks spool.
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with serving() as server, connected(server) as client:
        assert edit(client, image=("a.png", noise), mask=("m.png", mask)).data
        picture_in(json_edit(server, images=[data_url(noise)], mask=data_url(mask)))
