"""Bad input that this layer answers for: each row of the promised table, by its code."""

import dataclasses
import json

import numpy as np
import pytest
from pydantic import ValidationError

from service.api.fields import InpaintFields
from tests.fake_worker import MODEL
from tests.http.serving import (
    BOUNDARY,
    CLOSING,
    LiveServer,
    assert_problem,
    part,
    png,
    scene,
    square_mask,
    usual_parts,
)


def one_fault(server: LiveServer, status: int, code: str, **fields: object) -> dict[str, str]:
    """The only fault of the usual request with these fields."""
    problem = assert_problem(server.inpaint(**fields), status, code)
    assert len(problem["errors"]) == 1, problem
    return problem["errors"][0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_inference_steps", "0"),
        ("num_inference_steps", "1000000"),
        ("guidance_scale", "NaN"),
        ("guidance_scale", "1e400"),
        ("guidance_scale", "-Infinity"),
        ("guidance_scale", "30.1"),
        ("strength", "0"),
        ("strength", "1.01"),
        ("strength", "0.2"),  # int(4 * 0.2) steps
        ("num_images_per_prompt", "9"),
        ("seed", "-1"),
        ("seed", "1" + "0" * 30),
        ("seed", "9" * 5000),
        ("seed", str(2**32)),
        ("eta", "1.5"),
        ("height", "65"),
        ("height", "0"),
        ("width", "264"),  # over four times the native size
        ("padding_mask_crop", "-1"),
        ("clip_skip", "11"),
        ("mask_blur", "65"),
        ("mask_grow", "-3"),
        ("timeout", "0"),
        ("timeout", "inf"),
    ],
)
def test_number_outside_its_bounds(server: LiveServer, field: str, value: str) -> None:
    """A number outside its bounds, or none at all, is `out_of_range` of its field."""
    assert one_fault(server, 422, "out_of_range", **{field: value})["field"] == field


@pytest.mark.parametrize(("side", "is_accepted"), [("56", False), ("64", True), ("2048", True), ("2056", False)])
def test_sides_are_bounded_by_the_models_own(side: str, is_accepted: bool) -> None:
    """A working side is from an eighth of the model's native size to four times it."""
    model = dataclasses.replace(MODEL, native_size=512)
    texts = {"prompt": "a red house", "width": side}
    if is_accepted:
        assert InpaintFields.model_validate(texts, context=model).width == int(side)
    else:
        with pytest.raises(ValidationError, match="from 64 to 2048"):
            InpaintFields.model_validate(texts, context=model)


@pytest.mark.parametrize(("clip_skip", "is_accepted"), [("3", True), ("4", False), ("11", False)])
def test_layers_left_out_are_bounded_by_the_models_own(clip_skip: str, is_accepted: bool) -> None:
    """Before anything is painted, and however the answer is asked for."""
    model = dataclasses.replace(MODEL, max_clip_skip=3)
    texts = {"prompt": "a red house", "clip_skip": clip_skip}
    if is_accepted:
        assert InpaintFields.model_validate(texts, context=model).clip_skip == int(clip_skip)
    else:
        with pytest.raises(ValidationError, match=r"at most 3|less than or equal to 10"):
            InpaintFields.model_validate(texts, context=model)


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("1", True), ("True", True), ("on", True), ("false", False), ("0", False), ("FALSE", False)],
)
def test_truth_is_spelled_as_clients_do(text: str, value: bool) -> None:
    """JavaScript's and Python's words, digits, and what a form's checkbox sends."""
    fields = InpaintFields.model_validate({"prompt": "a red house", "composite": text}, context=MODEL)
    assert fields.composite is value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_inference_steps", "20.0"),
        ("num_inference_steps", "2e1"),
        ("num_inference_steps", " 20"),
        ("num_inference_steps", "0x14"),
        ("num_inference_steps", "٢٠"),
        ("num_inference_steps", ""),
        ("guidance_scale", "seven"),
        ("guidance_scale", "7,5"),
        ("guidance_scale", "1_0"),
        ("composite", "yes"),
        ("mask_invert", "T"),
        ("batching", "mine"),
        ("output_format", "gif"),
        ("output_format", "tiff"),
        ("output_format", "np"),
    ],
)
def test_value_that_cannot_be_read(server: LiveServer, field: str, value: str) -> None:
    """A value of the wrong type or spelling is `invalid_field`; nothing is rounded or guessed."""
    assert one_fault(server, 422, "invalid_field", **{field: value})["field"] == field


