"""What only torch can say, asked in a child process: a driver that is broken may crash it, or never answer."""

import asyncio
import multiprocessing
import os
import pkgutil
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

from service.engine.devices import resolve_devices
from service.findings import Finding
from service.settings import Settings

SURVEY_TARGET = "service.worker.survey:run"
"""Dotted name of what runs in the child; called with its end of the pipe, the settings and the devices."""

_TIMEOUT_SECONDS = 120.0
_EXIT_SECONDS = 10.0


def survey_worker(settings: Settings, target: str = SURVEY_TARGET) -> Iterator[Finding]:
    """What a worker would find; and, where the child did not get to the end, how far it got.

    Args:
        settings: The operator's settings.
        target: See `SURVEY_TARGET`.
    """
    devices = asyncio.run(resolve_devices(settings.devices))
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, settings, devices, target))
    process.start()
    theirs.close()
    found: list[Finding] = []
    give_up_at = time.monotonic() + _TIMEOUT_SECONDS
    has_hung = False
    try:
        while True:
            if not ours.poll(max(0.0, give_up_at - time.monotonic())):
                has_hung = True
                break
            found.append(ours.recv())
            yield found[-1]
    except (EOFError, ConnectionError):
        pass
    finally:
        ours.close()
        process.join(0 if has_hung else _EXIT_SECONDS)
        process.kill()
        process.join()
    if has_hung or process.exitcode != 0:
        how = f"did not end in {_TIMEOUT_SECONDS:.0f} s" if has_hung else _how(process.exitcode)
        yield _cut_short(found, how)


def _cut_short(found: list[Finding], how: str) -> Finding:
    """A driver that breaks after a device was found usable is a worry; before, it would break the worker, too."""
    is_usable = any(finding.topic.startswith("device ") and finding.state != "fail" for finding in found)
    hint = "a broken driver is the usual reason: see whether nvidia-smi answers; --devices cpu does without"
    return Finding("driver", "warn" if is_usable else "fail", f"asking torch for devices {how}", hint)


def _how(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        try:
            return f"crashed ({signal.Signals(-exitcode).name})"
        except ValueError:
            return f"crashed (signal {-exitcode})"
    return f"ended with status {exitcode}"


# --- in the child ------------------------------------------------------------------


def _child(connection: Connection, settings: Settings, devices: tuple[str, ...], target: str) -> None:
    """Find the survey by its name, so that this process never imports torch."""
    # What libraries and drivers write is no part of the report.
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, sys.stderr.fileno())
    os.dup2(silent, sys.stdout.fileno())
    pkgutil.resolve_name(target)(connection, settings, devices)
