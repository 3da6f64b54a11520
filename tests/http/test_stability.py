"""`POST /v2beta/stable-image/edit/inpaint`: what clients of Stability's API send is understood, and answered their way.

What they send and read is recorded in `recorded/stability`, from the format's own description and from clients' logs.
"""

import base64
import json
import socket
import subprocess
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode

from service.api.fields import InpaintFields
from service.api.stability.form import HARMLESS, MAX_SEED, REFUSED
from service.api.tensors import TENSORS
from tests.http.serving import (
    BOUNDARY,
    CLOSING,
    LiveServer,
    eventually,
    form,
    multipart_head,
    part,
    pixels_of,
    png,
    read_answer,
    scene,
    serving,
    square_mask,
    usual_parts,
)
from tests.http.test_any_request import CHECKS, bounded, cases, contents, operations

RECORDED = Path(__file__).parent / "recorded" / "stability"
FACTS = json.loads((RECORDED / "inpaint.json").read_text())
LIVE_ERRORS = json.loads((RECORDED / "live_errors.json").read_text())
PATH = FACTS["path"]
JSON = {"Accept": "application/json"}


def post(server: LiveServer, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    """Post the usual picture; `fields` are added, replaced, or left out where None."""
    files, data = form(**fields)
    return server.client.post(PATH, files=files, data=data, headers=headers)


def check_error(response: httpx.Response, status: int, name: str) -> list[str]:
    """Check that an error has the recorded shape; returns its sentences."""
    assert response.status_code == status, response.text
    return check_error_body(dict(response.headers), response.content, name)


def check_error_body(headers: dict[str, str], body: bytes, name: str) -> list[str]:
    """Check the parts of an error."""
    error = json.loads(body)
    assert headers["content-type"] == "application/json"
    assert set(error) == set(FACTS["errors"]["400"])
    assert error["name"] == name
    assert error["id"] == headers["x-request-id"]
    assert error["errors"]
    assert all(isinstance(sentence, str) for sentence in error["errors"])
    return list(error["errors"])


def repainted(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """(H, W) where pixels differ; noise over noise leaves hardly any as it was."""
    return (before != after).any(axis=2)


# --- requests as its clients send them ----------------------------------------------------------


def test_the_references_curl_command_works(tmp_path: Path) -> None:
    """The reference's curl command, sent to another host, is taken with its key, and writes the file it asks for."""
    example = FACTS["curl"]
    key = example["headers"][0].removeprefix("authorization: Bearer ")
    (tmp_path / "dog-wearing-vr-goggles.png").write_bytes(png(scene()))
    (tmp_path / "mask.png").write_bytes(png(square_mask()))
    with serving(api_keys=key) as server:
        command = ["curl", *example["options"], f"http://127.0.0.1:{server.port}{PATH}", "--noproxy", "*"]
        for header in example["headers"]:
            command += ["-H", header]
        for name, value in example["form"]:
            command += ["-F", f"{name}={value}"]
        subprocess.run([*command, "-o", example["output"]], cwd=tmp_path, check=True, timeout=60)

    answer = (tmp_path / example["output"]).read_bytes()
    assert (answer[:4], answer[8:12]) == (b"RIFF", b"WEBP")
    pixels = pixels_of(answer)
    assert pixels.shape == scene().shape
    assert np.array_equal(pixels[:8], scene()[:8])
    assert not np.array_equal(pixels, scene())


def test_polarity_of_the_mask(server: LiveServer) -> None:
    """As recorded: white is repainted, black is kept."""
    assert FACTS["polarity"]["mask"] == {"white": "repaint", "black": "keep"}
    painted = repainted(scene(), pixels_of(post(server, grow_mask="0").content))

    assert not painted[square_mask() < 128].any()
    assert painted[square_mask() >= 128].mean() > 0.95


def test_polarity_of_the_images_alpha(server: LiveServer) -> None:
    """As recorded: without a mask, transparent is repainted and opaque is kept."""
    assert FACTS["polarity"]["alpha"] == {"transparent": "repaint", "opaque": "keep"}
    image = png(np.dstack([scene(), 255 - square_mask()]))
    answer = pixels_of(post(server, image=image, mask=None, grow_mask="0").content)

    assert np.array_equal(answer, pixels_of(post(server, grow_mask="0").content))


def test_a_mask_takes_precedence_over_alpha(server: LiveServer) -> None:
    """As recorded: of an image with alpha and a mask, the mask counts."""
    assert FACTS["polarity"]["both"] == "mask"
    alpha = np.full(square_mask().shape, 255, np.uint8)
    alpha[-8:, -8:] = 0
    answer = pixels_of(post(server, image=png(np.dstack([scene(), alpha])), grow_mask="0").content)

    painted = repainted(scene(), answer[..., :3])
    assert not painted[-8:, -8:].any()
    assert painted[square_mask() >= 128].mean() > 0.95


@pytest.mark.parametrize(
    "beside",
    [
        {},
        {"negative_prompt": "blurry"},
        {"num_inference_steps": "3", "guidance_scale": "1.0", "strength": "0.5", "scheduler": "euler"},
        {"composite": "false", "height": "96", "width": "128", "mask_blur": "2"},
        {"prompt": "The sky was a crisp (blue:0.3) and (green:0.8)", "prompt_syntax": "a1111"},
    ],
    ids=["plain", "negative", "steps", "size", "weights"],
)
def test_the_picture_is_the_native_requests(server: LiveServer, beside: dict[str, str]) -> None:
    """The same pixels as from the native endpoint with the same seed and the mask grown alike; its fields go along."""
    ours = post(server, grow_mask="3", seed="41", **beside)
    native = server.inpaint(mask_grow="3", seed="41", **beside)

    assert ours.headers["Seed"] == native.headers["X-Seed"] == "41"
    assert np.array_equal(pixels_of(ours.content), pixels_of(native.content))


def test_the_mask_is_grown_by_the_recorded_default(server: LiveServer) -> None:
    """A client that says nothing of growing gets what its reference promises: 5 pixels; 0 grows nothing."""
    default = FACTS["form"]["properties"]["grow_mask"]["default"]
    assert default == 5

    assert np.array_equal(
        pixels_of(post(server).content), pixels_of(server.inpaint(mask_grow=str(default), seed="7").content)
    )
    assert np.array_equal(pixels_of(post(server, grow_mask="0").content), pixels_of(server.inpaint().content))
    assert not np.array_equal(pixels_of(post(server).content), pixels_of(post(server, grow_mask="0").content))


def test_numbers_may_have_a_fraction_of_nothing(server: LiveServer) -> None:
    """`seed` and `grow_mask` are numbers there, not whole numbers: languages write 9 as 9.0. 9.5 of a pixel is none."""
    as_number, as_integer = post(server, seed="9.0", grow_mask="2.0"), post(server, seed="9", grow_mask="2")

    assert as_number.headers["Seed"] == "9"
    assert as_number.content == as_integer.content
    assert check_error(post(server, grow_mask="2.5"), 400, "bad_request")[0].startswith("grow_mask: ")


@pytest.mark.parametrize("seed", [None, "0", "0.0"])
def test_seed_zero_or_none_is_random_and_reported(server: LiveServer, seed: str | None) -> None:
    """As recorded: 0 and no seed mean a random one. It is reported, is never 0, and paints the same again."""
    assert FACTS["polarity"]["seed 0 or none"] == "random"
    first, second = post(server, seed=seed), post(server, seed=seed)

    assert first.headers["Seed"] != second.headers["Seed"]
    assert 1 <= int(first.headers["Seed"]) <= FACTS["form"]["properties"]["seed"]["maximum"] == MAX_SEED
    assert post(server, seed=first.headers["Seed"]).content == first.content


def test_largest_recorded_seed_is_taken(server: LiveServer) -> None:
    """Seeds go as far as the reference says."""
    largest = str(FACTS["form"]["properties"]["seed"]["maximum"])
    assert post(server, seed=largest).headers["Seed"] == largest


def test_what_clients_say_of_themselves_is_taken_and_not_used(server: LiveServer) -> None:
    """The recorded headers of clients, and the parts in which generated clients repeat headers, change nothing."""
    headers = dict.fromkeys(FACTS["client_headers"], "DiscordUser#9999")
    assert set(FACTS["client_headers"]) < HARMLESS
    plain = post(server)

    assert post(server, headers).content == plain.content
    assert post(server, headers, **dict.fromkeys(HARMLESS, "image/*")).content == plain.content


# --- answers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("accept", [None, "*/*", "image/png", FACTS["accept"]["default"]])
def test_bytes_with_headers(server: LiveServer, accept: str | None) -> None:
    """By default and for `image/*` the answer is the image's bytes, with all of the recorded headers."""
    response = post(server, {} if accept is None else {"Accept": accept})

    assert response.status_code == 200
    assert response.headers["Content-Type"] == "image/png"
    assert response.headers["Finish-Reason"] == "SUCCESS"
    assert response.headers["Seed"] == "7"
    assert all(name in response.headers for name in FACTS["answers"]["image"]["headers"])
    assert response.content.startswith(b"\x89PNG")


@pytest.mark.parametrize("output_format", FACTS["form"]["properties"]["output_format"]["enum"])
def test_every_recorded_format_in_both_shapes(server: LiveServer, output_format: str) -> None:
    """Each format comes as bytes and as Base64 in JSON, whose members and content type are the recorded ones."""
    as_bytes = post(server, {"Accept": "image/*"}, output_format=output_format)
    as_json = post(server, JSON, output_format=output_format)

    assert as_bytes.headers["Content-Type"] == f"image/{output_format}"
    recorded = FACTS["answers"]["json"]
    assert as_json.headers["Content-Type"] == recorded["content_type"].replace("webp", output_format)
    assert not [name for name in recorded["absent_headers"] if name in as_json.headers]
    answer = as_json.json()
    assert set(answer) == set(recorded["members"])
    assert (answer["finish_reason"], answer["seed"]) == ("SUCCESS", 7)
    assert base64.b64decode(answer["image"], validate=True) == as_bytes.content


def test_flagged_image_is_answered_as_content_filtered(server: LiveServer) -> None:
    """What the safety checker flags is a 200 with CONTENT_FILTERED, as recorded, and shows nothing."""
    as_bytes, as_json = post(server, prompt="nsfw"), post(server, JSON, prompt="nsfw").json()

    assert as_bytes.status_code == 200
    assert as_bytes.headers["Finish-Reason"] == as_json["finish_reason"] == FACTS["answers"]["finish_reason"][1]
    assert not pixels_of(as_bytes.content).any()
    assert base64.b64decode(as_json["image"]) == as_bytes.content


def test_flagged_image_is_blurred_where_the_operator_says_so() -> None:
    """With the policy `blur` the answer is what the reference tells of: blurred, with CONTENT_FILTERED."""
    with serving(nsfw_policy="blur") as server:
        response = post(server, prompt="nsfw", grow_mask="0")

    assert response.headers["Finish-Reason"] == "CONTENT_FILTERED"
    keep = square_mask() < 128
    pixels = pixels_of(response.content)
    assert pixels.any()
    assert pixels[keep].std() < scene()[keep].std() / 4


def test_repeated_request_gets_the_first_answer(server: LiveServer) -> None:
    """`Idempotency-Key` works here, too: the random seed of the first answer comes again; another form is refused."""
    key = {"Idempotency-Key": "stability-1"}
    first, again = post(server, key, seed="0"), post(server, key, seed="0")

    assert again.content == first.content
    assert again.headers["Seed"] == first.headers["Seed"]
    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.headers["Original-Request"] == first.headers["X-Request-Id"]
    check_error(post(server, key, seed="1"), 422, "key_reuse")
    assert check_error(post(server, {**key, **JSON}, seed="0"), 400, "bad_request")[0].startswith("accept: ")


def test_repeated_json_answer_keeps_its_content_type(server: LiveServer) -> None:
    """A replayed JSON answer is the first one byte for byte, its content type included."""
    headers = {"Idempotency-Key": "stability-2", **JSON}
    first, again = post(server, headers), post(server, headers)

    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.content == first.content
    assert again.headers["Content-Type"] == first.headers["Content-Type"] == "application/json; type=image/png"


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt": None}, "prompt: The field prompt is missing."),
        ({"image": None}, "image: The image is missing."),
        ({"prompt": ""}, "prompt: "),
        ({"prompt": "a" * 2001}, "prompt: "),
        ({"negative_prompt": "a" * 2001}, "negative_prompt: "),
        ({"grow_mask": "65"}, "grow_mask: Input should be less than or equal to 64"),
        ({"grow_mask": "-1"}, "grow_mask: "),
        ({"grow_mask": ["1", "2"]}, "grow_mask: The field grow_mask is sent 2 times."),
        ({"mask_grow": "5"}, "grow_mask: The field is called grow_mask here."),
        ({"seed": "-1"}, "seed: "),
        ({"seed": "4294967296"}, "seed: "),
        ({"seed": ["0", "0"]}, "seed: The field seed is sent 2 times."),
        ({"output_format": "gif"}, "output_format: "),
        ({"output_format": "npy"}, "output_format: Input should be one of: png, jpeg, webp."),
        ({"style_preset": "anime"}, "style_preset: There are no presets here"),
        ({"num_images_per_prompt": "2"}, "num_images_per_prompt: Only /v1/inpaint"),
        ({"num_inference_steps": "151"}, "num_inference_steps: "),
        ({"loras": '[{"name": "nobody"}]'}, "loras: "),
        ({"creativity": "0.35"}, "creativity: There is no such field."),
        ({"image": "no file"}, "image: Send image as a file"),
        ({"image": b"GIF89a" + bytes(40)}, "image: "),
        ({"image": b"no picture"}, "image: "),
        ({"mask": png(square_mask(32, 32))}, "mask: The mask is 32"),
    ],
)
def test_wrong_field_is_400_and_named(server: LiveServer, changes: dict[str, Any], sentence: str) -> None:
    """An invalid parameter is 400 `bad_request`, with a sentence that begins with the field's name in this form."""
    sentences = check_error(post(server, **changes), 400, "bad_request")

    assert any(found.startswith(sentence) for found in sentences), sentences
    assert not any("mask_grow" in found for found in sentences)


