"""The playground in a real browser, on the real service with the bundled model."""

import io
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from tests.browser.conftest import Complaints
from tests.browser.pictures import (
    EXAMPLE,
    assert_only_changed_under,
    downloaded,
    grey,
    open_picture,
    paint,
    pixels,
    scene,
    wait_until_painted,
    wait_until_ready,
)

Visit = Callable[..., Page]

FEW_STEPS = "4"
TIMES = "\u00d7"


def drag(page: Page, *points: tuple[float, float]) -> None:
    """Paint with the mouse along points, in shares of the picture."""
    page.locator("#mask").scroll_into_view_if_needed()
    box = page.locator("#mask").bounding_box()
    assert box is not None
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=4)
    page.mouse.up()


def drawn_mask(page: Page) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The mask as the page would send it."""
    if not page.locator("#save-mask").is_visible():
        page.click("#curl-panel summary")
    return grey(downloaded(page, "#save-mask"))


def metric(url: str, name: str) -> float:
    """The sum of a metric's samples."""
    lines = httpx.get(f"{url}/metrics", trust_env=False).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


def test_opens_ready_and_changes_only_what_is_under_the_mask(service: str, visit: Visit) -> None:
    """With the demo model one press of the button gives a result; the file is the upload's own outside the mask."""
    page = visit(service)
    wait_until_ready(page)
    expect(page.locator("#demo")).to_contain_text("This is a demo model")
    expect(page.locator("[name=prompt]")).to_have_value("a red house")
    expect(page.locator("#model")).to_have_text("demo")
    page.fill("[name=seed]", "7")

    paint(page)

    expect(page.locator("#result-info")).to_contain_text(f"Seed 7 · 256{TIMES}256")
    mask = pixels(EXAMPLE / "mask.png")
    result = downloaded(page, "#download")
    assert_only_changed_under(mask, scene(), result)
    painted = result[mask == 255].astype(int)
    is_red = (painted[:, 0] > 150) & (painted[:, 1] < 80) & (painted[:, 2] < 80)
    assert is_red.mean() > 0.1  # It is a red house.
    page.locator("#split").focus()
    page.keyboard.press("Home")
    assert page.locator("#after").evaluate("element => getComputedStyle(element).clipPath").endswith(" 0%)")


def test_own_mask_is_what_is_painted(service: str, visit: Visit) -> None:
    """A mask drawn with mouse, eraser, undo and redo is sent at the picture's own pixels, and only it is painted."""
    page = visit(service)
    wait_until_ready(page)
    page.click("#clear")
    assert not drawn_mask(page).any()
    drag(page, (0.2, 0.2), (0.7, 0.2))
    first = drawn_mask(page)
    assert first.shape == (256, 256)
    assert first[51, 60:170].all()
    assert not first[100:].any()
    assert not first[:, :30].any()

    page.click("#eraser")
    drag(page, (0.45, 0.1), (0.45, 0.3))
    second = drawn_mask(page)
    assert not second[51, 110:120].any()
    assert second[51, 60:90].all()
    page.keyboard.press("Control+z")
    np.testing.assert_array_equal(drawn_mask(page), first)
    page.keyboard.press("Control+Shift+z")
    np.testing.assert_array_equal(drawn_mask(page), second)
    page.click("#invert")
    np.testing.assert_array_equal(drawn_mask(page), 255 - second)
    page.click("#undo")

    page.fill("[name=num_inference_steps]", FEW_STEPS)
    page.fill("[name=prompt]", "a green tree")
    paint(page)

    assert_only_changed_under(second, scene(), downloaded(page, "#download"))


