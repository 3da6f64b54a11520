"""The pipe to one worker process, as the event loop sees it.

A pipe blocks: reading waits for the worker, and writing waits when the worker
is too busy to read. So each pipe has a thread for either direction, and the
event loop only ever touches a queue.
"""

import asyncio
import logging
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import cast

from service.engine.frames import read_message, write_message
from service.messages import Command, Report

logger = logging.getLogger(__name__)


class Transport:
    """Sends commands to one worker and hands its reports to the event loop.

    Must be made on a running event loop, where all of its callbacks run.

    Args:
        pipe: This side's end, of `make_pipe`; owned from here on.
        name: Names the threads.
        on_report: Called with each report, in the order they were sent.
    """

    def __init__(self, pipe: socket.socket, name: str, on_report: Callable[[Report], None]) -> None:
        self._pipe = pipe
        self._on_report = on_report
        self._loop = asyncio.get_running_loop()
        self._outbox: SimpleQueue[Command | None] = SimpleQueue()
        self.at_eof: asyncio.Future[None] = self._loop.create_future()
        """Done once the worker's end is closed and every report before that was handed over."""
        self._threads = [
            threading.Thread(target=self._read, name=f"{name}-reader", daemon=True),
            threading.Thread(target=self._write, name=f"{name}-writer", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def send(self, command: Command) -> None:
        """Queue a command. Never blocks; to a worker that is gone it is dropped, and `at_eof` says so."""
        self._outbox.put(command)

    def hang_up(self) -> None:
        """Close both directions now, whoever else may still hold the other end. Idempotent."""
        self._outbox.put(None)
        # close() alone would not wake a thread that waits in the pipe.
        with suppress(OSError):
            self._pipe.shutdown(socket.SHUT_RDWR)

    async def close(self) -> None:
        """Hang up, then wait for both threads; afterwards neither they nor the descriptor are left."""
        if self._pipe.fileno() < 0:
            return
        self.hang_up()
        await self.at_eof
        for thread in self._threads:
            thread.join()  # At once: both wake from hang_up().
        self._pipe.close()

    # --- the two threads --------------------------------------------------------

    def _read(self) -> None:
        try:
            while True:
                report = cast("Report", read_message(self._pipe))
                self._post(self._on_report, report)
        except (EOFError, OSError):
            pass  # Closed, also in the middle of a frame.
        except Exception:
            logger.exception("a worker sent what is no report; it counts as lost")
        self._post(self._end)

    def _write(self) -> None:
        try:
            while (command := self._outbox.get()) is not None:
                # Pickled here, where copying megabytes of pixels stalls nobody.
                write_message(self._pipe, command)
        except OSError:
            pass  # Closed.
        except Exception:
            logger.exception("a command cannot be sent; the worker counts as lost")
            self.hang_up()

    def _post(self, callback: Callable[..., None], *args: object) -> None:
        with suppress(RuntimeError):  # The loop is closed: nobody is left to hear of it.
            self._loop.call_soon_threadsafe(callback, *args)

    def _end(self) -> None:
        if not self.at_eof.done():
            self.at_eof.set_result(None)
