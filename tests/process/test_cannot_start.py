"""`serve` that cannot: one line that names what and where, and a status that is not 0."""

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.model.checkpoints import make_checkpoint
from tests.process.real_service import ROOT

pytestmark = pytest.mark.timeout(180)


def serve(*flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "service", "serve", "--devices", "cpu", "--log-format", "text", *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def assert_one_line(process: subprocess.Popen[str], *words: str) -> None:
    """The process has ended with status 1, and its last words hold these."""
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1, errors
    said = [line for line in errors.splitlines() if line.startswith("inpaint-service: ")]
    assert len(said) == 1, errors
    assert errors.rstrip().endswith(said[0])
    assert "Traceback" not in errors
    for word in words:
        assert word in said[0]


def test_model_that_is_missing_or_damaged(tmp_path: Path) -> None:
    """With a real worker: the line names the model and the file."""
    whole = make_checkpoint(tmp_path / "whole")
    cut = shutil.copytree(whole, tmp_path / "cut")
    weights = cut / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    running = {name: serve("--port", "0", "--model", str(tmp_path / name)) for name in ("missing", "cut")}
    assert_one_line(running["missing"], "missing")
    assert_one_line(running["cut"], "cut", "unet")


def test_port_that_is_taken() -> None:
    """The line names the address; nothing has been loaded by then."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_one_line(serve("--port", str(port)), f"cannot listen on 127.0.0.1:{port}", "in use")
