"""Device memory as workers report it."""

import sys

import numpy as np
import pytest
import torch

from service.worker.memory import memory_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of a process's memory in /proc")
def test_a_cpu_worker_reports_what_its_process_has() -> None:
    """All that has been touched, and what is let go no longer."""
    size = 256 * 1024 * 1024
    (kind, before), *others = memory_bytes(torch.device("cpu")).items()
    assert kind == "resident"
    assert not others
    held = np.ones(size, np.uint8)
    with_it = memory_bytes(torch.device("cpu"))["resident"]
    assert 0.9 * size < with_it - before < 1.1 * size
    del held
    assert memory_bytes(torch.device("cpu"))["resident"] < with_it - 0.9 * size
