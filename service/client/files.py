"""Files that are read whole, and written whole or not at all."""

import fcntl
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from secrets import token_hex

from service.client.failures import Unwritable, WrongUsage

_PREFIX = ".inpaint-"
_SUFFIX = ".part"


def read_input(path: Path, flag: str) -> bytes:
    """A file that the command line names.

    Raises:
        WrongUsage: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise WrongUsage(f"{flag}: {path} cannot be read: {error.strerror or error}") from None


def write_whole(files: Sequence[tuple[Path, bytes]]) -> None:
    """Write files under hidden names beside their own, then rename them.

    Whatever ends this process, a file is there whole or not; of one that was killed hidden ones may be left, see
    `remove_abandoned`. Links are followed; a device or a pipe is written to and stays what it is.

    Raises:
        Unwritable: The disk is full, or the folder not to be written to.
    """
    renames: list[tuple[Path, Path]] = []
    path = Path()
    try:
        for path, data in files:
            if path.exists() and not path.is_file():
                path.write_bytes(data)
                continue
            target = path.resolve()
            part = target.with_name(f"{_PREFIX}{token_hex(8)}{_SUFFIX}")
            renames.append((part, target))
            _write_part(part, data)
        for part, target in renames:
            part.replace(target)
    except OSError as error:
        raise Unwritable(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        for part, _ in renames:
            with suppress(OSError):
                part.unlink(missing_ok=True)


def _write_part(path: Path, data: bytes) -> None:
    """A new file, on the disk; locked while it is written."""
    with path.open("xb") as file:
        with suppress(OSError):  # Not every file system has locks.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def remove_abandoned(folder: Path) -> None:
    """Remove what a killed run has left in a folder; what a living one writes is locked."""
    for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        if path.is_symlink() or not path.is_file():
            continue
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
