"""The real worker, which writes down what it has imported: `TEST_MODULES_FILE` names the file."""

import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from service.settings import Settings
from service.worker.process import run as run_worker


def run(connection: Connection, settings: Settings, device: str, cpu_threads: int) -> None:
    """As `service.worker.process.run`."""
    try:
        run_worker(connection, settings, device, cpu_threads)
    finally:
        Path(os.environ["TEST_MODULES_FILE"]).write_text("\n".join(sys.modules))