def test_cancelled_run_leaves_the_service(service: str, visit: Visit) -> None:
    """Previews and progress show while it paints; cancelling hangs up, upon which the service drops the request."""
    page = visit(service)
    wait_until_ready(page)
    cancelled = metric(service, "inpaint_cancelled_total")
    page.fill("[name=num_inference_steps]", "150")
    page.click("#run")
    expect(page.locator("#progress-text")).to_contain_text("of 150")
    expect(page.locator("#result-frame.previewing #after")).to_have_attribute(
        "src", re.compile(r"^data:image/jpeg;base64,")
    )

    page.click("#cancel")

    expect(page.locator("#live")).to_have_text("Cancelled.")
    expect(page.locator("#cancel")).to_be_hidden()
    expect(page.locator("#result-empty")).to_be_visible()
    give_up_at = time.monotonic() + 60
    while metric(service, "inpaint_in_flight") or metric(service, "inpaint_cancelled_total") == cancelled:
        assert time.monotonic() < give_up_at, "the request is still in the batch"
        time.sleep(0.05)


def test_errors_stand_beside_their_fields(service: str, visit: Visit, complaints: Complaints) -> None:
    """What the service refuses is shown in its words at the field that it names, and gone with the next run."""
    complaints.statuses.add(422)
    page = visit(service)
    wait_until_ready(page)
    page.fill("[name=guidance_scale]", "99")
    page.fill("[name=prompt]", "")
    page.click("#advanced summary")
    page.fill("[name=mask_grow]", "65")
    page.click("#advanced summary")
    page.click("#run")

    expect(page.locator('[data-error-for="guidance_scale"]')).to_have_text("Input should be less than or equal to 30.")
    expect(page.locator('[data-error-for="prompt"]')).not_to_be_empty()
    expect(page.locator('[data-error-for="mask_grow"]')).to_be_visible()
    expect(page.locator("[name=prompt]")).to_be_focused()
    expect(page.locator("[name=guidance_scale]")).to_have_attribute("aria-invalid", "true")

    page.fill("[name=guidance_scale]", "7.5")
    page.fill("[name=mask_grow]", "0")
    page.fill("[name=prompt]", "nothing")
    page.click("#clear")
    page.click("#run")
    expect(page.locator('[data-error-for="mask"]')).to_contain_text("nothing to repaint")
    expect(page.locator('[data-error-for="guidance_scale"]')).to_be_empty()
    page.set_input_files("#mask-file", {"name": "m.png", "mimeType": "image/png", "buffer": png(8, 8)})
    expect(page.locator('[data-error-for="mask"]')).to_have_text(
        f"The mask has 8{TIMES}8 pixels, the picture 256{TIMES}256."
    )
    page.set_input_files("#image-file", {"name": "no.png", "mimeType": "image/png", "buffer": b"no picture"})
    expect(page.locator('[data-error-for="image"]')).to_contain_text("no picture")


