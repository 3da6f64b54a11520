"""`POST /sdapi/v1/img2img`, against recorded facts of AUTOMATIC1111's wire format and with its client."""

import base64
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save

from service.api.a1111.fields import DEFAULTS, INERT, NEUTRAL
from service.imaging import filled
from tests.http.a1111 import (
    LIKE_STABLE_DIFFUSION,
    b64,
    client_of,
    faulty_fields,
    native,
    payload,
    pictures,
    post,
    recorded,
)
from tests.http.serving import SIZE, LiveServer, pixels_of, png, scene, serving, square_mask

WHITE = square_mask() == 255


@pytest.fixture(scope="module")
def like_sd() -> Iterator[LiveServer]:
    """A server of a model like Stable Diffusion."""
    with serving(model=LIKE_STABLE_DIFFUSION) as live:
        yield live


# --- recorded requests --------------------------------------------------------------------


def test_the_documented_defaults_are_accepted(like_sd: LiveServer) -> None:
    """Every field of the web UI's documentation at its schema's default, an empty prompt included, is a picture."""
    facts = recorded("docs_example")
    body = {**facts["body"], "init_images": [b64(scene(512, 512))], "mask": b64(square_mask(512, 512))}
    body |= {name: None for name in facts["null_by_default"] if name != "mask"}
    response = like_sd.client.post("/sdapi/v1/img2img", json=body)
    assert response.status_code == 200, response.text
    (picture,) = pictures(response.json())
    assert picture.shape == (512, 512, 3)
    assert set(facts["body"]) <= set(response.json()["parameters"])


def test_the_documented_example_is_refused_for_its_placeholders(like_sd: LiveServer) -> None:
    """What changes the picture and is not served is refused by name, all of it at once; zeros that do nothing pass."""
    facts = recorded("docs_example")
    body = {**facts["body"], "sampler_name": "Euler", "init_images": [b64(scene())], "mask": b64(square_mask())}
    response = like_sd.client.post("/sdapi/v1/img2img", json=body)
    assert response.status_code == 422
    placeholders = {"styles", "scheduler", "restore_faces", "tiling", "refiner_checkpoint", "firstpass_image"}
    placeholders |= {"initial_noise_multiplier", "latent_mask", "script_name", "infotext"}
    assert set(faulty_fields(response)) == placeholders


def test_a_users_request(like_sd: LiveServer) -> None:
    """A request from an issue: at full strength it is painted; below, "latent nothing" is refused by name."""
    body = {**recorded("issue_1640")["body"], "init_images": [b64(scene(512, 512))], "mask": b64(square_mask(512, 512))}
    response = like_sd.client.post("/sdapi/v1/img2img", json=body)
    assert response.status_code == 422
    assert faulty_fields(response) == ["inpainting_fill"]
    response = like_sd.client.post("/sdapi/v1/img2img", json={**body, "denoising_strength": 1})
    assert response.status_code == 200
    answer = response.json()
    assert json.loads(answer["info"])["sampler_name"] == "DPM++ 2M"
    assert answer["parameters"]["init_images"] == body["init_images"]  # include_init_images


# --- pictures -----------------------------------------------------------------------------


def test_same_pixels_as_the_native_request(server: LiveServer) -> None:
    """For the same seed, img2img paints what the native route paints, and keeps the rest bit for bit."""
    response = post(server)
    assert response.status_code == 200, response.text
    (picture,) = pictures(response.json())
    assert np.array_equal(picture, native(server))
    assert np.array_equal(picture[~WHITE], scene()[~WHITE])
    assert not np.array_equal(picture[WHITE], scene()[WHITE])


