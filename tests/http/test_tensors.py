"""Tensors in and out: what a client computes itself takes the place of what the service would compute."""

import base64
import io
import json
import struct

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save

from service.api.tensors import TensorFault, read_tensor
from tests.fake_worker import MODEL
from tests.http.serving import SIZE, LiveServer, assert_problem, form, pixels_of, png, scene, square_mask

WIDTH = MODEL.embeds_width
SIDE = SIZE // 8


def npy(array: NDArray[np.generic]) -> bytes:
    """An `.npy` file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def normal(*shape: int, dtype: type = np.float32) -> NDArray[np.generic]:
    """Repeatable noise."""
    return np.random.default_rng(1).standard_normal(shape).astype(dtype)


def latent_of(server: LiveServer, **fields: object) -> NDArray[np.float32]:
    """What the fake worker answers as latents: the seed plus the sum of all tensors, everywhere."""
    response = server.inpaint(output_format="latent", composite="false", **fields)
    assert response.status_code == 200, response.text
    return np.load(io.BytesIO(response.content), allow_pickle=False)


def bfloat16(array: NDArray[np.float32], name: str) -> bytes:
    """A `.safetensors` file in bfloat16, which numpy does not have."""
    data = (array.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    header = json.dumps({name: {"dtype": "BF16", "shape": list(array.shape), "data_offsets": [0, len(data)]}})
    return struct.pack("<Q", len(header)) + header.encode() + data


# --- in ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.dtype(">f4")])
@pytest.mark.parametrize("suffix", ["npy", "safetensors"])
def test_files_of_either_format_and_any_float(dtype: type, suffix: str) -> None:
    """`.npy` and `.safetensors`, float16 to float64, big-endian and Fortran order: the same numbers come out."""
    if suffix == "safetensors" and dtype == np.dtype(">f4"):
        return  # The format is little-endian by definition.
    array = np.asfortranarray(normal(3, 5, dtype=dtype)) if suffix == "npy" else normal(3, 5, dtype=dtype)
    data = npy(array) if suffix == "npy" else save({"anything": array})
    read = read_tensor(data, "latents")
    assert read.dtype == np.float32
    assert read.flags.c_contiguous
    assert np.array_equal(read, array.astype(np.float32))


def test_bfloat16_is_read() -> None:
    """bfloat16 is the upper half of float32."""
    array = np.array([[1.0, -2.5, 0.15625]], np.float32)
    assert np.array_equal(read_tensor(bfloat16(array, "x"), "x"), array)


def test_tensor_is_found_by_the_fields_name() -> None:
    """Of several tensors in a file, the one that is called like the field is taken."""
    file = save({"latents": np.ones(3, np.float32), "other": np.zeros(3, np.float32)})
    assert read_tensor(file, "latents").tolist() == [1, 1, 1]
    with pytest.raises(TensorFault, match="one named image_latents"):
        read_tensor(file, "image_latents")


PICKLED = npy(np.array([{"a": 1}], dtype=object))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        npy(normal(4, 4))[:-1],
        npy(normal(4, 4)) + b"x",
        npy(np.arange(4)),
        npy(normal(4).astype(np.complex64)),
        npy(np.array([1.0, np.nan], np.float32)),
        npy(np.array([1e300])),
        npy(np.zeros((0, 4), np.float32)),
        PICKLED,
        b"\x93NUMPY\x01\x00" + struct.pack("<H", 60) + b"{'descr': '<f4', 'fortran_order': False, 'shape': (9**9**9,)}",
        b"\x93NUMPY\x01\x00" + struct.pack("<H", 9) + b"(" * 9,
        save({"x": normal(4, 4)})[:-1],
        save({"x": np.arange(4)}),
        save({}),
        save({"a": normal(2), "b": normal(2)}),
        struct.pack("<Q", 2**60) + b"{}",
        b"\x80\x04\x95pickle.",
        png(scene()),
    ],
)
def test_what_is_no_tensor_is_refused(server: LiveServer, data: bytes) -> None:
    """Truncated, pickled, integer, infinite, empty or other files: 422 with the field named; nothing is executed."""
    problem = assert_problem(server.inpaint(latents=data), 422, "invalid_field")
    assert [error["field"] for error in problem["errors"]] == ["latents"]


def test_each_tensor_reaches_the_worker(server: LiveServer) -> None:
    """All five, singly and together, in either format, with and without a batch dimension."""
    embeds, latents = normal(77, WIDTH), normal(1, 4, SIDE, SIDE)
    assert np.allclose(latent_of(server), 7)
    one = latent_of(server, prompt=None, prompt_embeds=npy(embeds))
    assert np.allclose(one, 7 + embeds.sum(), atol=1e-2)
    both = latent_of(server, prompt=None, prompt_embeds=npy(embeds[None]), negative_prompt_embeds=save({"x": embeds}))
    assert np.allclose(both, 7 + 2 * embeds.sum(), atol=1e-2)
    three = latent_of(
        server, latents=npy(latents), masked_image_latents=npy(latents[0]), image_latents=save({"x": latents})
    )
    assert np.allclose(three, 7 + 3 * latents.sum(), atol=1e-2)


def test_long_prompt_embeds_need_negative_ones_when_guided(server: LiveServer) -> None:
    """Longer than the text encoder reads: the negative prompt cannot be encoded to that length, as in stock."""
    long = npy(normal(154, WIDTH))
    problem = assert_problem(server.inpaint(prompt=None, prompt_embeds=long), 422, "invalid_field")
    assert problem["errors"][0]["field"] == "negative_prompt_embeds"
    assert f"(154, {WIDTH})" in problem["detail"]
    assert server.inpaint(prompt=None, prompt_embeds=long, negative_prompt_embeds=long).status_code == 200
    assert server.inpaint(prompt=None, prompt_embeds=long, guidance_scale="1").status_code == 200


@pytest.mark.parametrize(
    ("field", "shape", "expected"),
    [
        ("prompt_embeds", (77, WIDTH + 1), f"(T, {WIDTH})"),
        ("prompt_embeds", (2, 77, WIDTH), f"(T, {WIDTH})"),
        ("prompt_embeds", (77 * 20 + 1, WIDTH), "T up to 1540"),
        ("negative_prompt_embeds", (78, WIDTH), f"(77, {WIDTH})"),
        ("latents", (1, 4, SIDE, SIDE + 1), f"(1, 4, {SIDE}, {SIDE})"),
        ("latents", (2, 4, SIDE, SIDE), f"(1, 4, {SIDE}, {SIDE})"),
        ("masked_image_latents", (3, SIDE, SIDE), f"(1, 4, {SIDE}, {SIDE})"),
        ("image_latents", (SIDE,), f"(1, 4, {SIDE}, {SIDE})"),
    ],
)
def test_wrong_shapes_name_the_expected_one(
    server: LiveServer, field: str, shape: tuple[int, ...], expected: str
) -> None:
    """422 with the field and the shape that it should have."""
    fields: dict[str, object] = {field: npy(normal(*shape)), "height": str(SIZE), "width": str(SIZE)}
    if field == "prompt_embeds":
        fields["prompt"] = None
    problem = assert_problem(server.inpaint(**fields), 422, "invalid_field")
    (error,) = problem["errors"]
    assert error["field"] == field
    assert expected in error["message"]
    assert f"not ({', '.join(map(str, shape))})." in error["message"]


def test_one_latent_for_all_images_or_one_each(server: LiveServer) -> None:
    """Initial noise is one for each image; latents of the picture are one for all or one each, as stock repeats."""
    accept = {"Accept": "application/json"}
    for count, status in ((1, 200), (2, 200), (3, 422)):
        pictures = npy(normal(count, 4, SIDE, SIDE))
        response = server.inpaint(accept, num_images_per_prompt="2", image_latents=pictures)
        assert response.status_code == status, response.text
    for count, status in ((1, 422), (2, 200)):
        noise = npy(normal(count, 4, SIDE, SIDE))
        assert server.inpaint(accept, num_images_per_prompt="2", latents=noise).status_code == status


def test_latents_set_the_working_size(server: LiveServer) -> None:
    """Where no size is named, that of the latents is meant, whatever the picture's."""
    image, mask = scene(100, 140), square_mask(100, 140)
    response = server.inpaint(
        {"Accept": "application/json"}, image=png(image), mask=png(mask), latents=npy(normal(4, 9, 12))
    )
    parameters = response.json()["parameters"]
    assert (parameters["height"], parameters["width"]) == (72, 96)
    assert parameters["tensors"] == ["latents"]
    painted = pixels_of(base64.b64decode(response.json()["images"][0]["b64_json"]))
    assert painted.shape == image.shape