def png(width: int, height: int) -> bytes:
    """A white PNG file."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(buffer, "PNG")
    return buffer.getvalue()


def test_flagged_picture_is_shown_as_withheld(service: str, visit: Visit) -> None:
    """What the safety checker flags is said to be withheld; there is nothing to download or to go on with."""
    page = visit(service)
    wait_until_ready(page)
    page.get_by_role("button", name="a pirate flag").click()
    page.fill("[name=seed]", "5")

    paint(page)

    expect(page.locator("#withheld")).to_be_visible()
    expect(page.locator("#withheld")).to_contain_text("safety checker")
    expect(page.locator("#result-info")).to_contain_text("flagged")
    expect(page.locator("#download")).to_be_hidden()
    expect(page.locator("#reuse")).to_be_hidden()
    expect(page.locator("#history-items .flagged")).to_have_count(1)


def test_several_images_and_the_way_back(service: str, visit: Visit) -> None:
    """Images of one run can be looked at in turn, each with its seed; an earlier run comes back with all it had."""
    page = visit(service)
    wait_until_ready(page)
    page.fill("[name=num_inference_steps]", "6")  # Of coarser pencil sketches the checker is not sure.
    page.fill("[name=prompt]", "a green tree")
    page.fill("[name=num_images_per_prompt]", "3")
    page.fill("[name=seed]", "11")
    page.click("#advanced summary")
    page.select_option("#lora-add", "pencil")
    paint(page)
    expect(page.locator("#choices button")).to_have_count(3)
    shown = []
    for number in range(3):
        page.locator("#choices button").nth(number).click()
        expect(page.locator("#result-info")).to_contain_text(f"Seed {11 + number}")
        shown.append(downloaded(page, "#download"))
    mask = pixels(EXAMPLE / "mask.png")
    for picture in shown:
        assert_only_changed_under(mask, scene(), picture)
    assert (shown[0] != shown[1]).any()

    page.click("#reuse")
    expect(page.locator("#live")).to_have_text("Picture opened.")
    page.fill("[name=prompt]", "a yellow balloon")
    page.fill("[name=num_images_per_prompt]", "1")
    page.get_by_role("button", name="Remove pencil").click()
    drag(page, (0.2, 0.2), (0.3, 0.2))
    paint(page)
    expect(page.locator("#choices")).to_be_hidden()
    expect(page.locator("#history-items button")).to_have_count(2)
    own = drawn_mask(page)
    assert_only_changed_under(own, shown[2], downloaded(page, "#download"))

    page.locator("#history-items button").nth(1).click()
    expect(page.locator("#choices button")).to_have_count(3)
    expect(page.locator("[name=prompt]")).to_have_value("a green tree")
    expect(page.locator("[name=num_images_per_prompt]")).to_have_value("3")
    expect(page.locator(".lora span")).to_have_text("pencil")
    np.testing.assert_array_equal(drawn_mask(page), mask)
    np.testing.assert_array_equal(downloaded(page, "#download"), shown[0])


def test_keyboard_alone_suffices(service: str, visit: Visit) -> None:
    """Mask, prompt and run need no pointer: all of it can be reached by Tab, and the brush moves by arrow keys."""
    page = visit(service)
    wait_until_ready(page)

    def tab_to(selector: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.locator(selector).evaluate("element => element === document.activeElement"):
                return
        raise AssertionError(f"{selector} cannot be reached")

    tab_to("#clear")
    page.keyboard.press("Enter")
    tab_to("#mask")
    page.keyboard.press("]")
    page.keyboard.down(" ")
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    page.keyboard.up(" ")
    page.keyboard.press("ArrowDown")  # Moves without painting.
    tab_to("[name=num_inference_steps]")
    page.keyboard.type(FEW_STEPS)
    tab_to("[name=prompt]")
    page.keyboard.press("Control+a")
    page.keyboard.type("a blue ball")
    page.keyboard.press("Enter")
    wait_until_painted(page)

    mask = drawn_mask(page)
    assert mask[128, 128:160].all()
    assert not mask[:100].any()
    assert_only_changed_under(mask, scene(), downloaded(page, "#download"))


def test_phone(service: str, visit: Visit) -> None:
    """On a narrow screen nothing is cut off, and a finger paints instead of scrolling."""
    page = visit(service, viewport={"width": 360, "height": 740}, device_scale_factor=2, is_mobile=True, has_touch=True)
    wait_until_ready(page)
    page.tap("#advanced summary")
    page.tap("#curl-panel summary")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.locator("#mask").scroll_into_view_if_needed()
    page.tap("#clear")
    box = page.locator("#mask").bounding_box()
    assert box is not None
    scrolled = page.evaluate("scrollY")
    touch = page.context.new_cdp_session(page)

    def send(kind: str, *points: tuple[float, float]) -> None:
        places = [{"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]} for x, y in points]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": places})

    send("touchStart", (0.3, 0.2))
    for step in range(1, 9):
        send("touchMove", (0.3, 0.2 + step * 0.05))
    send("touchEnd")
    assert page.evaluate("scrollY") == scrolled
    mask = drawn_mask(page)
    assert mask[60:150, 77].all()
    assert not mask[:, 140:].any()

    page.fill("[name=num_inference_steps]", FEW_STEPS)
    page.wait_for_timeout(500)  # A tap sooner after the stroke is no click to Chromium, which looks for double taps.
    page.tap("#run")
    wait_until_painted(page)
    expect(page.locator("#result-frame")).to_be_in_viewport(ratio=0.5)
    assert_only_changed_under(mask, scene(), downloaded(page, "#download"))


@pytest.mark.parametrize(("kind", "orientation"), [("JPEG", 6), ("WEBP", 6), ("WEBP", 3)])
def test_picture_is_shown_as_the_service_turns_it(service: str, visit: Visit, kind: str, orientation: int) -> None:
    """A picture with an EXIF orientation is sent as it is, and painted where it was painted over."""
    stored = scene()[64:224, :].copy()  # 160 high, 256 wide.
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {"quality": 95}
    Image.fromarray(stored).save(buffer, kind, exif=exif.tobytes(), **options)
    before = np.rot90(pixels(buffer.getvalue()), {6: 3, 3: 2}[orientation])
    height, width = before.shape[:2]

    page = visit(service)
    wait_until_ready(page)
    open_picture(page, "photo", f"image/{kind.lower()}", buffer.getvalue())
    expect(page.locator("#picture-info")).to_have_text(f"{width}{TIMES}{height}")
    seen = Image.open(io.BytesIO(page.locator("#picture").screenshot())).convert("RGB").resize((width, height))
    drag(page, (0.3, 0.2), (0.6, 0.2))
    mask = drawn_mask(page)
    assert mask.shape == (height, width)
    page.fill("[name=num_inference_steps]", FEW_STEPS)
    paint(page)

    assert_only_changed_under(mask, before, downloaded(page, "#download"))
    shown = np.asarray(seen).astype(int)
    assert np.abs(shown - before).mean() < 15  # Also to the eye: the mask was empty, or nearly, when it was looked at.


def test_command_is_quoted_for_the_shell(service: str, visit: Visit) -> None:
    """The curl command's words are the request's, whatever is in prompt and file names."""
    page = visit(service)
    wait_until_ready(page)
    name = """it's; a "pic", \\ $HOME.png"""
    open_picture(page, name, "image/png", png(64, 64))
    prompt = """@it's "red" $(id) `id` \\ <house>; é"""
    page.fill("[name=prompt]", prompt)
    page.fill("[name=seed]", "3")
    page.click("#curl-panel summary")
    text = page.locator("#curl").inner_text()

    words = shlex.split(text.replace("\\\n", " "))

    quoted = name.replace("\\", "\\\\").replace('"', '\\"')
    assert words[:5] == ["curl", "-sS", "--fail-with-body", f"{service}/v1/inpaint", "-o"]
    assert words[6:] == ["-F", f'image=@"{quoted}"', "-F", "mask=@mask.png"] + [
        word for field in (f"prompt={prompt}", "seed=3") for word in ("--form-string", field)
    ]


def test_command_does_what_the_page_did(service: str, visit: Visit, tmp_path: Path) -> None:
    """Run in a folder with the files, the command gives the very picture of the page."""
    if shutil.which("curl") is None:
        pytest.skip("no curl on PATH")
    page = visit(service)
    wait_until_ready(page)
    page.fill("[name=num_inference_steps]", FEW_STEPS)
    page.fill("[name=seed]", "3")
    page.click("#advanced summary")
    page.select_option("[name=batching]", "solo")
    paint(page)
    page.click("#curl-panel summary")
    for button, name in (("#save-image", "scene.png"), ("#save-mask", "mask.png")):
        with page.expect_download() as download:
            page.click(button)
        assert download.value.suggested_filename == name
        download.value.save_as(tmp_path / name)
    assert (tmp_path / "scene.png").read_bytes() == (EXAMPLE / "scene.png").read_bytes()

    subprocess.run(["sh", "-c", page.locator("#curl").inner_text()], cwd=tmp_path, check=True, timeout=120)

    np.testing.assert_array_equal(pixels(tmp_path / "out.png"), downloaded(page, "#download"))