@pytest.mark.parametrize(
    ("mask", "kwargs", "repainted"),
    [
        (square_mask(), {}, WHITE),
        (np.repeat(square_mask()[..., None], 3, axis=2), {}, WHITE),
        (np.dstack([scene(), square_mask()]), {}, WHITE),  # opaque, whatever its colours
        (np.dstack([np.repeat(square_mask()[..., None], 3, axis=2), np.full((SIZE, SIZE), 255, np.uint8)]), {}, WHITE),
        (square_mask(), {"inpainting_mask_invert": 1}, ~WHITE),
        (None, {}, np.ones_like(WHITE)),
    ],
    ids=["grey", "rgb", "rgba", "opaque rgba", "inverted", "none"],
)
def test_polarity_with_the_real_client(server: LiveServer, mask: Any, kwargs: Any, repainted: Any) -> None:
    """White, or what is opaque in a mask with transparency, is repainted; without a mask everything is."""
    result = client_of(server).img2img(
        images=[Image.fromarray(scene())],
        mask_image=None if mask is None else Image.fromarray(mask),
        prompt="a red house",
        seed=7,
        width=SIZE,
        height=SIZE,
        mask_blur=0,
        inpaint_full_res=False,
        **kwargs,
    )
    changed = (np.asarray(result.image) != scene()).any(axis=2)
    assert np.array_equal(changed, repainted)
    assert result.info["seed"] == 7
    assert result.parameters["prompt"] == "a red house"


def test_data_urls_and_bare_base64_are_alike(server: LiveServer) -> None:
    """Both spellings of a file that its clients send."""
    data_url = post(
        server,
        init_images=[f"data:image/png;base64,{b64(scene())}"],
        mask=f"data:image/png;base64,{b64(square_mask())}",
    )
    assert data_url.json()["images"] == post(server).json()["images"]


def test_seeds_count_as_in_the_web_ui(server: LiveServer) -> None:
    """batch_size times n_iter pictures, with seeds from the first one on."""
    response = post(server, batch_size=2, n_iter=2)
    answer, info = response.json(), json.loads(response.json()["info"])
    assert info["all_seeds"] == [7, 8, 9, 10]
    assert len(info["infotexts"]) == len(info["all_prompts"]) == 4
    assert info["index_of_first_image"] == 0
    for picture, seed in zip(pictures(answer), info["all_seeds"], strict=True):
        assert np.array_equal(picture, native(server, seed=str(seed)))


def test_a_random_seed_is_told(server: LiveServer) -> None:
    """With -1, the seed of the answer's info repeats the picture."""
    answer = post(server, seed=-1).json()
    seed = json.loads(answer["info"])["seed"]
    assert answer["parameters"]["seed"] == -1
    assert post(server, seed=seed).json()["images"][0] != post(server, seed=seed + 1).json()["images"][0]
    assert np.array_equal(pictures(answer)[0], pictures(post(server, seed=seed).json())[0])


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_the_whole_picture_is_brought_to_the_size(server: LiveServer, mode: int) -> None:
    """Whole picture: the answer has width and height, and what is kept is the resized upload."""
    image, mask = scene(96, 160), square_mask(96, 160)
    response = post(server, init_images=[b64(image)], mask=b64(mask), width=80, height=64, resize_mode=mode)
    assert response.status_code == 200, response.text
    (picture,) = pictures(response.json())
    assert picture.shape == (64, 80, 3)
    if mode == 0:
        stretched = np.asarray(Image.fromarray(image).resize((80, 64), Image.Resampling.LANCZOS))
        kept = np.asarray(Image.fromarray(mask).resize((80, 64), Image.Resampling.LANCZOS)) < 128
        assert np.array_equal(picture[kept], stretched[kept])
    # Cropped, the sides are gone; filled, they are inside, and above and below is what was at the edge.
    elif mode == 2:
        assert np.array_equal(picture[0], picture[1])


def test_only_masked_is_pasted_into_the_picture_at_its_own_size(server: LiveServer) -> None:
    """Only masked: the crop is painted at width and height; the answer is the upload's size, and all else its own."""
    image, mask = scene(96, 160), square_mask(96, 160)
    response = post(server, init_images=[b64(image)], mask=b64(mask), inpaint_full_res=True, inpaint_full_res_padding=8)
    (picture,) = pictures(response.json())
    expected = native(server, image=png(image), mask=png(mask), padding_mask_crop="8")
    assert np.array_equal(picture, expected)
    assert np.array_equal(picture[mask == 0], image[mask == 0])
    notes = json.loads(response.json()["info"])["extra_generation_params"]
    assert (notes["Inpaint area"], notes["Masked area padding"]) == ("Only masked", 8)


