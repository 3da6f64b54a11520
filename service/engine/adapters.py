"""The folders that hold LoRAs. The files themselves are the registry: one that is dropped in can be used at once.

Nothing here opens an adapter, so that a pipe or a device named like one blocks nobody; what is in the file is
the worker's to judge.
"""

import errno
import logging
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from service.engine.upload import Upload, remove_abandoned
from service.errors import ErrorCode, InpaintError, StartupError
from service.settings import Settings

logger = logging.getLogger(__name__)

BUNDLED_LORAS = Path(__file__).parent.parent / "worker" / "models" / "loras"
"""LoRAs of the bundled model, which ship with it."""

SUFFIX = ".safetensors"
REFUSED_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MAX_NAMES_LOGGED = 20
_READ_ONLY = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


@dataclass(frozen=True, slots=True)
class AdapterEntry:
    """A LoRA in one of the folders.

    Attributes:
        name: What requests call it.
        num_bytes: Its file's size.
        modified: Unix time of its file's last change.
        is_writable: Whether it can be replaced and deleted over HTTP.
    """

    name: str
    num_bytes: int
    modified: int
    is_writable: bool


def is_adapter_name(name: str) -> bool:
    """Whether a file could have this name: no separator, no leading dot, nothing that leads elsewhere."""
    return _NAME.fullmatch(name) is not None and ".." not in name


def adapter_folder(settings: Settings) -> "AdapterFolder":
    """The folders of a service: the operator's, then, for the bundled model, the one that ships with it."""
    own = (settings.lora_dir,) if settings.lora_dir is not None else ()
    bundled = (BUNDLED_LORAS,) if settings.is_bundled_model else ()
    return AdapterFolder((*own, *bundled), settings.lora_dir)


class AdapterFolder:
    """LoRAs by name: `<name>.safetensors`, a regular file directly in a folder.

    A link counts as the file that it leads to, as long as that is inside the folder.

    Args:
        folders: Where to look; of two files of one name the first folder's is used.
        writable: The one of them that uploads go to; None refuses them.
    """

    def __init__(self, folders: Sequence[Path], writable: Path | None) -> None:
        self._folders = tuple(folders)
        self._writable = writable

    def prepare(self) -> None:
        """Make the writable folder if there is none; tidy it up and say what in it will not be used.

        Raises:
            StartupError: The folder cannot be made or read.
        """
        if self._writable is None:
            return
        try:
            self._writable.mkdir(parents=True, exist_ok=True)
            names = sorted(path.name for path in self._writable.iterdir())
        except OSError as error:
            raise StartupError(f"cannot use the folder for LoRAs {self._writable}: {error.strerror}") from None
        remove_abandoned(self._writable)
        refused = [name for name in names if name.lower().endswith(REFUSED_SUFFIXES)]
        if refused:
            shown = ", ".join(ascii(name) for name in refused[:_MAX_NAMES_LOGGED])
            logger.warning(
                "%d files in the folder for LoRAs are refused, because only safetensors are loaded: %s%s",
                len(refused),
                shown,
                ", …" if len(refused) > _MAX_NAMES_LOGGED else "",
            )

    # --- looking --------------------------------------------------------------------

    def entries(self) -> list[AdapterEntry]:
        """Every LoRA that can be used now, by name."""
        found: dict[str, AdapterEntry] = {}
        for folder in self._folders:
            for name in _names_in(folder):
                entry = self._entry(folder, name)
                if entry is not None:
                    found.setdefault(name, entry)
        return sorted(found.values(), key=lambda entry: entry.name)

    def find(self, name: str) -> AdapterEntry | None:
        """One LoRA; None where there is none of this name."""
        entries = (self._entry(folder, name) for folder in self._folders)
        return next((entry for entry in entries if entry is not None), None)

    def resolve(self, name: str) -> tuple[Path, str]:
        """The file of a LoRA and that file's version, as of now.

        Args:
            name: As a client sent it: anything.

        Raises:
            InpaintError: `UNKNOWN_LORA`.
        """
        for folder in self._folders:
            found = _look_up(folder, name)
            if found is not None:
                path, status = found
                return path, f"{status.st_size}-{status.st_mtime_ns}-{status.st_ino}"
        raise InpaintError(ErrorCode.UNKNOWN_LORA, "There is no LoRA of this name.", field="loras")

    def _entry(self, folder: Path, name: str) -> AdapterEntry | None:
        found = _look_up(folder, name)
        if found is None:
            return None
        is_writable = folder == self._writable and os.access(folder, os.W_OK | os.X_OK)
        return AdapterEntry(name, found[1].st_size, int(found[1].st_mtime), is_writable)

    # --- changing -------------------------------------------------------------------

    def open_upload(self) -> Upload:
        """A file in the writable folder that is no LoRA yet; see `save`.

        Raises:
            InpaintError: `FORBIDDEN`, nothing can be stored; `INTERNAL`, storing fails.
        """
        folder = self._require_writable()
        try:
            return Upload(folder, SUFFIX)
        except OSError as error:
            raise storage_error(error) from None

    def save(self, name: str, upload: Upload) -> tuple[AdapterEntry, bool]:
        """Make an upload the LoRA of this name; whoever uses a former one keeps it.

        Returns:
            The LoRA, and whether there was none of this name in the folder before.

        Raises:
            InpaintError: `FORBIDDEN` or `INTERNAL`.
        """
        folder = self._require_writable()
        path = _path_of(folder, name)
        try:
            is_new = not os.path.lexists(path)
            status = upload.publish(path)
        except OSError as error:
            raise storage_error(error) from None
        return AdapterEntry(name, status.st_size, int(status.st_mtime), is_writable=True), is_new

    def delete(self, name: str) -> None:
        """Remove a LoRA; whoever uses it keeps it.

        Raises:
            InpaintError: `NOT_FOUND`, `FORBIDDEN` or `INTERNAL`.
        """
        folder = self._require_writable()
        if _look_up(folder, name) is None:
            if self.find(name) is not None:
                raise InpaintError(ErrorCode.FORBIDDEN, "This adapter ships with the service.")
            raise InpaintError(ErrorCode.NOT_FOUND, "There is no adapter of this name.")
        try:
            _path_of(folder, name).unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(error) from None

    def _require_writable(self) -> Path:
        if self._writable is None:
            raise InpaintError(ErrorCode.FORBIDDEN, "No folder for adapters is set.")
        return self._writable


def _path_of(folder: Path, name: str) -> Path:
    return folder / f"{name}{SUFFIX}"


def _names_in(folder: Path) -> Iterator[str]:
    """What looks like a LoRA; nothing where the folder is gone."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name.removesuffix(SUFFIX)
            if name != entry.name and is_adapter_name(name):
                yield name


def _look_up(folder: Path, name: str) -> tuple[Path, os.stat_result] | None:
    """The real file of a LoRA and its status; None for everything that is none."""
    if not is_adapter_name(name):
        return None
    try:
        path = _path_of(folder, name).resolve(strict=True)
        if not path.is_relative_to(folder.resolve()):
            return None
        status = path.stat()
    except (OSError, RuntimeError):  # Not there, a folder that nobody may read; a loop of links.
        return None
    return (path, status) if stat.S_ISREG(status.st_mode) else None


def storage_error(error: OSError) -> InpaintError:
    """What a client learns when the writable folder does not take a change."""
    if error.errno in _READ_ONLY:
        return InpaintError(ErrorCode.FORBIDDEN, "The folder for adapters is read-only.")
    logger.error("the folder for adapters cannot be changed: %s", error.strerror)
    return InpaintError(ErrorCode.INTERNAL, "The adapter could not be stored or removed.")
