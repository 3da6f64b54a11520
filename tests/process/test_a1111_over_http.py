"""AUTOMATIC1111's wire format on real workers with a real (tiny) model."""

import base64
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.model.checkpoints import NATIVE_SIZE, make_checkpoint
from tests.process.real_service import Service, png, serving

pytestmark = pytest.mark.timeout(300)

SCENE = np.random.default_rng(11).integers(0, 256, (NATIVE_SIZE, NATIVE_SIZE, 3), dtype=np.uint8)
MASK = np.zeros((NATIVE_SIZE, NATIVE_SIZE), np.uint8)
MASK[NATIVE_SIZE // 4 : NATIVE_SIZE // 2, NATIVE_SIZE // 4 :] = 255


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(make_checkpoint(tmp_path_factory.mktemp("a1111"))) as running:
        yield running


def img2img(service: Service, **fields: Any) -> httpx.Response:
    body = {
        "init_images": [base64.b64encode(png(SCENE)).decode()],
        "mask": base64.b64encode(png(MASK)).decode(),
        "prompt": "a (red:1.3) house",
        "negative_prompt": "blurry",
        "seed": 7,
        "steps": 6,
        "width": NATIVE_SIZE,
        "height": NATIVE_SIZE,
        "inpaint_full_res": False,
        "inpainting_fill": 1,
        **fields,
    }
    return httpx.post(f"{service.url}/sdapi/v1/img2img", json=body, timeout=120, trust_env=False)


def native(service: Service, **fields: str) -> NDArray[np.uint8]:
    usual = {"prompt": "a (red:1.3) house", "negative_prompt": "blurry", "prompt_syntax": "a1111", "seed": "7"}
    usual |= {"num_inference_steps": "6", "height": str(NATIVE_SIZE), "width": str(NATIVE_SIZE)}
    usual |= {"guidance_scale": "7", "strength": "0.75", "mask_blur": "4", "scheduler": "euler"}
    files = {"image": ("image.png", png(SCENE)), "mask": ("mask.png", png(MASK))}
    response = httpx.post(
        f"{service.url}/v1/inpaint", data={**usual, **fields}, files=files, timeout=120, trust_env=False
    )
    assert response.status_code == 200, response.text
    return np.asarray(Image.open(io.BytesIO(response.content)))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"sampler_name": "DPM++ 2M"}, {"scheduler": "dpmpp_2m_karras"}),
        ({"sampler_name": "DDIM", "eta": 0.5}, {"scheduler": "ddim", "eta": "0.5"}),
        (
            {"denoising_strength": 1, "cfg_scale": 3.5, "mask_blur": 0},
            {"strength": "1", "guidance_scale": "3.5", "mask_blur": "0"},
        ),
        ({"override_settings": {"CLIP_stop_at_last_layers": 2}}, {"clip_skip": "1"}),
        ({"inpainting_mask_invert": 1}, {"mask_invert": "true"}),
        ({"inpaint_full_res": True, "inpaint_full_res_padding": 4}, {"padding_mask_crop": "4"}),
        ({"prompt": ""}, {"prompt": "()"}),
    ],
)
def test_the_native_requests_pixels(service: Service, ours: dict[str, Any], theirs: dict[str, str]) -> None:
    """What is asked for in the web UI's words is painted as what it means in the native form's."""
    response = img2img(service, **ours)
    assert response.status_code == 200, response.text
    (image,) = response.json()["images"]
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(image))))
    assert np.abs(picture.astype(int) - native(service, **theirs)).max() <= 1


def test_an_interrupted_request_leaves_the_batch(service: Service) -> None:
    """Progress is told of the steps that a worker does; interrupted, the rest of them are not done."""
    with ThreadPoolExecutor() as pool:
        before = service.metric("inpaint_batch_images_count")
        running = pool.submit(img2img, service, steps=150, denoising_strength=1)
        service._wait_for(lambda: service.get("/sdapi/v1/progress").json()["state"]["sampling_step"] > 0)
        progress = service.get("/sdapi/v1/progress").json()
        assert progress["state"]["sampling_steps"] == 150
        assert 0.01 < progress["progress"] < 1
        interrupt = httpx.post(f"{service.url}/sdapi/v1/interrupt", timeout=30, trust_env=False)
        assert interrupt.json() == {}
        response = running.result(timeout=60)
    assert (response.status_code, response.json()["images"]) == (200, [])
    assert json.loads(response.json()["info"])["interrupted"] is True
    assert service.metric("inpaint_batch_images_count") - before < 150
    assert service.metric('inpaint_cancelled_total{reason="client"}') == 1
