"""Pictures as OpenAI's clients send them, and what comes back."""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import openai
from numpy.typing import NDArray

from tests.http.serving import LiveServer, pixels_of, png, scene, square_mask

KEY = "sk-of-a-client"


@contextmanager
def connected(server: LiveServer, **options: Any) -> Iterator[openai.OpenAI]:
    """OpenAI's own client, pointed here; it does not try again unless told to."""
    options = {"api_key": KEY, "max_retries": 0, "timeout": 20, **options}
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", **options) as client:
        yield client


def hole(height: int = 64, width: int = 64) -> bytes:
    """A mask's file: black, opaque, and transparent where `square_mask` is white."""
    pixels = np.zeros((height, width, 4), np.uint8)
    pixels[..., 3] = 255 - square_mask(height, width)
    return png(pixels)


def scene_with_hole() -> bytes:
    """A picture that is its own mask."""
    return png(np.dstack([scene(), 255 - square_mask()]))


def decoded(image: Any) -> NDArray[np.uint8]:
    """The pixels of an image in an answer."""
    return pixels_of(file_of(image))


def file_of(image: Any) -> bytes:
    """The file of an image in an answer."""
    return base64.b64decode(image.b64_json, validate=True)


def native_file(server: LiveServer, **fields: Any) -> bytes:
    """What the native endpoint paints for the usual request, changed."""
    response = server.inpaint(**fields)
    assert response.status_code == 200, response.text
    return response.content


def edit(client: openai.OpenAI, **changes: Any) -> Any:
    """The usual edit, changed; `extra_body` beside a fixed seed."""
    own = {"seed": 7, **changes.pop("extra_body", {})}
    usual = {"image": ("a.png", png(scene())), "mask": ("m.png", hole()), "prompt": "a red house"}
    asked = {name: value for name, value in {**usual, **changes}.items() if value is not None}
    return client.images.edit(**asked, extra_body=own)


# --- the same as JSON ----------------------------------------


def data_url(data: bytes) -> str:
    """A PNG file as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


USUAL_JSON: dict[str, Any] = {
    "images": [{"image_url": data_url(png(scene()))}],
    "mask": {"image_url": data_url(hole())},
    "prompt": "a red house",
    "seed": 7,
}


def json_edit(server: LiveServer, **changes: Any) -> httpx.Response:
    """The usual edit as JSON, changed; fields that are None are null."""
    return server.client.post("/v1/images/edits", json={**USUAL_JSON, **changes})


def picture_in(response: httpx.Response) -> bytes:
    """The file in an answer."""
    assert response.status_code == 200, response.text
    return base64.b64decode(response.json()["data"][0]["b64_json"])


def refusal(response: httpx.Response) -> tuple[int, str, str]:
    """Status, field and message of an error in OpenAI's form."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["param"], error["message"]
