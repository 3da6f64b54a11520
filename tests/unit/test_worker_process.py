"""A worker process: where it prepares and finishes."""

import subprocess
import sys

import pytest

from service.worker.background import InlineJobs, ThreadedJobs
from service.worker.process import SWITCH_SECONDS, jobs_for


@pytest.fixture
def intervals(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What Python is told of how long a thread may keep the others waiting."""
    told: list[float] = []
    monkeypatch.setattr(sys, "setswitchinterval", told.append)
    return told


def test_cpu_does_all_on_the_loops_thread(intervals: list[float]) -> None:
    """Threads would only take the cores from the running batch."""
    assert isinstance(jobs_for("cpu", 60), InlineJobs)
    assert intervals == []


def test_other_devices_get_threads_that_give_way(intervals: list[float]) -> None:
    """The loop must be able to start the next step while another thread is in Python."""
    assert isinstance(jobs_for("cuda", 60), ThreadedJobs)
    assert intervals == [SWITCH_SECONDS]
    assert sys.getswitchinterval() > SWITCH_SECONDS


def test_process_says_its_first_word_before_torch_is_imported() -> None:
    """Its imports take seconds, which are part of loading."""
    code = "import sys, service.worker.process; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False"
