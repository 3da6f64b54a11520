"""A stand-in for captured functions, which a CPU does not have."""

from collections.abc import Callable, Sequence

import torch


class Graph:
    """Stands for a captured function: computes what fits, and notes it.

    Attributes:
        seen: How many rows each call had.
    """

    made: Sequence["Graph"] = ()

    def __init__(
        self, function: Callable[[torch.Tensor], torch.Tensor], example: torch.Tensor, batch_sizes: Sequence[int]
    ) -> None:
        self._function, self._example, self._batch_sizes = function, example, batch_sizes
        self.seen: list[int] = []
        Graph.made = [*Graph.made, self]

    def fits(self, batch: torch.Tensor) -> bool:
        """As a captured one."""
        return batch.shape[1:] == self._example.shape[1:] and len(batch) <= max(self._batch_sizes)

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """As the function."""
        assert batch.dtype == self._example.dtype
        self.seen.append(len(batch))
        return self._function(batch)
