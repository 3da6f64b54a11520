"""`inpaint-service inpaint` as a process, against a real server: one picture."""

import base64
import json
import os
import pty
import signal
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.http.client_process import Client, files_in
from tests.http.serving import (
    CLOSING,
    LiveServer,
    eventually,
    multipart_head,
    pixels_of,
    serving,
    usual_parts,
)

CANCELLED = 'inpaint_cancelled_total{reason="disconnect"}'


@pytest.fixture
def client(tmp_path: Path, server: LiveServer) -> Client:
    """The command, with the usual picture and mask, on the shared server."""
    return Client(server.port, tmp_path)


def test_file_is_the_service_s_own_answer(client: Client, server: LiveServer) -> None:
    """What is written equals, byte for byte, what another HTTP client gets; nothing is said, nothing else is left."""
    run = client.run("-o", "out.png")
    assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")
    assert (client.folder / "out.png").read_bytes() == server.inpaint().content
    assert files_in(client.folder) == ["image.png", "mask.png", "out.png"]


def test_standard_output(client: Client, server: LiveServer) -> None:
    """`-o -` writes the picture, and nothing else, to standard output."""
    run = client.run("-o", "-")
    assert (run.returncode, run.stderr) == (0, b"")
    assert run.stdout == server.inpaint().content


@pytest.mark.parametrize(("name", "named", "sent"), [("o.JPG", None, "jpeg"), ("o.bin", "webp", "webp")])
def test_format_follows_the_name(client: Client, server: LiveServer, name: str, named: str | None, sent: str) -> None:
    """The suffix asks for the format, unless `--output-format` does."""
    run = client.run("-o", name, *(["--output-format", named] if named else []))
    assert run.returncode == 0, run.stderr
    assert (client.folder / name).read_bytes() == server.inpaint(output_format=sent).content


def test_several_images_are_numbered(client: Client, server: LiveServer) -> None:
    """Image i goes to out-i.png, in the answer's order."""
    run = client.run("-o", "out.png", "--num-images-per-prompt", "3")
    assert run.returncode == 0, run.stderr
    answer = server.inpaint({"Accept": "application/json"}, num_images_per_prompt="3").json()
    for index, image in enumerate(answer["images"]):
        assert (client.folder / f"out-{index}.png").read_bytes() == base64.b64decode(image["b64_json"])
    assert files_in(client.folder) == ["image.png", "mask.png", "out-0.png", "out-1.png", "out-2.png"]


def test_metadata_is_the_answer_without_its_images(client: Client) -> None:
    """`--json` has parameters, seeds, flags and timings, and where each image is; pictures are in their files alone."""
    assert client.run("-o", "out.png", "--num-images-per-prompt", "2", "--json", "out.json").returncode == 0
    answer = json.loads((client.folder / "out.json").read_text())
    assert set(answer) == {"id", "created", "model", "parameters", "images", "timings", "batch"}
    assert answer["parameters"]["prompt"] == "a red house"
    assert [(image["seed"], image["file"], image["nsfw_content_detected"]) for image in answer["images"]] == [
        (7, "out-0.png", False),
        (8, "out-1.png", False),
    ]
    assert not any("b64_json" in image for image in answer["images"])


def test_fields_and_files_are_sent(client: Client) -> None:
    """Flags of every type reach the service: numbers, switches, JSON, text beyond ASCII, and files of numbers."""
    latents = np.zeros((1, 4, 8, 8), np.float32)
    np.save(client.folder / "latents.npy", latents)
    flags = ["--prompt", "ein Häuschen 🏠\u2028mit Zeile", "--guidance-scale", "3.5", "--no-composite", "--mask-invert"]
    flags += ["--timesteps", "[900, 400]", "--scheduler", "euler", "--latents", "latents.npy", "--json", "-"]
    run = client.run("-o", "out.png", *flags)
    assert run.returncode == 0, run.stderr
    parameters = json.loads(run.stdout)["parameters"]
    assert parameters["prompt"] == "ein Häuschen 🏠\u2028mit Zeile"
    assert (parameters["guidance_scale"], parameters["composite"], parameters["mask_invert"]) == (3.5, False, True)
    assert (parameters["timesteps"], parameters["scheduler"]) == ([900, 400], "euler")
    assert parameters["tensors"] == ["latents"]


def test_refused_field_is_named(client: Client) -> None:
    """A 4xx exits with 3, and each field at fault is on standard error in one line; there is no output."""
    run = client.run("-o", "out.png", "--guidance-scale", "99", "--seed", "-1")
    assert run.returncode == 3
    (line,) = run.stderr.decode().splitlines()
    assert line.startswith("inpaint-service: 422 out_of_range: guidance_scale: ")
    assert "; seed: " in line
    assert files_in(client.folder) == ["image.png", "mask.png"]


def test_flagged_picture_is_written_as_it_came(client: Client) -> None:
    """A flagged result is the service's black picture; it is said, and the exit status is 4."""
    run = client.run("-o", "out.png", "--prompt", "nsfw")
    assert run.returncode == 4
    assert b"flagged the image" in run.stderr
    assert not pixels_of((client.folder / "out.png").read_bytes())[16:32, 16:32].any()


def test_device_as_output_stays_a_device(client: Client) -> None:
    """An output that is no file, such as /dev/stdout, is written to and not replaced."""
    run = client.run("-o", "/dev/stdout", "--output-format", "png")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(b"\x89PNG")


