"""A picture to paint by: its fields, what is wrong with them, and what reaches the worker."""

import io
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.fake_worker import IP_ADAPTERS
from tests.http.serving import LiveServer, assert_problem, form, png, scene, serving
from tests.http.test_tensors import normal, npy

PICTURE = np.full((40, 70, 3), (200, 60, 10), np.uint8)
PLAIN_WIDTH = IP_ADAPTERS["plain"].embeds_width
PLUS_WIDTH = IP_ADAPTERS["plus"].embeds_width


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, LiveServer]]:
    """A server for each kind of IP-Adapter, and one without any."""
    with (
        serving(model="fake?ip_adapter=plain", max_pixels=1_000_000) as plain,
        serving(model="fake?ip_adapter=plus") as plus,
        serving(model="fake?ip_adapter=bare") as bare,
        serving() as none,
    ):
        yield {"plain": plain, "plus": plus, "bare": bare, "none": none}


def received(server: LiveServer, **fields: object) -> float:
    """What the worker was given: 1000 for each unit of scale, the embeddings' shape and sum, the picture's mean."""
    response = server.inpaint(output_format="latent", composite="false", seed="0", **fields)
    assert response.status_code == 200, response.text
    return float(np.load(io.BytesIO(response.content), allow_pickle=False).flat[0])


def encoded(file_format: str, pixels: NDArray[np.uint8] = PICTURE, **options: object) -> bytes:
    """A file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format, **options)
    return buffer.getvalue()


# --- pictures ------------------------------------------------------------------------


@pytest.mark.parametrize("data", [png(PICTURE), encoded("JPEG", quality=100), encoded("WEBP", lossless=True)])
def test_picture_of_any_format_and_size(servers: dict[str, LiveServer], data: bytes) -> None:
    """PNG, JPEG or WebP, of another size than the image: it reaches the worker as RGB, at scale 1."""
    assert received(servers["plain"], ip_adapter_image=data) == pytest.approx(1000 + 1 + PICTURE.mean(), abs=1)


def test_picture_is_upright_rgb(servers: dict[str, LiveServer]) -> None:
    """Orientation is applied, alpha is dropped, grey becomes RGB."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for data in (encoded("PNG", exif=exif), encoded("PNG", np.dstack([PICTURE, np.full(PICTURE.shape[:2], 9, "u1")]))):
        assert received(servers["plain"], ip_adapter_image=data) == pytest.approx(1001 + PICTURE.mean(), abs=0.01)
    grey = encoded("PNG", np.full((9, 9), 77, np.uint8))
    assert received(servers["plain"], ip_adapter_image=grey) == pytest.approx(1001 + 77, abs=0.01)


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"no picture", 422, "invalid_image"),
        (png(PICTURE)[:-20], 422, "invalid_image"),
        (png(np.zeros((1001, 1000, 3), np.uint8)), 422, "too_many_pixels"),
    ],
)
def test_bad_pictures_are_refused_by_name(servers: dict[str, LiveServer], data: bytes, status: int, code: str) -> None:
    """Like the image itself, and with the field named."""
    problem = assert_problem(servers["plain"].inpaint(ip_adapter_image=data), status, code)
    assert [error["field"] for error in problem["errors"]] == ["ip_adapter_image"]


# --- scales --------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "scale"), [("0.5", 0.5), ("0", 0), ("2", 2), ("-1", -1), ("{}", 0)])
def test_scale_reaches_the_worker_and_the_answer(servers: dict[str, LiveServer], text: str, scale: float) -> None:
    """A number; an object without numbers leaves every block at 0, as in stock."""
    picture = png(PICTURE)
    got = received(servers["plus"], ip_adapter_image=picture, ip_adapter_scale=text)
    assert got == pytest.approx(1000 * scale + 1 + 26 + PICTURE.mean(), abs=0.01)
    answer = (
        servers["plus"].inpaint({"Accept": "application/json"}, ip_adapter_image=picture, ip_adapter_scale=text).json()
    )
    assert answer["parameters"]["ip_adapter_scale"] == scale