@pytest.mark.parametrize(
    ("fields", "faulty"),
    [
        ({"prompt_embeds": npy(normal(77, WIDTH))}, "prompt_embeds"),
        ({"negative_prompt": "x", "negative_prompt_embeds": npy(normal(77, WIDTH))}, "negative_prompt_embeds"),
        ({"prompt": None}, "prompt"),
        ({"latents": "text"}, "latents"),
    ],
)
def test_text_and_embeddings_exclude_each_other(server: LiveServer, fields: dict[str, object], faulty: str) -> None:
    """Both or neither of a prompt and its embeddings: 422, as stock raises; tensors are files."""
    problem = assert_problem(server.inpaint(**fields), 422, "invalid_field")
    assert [error["field"] for error in problem["errors"]] == [faulty]


def test_latents_can_stand_for_the_picture(server: LiveServer) -> None:
    """As in stock, with those of the masked picture and a mask; then there is nothing to paste into."""
    latents = npy(normal(4, SIDE, SIDE))
    given = {"image": None, "image_latents": latents, "masked_image_latents": latents}
    response = server.inpaint(**given, composite="false")
    assert response.status_code == 200, response.text
    assert pixels_of(response.content).shape == (SIZE, SIZE, 3)
    problem = assert_problem(server.inpaint(**given), 422, "invalid_field")
    assert problem["errors"][0]["field"] == "composite"
    for missing in ("mask", "masked_image_latents"):
        problem = assert_problem(server.inpaint(**{**given, missing: None, "composite": "false"}), 422, "invalid_field")
        assert problem["errors"][0]["field"] == missing