def test_fill_runs_the_surroundings_into_the_mask(server: LiveServer) -> None:
    """Masked content "fill" is what the model starts from; at full strength it makes no difference."""
    started_from = pictures(post(server, inpainting_fill=0, denoising_strength=0.75).json())[0]
    prepared = native(server, image=png(filled(scene(), square_mask())), strength="0.75")
    assert np.array_equal(started_from[WHITE], prepared[WHITE])
    assert np.array_equal(started_from[~WHITE], scene()[~WHITE])
    at_full_strength = [
        pictures(post(server, inpainting_fill=fill, denoising_strength=1).json())[0] for fill in range(4)
    ]
    assert all(np.array_equal(picture, at_full_strength[0]) for picture in at_full_strength)


def test_blur_is_the_same_on_both_axes(server: LiveServer) -> None:
    """mask_blur counts before mask_blur_x and _y, which default to 4; other shapes are refused by name."""
    blurred = native(server, mask_blur="4")
    assert np.array_equal(pictures(post(server, mask_blur=None).json())[0], blurred)
    assert np.array_equal(pictures(post(server, mask_blur=4, mask_blur_x=9).json())[0], blurred)
    assert faulty_fields(post(server, mask_blur=None, mask_blur_x=2)) == ["mask_blur_x"]


def test_no_prompt_is_no_text(server: LiveServer) -> None:
    """A blank prompt, which the web UI allows, is painted as its syntax reads no text."""
    assert np.array_equal(pictures(post(server, prompt="").json())[0], native(server, prompt="()"))
    info = json.loads(post(server, prompt=...).json()["info"])
    assert info["prompt"] == ""


def test_a_flagged_picture_is_black_and_told(server: LiveServer) -> None:
    """The safety checker's flag stands beside the pictures."""
    answer = post(server, prompt="nsfw").json()
    assert answer["nsfw_content_detected"] == [True]
    assert not pictures(answer)[0].any()
    assert post(server).json()["nsfw_content_detected"] == [False]


# --- answers --------------------------------------------------------------------------------


def test_answer_and_info_have_the_recorded_names(server: LiveServer) -> None:
    """Every name of the web UI's answer and of its info is there; info is JSON in a string."""
    facts = recorded("answers")
    response = post(server, negative_prompt="blurry", override_settings={"CLIP_stop_at_last_layers": 2})
    answer = response.json()
    assert set(facts["answer"]) <= set(answer)
    info = json.loads(answer["info"])
    assert set(facts["info"]) <= set(info)
    assert (info["negative_prompt"], info["clip_skip"]) == ("blurry", 2)
    assert (info["width"], info["height"], info["steps"], info["sampler_name"]) == (SIZE, SIZE, 4, "Euler")
    assert (answer["parameters"]["init_images"], answer["parameters"]["mask"]) == (None, None)
    assert set(answer["parameters"]) == set(DEFAULTS)
    assert answer["request_id"] == response.headers["X-Request-Id"]


def test_pictures_carry_their_notes(server: LiveServer) -> None:
    """Each PNG has the web UI's chunk `parameters`, in any alphabet, and its pixels are what they were without."""
    for prompt in ("a red house", "ein rotes Häuschen, 赤い家"):
        answer = post(server, prompt=prompt, negative_prompt="blurry", batch_size=2).json()
        infotexts = json.loads(answer["info"])["infotexts"]
        for index, image in enumerate(answer["images"]):
            picture = Image.open(io.BytesIO(base64.b64decode(image)))
            notes = picture.info["parameters"]
            assert notes == infotexts[index]
            assert notes.startswith(f"{prompt}\nNegative prompt: blurry\nSteps: 4, Sampler: Euler, ")
            assert f"Seed: {7 + index}, Size: {SIZE}x{SIZE}, Model: fake" in notes
            assert np.array_equal(np.asarray(picture), native(server, prompt=prompt, seed=str(7 + index)))


def test_images_can_be_left_out(server: LiveServer) -> None:
    """send_images=false answers without pictures."""
    assert post(server, send_images=False).json()["images"] == []


