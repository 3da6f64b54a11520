"""What a person sees and gets on the page, as arrays."""

import io
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Page, expect

from tests.browser.conftest import WAIT_MS
from tests.bundled_service import ROOT

EXAMPLE = ROOT / "service/api/playground/example"

expect.set_options(timeout=WAIT_MS)


def pixels(source: Path | bytes) -> NDArray[np.uint8]:
    """A file's pixels."""
    return np.asarray(Image.open(io.BytesIO(source) if isinstance(source, bytes) else source))


def scene() -> NDArray[np.uint8]:
    """(256, 256, 3) of the example."""
    return pixels(EXAMPLE / "scene.png")


def downloaded(page: Page, button: str) -> NDArray[np.uint8]:
    """The picture that a button of the page gives."""
    with page.expect_download() as download:
        page.click(button)
    return pixels(Path(download.value.path()))


def wait_until_ready(page: Page) -> None:
    """Until a picture is open and the service can paint."""
    expect(page.locator("#run")).to_be_enabled()


def open_picture(page: Page, name: str, kind: str, data: bytes) -> None:
    """Choose a file."""
    page.set_input_files("#image-file", {"name": name, "mimeType": kind, "buffer": data})
    expect(page.locator("#live")).to_have_text("Picture opened.")


def paint(page: Page) -> None:
    """Press the button, and wait for the result."""
    page.click("#run")
    wait_until_painted(page)


def wait_until_painted(page: Page) -> None:
    """Until there is a result, and not the one before."""
    expect(page.locator("#run")).to_have_attribute("aria-disabled", "false")
    expect(page.locator("#live")).to_have_text(re.compile("^Done"))


def assert_only_changed_under(mask: NDArray[np.uint8], before: NDArray[np.uint8], after: NDArray[np.uint8]) -> None:
    """Outside the mask all pixels are the same, bit for bit; under it many are not."""
    assert mask.ndim == 2
    assert set(np.unique(mask)) == {0, 255}
    assert after.shape == before.shape
    changed = (after != before).any(axis=2)
    assert not changed[mask == 0].any()
    assert changed[mask == 255].mean() > 0.5


def grey(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A black and white picture's only channel."""
    channels = picture[..., :3]
    assert (channels == channels[..., :1]).all()
    return channels[..., 0]