@pytest.mark.parametrize("prompt", ["", " \n\t", "a" * 2001, "a\0b"])
def test_prompt_that_cannot_be_used(server: LiveServer, prompt: str) -> None:
    """An empty, blank, too long or NUL-bearing prompt is `invalid_prompt`."""
    assert one_fault(server, 422, "invalid_prompt", prompt=prompt)["field"] == "prompt"


def test_longest_prompt_counts_characters_and_not_bytes(server: LiveServer) -> None:
    """2,000 characters are accepted whatever their encoding's length."""
    assert server.inpaint(prompt="ü" * 2000, negative_prompt="家" * 2000).status_code == 200


def test_prompt_in_broken_utf8(server: LiveServer) -> None:
    """Bytes that are not UTF-8 are refused, not read as some other encoding."""
    body = part("image", png(scene()), "a.png") + part("mask", png(square_mask()), "m.png")
    body += part("prompt", b"a red \xff\xfe house") + CLOSING

    problem = assert_problem(server.post_body(body), 422, "invalid_prompt")
    assert [error["field"] for error in problem["errors"]] == ["prompt"]


def test_unknown_scheduler_lists_the_known(server: LiveServer) -> None:
    """An unknown scheduler is refused with the names that there are."""
    assert "ddim, euler" in one_fault(server, 422, "unknown_scheduler", scheduler="karras")["message"]


def test_every_fault_is_listed_and_the_first_documented_field_names_the_code(server: LiveServer) -> None:
    """All faults are reported at once, in the documented order, whatever the order of the parts."""
    body = (
        part("stepz", b"3")
        + part("mask_blur", b"99")
        + part("seed", b"1")
        + part("seed", b"2")
        + part("guidance_scale", b"nan")
        + part("mask", b"not a file")
        + part("prompt", b"a.txt", "a.txt")
        + CLOSING
    )

    problem = assert_problem(server.post_body(body), 422, "invalid_field")

    fields = [error["field"] for error in problem["errors"]]
    assert fields == ["image", "mask", "prompt", "guidance_scale", "seed", "mask_blur", "stepz"]
    assert problem["errors"][0]["message"] == problem["detail"]


def test_out_of_range_is_the_code_when_it_is_the_first_fault(server: LiveServer) -> None:
    """The top-level code is that of the first faulty field, and not of the most severe."""
    problem = assert_problem(server.inpaint(num_inference_steps="0", batching="x"), 422, "out_of_range")
    assert [error["field"] for error in problem["errors"]] == ["num_inference_steps", "batching"]


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        (part("image", png(scene())) + part("prompt", b"a"), "image"),
        (part("image", png(scene()), "a.png") + part("prompt", b"a", "prompt.txt"), "prompt"),
        (part("image", png(scene()), "a.png"), "prompt"),
        (part("prompt", b"a"), "image"),
        (usual_parts() + part("image", png(scene()), "b.png"), "image"),
        (usual_parts() + part("generator", b"1"), "generator"),
    ],
)
def test_part_of_the_wrong_kind_missing_or_double(server: LiveServer, parts: bytes, field: str) -> None:
    """Image as text, prompt as file, missing, duplicate and unknown fields are `invalid_field`."""
    problem = assert_problem(server.post_body(parts + CLOSING), 422, "invalid_field")
    assert problem["errors"][0]["field"] == field


def test_hostile_field_name_is_not_echoed(server: LiveServer) -> None:
    """What a client sends is not sent back: an odd field name appears nowhere in the answer."""
    problem = assert_problem(
        server.post_body(usual_parts() + part("<script>alert(1)</script>", b"1") + CLOSING), 422, "invalid_field"
    )
    assert "script" not in json.dumps(problem)