def test_a_repeated_request_gets_the_first_answer(server: LiveServer) -> None:
    """Idempotency-Key works as on the native route; another body under it is refused."""
    headers = {"Idempotency-Key": "a1111-again"}
    first, again = post(server, headers, seed=-1), post(server, headers, seed=-1)
    assert again.content == first.content
    assert again.headers["Idempotent-Replayed"] == "true"
    refused = post(server, headers, seed=1)
    assert (refused.status_code, refused.json()["error"]) == (422, "key_reuse")


# --- LoRAs and settings -----------------------------------------------------------------------


def test_loras_in_the_prompt(tmp_path: Path) -> None:
    """`<lora:…>` names LoRAs, and is taken out of the prompt; what is none, or no number, is refused."""
    save_lora(tmp_path / "pencil.safetensors")
    with serving(lora_dir=tmp_path) as server:
        plain = native(server, prompt="a  house", loras='[{"name": "pencil"}]')
        assert np.array_equal(pictures(post(server, prompt="a <lora:pencil:0.5> house").json())[0], plain)
        assert [lora["name"] for lora in client_of(server).get_loras()] == ["pencil"]
        for prompt in (
            "<lora:crayon:1>",
            "<lora:pencil:much>",
            "<hypernet:x:1>",
            "<lora:pencil:1:1:8>",
            "<lora:pencil:1><lora:pencil:2>",
            "<lora:pencil:11>",
        ):
            response = post(server, prompt=f"a house {prompt}")
            assert response.status_code == 422, prompt
            assert faulty_fields(response) == ["prompt"]
        unused = post(server, prompt="a <lora:crayon:1> house", disable_extra_networks=True)
        assert np.array_equal(pictures(unused.json())[0], plain)


def save_lora(path: Path) -> None:
    """A file that the fake worker takes for a LoRA."""
    path.write_bytes(save({"unet.x": np.zeros((4, 4), np.float32)}))


