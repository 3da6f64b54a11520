"""`inpaint-service inpaint` as a process, and what it works on."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.http.serving import png, scene, square_mask

ROOT = Path(__file__).parents[2]


def inputs(folder: Path) -> None:
    """The usual picture and mask."""
    (folder / "image.png").write_bytes(png(scene()))
    (folder / "mask.png").write_bytes(png(square_mask()))


def files_in(folder: Path) -> list[str]:
    """Every file of a folder, hidden ones too; the tests' own gate and key apart."""
    return sorted(path.name for path in folder.iterdir() if path.name not in ("gate", "key"))


class Client:
    """The command, run in a folder of its own.

    Args:
        port: Of the service.
        folder: Where it runs; the usual picture and mask are put there.
        has_url: Whether it is told where the service is.
    """

    def __init__(self, port: int, folder: Path, *, has_url: bool = True) -> None:
        self.port = port
        self.folder = folder
        self._url = ["--url", f"http://127.0.0.1:{port}"] if has_url else []
        inputs(folder)

    def start(
        self, *flags: str, environment: Mapping[str, str] | None = None, stderr: int = subprocess.PIPE
    ) -> subprocess.Popen[bytes]:
        """Start it with the usual picture, mask, prompt and seed; later flags win over earlier ones."""
        usual = ["--image", "image.png", "--mask", "mask.png", "--prompt", "a red house", "--seed", "7"]
        return self.start_bare(*usual, *flags, environment=environment, stderr=stderr)

    def start_bare(
        self, *flags: str, environment: Mapping[str, str] | None = None, stderr: int = subprocess.PIPE
    ) -> subprocess.Popen[bytes]:
        """Start it with these flags alone."""
        others = {name: value for name, value in os.environ.items() if not name.startswith("INPAINT_")}
        return subprocess.Popen(
            [sys.executable, "-m", "service", "inpaint", *self._url, *flags],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=others | {"PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"} | dict(environment or {}),
            # Where the tests run in the background, a shell may have had SIGINT ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509 - no locks
        )

    def finish(self, started: subprocess.Popen[bytes]) -> tuple[int, bytes, bytes]:
        """Wait for it: status, standard output, standard error."""
        try:
            output, errors = started.communicate(timeout=60)
        finally:
            started.kill()
        return started.returncode, output, errors

    def run(self, *flags: str, **options: Any) -> "subprocess.CompletedProcess[bytes]":
        """`start` and `finish`."""
        return self._completed(self.start(*flags, **options))

    def run_bare(self, *flags: str, **options: Any) -> "subprocess.CompletedProcess[bytes]":
        """`start_bare` and `finish`."""
        return self._completed(self.start_bare(*flags, **options))

    def _completed(self, started: subprocess.Popen[bytes]) -> "subprocess.CompletedProcess[bytes]":
        status, output, errors = self.finish(started)
        return subprocess.CompletedProcess(started.args, status, output, errors)
