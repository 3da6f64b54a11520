"""OpenAI's own client against `serve` with real workers and a real (tiny) model."""

from pathlib import Path

import httpx
import numpy as np
import openai
import pytest

from service.settings import BUNDLED_MODEL
from tests.http.openai_pictures import decoded, file_of, hole
from tests.http.serving import scene, square_mask
from tests.process.real_service import png, serving

pytestmark = pytest.mark.timeout(300)

SIZE = 256


def test_stream_of_the_demo_model_and_the_same_natively() -> None:
    """Unfinished pictures of real steps, then the file that `/v1/inpaint` gives for the same request."""
    picture, mask = png(scene(SIZE, SIZE)), hole(SIZE, SIZE)
    kept = square_mask(SIZE, SIZE) == 0
    with serving(Path(BUNDLED_MODEL)) as service, openai.OpenAI(base_url=f"{service.url}/v1", api_key="any") as client:
        asked = {"image": ("a.png", picture), "mask": ("m.png", mask), "prompt": "a red house", "quality": "medium"}
        events = list(client.images.edit(**asked, stream=True, partial_images=2, extra_body={"seed": 7}))
        files = {"image": ("a.png", picture), "mask": ("m.png", png(square_mask(SIZE, SIZE)))}
        data = {"prompt": "a red house", "seed": "7"}
        native = httpx.post(f"{service.url}/v1/inpaint", files=files, data=data, timeout=120).content

    *partial, completed = events
    assert file_of(completed) == native
    assert 1 <= len(partial) <= 2
    for event in partial:
        assert np.array_equal(decoded(event)[kept], scene(SIZE, SIZE)[kept])
        assert not np.array_equal(decoded(event)[~kept], decoded(completed)[~kept])