def test_scale_by_block(servers: dict[str, LiveServer]) -> None:
    """As `set_ip_adapter_scale` takes it."""
    text = '{"down": {"block_2": [0.0, 1]}, "mid": 0.5, "up": {"block_0": [0.0, 1.0, 0.0]}}'
    response = servers["plain"].inpaint(
        {"Accept": "application/json"}, ip_adapter_image=png(PICTURE), ip_adapter_scale=text
    )
    assert response.json()["parameters"]["ip_adapter_scale"] == {
        "down": {"block_2": [0.0, 1.0]},
        "mid": 0.5,
        "up": {"block_0": [0.0, 1.0, 0.0]},
    }


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "invalid_field"),
        ("much", "invalid_field"),
        ("10.1", "out_of_range"),
        ("nan", "out_of_range"),
        ("-1e400", "out_of_range"),
        ("[1]", "invalid_field"),
        ("{", "invalid_field"),
        ('{"left": 1}', "invalid_field"),
        ('{"up": {"block_x": 1}}', "invalid_field"),
        ('{"up": "1"}', "invalid_field"),
        ('{"up": {"block_0": []}}', "invalid_field"),
        ('{"mid": 11}', "out_of_range"),
        ('{"up": [' + ",".join("1" * 65) + "]}", "out_of_range"),
    ],
)
def test_bad_scales(servers: dict[str, LiveServer], text: str, code: str) -> None:
    """422 with the field named."""
    response = servers["plain"].inpaint(ip_adapter_image=png(PICTURE), ip_adapter_scale=text)
    problem = assert_problem(response, 422, code)
    assert [error["field"] for error in problem["errors"]] == ["ip_adapter_scale"]


# --- embeddings ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shape", "guidance_scale"),
    [
        ("plain", (2, 1, PLAIN_WIDTH), "7.5"),
        ("plain", (2, 8, PLAIN_WIDTH), "7.5"),
        ("plain", (1, 3, PLAIN_WIDTH), "1"),
        ("bare", (2, 1, PLAIN_WIDTH), "7.5"),
        ("plus", (2, 1, 26, PLUS_WIDTH), "7.5"),
        ("plus", (1, 2, 50, PLUS_WIDTH), "0"),
    ],
)
def test_embeddings_reach_the_worker(
    servers: dict[str, LiveServer], kind: str, shape: tuple[int, ...], guidance_scale: str
) -> None:
    """As stock takes them for one adapter: those of no picture first, when guided."""
    embeds = normal(*shape)
    got = received(servers[kind], ip_adapter_image_embeds=npy(embeds), guidance_scale=guidance_scale)
    assert got == pytest.approx(1000 + sum(shape[1:-1]) + float(embeds.sum()), abs=0.01)


@pytest.mark.parametrize(
    ("kind", "shape", "guidance_scale", "expected"),
    [
        ("plain", (1, 1, PLAIN_WIDTH), "7.5", f"(2, n, {PLAIN_WIDTH}) with n up to 8"),
        ("plain", (2, 1, PLAIN_WIDTH), "1", f"(1, n, {PLAIN_WIDTH})"),
        ("plain", (2, 1, PLAIN_WIDTH + 1), "7.5", f"(2, n, {PLAIN_WIDTH})"),
        ("plain", (2, PLAIN_WIDTH), "7.5", f"(2, n, {PLAIN_WIDTH})"),
        ("plain", (2,), "7.5", f"(2, n, {PLAIN_WIDTH})"),
        ("plain", (2, 9, PLAIN_WIDTH), "7.5", "n up to 8"),
        ("plain", (2, 1, 26, PLAIN_WIDTH), "7.5", f"(2, n, {PLAIN_WIDTH})"),
        ("plus", (2, 1, PLUS_WIDTH), "7.5", f"(2, n, T, {PLUS_WIDTH}) with n up to 8 and T up to 1024"),
        ("plus", (2, 1, 1025, PLUS_WIDTH), "7.5", "T up to 1024"),
    ],
)
def test_wrong_shapes_name_the_expected_one(
    servers: dict[str, LiveServer], kind: str, shape: tuple[int, ...], guidance_scale: str, expected: str
) -> None:
    """422 with the field and the shape that it should have."""
    response = servers[kind].inpaint(ip_adapter_image_embeds=npy(normal(*shape)), guidance_scale=guidance_scale)
    (error,) = assert_problem(response, 422, "invalid_field")["errors"]
    assert error["field"] == "ip_adapter_image_embeds"
    assert expected in error["message"]