def test_every_fault_is_named_at_once(server: LiveServer) -> None:
    """A form with several faults is answered with all of them."""
    sentences = check_error(post(server, prompt=None, style_preset="anime", grow_mask="x"), 400, "bad_request")
    assert {sentence.partition(":")[0] for sentence in sentences} == {"prompt", "style_preset", "grow_mask"}


def test_mask_that_asks_for_nothing_is_sound_but_rejected(server: LiveServer) -> None:
    """A black mask is a sound request that is rejected all the same: 422; the sentence speaks of this form's fields."""
    sentences = check_error(post(server, mask=png(np.zeros_like(square_mask()))), 422, "empty_mask")

    assert sentences[0].startswith("mask: ")
    assert "grow_mask" in sentences[0]
    assert "mask_grow" not in sentences[0]


def test_recorded_live_errors() -> None:
    """No key and a body that is no form get the recorded status and name."""
    no_form, no_key = LIVE_ERRORS
    with serving(api_keys="key") as server:
        refused = post(server)
        check_error(refused, no_key["status"], no_key["body"]["name"])
        assert refused.json()["errors"][0].startswith("authorization: ")
        assert refused.headers["WWW-Authenticate"] == "Bearer"
        key = {"Authorization": "Bearer key"}
        as_json = server.client.post(PATH, json={"prompt": "a red house"}, headers=key)
        check_error(as_json, no_form["status"], no_form["body"]["name"])
        assert "multipart/form-data" in as_json.json()["errors"][0]
        broken = {**key, "Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        check_error(server.client.post(PATH, content=b"no form", headers=broken), 400, "bad_request")


def test_too_large_body_is_the_recorded_413(server: LiveServer) -> None:
    """A body over the limit has the recorded name, whether its length is declared or not."""
    large = png(np.random.default_rng(1).integers(0, 256, (700, 700, 3), dtype=np.uint8))
    declared = post(server, image=large)
    body = part("image", large, "a.png") + CLOSING
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    chunked = server.client.post(PATH, content=iter([body]), headers=headers)

    for response in (declared, chunked):
        assert check_error(response, 413, FACTS["errors"]["413"]["name"])[0].startswith("body: ")


def test_failure_of_ours_is_the_recorded_500(server: LiveServer) -> None:
    """What fails here has the recorded name and says nothing of what it was."""
    response = post(server, prompt="fail")
    assert check_error(response, 500, FACTS["errors"]["500"]["name"]) == ["The request failed."]


def test_full_queue_is_the_recorded_429(tmp_path: Path) -> None:
    """A full queue is a rate limit with a computed `Retry-After`."""
    gate = tmp_path / "gate"
    body = usual_parts().replace(b"a red house", b"hold") + CLOSING
    with serving(model=f"fake?gate={gate}", max_images=1, queue_size=1) as server:
        held: list[socket.socket] = []
        for count in range(1, 4):
            held.append(server.raw(multipart_head(f"Content-Length: {len(body)}"), body))
            eventually(
                lambda count=count: server.metric("inpaint_in_flight") + server.metric("inpaint_queue_depth") == count
            )
        refused = post(server)
        gate.touch()
        assert [read_answer(connection)[0] for connection in held] == [200] * 3
        for connection in held:
            connection.close()

    check_error(refused, 429, FACTS["errors"]["429"]["name"])
    assert int(refused.headers["Retry-After"]) >= 1


def test_states_that_the_reference_does_not_know(server: LiveServer) -> None:
    """Errors without a name of the reference's have ours, in its shape: also what the framework or the gate refuses."""
    with serving(wait_ready=False, model="fake?load_forever=1") as loading:
        not_ready = post(loading)
    check_error(not_ready, 503, "not_ready")
    assert int(not_ready.headers["Retry-After"]) >= 1
    check_error(post(server, timeout="0.01", prompt="slow"), 504, "deadline")
    check_error(server.client.post("/v2beta/stable-image/edit/erase"), 404, "not_found")
    wrong_method = server.client.get(PATH)
    check_error(wrong_method, 405, "method_not_allowed")
    assert wrong_method.headers["Allow"] == "POST"
    check_error(post(server, {"Origin": "https://evil.example"}), 403, "cross_origin")
    assert check_error(post(server, {"Accept": "text/html"}), 400, "bad_request")[0].startswith("accept: ")
    assert check_error(post(server, {"Accept": "image/jpeg"}), 400, "bad_request")[0].startswith("accept: ")


def test_other_paths_keep_the_native_form(server: LiveServer) -> None:
    """Beside `/v2beta/` errors stay problem documents."""
    assert server.inpaint(prompt=None).headers["Content-Type"] == "application/problem+json"


def test_pages_may_read_what_the_headers_say() -> None:
    """A page of an allowed origin is shown the format's headers, and may send those of its clients."""
    with serving(cors_origins="https://shop.example") as server:
        origin = {"Origin": "https://shop.example"}
        exposed = post(server, origin).headers["Access-Control-Expose-Headers"].lower()
        ask = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        allowed = server.client.options(PATH, headers=ask).headers["Access-Control-Allow-Headers"].lower()

    assert {"finish-reason", "seed", "x-request-id"} <= set(exposed.split(", "))
    assert set(FACTS["client_headers"]) <= set(allowed.split(", "))


# --- the document, and requests that nobody thought of --------------------------------------------


def test_document_describes_the_recorded_form(server: LiveServer) -> None:
    """The form's fields, defaults and choices are the recorded ones, with our bounds; what is refused is not in it."""
    document = server.client.get("/openapi.json").json()
    operation = document["paths"][PATH]["post"]
    schema = operation["requestBody"]["content"]["multipart/form-data"]["schema"]
    ours, recorded = schema["properties"], FACTS["form"]["properties"]

    assert schema["required"] == FACTS["form"]["required"]
    assert set(recorded) - set(ours) == {"style_preset"} <= set(REFUSED)
    assert {name: ours[name].get("default") for name in ("grow_mask", "seed", "output_format")} == {
        name: recorded[name]["default"] for name in ("grow_mask", "seed", "output_format")
    }
    assert set(ours["output_format"]["enum"]) == set(recorded["output_format"]["enum"])
    assert ours["seed"]["maximum"] == recorded["seed"]["maximum"]
    assert set(ours) - set(recorded) == {"ip_adapter_image", *InpaintFields.model_fields} - set(REFUSED) - set(recorded)
    assert {*TENSORS, "num_images_per_prompt", "previews", "mask_grow"} == set(REFUSED) - {"style_preset"}
    parameters = {parameter["name"] for parameter in operation["parameters"]}
    assert {"Idempotency-Key", *FACTS["client_headers"]} == parameters
    answers = operation["responses"]
    assert set(answers["200"]["content"]) == {"image/png", "image/jpeg", "image/webp", "application/json"}
    for status in set(answers) - {"200"}:
        schema = answers[status]["content"]["application/json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/StabilityError"}
    assert set(FACTS["errors"]) <= set(answers)


FIELDS = (*FACTS["form"]["properties"], *InpaintFields.model_fields, *TENSORS, *HARMLESS)


@settings(bounded, max_examples=200)
@given(name=st.sampled_from(FIELDS), content=contents, is_file=st.sampled_from([False, False, False, True]))
def test_any_text_in_any_field(server: LiveServer, name: str, content: bytes, is_file: bool) -> None:
    """Any bytes in any one field, beside sound ones, give a picture, or an error that names this field."""
    usual = {"image": png(scene()), "mask": png(square_mask()), "prompt": b"a red house"}
    files = {"image", "mask"}
    body = b"".join(part(other, data, other if other in files else None) for other, data in usual.items())
    if name in usual:
        body = body.replace(part(name, usual[name], name if name in files else None), b"")
    body += part(name, content, "file" if is_file else None) + CLOSING
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    response = server.client.post(PATH, content=body, headers=headers)
    if response.status_code == 200 or (name == "timeout" and response.status_code == 504):
        return
    error = "empty_mask" if response.status_code == 422 else "bad_request"
    sentences = check_error(response, 422 if error == "empty_mask" else 400, error)
    shown = "grow_mask" if name == "mask_grow" else name
    # A mask can be inverted or blurred away; then it is the mask that has nothing to repaint.
    assert sentences[0].startswith("mask: " if error == "empty_mask" else f"{shown}: "), sentences


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_answers_are_those_of_the_document(server: LiveServer, mode: GenerationMode) -> None:
    """Whatever the document allows, and what it does not, has an answer of a status, type and shape that it names."""
    (operation,) = (operation for operation in operations(server) if operation.path == PATH)
    num_cases = 0

    @settings(bounded, max_examples=60)
    @given(case=cases(operation, mode))
    def check(case: Case) -> None:
        nonlocal num_cases
        num_cases += 1
        case.validate_response(case.call(timeout=20), checks=CHECKS)

    check()
    assert num_cases >= 30
