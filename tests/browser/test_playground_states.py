"""The playground where the service is not simply ready: keys, a full queue, a model that loads; and its modules."""

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from playwright.sync_api import Page, expect

from tests.browser.conftest import Complaints
from tests.browser.pictures import downloaded, grey, open_picture, paint, pixels, wait_until_ready
from tests.http.serving import CLOSING, LiveServer, eventually, multipart_head, png, scene, usual_parts

Serve = Callable[..., LiveServer]
Visit = Callable[..., Page]

KEY = "correct-horse-battery-staple"


def test_key_is_asked_for_and_stays_in_the_tab(serve: Serve, visit: Visit, complaints: Complaints) -> None:
    """A service with keys is used after the key was given; it is in the tab's storage alone, not in the command."""
    complaints.statuses.add(401)
    server = serve(api_keys=KEY)
    page = visit(f"http://127.0.0.1:{server.port}/")
    expect(page.locator("#key-hint")).to_have_text("This service asks for a key.")
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-hint")).to_have_text("The service does not know this key.")
    page.fill("#key", KEY)
    page.keyboard.press("Enter")
    wait_until_ready(page)
    expect(page.locator("#key-form")).to_be_hidden()
    paint(page)

    page.click("#curl-panel summary")
    expect(page.locator("#curl")).to_contain_text('-H "Authorization: Bearer $INPAINT_KEY"')
    assert KEY not in page.content()
    assert page.evaluate("JSON.stringify(sessionStorage)") == json.dumps({"inpaint-key": KEY}, separators=(",", ":"))
    assert KEY not in page.evaluate("JSON.stringify(localStorage) + document.cookie")
    page.reload()
    wait_until_ready(page)


def test_full_queue_says_when_to_come_back(serve: Serve, visit: Visit, complaints: Complaints, tmp_path: Path) -> None:
    """A refusal for want of room is one line with the service's own time to wait."""
    complaints.statuses.add(429)
    gate = tmp_path / "gate"
    server = serve(model=f"fake?gate={gate}&max_images=1", queue_size=1)
    page = visit(f"http://127.0.0.1:{server.port}/")
    wait_until_ready(page)
    body = usual_parts().replace(b"a red house", b"hold") + CLOSING
    held = [server.raw(multipart_head(f"Content-Length: {len(body)}"), body)]
    eventually(lambda: server.metric("inpaint_in_flight") == 1)
    while server.metric("inpaint_queue_depth") < 1:
        held.append(server.raw(multipart_head(f"Content-Length: {len(body)}"), body))
        eventually(lambda: server.metric("inpaint_in_flight") + server.metric("inpaint_queue_depth") >= len(held))

    page.click("#run")

    expect(page.locator("#problem")).to_have_text(re.compile(r"Try again in \d+ s\."))
    gate.touch()
    for connection in held:
        connection.close()
    eventually(lambda: server.metric("inpaint_in_flight") + server.metric("inpaint_queue_depth") == 0)
    paint(page)
    expect(page.locator("#problem")).to_be_empty()


def test_waits_for_the_model(serve: Serve, visit: Visit, complaints: Complaints, tmp_path: Path) -> None:
    """Before a worker is ready the page says so and what is being loaded, and goes on by itself once there is one."""
    complaints.statuses.add(503)
    gate = tmp_path / "gate"
    server = serve(wait_ready=False, model=f"fake?startup_gate={gate}")
    page = visit(f"http://127.0.0.1:{server.port}/")
    expect(page.locator("#readiness")).to_contain_text("not ready yet")
    expect(page.locator("#run")).to_be_disabled()
    gate.touch()
    wait_until_ready(page)
    expect(page.locator("#readiness")).to_be_hidden()


def test_failed_run_is_told(serve: Serve, visit: Visit) -> None:
    """A request that fails after it was admitted ends as one line, and the page can go on."""
    server = serve()
    page = visit(f"http://127.0.0.1:{server.port}/")
    wait_until_ready(page)
    page.fill("[name=prompt]", "fail")
    page.click("#run")
    expect(page.locator("#problem")).to_have_text("The request failed.")
    page.fill("[name=prompt]", "a red house")
    paint(page)


def test_flag_policy_marks_without_withholding(serve: Serve, visit: Visit) -> None:
    """Where the operator only flags pictures, a flagged one is shown, with the flag."""
    server = serve(nsfw_policy="flag")
    page = visit(f"http://127.0.0.1:{server.port}/")
    wait_until_ready(page)
    page.fill("[name=prompt]", "nsfw")
    paint(page)
    expect(page.locator("#result-info")).to_contain_text("flagged")
    expect(page.locator("#withheld")).to_be_hidden()
    expect(page.locator("#download")).to_be_visible()


