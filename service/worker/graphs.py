"""Functions of a batch as CUDA graphs: the host starts them with one call, whatever they consist of.

Graphs that may be replayed at the same time are captured on different streams. torch gives cuBLAS one workspace for
each stream, whose address becomes part of a graph: products that are split along K leave their parts there, and count
them. Two graphs of one stream, replayed side by side, would take each other's parts for their own, or wait for parts
that never come.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from service.worker.streams import stream_of_its_own

BATCH_SIZES = (1, 2, 3, 4, 6, 8)
"""To capture: few, and never far apart."""

BatchFunction = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Graph:
    replay: Callable[[], object]
    inputs: torch.Tensor
    outputs: torch.Tensor


class GraphedFunction:
    """A function of (N, ...) tensors, captured for a few N. Used by one thread, beside other graphs.

    Args:
        function: Gives (N, ...); what it reads besides its argument stays where it is.
        example: (1, ...) like the rows that are to come, on a CUDA device.
        batch_sizes: N to capture.
    """

    def __init__(self, function: BatchFunction, example: torch.Tensor, batch_sizes: Sequence[int]) -> None:
        self._row_shape = example.shape[1:]
        self._graphs: dict[int, _Graph] = {}
        pool = None
        with stream_of_its_own(example.device) as stream:
            for batch_size in sorted(batch_sizes, reverse=True):  # The smaller ones use the largest one's memory.
                inputs = example.expand(batch_size, *self._row_shape).contiguous()
                function(inputs)  # Whatever is chosen, compiled or allocated at a first call is by then.
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    outputs = function(inputs)
                pool = graph.pool()
                self._graphs[batch_size] = _Graph(graph.replay, inputs, outputs)
        torch.cuda.empty_cache()  # What the calls before the captures left could only be used on that stream again.

    def fits(self, batch: torch.Tensor) -> bool:
        """Whether there is a graph for it."""
        return batch.shape[1:] == self._row_shape and len(batch) <= max(self._graphs)

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """(N, ...) for (N, ...) that fits, filled up with copies of its last row where N has no graph."""
        graph = self._graphs[min(size for size in self._graphs if size >= len(batch))]
        graph.inputs[: len(batch)] = batch
        graph.inputs[len(batch) :] = batch[-1:]
        graph.replay()
        return graph.outputs[: len(batch)].clone()
