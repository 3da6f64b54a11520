"""Every example in the README does what it says, pasted as it stands there, against a service with the demo model."""

import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from PIL import Image, ImageChops
from playwright.sync_api import Browser

from tests.bundled_service import serving_bundled
from tests.examples.blocks import README, Block, blocks_of

ROOT = README.parent
EXAMPLE = ROOT / "service" / "api" / "playground" / "example"
PENCIL = ROOT / "service" / "worker" / "models" / "loras" / "pencil.safetensors"
ADDRESS = "http://127.0.0.1:8000"
ADMIN_KEY = "an-administrators-key"
SECONDS = 120
"""Far beyond what any example takes."""

BLOCKS = blocks_of(README.read_text())
RUN = [block for block in BLOCKS if block.excuse is None]

_NAME = r"([\w.-]+\.(?:png|jpg|webp))"
_OUTPUT = re.compile(rf'(?:-o |writeFile\("|\.save\("){_NAME}|open\("{_NAME}", "wb"')


def named(block: Block) -> str:
    return f"{block.language}-line-{block.line}"


@dataclass(frozen=True, slots=True)
class Desk:
    """Where a reader tries the examples.

    Attributes:
        folder: With pictures of the names that the examples use, and what the repository has beside its README.
        address: Of the service.
        site: Address of a web site whose pages the service lets in; it serves the folder.
    """

    folder: Path
    address: str
    site: str

    def run(self, *command: str) -> None:
        """Run a command in the folder; it must succeed, and write the pictures that it names."""
        outputs = [self.folder / (match[1] or match[2]) for match in _OUTPUT.finditer(command[-1])]
        for output in outputs:
            output.unlink(missing_ok=True)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environ = {**os.environ, "PATH": path, "ADMIN_KEY": ADMIN_KEY, "INPAINT_URL": self.address, "NO_PROXY": "*"}
        done = subprocess.run(
            command, cwd=self.folder, env=environ, capture_output=True, text=True, timeout=SECONDS, check=False
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        for output in outputs:
            with Image.open(output) as picture:
                picture.load()


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    folder = tmp_path_factory.mktemp("desk")
    for name in ("service", "training", "benchmarks", "openapi.yaml"):
        (folder / name).symlink_to(ROOT / name)
    Image.open(EXAMPLE / "scene.png").save(folder / "photo.jpg", quality=95)
    shutil.copy(EXAMPLE / "scene.png", folder / "photo.png")
    shutil.copy(EXAMPLE / "mask.png", folder / "mask.png")
    mask = Image.open(EXAMPLE / "mask.png").convert("L")
    alpha = mask.convert("RGBA")
    alpha.putalpha(ImageChops.invert(mask))
    alpha.save(folder / "mask-alpha.png")
    for name in ("photos", "masks"):
        (folder / name).mkdir()
        for stem in ("one", "two"):
            shutil.copy(EXAMPLE / ("scene.png" if name == "photos" else "mask.png"), folder / name / f"{stem}.png")
    shutil.copy(PENCIL, folder / "pencil.safetensors")
    (folder / "favicon.ico").touch()  # Browsers ask for one.
    loras = folder / "loras"
    loras.mkdir()
    shutil.copy(PENCIL, loras / "pencil.safetensors")

    handler = partial(_Quiet, directory=str(folder))
    site = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    origin = f"http://127.0.0.1:{site.server_port}"
    flags = ["--lora-dir", str(loras), "--admin-keys", ADMIN_KEY, "--cors-origins", origin]
    try:
        with serving_bundled(*flags) as address:
            yield Desk(folder, address, origin)
    finally:
        site.shutdown()
        site.server_close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing."""


def code_for(desk: Desk, block: Block) -> str:
    """The example, with the address of this service."""
    return block.code.replace(ADDRESS, desk.address)


@pytest.mark.parametrize("block", [block for block in RUN if block.language == "bash"], ids=named)
def test_commands(desk: Desk, block: Block) -> None:
    """A shell takes them as pasted, every command in them succeeds, and pictures are where they say."""
    if "curl" in block.code and shutil.which("curl") is None:
        pytest.skip("there is no curl on this machine")
    desk.run("bash", "-euo", "pipefail", "-c", code_for(desk, block))


@pytest.mark.parametrize("block", [block for block in RUN if block.language == "python"], ids=named)
def test_python(desk: Desk, block: Block) -> None:
    """They run as scripts."""
    desk.run(sys.executable, "-W", "error", "-c", code_for(desk, block))


@pytest.mark.parametrize("block", [block for block in RUN if block.language == "javascript"], ids=named)
def test_javascript(desk: Desk, block: Block) -> None:
    """They run as modules of Node.js."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no Node.js on this machine")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout
    if int(version.removeprefix("v").partition(".")[0]) < 20:
        pytest.skip(f"Node.js {version.strip()} is older than the README asks for")
    desk.run(node, "--input-type=module", "-e", code_for(desk, block))


@pytest.mark.parametrize("block", [block for block in RUN if block.language == "html"], ids=named)
def test_pages(desk: Desk, browser: Browser, block: Block) -> None:
    """On a site that the service lets in, they show each step and then the picture, and nothing else goes wrong."""
    (desk.folder / "page.html").write_text(code_for(desk, block))
    page = browser.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(f"{desk.site}/page.html")
    page.set_input_files("input[name=image]", desk.folder / "photo.jpg")
    page.set_input_files("input[name=mask]", desk.folder / "mask.png")
    page.evaluate("""() => {
        window.said = [];
        new MutationObserver(() => window.said.push(document.querySelector("p").textContent))
            .observe(document.querySelector("p"), { childList: true });
    }""")
    page.click("button")
    page.wait_for_function("document.querySelector('p').textContent.startsWith('seed ')", timeout=1000 * SECONDS)
    page.wait_for_function("document.querySelector('img').naturalWidth === 256")
    said = page.evaluate("window.said")
    page.close()
    assert complaints == []
    assert any(text.startswith("step ") for text in said)


def test_blocks_are_told_apart() -> None:
    """Each block has its language, line and excuse; what is in other languages is no example."""
    text = "a\n```bash\none\n```\n<!-- not run: why -->\n```python\ntwo\n```\n<!-- x -->\n```json\nthree\n```\n"
    assert blocks_of(text) == [Block("bash", "one\n", 2, None), Block("python", "two\n", 6, "why")]


def test_excuses_are_few_and_say_why() -> None:
    """The README has examples in every language, and most of them are run."""
    assert {block.language for block in RUN} >= {"bash", "python"}
    excuses = [block.excuse for block in BLOCKS if block.excuse is not None]
    assert all(excuses)
    assert len(excuses) < len(RUN)
