"""`/docs` in a real browser: the API is tried out as a reader does, and the page keeps to itself."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, Response, expect

from tests.http.serving import LiveServer, serving

EXAMPLE = Path(__file__).parents[2] / "service" / "api" / "playground" / "example"

_PARTS = re.compile(r'name="([^"]+)"(?:; filename="[^"]*")?\r\n(?:Content-Type: [^\r]*\r\n)?\r\n(.*?)\r\n--', re.DOTALL)

# Kept by the page before its own scripts run: what its policy refused, and the last form that it sent. Chromium does
# not tell its driver what is in a form that has files.
_WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => window.violations.push(event.violatedDirective));
const send = window.fetch;
window.fetch = async (...args) => {
  const [request, options] = args;
  const body = options?.body ?? request.body;
  window.sent = body instanceof FormData ? await new Response(body).arrayBuffer().then((bytes) =>
    new TextDecoder("latin1").decode(bytes)) : "";
  return send(...args);
};
"""


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    """A server with default settings."""
    with serving() as live:
        yield live


@dataclass
class Docs:
    """The page, open at one operation.

    Attributes:
        page: The browser's page.
        operation: The part of it that is about the operation.
        requests: Addresses that were asked for.
        complaints: What the page wrote to the console as an error or warning.
    """

    page: Page
    operation: Locator
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def row(self, name: str) -> Locator:
        """A field of the form."""
        return self.operation.locator(f'[data-property-name="{name}"]')

    def attach(self, name: str, file: str) -> None:
        """Choose one of the example's files."""
        self.row(name).locator("input[type=file]").set_input_files(EXAMPLE / file)

    def ask_for(self, media_type: str) -> None:
        """Choose the content type of the answer."""
        self.operation.locator(".responses-table select").first.select_option(media_type)

    def execute(self) -> Response:
        """Press the button, and wait for the answer."""
        with self.page.expect_response("**/v1/inpaint") as answered:
            self.operation.get_by_role("button", name="Execute").click()
        expect(self.operation.locator(".live-responses-table .response-col_status").last).to_contain_text(
            str(answered.value.status)
        )
        return answered.value

    def sent(self) -> dict[str, str]:
        """The parts of the last form."""
        return dict(_PARTS.findall(self.page.evaluate("window.sent")))

    @property
    def answer(self) -> Locator:
        """What came back, as it is shown."""
        return self.operation.locator(".live-responses-table .response-col_description").last


@contextmanager
def opened(browser: Browser, server: LiveServer, operation: str, **context: str) -> Iterator[Docs]:
    """The page with an operation unfolded; afterwards nothing was refused by its policy or asked of another host."""
    page = browser.new_context(**context).new_page()
    page.add_init_script(_WATCH)
    docs = Docs(page, page.locator(f"#{operation}"))
    page.on("request", lambda request: docs.requests.append(request.url))
    page.on("console", lambda said: docs.complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: docs.complaints.append(str(error)))
    try:
        page.goto(f"http://127.0.0.1:{server.port}/docs")
        docs.operation.locator(".opblock-summary").click()
        docs.operation.get_by_role("button", name="Try it out").click()
        yield docs
        assert page.evaluate("window.violations") == []
        away = [url for url in docs.requests if urlsplit(url).scheme not in ("data", "blob")]
        assert {urlsplit(url).netloc for url in away} == {f"127.0.0.1:{server.port}"}
    finally:
        page.context.close()


def test_a_picture_is_painted_and_shown(browser: Browser, server: LiveServer) -> None:
    """Image and mask attached, the rest as it comes: only what is filled in is sent, and the PNG is seen."""
    with opened(browser, server, "operations-Inpainting-inpaint") as docs:
        docs.attach("image", "scene.png")
        docs.attach("mask", "mask.png")
        response = docs.execute()

        assert response.status == 200
        assert response.headers["content-type"] == "image/png"
        assert response.request.headers["accept"] == "image/png"
        assert docs.sent().keys() == {"image", "mask", "prompt"}
        assert docs.sent()["prompt"] == "a red house"
        picture = docs.answer.locator("img")
        expect(picture).to_be_visible()
        assert picture.evaluate("image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])") == [
            *Image.open(EXAMPLE / "scene.png").size
        ]
        expect(docs.answer).to_contain_text("x-seed")
        assert docs.complaints == []


