"""`inpaint-service inpaint` as a process, against a real server: a folder of pictures."""

import json
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.http.client_process import Client, files_in
from tests.http.serving import SIZE, LiveServer, eventually, pixels_of, png, serving, square_mask

INPAINT_200 = 'inpaint_requests_total{code="200",endpoint="/v1/inpaint"}'


def picture(number: int) -> NDArray[np.uint8]:
    return np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


def fill(folder: Path, count: int) -> None:
    """Folders `in` and `masks` with so many pictures and their masks."""
    for name in ("in", "masks"):
        (folder / name).mkdir()
    for number in range(count):
        (folder / "in" / f"p{number}.png").write_bytes(png(picture(number)))
        (folder / "masks" / f"p{number}.png").write_bytes(png(square_mask()))


FOLDERS = ("--image", "in", "--mask", "masks", "-o", "out", "--seed", "7")
USUAL = (*FOLDERS, "--prompt", "a red house")


def test_each_picture_is_painted_with_its_mask(tmp_path: Path, server: LiveServer) -> None:
    """Pictures and masks are paired by name, whatever their suffixes; `--seed` is each one's; a summary is said."""
    client = Client(server.port, tmp_path)
    fill(tmp_path, 3)
    (tmp_path / "masks" / "p2.png").rename(tmp_path / "masks" / "p2.WebP")
    (tmp_path / "masks" / "p2.WebP").write_bytes(png(np.full((SIZE, SIZE), 255, np.uint8)))
    (tmp_path / "in" / "notes.txt").write_text("no picture")

    run = client.run_bare(*USUAL, "--json", "out.jsonl")

    assert (run.returncode, run.stderr) == (0, b"inpaint-service: 3 painted\n")
    assert files_in(tmp_path / "out") == ["p0.png", "p1.png", "p2.png"]
    for number, mask in enumerate([square_mask(), square_mask(), np.full((SIZE, SIZE), 255, np.uint8)]):
        expected = server.inpaint(image=png(picture(number)), mask=png(mask)).content
        assert (tmp_path / "out" / f"p{number}.png").read_bytes() == expected
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(answer["images"][0]["file"] for answer in answers) == ["out/p0.png", "out/p1.png", "out/p2.png"]
    assert {answer["images"][0]["seed"] for answer in answers} == {7}


