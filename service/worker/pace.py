"""How far the host runs ahead of the device: it starts each tick shortly before the one before is done.

Then the device finds the next tick ready and never waits for the host, and what
arrives while it computes still joins the tick that comes next.
"""

import time

import torch

LEAD_SECONDS = 0.004
"""The host's work between two ticks takes less."""


class Pace:
    """Of one device's ticks. On a CPU, a tick is done when it has been called.

    Args:
        device: Where they run.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_asynchronous = device.type == "cuda"
        self._latest: torch.cuda.Event | None = None

    def started(self, expected_seconds: float | None) -> torch.cuda.Event | None:
        """A tick has been handed to the device; returns shortly before the host should start the next one.

        Args:
            expected_seconds: How long it will take; None where it is not known.

        Returns:
            What the device records when it has done it; None on a CPU.
        """
        if not self._is_asynchronous:
            return None
        earlier = self._latest
        self._latest = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._latest.record()
        if expected_seconds is None:
            self._latest.synchronize()
            return self._latest
        if earlier is not None:
            earlier.synchronize()
        time.sleep(max(0.0, expected_seconds - LEAD_SECONDS))
        return self._latest