def test_every_kind_of_answer_is_shown(browser: Browser, server: LiveServer) -> None:
    """The list of content types decides what is asked for: JSON and events are shown, an array can be downloaded."""
    with opened(browser, server, "operations-Inpainting-inpaint") as docs:
        docs.attach("image", "scene.png")
        docs.attach("mask", "mask.png")
        for media_type, shown in (
            ("application/json", '"nsfw_content_detected": false'),
            ("text/event-stream", "event: completed"),
            ("application/x-npy", "Download file"),
        ):
            docs.ask_for(media_type)
            response = docs.execute()
            assert response.status == 200
            assert response.headers["content-type"].partition(";")[0] == media_type
            expect(docs.answer).to_contain_text(shown)
        with docs.page.expect_download() as download:
            docs.answer.get_by_text("Download file").click()
        array = np.load(io.BytesIO(download.value.path().read_bytes()))
        assert array.shape == (*Image.open(EXAMPLE / "scene.png").size[::-1], 3)
        assert docs.complaints == []


def test_every_kind_of_field_is_sent_as_it_is_meant(browser: Browser, server: LiveServer) -> None:
    """Numbers, choices, lists and objects reach the service; defaults are told, and stay out of the form."""
    factors = '{"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4}'
    with opened(browser, server, "operations-Inpainting-inpaint") as docs:
        docs.attach("image", "scene.png")
        docs.attach("mask", "mask.png")
        docs.row("prompt").locator("input").fill("a green tree")
        docs.row("seed").locator("input").fill("0")
        docs.row("scheduler").locator("input").fill("euler")
        docs.row("timesteps").locator("textarea").fill("[900, 500, 20]")
        docs.row("loras").locator("textarea").fill("[]")
        docs.row("freeu").locator("textarea").fill(factors)
        docs.row("composite").locator("select").select_option("false")
        docs.row("batching").locator("select").select_option("solo")
        docs.row("num_images_per_prompt").locator("input").fill("2")
        expect(docs.operation.get_by_role("button", name="Reset")).to_have_count(0)
        expect(docs.row("guidance_scale")).to_contain_text("Default: 7.5")
        docs.ask_for("application/json")
        response = docs.execute()

        assert response.status == 200, docs.answer.inner_text()
        parameters = response.json()["parameters"]
        chosen = {
            "prompt": "a green tree",
            "seed": 0,
            "scheduler": "euler",
            "timesteps": [900, 500, 20],
            "loras": [],
            "freeu": {"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4},
            "composite": False,
            "batching": "solo",
            "num_images_per_prompt": 2,
        }
        assert {name: parameters[name] for name in chosen} == chosen
        assert docs.sent().keys() == {"image", "mask", *chosen}

        # What was emptied again is left out again.
        for name in ("scheduler", "num_images_per_prompt"):
            docs.row(name).locator("input").fill("")
        for name in ("timesteps", "loras", "freeu"):
            docs.row(name).locator("textarea").fill("")
        for name in ("composite", "batching"):
            docs.row(name).locator("select").select_option("")
        assert docs.execute().status == 200
        assert docs.sent().keys() == {"image", "mask", "prompt", "seed"}
        assert docs.complaints == []


def test_forms_and_bodies_of_any_format(browser: Browser, server: LiveServer) -> None:
    """What other formats are made of can be filled in: several files, required fields, JSON with an example."""
    file = {"type": "string", "format": "binary"}
    form = {
        "type": "object",
        "required": ["prompt"],
        "properties": {
            "image": {"anyOf": [file, {"type": "array", "items": file}]},
            "image[]": {"type": "array", "items": file},
            "prompt": {"type": "string"},
            "n": {"type": "integer", "default": 1},
        },
    }
    json = {"schema": {"type": "object", "properties": {"steps": {"type": "integer"}}}, "example": {"steps": 20}}
    answer = {"200": {"description": "Done.", "content": {"application/json": {"schema": {"type": "object"}}}}}
    document = {
        "openapi": "3.1.0",
        "info": {"title": "Formats", "version": "1"},
        "paths": {
            f"/{name}": {
                "post": {"operationId": name, "tags": ["T"], "requestBody": {"content": body}, "responses": answer}
            }
            for name, body in {
                "form": {"multipart/form-data": {"schema": form}},
                "json": {"application/json": json},
            }.items()
        },
    }
    context = browser.new_context()
    context.route("**/openapi.json", lambda route: route.fulfill(json=document))
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{server.port}/docs")
    commands = []
    for name in ("form", "json"):
        operation = page.locator(f"#operations-T-{name}")
        operation.locator(".opblock-summary").click()
        operation.get_by_role("button", name="Try it out").click()
        if name == "form":
            operation.get_by_role("button", name="Execute").click()
            expect(operation.locator("[data-property-name=prompt] .invalid")).to_be_visible()
            operation.locator("[data-property-name=prompt] input").fill("a red house")
            operation.locator("[data-property-name=image] input").set_input_files(EXAMPLE / "scene.png")
            several = operation.locator("[data-property-name='image[]']")
            several.get_by_role("button").first.click()
            several.locator("input").set_input_files(EXAMPLE / "mask.png")
        operation.get_by_role("button", name="Execute").click()
        commands.append(operation.locator(".curl").inner_text())
    context.close()

    parts = re.findall(r"-F '([^']*)'", commands[0])
    assert sorted(parts) == [
        "image=@scene.png;type=image/png",
        "image[]=@mask.png;type=image/png",
        "prompt=a red house",
    ]
    assert re.search(r'-d \'{\s*"steps": 20\s*}\'', commands[1])


def test_a_refusal_is_shown_with_its_field(browser: Browser, server: LiveServer) -> None:
    """A form without an image is sent, and the problem document says what is missing."""
    with opened(browser, server, "operations-Inpainting-inpaint") as docs:
        assert docs.execute().status == 422
        expect(docs.answer).to_contain_text("The image is missing.")
        expect(docs.answer).to_contain_text("x-should-retry")


def test_keys_are_sent_where_they_are_asked_for(browser: Browser) -> None:
    """With the documentation open and the rest behind keys, a reader authorises the page and can go on."""
    with (
        serving(docs_access="open", api_keys="a-key-of-a-client") as server,
        opened(browser, server, "operations-Inpainting-inpaint") as docs,
    ):
        docs.attach("image", "scene.png")
        docs.attach("mask", "mask.png")
        assert docs.execute().status == 401
        docs.page.locator(".auth-wrapper .authorize").first.click()
        bearer = docs.page.locator(".auth-container").filter(has_text="bearer")
        bearer.locator("input").fill("a-key-of-a-client")
        bearer.get_by_role("button", name="Apply credentials").click()
        docs.page.locator(".close-modal").click()
        assert docs.execute().status == 200
        expect(docs.answer.locator("img")).to_be_visible()


def test_an_idempotency_key_is_sent_where_there_is_one(browser: Browser, server: LiveServer) -> None:
    """The header's field is part of the page; the same request again gets the first answer."""
    with opened(browser, server, "operations-Inpainting-inpaint") as docs:
        docs.attach("image", "scene.png")
        docs.attach("mask", "mask.png")
        assert "idempotent-replayed" not in docs.execute().headers
        docs.operation.locator("tr[data-param-name='Idempotency-Key'] input").fill("from-the-page")
        assert "idempotent-replayed" not in docs.execute().headers
        assert docs.execute().headers["idempotent-replayed"] == "true"
        assert docs.complaints == []


@pytest.mark.parametrize(("scheme", "is_dark"), [("light", False), ("dark", True)])
def test_colours_are_the_readers(browser: Browser, server: LiveServer, scheme: str, is_dark: bool) -> None:
    """Dark where the reader's system is dark, and bright where it is bright."""
    with opened(browser, server, "operations-Models_and_adapters-models", color_scheme=scheme) as docs:
        colour = docs.page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        text = docs.page.locator(".info .title").evaluate("title => getComputedStyle(title).color")

        def brightness(colour: str) -> int:
            red, green, blue, *alpha = (float(part) for part in re.findall(r"[\d.]+", colour))
            return 765 if alpha == [0.0] else round(red + green + blue)  # Nothing painted is the white canvas.

        assert (brightness(colour) < brightness(text)) is is_dark


def test_without_scripts_the_page_can_be_read(browser: Browser, server: LiveServer) -> None:
    """A browser that runs no scripts shows the whole API."""
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{server.port}/docs")
    expect(page.get_by_role("heading", name="POST /v1/inpaint")).to_be_visible()
    expect(page.get_by_role("cell", name="guidance_scale").first).to_be_visible()
    context.close()


def test_a_phone_needs_no_sideways_scrolling(browser: Browser, server: LiveServer) -> None:
    """On a narrow window the form is as wide as the window."""
    with opened(browser, server, "operations-Inpainting-inpaint") as docs:
        docs.page.set_viewport_size({"width": 390, "height": 844})
        assert docs.page.evaluate("document.documentElement.scrollWidth") <= 390
