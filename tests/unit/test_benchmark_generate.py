"""The load generator from its command line to its figures, against a made-up server over a socket."""

import io
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import generate, plots
from tests.unit.benchmark_server import Reply, Request, png, serving

SIZE = 32
QUICK = ["--sizes", str(SIZE), "--steps", "4-6"]


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The command, with its exit status."""
    monkeypatch.setattr(sys, "argv", ["generate", *QUICK, *words])
    return generate.main()


def test_each_way_to_fail_is_counted_as_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal, a picture of the wrong size, no picture, and no answer in time: none of them passes for another."""
    trace = tmp_path / "trace.csv"
    trace.write_text("seconds,steps\n" + "".join(f"0,{steps}\n" for steps in range(1, 7)), encoding="utf-8")
    replies: dict[str, Reply | None] = {
        "1": (200, png(SIZE)),
        "2": (429, b"full"),
        "3": (200, png(SIZE * 2)),
        "4": (200, b"<html>"),
        "5": None,
        "6": (503, b"draining"),
    }
    output = tmp_path / "out.json"
    with serving(lambda request: replies[request.field("num_inference_steps")]) as url:
        words = ["--url", url, "--arrivals", "trace", "--trace", str(trace), "--timeout", "0.9", "--bound", "0.9"]
        assert run(monkeypatch, *words, "--json", str(output)) == 0
    document = json.loads(output.read_text(encoding="utf-8"))
    outcomes = {"good": 1, "wrong picture": 2, "status 429": 1, "status 503": 1, "timeout": 1}
    assert document["figures"]["outcomes"] == outcomes
    by_steps = {answer["num_steps"]: answer["outcome"] for answer in document["round"]["answers"]}
    assert [by_steps[steps] for steps in range(1, 7)] == [
        "good",
        "status 429",
        "wrong picture",
        "wrong picture",
        "timeout",
        "status 503",
    ]


def test_a_server_without_a_good_answer_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit status says that nothing was measured, and the first lines why."""
    with serving(lambda _: (500, b"broken")) as url:
        assert run(monkeypatch, "--url", url, "--rate", "100", "--seconds", "0.05") == 1
    assert "status 500: broken" in capsys.readouterr().err


def painted(request: Request, *, spoils: bool) -> Reply:
    """The upload with another pixel, outside the mask when it is to be spoiled."""
    with Image.open(io.BytesIO(request.upload)) as picture:
        answer = picture.convert("RGB")
    # Masks cover at most 55 % of the side: one of the corners is outside, another may not be.
    if spoils:
        for corner in ((0, 0), (SIZE - 1, 0), (0, SIZE - 1), (SIZE - 1, SIZE - 1)):
            answer.putpixel(corner, (0, 0, 0))
    buffer = io.BytesIO()
    answer.save(buffer, format="PNG")
    return 200, buffer.getvalue()


@pytest.mark.parametrize("spoils", [True, False])
def test_pixels_outside_the_mask_are_checked_when_asked_for(spoils: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One changed pixel outside the mask makes a picture a wrong one; the upload's own pixels pass."""
    with serving(lambda request: painted(request, spoils=spoils)) as url:
        words = ["--url", url, "--rate", "200", "--seconds", "0.05"]
        assert run(monkeypatch, *words, "--check-pixels") == (1 if spoils else 0)
        assert run(monkeypatch, *words) == 0


def test_a_closed_loop_sends_for_its_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The clients go on until the time is over, and no request is left without an answer."""
    with serving(lambda _: (200, png(SIZE))) as url:
        assert run(monkeypatch, "--url", url, "--arrivals", "closed", "--clients", "3", "--seconds", "0.1") == 0
    printed = capsys.readouterr().out
    assert " good)" in printed
    assert "latency, s: mean" in printed


def test_bursts_and_mixes_reach_the_wire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command line asks for is what a server is sent."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a lamp\n\n", encoding="utf-8")
    seen: list[Request] = []

    def reply(request: Request) -> Reply:
        seen.append(request)
        return 200, png(SIZE)

    with serving(reply) as url:
        words = ["--url", url, "--arrivals", "bursts", "--burst-size", "5", "--burst-interval", "0.1"]
        words += ["--rate", "0", "--seconds", "0.1", "--schedulers", "heun", "--guided-share", "0"]
        assert run(monkeypatch, *words, "--prompts", str(prompts)) == 0
    assert len(seen) == 5
    assert {request.line for request in seen} == {"POST /v1/inpaint HTTP/1.1"}
    assert {request.field("prompt") for request in seen} == {"a lamp"}
    assert {request.field("scheduler") for request in seen} == {"heun"}
    assert {request.field("guidance_scale") for request in seen} == {"1.0"}
    assert {int(request.field("num_inference_steps")) for request in seen} <= {4, 5, 6}


def test_a_plot_without_matplotlib_is_refused_before_the_load(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing package ends the command with what to install, not after minutes of load with a traceback."""
    monkeypatch.setattr(plots, "Figure", None)
    assert run(monkeypatch, "--url", "http://127.0.0.1:9", "--plot", "never.png") == 2
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["--steps", "0"], ["--steps", "9-3"], ["--sizes", "512:0"], ["--sizes", "wide"], ["--arrivals", "trace"]],
)
def test_command_lines_that_mean_nothing_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is sent for steps that descend, sizes without weight, or a trace that is not named."""
    with pytest.raises(SystemExit):
        generate.parse(["--url", "http://127.0.0.1:9", *words])
    assert "error" in capsys.readouterr().err


def test_sizes_and_steps_are_read_with_weights_and_ranges() -> None:
    """`512:3,768` weighs three to one, `20` is 20 to 20."""
    arguments = generate.parse(["--url", "u", "--sizes", "512:3,768", "--steps", "20"])
    assert arguments.sizes == {512: 3.0, 768: 1.0}
    assert arguments.steps == (20, 20)
