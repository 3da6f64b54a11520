"""A checkpoint to measure on where no trained one is at hand."""

import subprocess
import sys
from pathlib import Path

from benchmarks.servers import ROOT


def make_checkpoint(folder: Path, *, is_tiny: bool) -> Path:
    """Write one of random weights, see `benchmarks.synthetic`; returns the folder.

    In a process of its own: who asks may have no use for torch, or not want its settings changed.
    """
    command = [sys.executable, "-m", "benchmarks.synthetic", str(folder), *(["--tiny"] if is_tiny else [])]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder
