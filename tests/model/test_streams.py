"""Host and device: on a CPU, where nothing runs beside the host, streams and pace do nothing."""

import threading
import time

import pytest
import torch

from service.worker.pace import Pace
from service.worker.streams import ThreadStreams, note_use, send

CPU = torch.device("cpu")


def test_pace_waits_for_nothing_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tick that has been called is done, however long it was thought to take."""
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it slept"))
    pace = Pace(CPU)
    assert [pace.started(seconds) for seconds in (None, 0.0, 3600.0, None)] == [None] * 4


def test_streams_are_none_on_a_cpu() -> None:
    """They can be entered, again and by any thread; what raises inside is raised."""
    streams = ThreadStreams(CPU)
    results: list[torch.Tensor] = []

    def work() -> None:
        with streams.active(), streams.active():
            results.append(torch.ones(2) + 1)
            streams.synchronize()

    work()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert [result.tolist() for result in results] == [[2.0, 2.0]] * 2
    with pytest.raises(KeyError), streams.active():
        raise KeyError


def test_sent_tensor_is_the_same() -> None:
    """In its values, type and shape."""
    for tensor in (torch.arange(6).view(2, 3), torch.rand(3, 4, dtype=torch.float64).t(), torch.zeros(0)):
        sent = send(tensor, CPU)
        assert sent.device == CPU
        assert sent.dtype == tensor.dtype
        assert torch.equal(sent, tensor)


def test_use_of_cpu_memory_is_not_noted() -> None:
    """Nor that of tensors which are not there."""
    tensor = torch.ones(2)
    note_use([tensor, None])
    assert tensor.tolist() == [1.0, 1.0]