@pytest.mark.parametrize(
    ("overridden", "faulty"),
    [
        ({}, []),
        ({"sd_model_checkpoint": "fake", "sd_vae": "Automatic", "samples_format": "png"}, []),
        ({"sd_model_checkpoint": None, "filter_nsfw": True, "live_previews_enable": True}, []),
        ({"CLIP_stop_at_last_layers": 3}, []),
        ({"sd_model_checkpoint": "other.safetensors [abc]"}, ["sd_model_checkpoint"]),
        ({"filter_nsfw": False}, ["filter_nsfw"]),
        (
            {"sd_vae": "x.pt", "no such thing": 1, "eta_noise_seed_delta": 31337},
            ["sd_vae", "?", "eta_noise_seed_delta"],
        ),
        ({"CLIP_stop_at_last_layers": 0}, ["CLIP_stop_at_last_layers"]),
        ({"CLIP_stop_at_last_layers": "2"}, ["CLIP_stop_at_last_layers"]),
        ({"live_previews_enable": 3}, ["live_previews_enable"]),
    ],
)
def test_override_settings(server: LiveServer, overridden: dict[str, Any], faulty: list[str]) -> None:
    """Settings that are so, or that hold for one request, pass; others are refused by name, the checker's above all."""
    response = post(server, override_settings=overridden)
    assert response.status_code == (422 if faulty else 200), response.text
    if faulty:
        assert faulty_fields(response) == [f"override_settings.{name}" for name in faulty]
    else:
        assert response.json()["parameters"]["override_settings"] == overridden


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "faulty"),
    [
        ({"init_images": ...}, "init_images"),
        ({"init_images": []}, "init_images"),
        ({"init_images": [b64(scene()), b64(scene())]}, "init_images"),
        ({"init_images": ["https://example.com/a.png"]}, "init_images"),
        ({"init_images": ["aGVsbG8="]}, "init_images"),
        ({"init_images": [7]}, "init_images"),
        ({"mask": "%"}, "mask"),
        ({"mask": b64(square_mask(32, 32))}, "mask"),
        ({"mask": b64(np.zeros((SIZE, SIZE), np.uint8))}, "mask"),
        ({"denoising_strength": 0}, "denoising_strength"),
        ({"denoising_strength": 1.01}, "denoising_strength"),
        ({"denoising_strength": 1e400}, "denoising_strength"),
        ({"denoising_strength": "much"}, "denoising_strength"),
        ({"steps": 0}, "steps"),
        ({"steps": 151}, "steps"),
        ({"steps": [4]}, "steps"),
        ({"cfg_scale": 31}, "cfg_scale"),
        ({"width": 65}, "width"),
        ({"height": 1024}, "height"),
        ({"seed": -2}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"batch_size": 3, "n_iter": 3}, "batch_size"),
        ({"batch_size": -2}, "batch_size"),
        ({"n_iter": 0}, "n_iter"),
        ({"n_iter": 1.5}, "n_iter"),
        ({"prompt": "x" * 2001}, "prompt"),
        ({"prompt": "a\0b"}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"negative_prompt": 7}, "negative_prompt"),
        ({"mask_blur": 65}, "mask_blur"),
        ({"resize_mode": 3}, "resize_mode"),
        ({"inpainting_fill": 4}, "inpainting_fill"),
        ({"inpainting_fill": 2}, "inpainting_fill"),
        ({"inpaint_full_res": "maybe"}, "inpaint_full_res"),
        ({"send_images": "maybe"}, "send_images"),
        ({"include_init_images": 2}, "include_init_images"),
        ({"disable_extra_networks": []}, "disable_extra_networks"),
        ({"inpaint_full_res": True, "inpaint_full_res_padding": -1}, "inpaint_full_res_padding"),
        ({"inpainting_mask_invert": 2}, "inpainting_mask_invert"),
        ({"sampler_name": "DDIM", "eta": 1.5}, "eta"),
        ({"scheduler": "Align Your Steps"}, "scheduler"),
        ({"scheduler": "Karras"}, "scheduler"),
        ({"override_settings": "x"}, "override_settings"),
        ({"init_image": "typo"}, "init_image"),
        ({"<script>": 1}, "?"),
        *(({name: "not so"}, name) for name in NEUTRAL),
    ],
)
def test_faults_name_the_web_uis_field(server: LiveServer, changes: dict[str, Any], faulty: str) -> None:
    """What is wrong is 422 in FastAPI's form, with the name that the client used, and nothing is repeated."""
    body = json.dumps(payload(**changes))
    response = server.client.post(
        "/sdapi/v1/img2img", content=body.replace("Infinity", "1e400"), headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 422, response.text
    assert faulty_fields(response) == [faulty]
    assert "not so" not in response.text


def test_what_has_no_effect_is_taken(server: LiveServer) -> None:
    """Fields that change nothing do not stand in a client's way, whatever they say."""
    response = post(server, **dict.fromkeys(INERT, "anything"))
    assert response.status_code == 200
    assert np.array_equal(pictures(response.json())[0], native(server))


@pytest.mark.parametrize(
    ("sampler", "field", "value", "status"),
    [
        ("Euler a", "eta", 1.0, 200),
        ("Euler a", "eta", 0, 422),
        ("Euler a", "s_noise", 0, 422),
        ("Euler", "eta", 1.0, 200),
        ("Euler", "s_noise", 0, 200),
        ("DDIM", "eta", 1.0, 200),
    ],
)
def test_eta_where_it_counts(like_sd: LiveServer, sampler: str, field: str, value: float, status: int) -> None:
    """The noise of ancestral samplers is not to be scaled, and refused; where the web UI passes over it, it passes."""
    response = post(like_sd, sampler_name=sampler, **{field: value})
    assert response.status_code == status, response.text
    if status == 422:
        assert faulty_fields(response) == [field]


def test_an_unknown_sampler_is_not_found(server: LiveServer) -> None:
    """404 in the web UI's own words; its client raises with them."""
    response = post(server, sampler_name="DPM adaptive")
    assert response.status_code == 404
    assert response.json() == {"error": "HTTPException", "detail": "Sampler not found", "body": "", "errors": ""}
    with pytest.raises(RuntimeError, match="Sampler not found"):
        client_of(server).img2img(images=[Image.fromarray(scene())], sampler_name="Restart")


def test_every_fault_is_told_at_once(server: LiveServer) -> None:
    """Faults that were found here and in the native form come together."""
    response = post(server, tiling=True, steps=0, cfg_scale=99, mask_blur=None, mask_blur_x=1)
    assert set(faulty_fields(response)) == {"tiling", "steps", "cfg_scale", "mask_blur_x"}


def test_other_errors_have_the_web_uis_shape(server: LiveServer) -> None:
    """No JSON, another type, a body too large, a failing worker: the web UI's shape and a status of their own."""
    names = set(recorded("answers")["error"])
    json_type = {"Content-Type": "application/json"}
    for content, headers, status in (
        (b"{", json_type, 400),
        (b"[]", json_type, 400),
        (b"{}", {"Content-Type": "text/plain"}, 415),
        (bytes(2_000_000), json_type, 413),
    ):
        response = server.client.post("/sdapi/v1/img2img", content=content, headers=headers)
        assert (response.status_code, set(response.json())) == (status, names)
    failed = post(server, prompt="fail")
    assert (failed.status_code, set(failed.json()), failed.json()["error"]) == (500, names, "internal")


def test_nothing_that_was_sent_is_logged_or_repeated(server: LiveServer, caplog: pytest.LogCaptureFixture) -> None:
    """Prompts, names and values are in no log line, and in no error."""
    mark = "xyzzy"
    with caplog.at_level(logging.DEBUG):
        assert post(server, prompt=mark, negative_prompt=mark, force_task_id=mark).status_code == 200
        for changes in (
            {"sampler_name": mark},
            {"scheduler": mark},
            {"prompt": f"<lora:{mark}:1>"},
            {"prompt": f"<{mark}:1>"},
            {"styles": [mark]},
            {"override_settings": {f"{mark}!": mark, "sd_model_checkpoint": mark}},
            {f"{mark}!": mark},
            {"init_images": [mark]},
            {"steps": mark},
        ):
            refused = post(server, **changes)
            assert refused.status_code in {404, 422}
            assert mark not in refused.text
    assert "/sdapi/v1/img2img" in str([record.__dict__ for record in caplog.records])
    assert mark not in str([record.__dict__ for record in caplog.records])


def test_routes_that_there_are_not(server: LiveServer) -> None:
    """txt2img and other routes are FastAPI's 404, other methods its 405."""
    response = server.client.post("/sdapi/v1/txt2img", json={"prompt": "a red house"})
    assert (response.status_code, response.json()) == (404, {"detail": "Not Found"})
    response = server.client.get("/sdapi/v1/img2img")
    assert (response.status_code, response.json()) == (405, {"detail": "Method Not Allowed"})
    native_route = server.client.get("/v1/nothing")
    assert native_route.headers["Content-Type"] == "application/problem+json"


values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=8),
        st.sampled_from(["Euler", "karras", "()", "<lora:x:1>", "-1", "1e400", "data:image/png;base64,", -1, 0, 1, 2]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
OTHERS = {"sampler_index": {"sampler_name"}, "s_noise": {"sampler_name"}, "mask_blur_y": {"mask_blur_x"}}


@settings(max_examples=500, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(sorted(DEFAULTS)), value=values)
def test_any_value_in_any_field(server: LiveServer, name: str, value: Any) -> None:
    """Any JSON value in any one field, beside sound ones, gives a picture, or an error that names this field."""
    response = server.client.post("/sdapi/v1/img2img", json=payload(**{name: value}))
    assert response.status_code in {200, 404, 415, 422}, response.text
    if response.status_code == 404:
        assert name in {"sampler_name", "sampler_index"}
    elif response.status_code != 200:
        fields = {field.partition(".")[0] for field in faulty_fields(response)}
        assert fields <= {name, *OTHERS.get(name, ())}, response.text
    else:
        info = json.loads(response.json()["info"])
        assert len(response.json()["images"]) == (
            0 if value in (False, 0, "0") and name == "send_images" else len(info["infotexts"])
        )


def test_a_mask_that_is_the_pictures_alpha_is_not_assumed(server: LiveServer) -> None:
    """Transparency of the picture is no mask here, as in the web UI."""
    image = np.dstack([scene(), square_mask()])
    (picture,) = pictures(post(server, init_images=[b64(image)], mask=...).json())
    assert (picture[..., :3] != scene()).any(axis=2).all()
    assert pixels_of(png(image)).shape == (SIZE, SIZE, 4)
