"""Surveys of a worker that are not the real one: `service.doctor` finds them by name."""

import os
import signal
from multiprocessing.connection import Connection

from service.findings import Finding
from service.settings import Settings


def fine(connection: Connection, settings: Settings, devices: tuple[str, ...]) -> None:
    """All is well."""
    connection.send(Finding("model", "ok", settings.model_name))
    for device in devices:
        connection.send(Finding(f"device {device}", "ok", "it computes"))
    connection.close()


def driver_crashes(connection: Connection, settings: Settings, devices: tuple[str, ...]) -> None:
    """The devices that are asked for can be used; then a broken driver takes the process along."""
    fine(connection, settings, devices)
    print("a driver's last words, which are no part of the report", flush=True)  # noqa: T201 - that is the point
    os.kill(os.getpid(), signal.SIGSEGV)


def device_crashes(connection: Connection, settings: Settings, _devices: tuple[str, ...]) -> None:
    """Asking for the devices themselves takes the process along."""
    connection.send(Finding("model", "ok", settings.model_name))
    os.kill(os.getpid(), signal.SIGABRT)
