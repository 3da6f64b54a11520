"""On a GPU: functions of a batch as graphs, and a stream for each thread."""

import threading

import pytest
import torch

from service.worker.graphs import GraphedFunction
from service.worker.streams import ThreadStreams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@torch.inference_mode()
def test_graph_computes_what_the_function_does() -> None:
    """For every number of rows up to the largest, whatever was computed before; and results outlive the next call."""
    device = torch.device("cuda:0")
    streams = ThreadStreams(device)

    def function(batch: torch.Tensor) -> torch.Tensor:
        return batch.sin().flatten(1) + 1

    example = torch.zeros(1, 3, 8, 8, device=device)
    with streams.active():
        captured = GraphedFunction(function, example, (1, 2, 4))
        batches = [torch.rand(count, 3, 8, 8, device=device) for count in (4, 1, 3, 2, 3)]
        results = [captured(batch) for batch in batches]
        for batch, result in zip(batches, results, strict=True):
            assert torch.equal(result, function(batch))
        streams.synchronize()
    assert not captured.fits(torch.zeros(5, 3, 8, 8, device=device))
    assert not captured.fits(torch.zeros(1, 3, 8, 9, device=device))


def test_each_thread_has_a_stream_and_keeps_it() -> None:
    """Neither the default one nor another's."""
    streams = ThreadStreams(torch.device("cuda:0"))
    seen: dict[str, list[int]] = {}

    def work(name: str) -> None:
        for _ in range(2):
            with streams.active():
                seen.setdefault(name, []).append(torch.cuda.current_stream().cuda_stream)

    for name in ("prepare", "finish"):
        thread = threading.Thread(target=work, args=(name,))
        thread.start()
        thread.join(60)
    work("loop")
    assert all(first == again for first, again in seen.values())
    assert len({first for first, _ in seen.values()} | {torch.cuda.default_stream().cuda_stream}) == 4
