"""Kills and stops worker processes from outside, at moments drawn from a seed."""

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import psutil

from benchmarks.chaos_log import WorkersLog

KILL = "SIGKILL"
SHORT_STOP = "SIGSTOP, shorter than the hang timeout"
LONG_STOP = "SIGSTOP, until it is replaced"
KINDS = (KILL, SHORT_STOP, LONG_STOP)

CAREFUL_SHARE = 0.75
"""Share of attacks that wait until all workers are ready: without, workers would do nothing but start."""

POLL_SECONDS = 0.2
PATIENCE_SECONDS = 15.0
"""How long beyond the hang timeout a stopped worker is waited for."""


@dataclass(frozen=True, slots=True)
class Attack:
    """One attack.

    Attributes:
        at: Unix time.
        pid: Of the worker.
        kind: One of `KINDS`.
        was_replaced: Of a `LONG_STOP`, whether the service ended the worker.
    """

    at: float
    pid: int
    kind: str
    was_replaced: bool


class Assassin:
    """Attacks one worker after the other.

    Args:
        look: What the log says now.
        hang_timeout_seconds: After which the service replaces a silent worker.
        interval_seconds: Mean time from attack to attack.
        seed: Of all that is drawn.
    """

    def __init__(
        self, look: Callable[[], WorkersLog], hang_timeout_seconds: float, interval_seconds: float, seed: int
    ) -> None:
        self.attacks: list[Attack] = []
        self._look = look
        self._hang_timeout_seconds = hang_timeout_seconds
        self._interval_seconds = interval_seconds
        self._draw = random.Random(f"assassin {seed}")  # noqa: S311 - no secret

    async def run(self, is_over: Callable[[], bool]) -> None:
        """Until it is over; nothing is stopped any more then."""
        while not is_over():
            next_at = time.monotonic() + self._pause()
            is_careful = self._draw.random() < CAREFUL_SHARE
            kind = self._draw.choice(KINDS)
            # A state of other processes sends no event.
            while not is_over() and (time.monotonic() < next_at or (is_careful and not self._are_all_ready())):  # noqa: ASYNC110
                await asyncio.sleep(POLL_SECONDS)
            if not is_over():
                await self._attack(kind)

    def _are_all_ready(self) -> bool:
        log = self._look()
        return log.ready == set(log.current)

    def _pause(self) -> float:
        return self._draw.expovariate(1 / self._interval_seconds)

    async def _attack(self, kind: str) -> None:
        """On a ready worker, or for want of one on any; only ready ones are watched for silence."""
        log = self._look()
        names = sorted(log.ready) or ([] if kind == LONG_STOP else sorted(log.current))
        if not names:
            return
        pid = log.current[self._draw.choice(names)]
        at = time.time()
        was_replaced = False
        try:
            if kind == KILL:
                os.kill(pid, signal.SIGKILL)
            else:
                was_replaced = await self._stop(pid, kind)
        except ProcessLookupError:
            return  # Somebody else was faster.
        self.attacks.append(Attack(at, pid, kind, was_replaced))

    async def _stop(self, pid: int, kind: str) -> bool:
        """Stop a process; whether it was ended before it could go on."""
        os.kill(pid, signal.SIGSTOP)
        try:
            if kind == SHORT_STOP:
                await asyncio.sleep(self._draw.uniform(0.1, 0.5) * self._hang_timeout_seconds)
                return False
            give_up_at = time.monotonic() + self._hang_timeout_seconds + PATIENCE_SECONDS
            while time.monotonic() < give_up_at:
                await asyncio.sleep(POLL_SECONDS)
                if not psutil.pid_exists(pid):
                    return True
            return False
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