def test_form_is_what_is_sent(serve: Serve, visit: Visit) -> None:
    """Of the settings what differs from the defaults is sent, and the picture's own bytes; the service takes it."""
    by, picture = png(scene(40, 40)), png(scene(24, 32))
    server = serve(model="fake?ip_adapter=plain")
    page = visit(f"http://127.0.0.1:{server.port}/")
    wait_until_ready(page)
    open_picture(page, "own.png", "image/png", picture)
    page.locator("#invert").click()
    page.click("#advanced summary")
    page.set_input_files("#ip-adapter-image", {"name": "by.png", "mimeType": "image/png", "buffer": by})
    settings = {"ip_adapter_scale": "0.5", "seed": "9", "guidance_scale": "3", "num_inference_steps": "3"}
    settings |= {"mask_grow": "4", "eta": "0.5", "negative_prompt": "a cloud", "width": "64", "height": "64"}
    settings |= {"padding_mask_crop": "8", "strength": "0.9", "clip_skip": "1", "timeout": "60", "mask_blur": "2"}
    settings |= {"freeu": '{"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4}'}
    for name, value in settings.items():
        page.fill(f"[name={name}]", value)
    choices = {"scheduler": "euler", "prompt_syntax": "a1111", "batching": "solo", "output_format": "webp"}
    for name, value in choices.items():
        page.select_option(f"[name={name}]", value)
    page.uncheck("[name=composite]")
    page.evaluate(
        """() => {
            const post = window.fetch;
            window.fetch = (address, options) => {
                if (options?.body instanceof FormData) window.sent = options.body;
                return post(address, options);
            };
        }"""
    )
    paint(page)

    sent = dict(
        page.evaluate(
            """() => Promise.all([...window.sent].map(async ([name, value]) =>
                [name, value instanceof File ? [...new Uint8Array(await value.arrayBuffer())] : value]))"""
        )
    )
    files = {name: bytes(sent.pop(name)) for name in ("image", "mask", "ip_adapter_image")}
    assert sent == {**settings, **choices, "composite": "false", "prompt": "a red house", "previews": "true"}
    assert (files["image"], files["ip_adapter_image"]) == (picture, by)
    assert grey(pixels(files["mask"])).shape == (24, 32)
    assert grey(pixels(files["mask"])).all()
    page.click("#curl-panel summary")
    expect(page.locator("#curl")).to_contain_text("-F ip_adapter_image=@by.png")


def test_pictures_can_be_dropped_and_pasted(serve: Serve, visit: Visit) -> None:
    """A dropped or pasted picture is opened; what is transparent in it is the mask to begin with."""
    transparent = scene(30, 50, channels=4)
    transparent[..., 3] = 255
    transparent[:10, :20, 3] = 0
    server = serve()
    page = visit(f"http://127.0.0.1:{server.port}/")
    wait_until_ready(page)
    for event, attribute, data in (
        ("drop", "dataTransfer", png(scene(20, 40))),
        ("paste", "clipboardData", png(transparent)),
    ):
        page.evaluate(
            """([event, attribute, bytes]) => {
                const transfer = new DataTransfer();
                transfer.items.add(new File([new Uint8Array(bytes)], "a.png", { type: "image/png" }));
                const type = event === "drop" ? DragEvent : ClipboardEvent;
                document.querySelector("#drop").dispatchEvent(
                    new type(event, { bubbles: true, cancelable: true, [attribute]: transfer }));
            }""",
            [event, attribute, list(data)],
        )
        expect(page.locator("#picture-info")).to_have_text("40\u00d720" if event == "drop" else "50\u00d730")
    page.click("#curl-panel summary")
    mask = grey(downloaded(page, "#save-mask"))
    np.testing.assert_array_equal(mask, 255 - transparent[..., 3])


def test_events_are_read_however_the_stream_is_cut(serve: Serve, visit: Visit) -> None:
    """The stream's events are the same for any size of its pieces and any line ends; comments are none."""
    lines = [": waiting", "", "event: queued", 'data: {"position": 0}', "", "data: a", "data:b", "", "data", ""]
    server = serve()
    page = visit(f"http://127.0.0.1:{server.port}/")
    wait_until_ready(page)
    for end, size in itertools.product(("\n", "\r\n", "\r"), (1, 2, 3, 7, 1000)):
        events = page.evaluate(
            """async ([stream, size]) => {
                const { EventParser } = await import("/playground/events.js");
                const parser = new EventParser();
                const pieces = stream.match(new RegExp(`[^]{1,${size}}`, "g"));
                return pieces.flatMap((piece) => parser.push(piece));
            }""",
            [end.join(lines), size],
        )
        assert events == [{"event": "queued", "data": '{"position": 0}'}, {"event": "message", "data": "a\nb"}]


def test_theme_follows_the_browser_until_one_is_chosen(serve: Serve, visit: Visit) -> None:
    """Dark where the browser prefers it; the button's choice outlives a reload."""
    server = serve()
    page = visit(f"http://127.0.0.1:{server.port}/", color_scheme="dark")
    colour = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(colour)
    page.click("#theme")
    light = page.evaluate(colour)
    assert sum(map(int, re.findall(r"\d+", dark))) < 150
    assert sum(map(int, re.findall(r"\d+", light))) > 600
    page.reload()
    assert page.evaluate(colour) == light