def test_a_tensor_is_sent_once(server: LiveServer) -> None:
    """A repeated file is refused like any repeated field."""
    files, data = form()
    pairs = [*files.items(), *(("latents", ("l.npy", npy(normal(4, SIDE, SIDE)))) for _ in range(2))]
    problem = assert_problem(server.client.post("/v1/inpaint", files=pairs, data=data), 422, "invalid_field")
    assert problem["errors"][0]["field"] == "latents"


# --- out -----------------------------------------------------------------------------


def test_npy_answer_is_floats_with_the_uploads_own_pixels(server: LiveServer) -> None:
    """`npy` is float32 from 0 to 1; outside the mask it is the upload's levels over 255, exactly."""
    image, mask = scene(100, 140), square_mask(100, 140)
    response = server.inpaint(image=png(image), mask=png(mask), output_format="npy")
    assert response.headers["Content-Type"] == "application/x-npy"
    assert response.headers["X-Seed"] == "7"
    array = np.load(io.BytesIO(response.content), allow_pickle=False)
    assert (array.dtype, array.shape) == (np.float32, (100, 140, 3))
    assert 0 <= array.min() <= array.max() <= 1
    levels = image.astype(np.float32) / np.float32(255)
    assert np.array_equal(array[mask < 128], levels[mask < 128])
    assert not np.array_equal(array[mask >= 128], levels[mask >= 128])


def test_accept_header_can_ask_for_floats(server: LiveServer) -> None:
    """`Accept: application/x-npy` alone is enough."""
    response = server.inpaint({"Accept": "application/x-npy"})
    assert response.headers["Content-Type"] == "application/x-npy"
    assert np.load(io.BytesIO(response.content), allow_pickle=False).shape == (SIZE, SIZE, 3)


@pytest.mark.parametrize("output_format", ["npy", "latent"])
def test_arrays_in_json(server: LiveServer, output_format: str) -> None:
    """Several arrays are answered as JSON, each in base64."""
    response = server.inpaint(
        {"Accept": "application/json"}, num_images_per_prompt="2", output_format=output_format, seed="3"
    )
    images = response.json()["images"]
    assert [image["media_type"] for image in images] == ["application/x-npy"] * 2
    arrays = [np.load(io.BytesIO(base64.b64decode(image["b64_json"])), allow_pickle=False) for image in images]
    assert [array.shape for array in arrays] == [{"npy": (SIZE, SIZE, 3), "latent": (4, SIDE, SIDE)}[output_format]] * 2
    if output_format == "latent":
        assert [float(array[0, 0, 0]) for array in arrays] == [3, 4]
    assert response.json()["parameters"]["output_format"] == output_format


@pytest.mark.parametrize("output_format", ["npy", "latent"])
def test_flagged_arrays_hold_nothing(server: LiveServer, output_format: str) -> None:
    """What the checker flags is zeros in every format: an array is no way around it."""
    response = server.inpaint(prompt="nsfw", output_format=output_format)
    assert response.headers["X-NSFW-Content-Detected"] == "true"
    assert not np.load(io.BytesIO(response.content), allow_pickle=False).any()


@pytest.mark.parametrize("output_format", ["npy", "latent"])
def test_arrays_do_not_go_with_a_padded_crop(server: LiveServer, output_format: str) -> None:
    """Stock refuses it, too: a crop is laid over a picture."""
    problem = assert_problem(server.inpaint(output_format=output_format, padding_mask_crop="8"), 422, "invalid_field")
    assert problem["errors"][0]["field"] == "output_format"