@pytest.mark.parametrize(
    "body",
    [
        usual_parts(),  # no closing boundary
        usual_parts()[:-200] if len(usual_parts()) > 200 else b"",  # stops inside a part
        b"",
        b"no multipart at all",
        usual_parts().replace(BOUNDARY.encode(), b"another") + b"--another--\r\n",
        part(None, b"1") + CLOSING,
        f"--{BOUNDARY}\r\n\r\nno disposition\r\n".encode() + CLOSING,
        f"--{BOUNDARY}\r\nbad header\r\n\r\n1\r\n".encode() + CLOSING,
        f'--{BOUNDARY}\r\nContent-Disposition: attachment; name="seed"\r\n\r\n1\r\n'.encode() + CLOSING,
        b"".join(part("seed", b"1") for _ in range(65)) + CLOSING,
    ],
    ids=["unclosed", "cut", "empty", "text", "boundary", "nameless", "bare", "header", "attachment", "many"],
)
def test_malformed_multipart(server: LiveServer, body: bytes) -> None:
    """A body that is no complete multipart form is 400, whatever part of it could be read."""
    assert_problem(server.post_body(body), 400, "malformed_multipart")


def test_missing_boundary(server: LiveServer) -> None:
    """A multipart type that names no boundary is 400."""
    body = usual_parts() + CLOSING
    assert_problem(server.post_body(body, **{"Content-Type": "multipart/form-data"}), 400, "malformed_multipart")
    problem = server.post_body(body, **{"Content-Type": f"multipart/form-data; boundary={'x' * 5000}"})
    assert_problem(problem, 400, "malformed_multipart")


@pytest.mark.parametrize(
    "content_type", ["application/json", "application/x-www-form-urlencoded", "multipart/mixed; boundary=x", "", "é"]
)
def test_other_content_types(server: LiveServer, content_type: str) -> None:
    """JSON, urlencoded and untyped bodies are 415."""
    headers = {"Content-Type": content_type.encode("latin-1")} if content_type else {}
    response = server.client.post("/v1/inpaint", content=b"{}", headers=headers)
    assert_problem(response, 415, "unsupported_media")


def test_compressed_body(server: LiveServer) -> None:
    """A body with a Content-Encoding is 415, so that no bomb is ever unpacked."""
    assert_problem(server.post_body(usual_parts() + CLOSING, **{"Content-Encoding": "gzip"}), 415, "unsupported_media")
    assert server.post_body(usual_parts() + CLOSING, **{"Content-Encoding": "identity"}).status_code == 200


@pytest.mark.parametrize(
    ("image", "status", "code"),
    [
        (b"GIF89a" + bytes(40), 415, "unsupported_media"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "unsupported_media"),
        (b"", 422, "invalid_image"),
        (png(scene())[:500], 422, "invalid_image"),
        (png(np.zeros((1001, 1000, 3), np.uint8)), 422, "too_many_pixels"),
        (png(scene(32, 32)), 422, "mask_mismatch"),
    ],
    ids=["gif", "svg", "empty", "truncated", "large", "mismatch"],
)
def test_picture_that_cannot_be_used(server: LiveServer, image: bytes, status: int, code: str) -> None:
    """What decoding refuses keeps its code and names the field."""
    problem = assert_problem(server.inpaint(image=image), status, code)
    assert problem["errors"][0]["field"] == ("mask" if code == "mask_mismatch" else "image")


def test_mask_with_nothing_to_repaint(server: LiveServer) -> None:
    """A black mask is `empty_mask`, also when inverting made it so."""
    black = png(np.zeros((64, 64), np.uint8))
    assert_problem(server.inpaint(mask=black), 422, "empty_mask")
    assert_problem(server.inpaint(mask=png(np.full((64, 64), 255, np.uint8)), mask_invert="true"), 422, "empty_mask")
    assert server.inpaint(mask=black, mask_invert="1").status_code == 200


def test_deterministic_failures_say_not_to_retry(server: LiveServer) -> None:
    """A failure that would only repeat itself carries `x-should-retry: false`."""
    assert server.inpaint(seed="-1").headers["X-Should-Retry"] == "false"
    assert "X-Should-Retry" not in server.inpaint().headers


def test_unknown_routes_and_methods_are_problems(server: LiveServer) -> None:
    """What the framework refuses has the service's own form, too."""
    assert_problem(server.client.get("/nothing/here"), 404, "not_found")
    response = server.client.get("/v1/inpaint")
    assert_problem(response, 405, "method_not_allowed")
    assert response.headers["Allow"] == "POST"
    assert_problem(server.client.post("/v1/inpaint/"), 404, "not_found")
