"""CUDA streams: each of the worker's threads has its own, so that the device works for all of them at once.

A thread's work is in order on its own stream, and beside that of the others. What
crosses from one to another is ready before it is handed over, or waited for by an
event. A tensor that is used on another stream than the one it was made on is noted
there, or its memory would be given away while it is still read.

On a CPU none of this exists, and everything here does nothing.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


class ThreadStreams:
    """One stream for each thread that computes on a device.

    Args:
        device: Where.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._own = threading.local()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Whatever this thread computes is on its own stream, and on this device."""
        if self._device.type != "cuda":
            yield
            return
        stream = getattr(self._own, "stream", None)
        if stream is None:
            stream = self._own.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            yield

    def synchronize(self) -> None:
        """Wait until everything of this thread's stream is done; inside `active`."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


@contextmanager
def stream_of_its_own(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """A new stream of a CUDA device, the current one inside: what is done there comes after what was done before.

    And what follows comes after it.
    """
    outside, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(outside)
    with torch.cuda.stream(stream):
        yield stream
    outside.wait_stream(stream)


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor's copy on the device; the host does not wait for it."""
    if device.type != "cuda":
        return tensor.to(device)
    # torch keeps pinned memory until the copy is done, also when nobody holds it any more.
    return tensor.pin_memory().to(device, non_blocking=True)


def note_use(tensors: Iterable[torch.Tensor | None]) -> None:
    """Keep the memory of tensors of other streams until what the current stream does up to their end is done."""
    for tensor in tensors:
        if tensor is not None and tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
