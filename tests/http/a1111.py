"""What tests of the web UI's wire format share: recorded facts, and requests in its words."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import webuiapi
from numpy.typing import NDArray
from PIL import Image

from service.worker.schedulers import scheduler_names
from tests.http.serving import SIZE, LiveServer, png, scene, square_mask

RECORDED = Path(__file__).parent / "recorded" / "a1111"

LIKE_STABLE_DIFFUSION = f"fake?native_size=512&schedulers={','.join(scheduler_names())}"
"""A fake model of the size that the web UI's defaults are for, with every noise scheduler."""


def recorded(name: str) -> dict[str, Any]:
    """Facts of the format, with their source."""
    facts: dict[str, Any] = json.loads((RECORDED / f"{name}.json").read_text())
    return facts


def b64(pixels: NDArray[np.uint8]) -> str:
    """A PNG in Base64."""
    return base64.b64encode(png(pixels)).decode()


def payload(**changes: Any) -> dict[str, Any]:
    """A body for a picture of the fake model's size; fields that are ... are left out."""
    usual = {
        "init_images": [b64(scene())],
        "mask": b64(square_mask()),
        "prompt": "a red house",
        "seed": 7,
        "steps": 4,
        "width": SIZE,
        "height": SIZE,
        "mask_blur": 0,
        "inpaint_full_res": False,
        "inpainting_fill": 1,
    }
    return {name: value for name, value in {**usual, **changes}.items() if value is not ...}


def post(server: LiveServer, headers: dict[str, str] | None = None, **changes: Any) -> Any:
    """The answer to `img2img`."""
    return server.client.post("/sdapi/v1/img2img", json=payload(**changes), headers=headers)


def pictures(answer: dict[str, Any]) -> list[NDArray[np.uint8]]:
    """The pictures of an answer."""
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(image)))) for image in answer["images"]]


def native(server: LiveServer, **fields: Any) -> NDArray[np.uint8]:
    """What the native route paints in the web UI's prompt syntax."""
    fields = {"prompt_syntax": "a1111", "height": SIZE, "width": SIZE, "num_inference_steps": 4, **fields}
    response = server.inpaint(**{name: value for name, value in fields.items() if value is not ...})
    assert response.status_code == 200, response.text
    return np.asarray(Image.open(io.BytesIO(response.content)))


def client_of(server: LiveServer, **options: Any) -> webuiapi.WebUIApi:
    """The real client; without a proxy, whatever the environment says."""
    api = webuiapi.WebUIApi(host="127.0.0.1", port=server.port, sampler="Euler", steps=4, **options)
    api.session.trust_env = False
    return api


def faulty_fields(response: Any) -> list[str]:
    """The fields of FastAPI's error answer, dotted."""
    detail = response.json()["detail"]
    assert all(set(fault) == {"loc", "msg", "type"} and fault["loc"][0] == "body" for fault in detail)
    return [".".join(fault["loc"][1:]) for fault in detail]
