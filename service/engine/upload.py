"""A file on its way into a folder: written beside the others under a hidden name, and then renamed into place."""

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from types import TracebackType
from typing import Self

_PREFIX = ".upload-"
_BUFFER_BYTES = 1024 * 1024


class Upload:
    """A new hidden file. As a context manager it removes the file unless it was published.

    Methods block and belong into a thread. `discard` may be called while another
    one runs, as it is when a client goes away.

    Args:
        folder: Where the file is to go.
        suffix: Ends its hidden name.

    Raises:
        OSError: The file cannot be made.
    """

    def __init__(self, folder: Path, suffix: str) -> None:
        self.path = folder / f"{_PREFIX}{token_hex(8)}{suffix}"
        # Buffered, for the buffer's lock: closing waits for a write that is under way in a thread.
        self._file = self.path.open("xb", buffering=_BUFFER_BYTES)
        with suppress(OSError):  # Not every file system has locks.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.discard()

    def write(self, data: bytes | bytearray) -> None:
        """Append.

        Raises:
            OSError: The disk is full, or broken.
        """
        self._file.write(data)

    def finish(self) -> None:
        """All is written: have it on the disk, where others can read it under `path`.

        Raises:
            OSError: The disk is full, or broken.
        """
        self._file.flush()
        os.fsync(self._file.fileno())

    def publish(self, path: Path) -> os.stat_result:
        """Rename the finished file, in place of what had the name.

        Raises:
            OSError: It cannot be renamed.
        """
        status = os.fstat(self._file.fileno())
        self.path.replace(path)
        # The file is in place: where its folder cannot be synced, only a power cut could still lose the name.
        with suppress(OSError):
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        return status

    def discard(self) -> None:
        """Close the file, and remove it unless it was published. Idempotent."""
        self.path.unlink(missing_ok=True)
        with suppress(OSError):  # What a full disk did not take is not needed any more.
            self._file.close()


def remove_abandoned(folder: Path) -> None:
    """Remove what a service that was killed has left; uploads that any living one still writes are locked."""
    for path in folder.glob(f"{_PREFIX}*"):
        if path.is_symlink() or not path.is_file():
            continue  # Not one of ours; opening a pipe would block.
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
