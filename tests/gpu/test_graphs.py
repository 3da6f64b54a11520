"""On a GPU: functions of a batch as graphs, and a stream for each thread."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

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


WIDTH, OUTPUTS, NUM_REPLAYS = 65_536, 96, 2_000
"""A product of few rows and columns and a long sum, which is split: its parts meet in cuBLAS's workspace."""


@torch.inference_mode()
def test_graphs_replayed_side_by_side_compute_what_they_do_alone() -> None:
    """Two threads replay theirs as fast as they can; every result is bit for bit that of a replay alone."""
    device = torch.device("cuda:0")
    streams = ThreadStreams(device)
    draw = torch.Generator(device).manual_seed(0)

    def product(weights: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda batch: batch @ weights

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float16, device=device) / 16

    with streams.active():
        functions = [GraphedFunction(product(random(WIDTH, OUTPUTS)), random(1, WIDTH), (2, 8)) for _ in range(2)]
        batches = [random(8, WIDTH), random(2, WIDTH)]
        alone = [[function(batch) for batch in batches] for function in functions]
        streams.synchronize()
    start = threading.Barrier(len(functions))

    @torch.inference_mode()
    def differences(number: int) -> int:
        start.wait(60)
        with streams.active():
            found = torch.zeros((), dtype=torch.int64, device=device)
            for turn in range(NUM_REPLAYS):
                which = turn % len(batches)
                found += (functions[number](batches[which]) != alone[number][which]).sum()
            return int(found)

    with ThreadPoolExecutor(len(functions)) as threads:
        assert list(threads.map(differences, range(len(functions)))) == [0, 0]


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