def test_nobody_there_is_status_1(client: Client) -> None:
    """A service that cannot be reached is one line with its address, and status 1; a password in it is not shown."""
    run = client.run("-o", "out.png", "--url", "http://me:sesame@127.0.0.1:9", "--retries", "1")
    assert run.returncode == 1
    assert b"http://127.0.0.1:9 cannot be reached" in run.stderr
    assert b"sesame" not in run.stderr
    assert b"Traceback" not in run.stderr


def test_failure_of_the_service_is_status_1(client: Client) -> None:
    """A request that the service fails to paint, once it has started, is status 1 with the service's code."""
    run = client.run("-o", "out.png", "--prompt", "fail")
    assert run.returncode == 1
    assert b"500 internal: " in run.stderr


def test_something_else_at_the_address(client: Client) -> None:
    """A server that is not this service is a 4xx in one line."""
    run = client.run("-o", "out.png", "--url", f"http://127.0.0.1:{client.port}/elsewhere")
    assert run.returncode == 3
    assert b"404 not_found" in run.stderr


@pytest.mark.parametrize("source", ["file", "environment", "none", "wrong"])
def test_key_comes_from_a_file_or_the_environment(tmp_path: Path, source: str) -> None:
    """The key is read from `--key-file` or INPAINT_API_KEY and shown nowhere; without the right one the status is 3."""
    key = "sesame-Straße"
    with serving(api_keys=key) as live:
        client = Client(live.port, tmp_path)
        (tmp_path / "key").write_text(f"{key}\n")
        flags = ["--key-file", "key"] if source == "file" else []
        environment = {"environment": {"INPAINT_API_KEY": key}, "wrong": {"INPAINT_API_KEY": "tahini"}}.get(source, {})
        run = client.run("-o", "out.png", *flags, environment=environment)
    assert run.returncode == (0 if source in ("file", "environment") else 3), run.stderr
    assert (b"401 unauthorized" in run.stderr) == (source in ("none", "wrong"))
    assert not any(word in run.stderr for word in (b"sesame", b"tahini"))


def test_address_comes_from_the_environment(server: LiveServer, tmp_path: Path) -> None:
    """INPAINT_URL names the service where `--url` does not."""
    client = Client(server.port, tmp_path, has_url=False)
    run = client.run("-o", "out.png", environment={"INPAINT_URL": f"http://127.0.0.1:{server.port}"})
    assert run.returncode == 0, run.stderr


def test_full_queue_is_waited_for(tmp_path: Path) -> None:
    """A 429 is tried again after its `Retry-After`, and then painted."""
    gate = tmp_path / "gate"
    with serving(model=f"fake?gate={gate}", max_images=1, queue_size=1) as live, full(live):
        client = Client(live.port, tmp_path)
        started = client.start("-o", "out.png")
        eventually(lambda: live.metric('inpaint_requests_total{code="429",endpoint="/v1/inpaint"}') >= 1)
        gate.touch()
        assert client.finish(started)[0] == 0
    assert (tmp_path / "out.png").exists()


def test_full_queue_without_end_is_status_5(tmp_path: Path) -> None:
    """Retries are bounded: what is still refused with 429 then is status 5."""
    gate = tmp_path / "gate"
    with serving(model=f"fake?gate={gate}", max_images=1, queue_size=1) as live, full(live):
        run = Client(live.port, tmp_path).run("-o", "out.png", "--retries", "1")
        assert live.metric('inpaint_requests_total{code="429",endpoint="/v1/inpaint"}') == 2
        gate.touch()
    assert run.returncode == 5
    assert b"429 overloaded: " in run.stderr


def test_service_that_is_not_ready_is_status_5(tmp_path: Path) -> None:
    """A 503 that does not pass is status 5."""
    with serving(model="fake?load_forever=1", wait_ready=False) as live:
        run = Client(live.port, tmp_path).run("-o", "out.png", "--retries", "0")
    assert run.returncode == 5
    assert b"503 not_ready: " in run.stderr


def test_interrupt_cancels(tmp_path: Path) -> None:
    """Ctrl-C hangs up, upon which the service cancels the request; status 130, no traceback, no file."""
    with serving(model=f"fake?gate={tmp_path / 'gate'}") as live:
        client = Client(live.port, tmp_path)
        started = client.start("-o", "out.png", "--prompt", "hold")
        eventually(lambda: live.metric("inpaint_in_flight") == 1)
        started.send_signal(signal.SIGINT)
        status, _, errors = client.finish(started)
        assert (status, errors) == (130, b"")
        eventually(lambda: live.metric(CANCELLED) == 1)
        assert live.metric("inpaint_images_total") == 0
    assert files_in(tmp_path) == ["image.png", "mask.png"]


@pytest.mark.parametrize("flags", [[], ["--quiet"]])
def test_progress_is_for_terminals(client: Client, flags: list[str]) -> None:
    """On a terminal the steps are shown as they are done; not with `--quiet`, and to no file (see above)."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    started = client.start("-o", "out.png", "--prompt", "slow", *flags, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 4096):
            shown += data
    except OSError:  # The other end is closed.
        pass
    os.close(ours)
    assert started.wait(timeout=30) == 0
    if flags:
        assert shown == b""
    else:
        assert b"painting" in shown
        assert b"/40" in shown


@contextmanager
def full(live: LiveServer) -> Iterator[None]:
    """A service without a place left, until its gate opens: two requests are in its worker, one is in the queue."""
    body = usual_parts().replace(b"a red house", b"hold") + CLOSING
    connections = []
    for count in range(1, 4):
        connections.append(live.raw(multipart_head(f"Content-Length: {len(body)}"), body))
        eventually(lambda count=count: live.metric("inpaint_in_flight") + live.metric("inpaint_queue_depth") == count)
    try:
        yield
    finally:
        for connection in connections:
            connection.close()