def test_bad_pictures_cost_the_others_nothing(tmp_path: Path, server: LiveServer) -> None:
    """What is no picture or lacks a mask is listed; all others are painted, several images each numbered; status 3."""
    client = Client(server.port, tmp_path)
    fill(tmp_path, 6)
    (tmp_path / "in" / "p1.png").write_bytes(b"junk")
    (tmp_path / "masks" / "p2.png").write_bytes(png(square_mask(SIZE, SIZE // 2)))
    (tmp_path / "masks" / "p3.png").unlink()
    (tmp_path / "masks" / "stray.png").write_bytes(png(square_mask()))

    run = client.run_bare(*USUAL, "--output-format", "jpeg", "--num-images-per-prompt", "2")

    errors = run.stderr.decode()
    assert run.returncode == 3
    assert "p1.png: 422 invalid_image: image: " in errors
    assert "p2.png: 422 mask_mismatch: mask: " in errors
    assert "p3.png: no mask of this name" in errors
    assert "stray.png: no picture of this name" in errors
    assert errors.endswith("inpaint-service: 3 painted, 2 failed\n")
    assert files_in(tmp_path / "out") == [f"p{number}-{index}.jpg" for number in (0, 4, 5) for index in (0, 1)]


def test_flagged_pictures_are_written_and_said(tmp_path: Path, server: LiveServer) -> None:
    """Status 4 where something was flagged and nothing failed."""
    client = Client(server.port, tmp_path)
    fill(tmp_path, 1)
    run = client.run_bare(*FOLDERS, "--prompt", "nsfw", "--quiet")
    assert run.returncode == 4
    assert run.stderr == b"inpaint-service: p0.png: flagged by the safety checker\n"
    assert files_in(tmp_path / "out") == ["p0.png"]


def test_one_mask_for_all_and_none_at_all(tmp_path: Path, server: LiveServer) -> None:
    """A mask that is a file is every picture's; without one the alpha of each is."""
    client = Client(server.port, tmp_path)
    fill(tmp_path, 2)
    flags = ("--image", "in", "--prompt", "a red house", "--seed", "7")
    assert client.run_bare(*flags, "--mask", "mask.png", "-o", "one").returncode == 0
    expected = server.inpaint(image=png(picture(1))).content
    assert (tmp_path / "one" / "p1.png").read_bytes() == expected
    transparent = np.dstack([picture(0), 255 - square_mask()])
    (tmp_path / "in" / "p0.png").write_bytes(png(transparent))
    run = client.run_bare(*flags, "-o", "none")
    assert run.returncode == 3  # The other one is not transparent anywhere.
    assert files_in(tmp_path / "none") == ["p0.png"]


def test_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    """After SIGKILL every file in the output folder is whole; the same command paints the rest, and only that."""
    with serving(model="fake?step_seconds=0.05") as live:
        client = Client(live.port, tmp_path)
        fill(tmp_path, 8)
        out = tmp_path / "out"
        started = client.start_bare(*USUAL, "--concurrency", "1")
        eventually(lambda: out.is_dir() and len(list(out.glob("p*.png"))) >= 2)
        started.kill()
        client.finish(started)
        there = {path.name: path.stat().st_mtime_ns for path in out.glob("p*.png")}
        assert 2 <= len(there) < 8
        for name in there:
            assert pixels_of((out / name).read_bytes()).shape == (SIZE, SIZE, 3)
        (out / ".inpaint-0123.part").write_bytes(b"what a kill in the midst of writing leaves")
        eventually(lambda: live.metric("inpaint_in_flight") == 0)
        painted = live.metric("inpaint_images_total")

        run = client.run_bare(*USUAL)

        assert run.returncode == 0
        assert f"{8 - len(there)} painted, {len(there)} there already".encode() in run.stderr
        assert live.metric("inpaint_images_total") - painted == 8 - len(there)
    assert files_in(out) == [f"p{number}.png" for number in range(8)]
    assert {name: (out / name).stat().st_mtime_ns for name in there} == there


def test_overwrite_paints_all_anew(tmp_path: Path, server: LiveServer) -> None:
    """What is there is left alone without `--overwrite`, and painted anew with it."""
    client = Client(server.port, tmp_path)
    fill(tmp_path, 2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "p0.png").write_bytes(b"mine")
    assert client.run_bare(*USUAL).returncode == 0
    assert (tmp_path / "out" / "p0.png").read_bytes() == b"mine"
    assert client.run_bare(*USUAL, "--overwrite").returncode == 0
    assert pixels_of((tmp_path / "out" / "p0.png").read_bytes()).shape == (SIZE, SIZE, 3)


def test_concurrency_is_kept_to(tmp_path: Path) -> None:
    """So many requests are under way as `--concurrency` says, and no more."""
    gate = tmp_path / "gate"
    with serving(model=f"fake?gate={gate}", max_images=8) as live:
        client = Client(live.port, tmp_path)
        fill(tmp_path, 7)
        started = client.start_bare(*FOLDERS, "--prompt", "hold", "--concurrency", "3")
        eventually(lambda: live.metric("inpaint_in_flight") == 3)
        # Seven are wanted, and the worker has room for eight: more would be here by the time of another request.
        assert live.inpaint().status_code == 200
        assert live.metric("inpaint_in_flight") + live.metric("inpaint_queue_depth") == 3
        gate.touch()
        assert client.finish(started)[0] == 0
    assert len(files_in(tmp_path / "out")) == 7


def test_interrupt_says_how_to_go_on(tmp_path: Path) -> None:
    """Ctrl-C ends a run with status 130 and a summary; nothing half is left."""
    with serving(model=f"fake?gate={tmp_path / 'gate'}") as live:
        client = Client(live.port, tmp_path)
        fill(tmp_path, 3)
        started = client.start_bare(*FOLDERS, "--prompt", "hold", "--concurrency", "2")
        eventually(lambda: live.metric("inpaint_in_flight") == 2)
        started.send_signal(signal.SIGINT)
        status, _, errors = client.finish(started)
        (tmp_path / "gate").touch()
    assert status == 130
    assert errors == b"inpaint-service: interrupted; 3 not tried; the same command goes on from here\n"
    assert files_in(tmp_path / "out") == []


def test_refused_key_ends_the_run(tmp_path: Path) -> None:
    """What would befall every picture is not tried with every picture."""
    with serving(api_keys="sesame") as live:
        client = Client(live.port, tmp_path)
        fill(tmp_path, 9)
        run = client.run_bare(*USUAL, "--concurrency", "2")
        refused = live.client.get("/metrics", headers={"X-API-Key": "sesame"}).text
    assert run.returncode == 3
    assert b"401 unauthorized" in run.stderr
    assert b"2 failed, 7 not tried" in run.stderr
    assert 'inpaint_requests_total{code="401",endpoint="/v1/inpaint"} 2.0' in refused


def test_service_that_is_gone_ends_the_run(tmp_path: Path) -> None:
    """A service that cannot be reached is status 1, after a few tries and not after those of all pictures."""
    client = Client(9, tmp_path)
    fill(tmp_path, 5)
    run = client.run_bare(*USUAL, "--concurrency", "1", "--retries", "1")
    assert run.returncode == 1
    assert run.stderr.count(b"cannot be reached") == 1
    assert b"1 failed, 4 not tried" in run.stderr


def test_request_whose_connection_broke_is_painted_once(tmp_path: Path) -> None:
    """Sent again, it gets the answer of the first: of two requests one was painted, and one was its repetition."""
    gate = tmp_path / "gate"
    with serving(model=f"fake?gate={gate}") as live, breaking_once(live) as port:
        client = Client(port, tmp_path)
        fill(tmp_path, 1)
        started = client.start_bare(*FOLDERS, "--prompt", "hold")
        eventually(lambda: live.metric('inpaint_requests_total{code="409",endpoint="/v1/inpaint"}') >= 1)
        gate.touch()
        status, _, errors = client.finish(started)
        assert (status, errors) == (0, b"inpaint-service: 1 painted\n")
        assert live.metric("inpaint_images_total") == 1
        expected = live.inpaint(image=png(picture(0)), prompt="hold").content
    assert (tmp_path / "out" / "p0.png").read_bytes() == expected


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--image", "empty", "-o", "out"), "no picture in empty"),
        (("--image", "in", "-o", "in"), "mixed"),
        (("--image", "in", "-o", "-"), "standard output"),
        (("--image", "in", "-o", "mask.png"), "cannot be made"),
        (("--image", "in", "-o", "out", "--latents", "missing.npy"), "--latents"),
    ],
)
def test_wrong_usage_is_status_2(tmp_path: Path, flags: tuple[str, ...], named: str) -> None:
    """Folders that cannot be read from or written to are known before anything is sent."""
    client = Client(9, tmp_path)
    fill(tmp_path, 1)
    (tmp_path / "empty").mkdir()
    run = client.run_bare(*flags, "--prompt", "a red house")
    assert run.returncode == 2
    assert named in run.stderr.decode()


# --- a connection that breaks -------------------------------------------------------------


@contextmanager
def breaking_once(live: LiveServer) -> Iterator[int]:
    """The port of a way to the server that breaks the first connection once its request is being painted."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_forward, args=(listener, live), daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(timeout=30)
    assert not thread.is_alive()


def _forward(listener: socket.socket, live: LiveServer) -> None:
    is_first = True
    with suppress(OSError):  # The listener is closed.
        while True:
            theirs, _ = listener.accept()
            ours = socket.create_connection(("127.0.0.1", live.port))
            ways = [threading.Thread(target=_copy, args=pair, daemon=True) for pair in ((theirs, ours), (ours, theirs))]
            for way in ways:
                way.start()
            if is_first:
                eventually(lambda: live.metric("inpaint_in_flight") == 1)
                is_first = False
                for connection in (theirs, ours):
                    with suppress(OSError):  # A thread was faster.
                        connection.shutdown(socket.SHUT_RDWR)


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_RDWR)