def test_answer_lists_embeddings_that_were_sent(servers: dict[str, LiveServer]) -> None:
    """Among the tensors; without a picture to paint by, there is no scale."""
    embeds = npy(normal(2, 1, PLAIN_WIDTH))
    sent = servers["plain"].inpaint({"Accept": "application/json"}, ip_adapter_image_embeds=embeds).json()
    assert sent["parameters"]["tensors"] == ["ip_adapter_image_embeds"]
    assert sent["parameters"]["ip_adapter_scale"] == 1
    plain = servers["plain"].inpaint({"Accept": "application/json"}).json()
    assert plain["parameters"]["ip_adapter_scale"] is None


# --- together, and without an adapter ------------------------------------------------


EMBEDS = npy(normal(2, 1, PLAIN_WIDTH))


@pytest.mark.parametrize(
    ("kind", "fields", "faulty"),
    [
        ("none", {"ip_adapter_image": png(PICTURE)}, ["ip_adapter_image"]),
        ("none", {"ip_adapter_image_embeds": EMBEDS}, ["ip_adapter_image_embeds"]),
        ("none", {"ip_adapter_scale": "1"}, ["ip_adapter_scale"]),
        (
            "none",
            {"ip_adapter_image": png(PICTURE), "ip_adapter_scale": "much"},
            ["ip_adapter_image", "ip_adapter_scale"],
        ),
        ("plain", {"ip_adapter_image": png(PICTURE), "ip_adapter_image_embeds": EMBEDS}, ["ip_adapter_image_embeds"]),
        ("plain", {"ip_adapter_scale": "1"}, ["ip_adapter_scale"]),
        ("plain", {"ip_adapter_image": "text"}, ["ip_adapter_image"]),
        ("plain", {"ip_adapter_image_embeds": b"no tensor"}, ["ip_adapter_image_embeds"]),
        ("bare", {"ip_adapter_image": png(PICTURE)}, ["ip_adapter_image"]),
    ],
)
def test_fields_that_do_not_fit(
    servers: dict[str, LiveServer], kind: str, fields: dict[str, object], faulty: list[str]
) -> None:
    """Without an IP-Adapter or its image encoder, both at once, or a scale of nothing: each field at fault, once."""
    problem = assert_problem(servers[kind].inpaint(**fields), 422, "invalid_field")
    assert [error["field"] for error in problem["errors"]] == faulty


def test_a_picture_is_sent_once(servers: dict[str, LiveServer]) -> None:
    """A repeated file is refused like any repeated field."""
    files, data = form()
    pairs = [*files.items(), *(("ip_adapter_image", ("a.png", png(scene()))) for _ in range(2))]
    for kind in ("plain", "none"):
        response = servers[kind].client.post("/v1/inpaint", files=pairs, data=data)
        problem = assert_problem(response, 422, "invalid_field")
        assert [error["field"] for error in problem["errors"]] == ["ip_adapter_image"]


def test_models_tell_of_it(servers: dict[str, LiveServer]) -> None:
    """What can be sent, and in which shapes."""

    def served(kind: str) -> object:
        return servers[kind].client.get("/v1/models").json()["data"][0]["ip_adapter"]

    assert served("none") is None
    assert served("plus") == {
        "name": "plus.safetensors",
        "kind": "plus",
        "embeds_width": PLUS_WIDTH,
        "embeds_tokens": 26,
        "takes_images": True,
    }
    assert served("bare")["takes_images"] is False
