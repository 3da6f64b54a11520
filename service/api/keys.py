"""API keys: what the operator wrote, and whose a key that was sent is.

An entry is a key or the hash of one, with a name in front where there shall be one:

    correct-horse-battery-staple
    sha256:5c9b… (64 digits)
    shop=sha256:5c9b…
    shop:priority=sha256:5c9b…

Of a key only its hash is kept, and what is compared are hashes. Nothing here
says in an error what was written: it could be a key.
"""

import hashlib
import hmac
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from service.engine.clients import Client
from service.errors import StartupError
from service.settings import Settings, setting_label

HASH_PREFIX = "sha256:"

_HASH = re.compile(r"[0-9a-fA-F]{64}")
_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63})(:priority)?")


@dataclass(frozen=True, slots=True)
class Key:
    """One entry.

    Attributes:
        digest: SHA-256 of the key.
        client: Whose it is.
    """

    digest: bytes = field(repr=False)
    client: Client


class Keyring:
    """Keys that allow the same.

    Args:
        keys: All of them.
    """

    def __init__(self, keys: Sequence[Key]) -> None:
        self._keys = tuple(keys)

    def __len__(self) -> int:
        return len(self._keys)

    def owner(self, sent: str) -> Client | None:
        """Whose key it is; None if nobody's.

        The hash of what was sent is compared with all others, each in constant time: how long that takes says
        nothing about them.

        Args:
            sent: A header's value, bytes read as Latin-1.
        """
        digest = hashlib.sha256(sent.encode("latin-1")).digest()
        owners = [key.client for key in self._keys if hmac.compare_digest(digest, key.digest)]
        return owners[0] if owners else None


@dataclass(frozen=True, slots=True)
class Keyrings:
    """All keys.

    Attributes:
        clients: May paint, and read.
        admins: May do that, and change adapters.
    """

    clients: Keyring
    admins: Keyring


def load_keys(settings: Settings) -> Keyrings:
    """Read the keys of the settings and of the files that they name.

    Raises:
        StartupError: A file cannot be read or holds no key; or an entry is none, or its key or name is there twice.
    """
    numbers = count(1)
    clients = list(_keys(settings.api_keys, "api_keys", settings.api_keys_file, numbers.__next__))
    admins = list(_keys(settings.admin_keys, "admin_keys", settings.admin_keys_file, numbers.__next__))
    _require_distinct([*clients, *admins])
    return Keyrings(Keyring([key for _, key in clients]), Keyring([key for _, key in admins]))


def hash_of(key: str) -> str:
    """The hash of a key, as settings take it."""
    return HASH_PREFIX + hashlib.sha256(key.encode()).hexdigest()


# --- reading ----------------------------------------------------------------------


def _keys(
    entries: Sequence[str], name: str, path: Path | None, next_number: Callable[[], int]
) -> Iterator[tuple[str, Key]]:
    """Each key, and where it stands."""
    label = setting_label(name)
    for place, entry in enumerate(entries, start=1):
        where = f"{label}, entry {place}"
        yield where, _key(entry, where, next_number())
    if path is not None:
        lines = _lines(path, setting_label(f"{name}_file"))
        for line_number, line in lines:
            where = f"{path}, line {line_number}"
            yield where, _key(line, where, next_number())


def _lines(path: Path, label: str) -> list[tuple[int, str]]:
    """The lines of a file that are entries, with their numbers."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise StartupError(f"{label}: {path} cannot be read: {error.strerror or 'unknown error'}") from None
    except UnicodeDecodeError:
        raise StartupError(f"{label}: {path} is not UTF-8") from None
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1)]
    entries = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not entries:
        # Without a key the service would be open, which who names a file does not mean.
        raise StartupError(f"{label}: {path} holds no key")
    return entries


def _key(entry: str, where: str, number: int) -> Key:
    name, has_priority, text = None, False, entry
    before, equals, after = entry.partition("=")
    if equals:
        match = _NAME.fullmatch(before.strip())
        if match is None:
            raise StartupError(
                f"{where}: what is before the '=' is neither a name nor a name with ':priority'; "
                "a key that has a '=' in it needs a name before it"
            )
        name, has_priority, text = match[1], match[2] is not None, after.strip()
    if not text or text.startswith("="):
        # As of base64 that ends in padding: what is left would be a short key.
        raise StartupError(f"{where}: there is no key behind the name; a key that has a '=' in it needs a name")
    return Key(_digest(text, where), Client(number, name, has_priority))


def _digest(text: str, where: str) -> bytes:
    if not text.startswith(HASH_PREFIX):
        return hashlib.sha256(text.encode()).digest()
    hexadecimal = text.removeprefix(HASH_PREFIX)
    if _HASH.fullmatch(hexadecimal) is None:
        raise StartupError(f"{where}: {HASH_PREFIX} is not followed by 64 hexadecimal digits")
    digest = bytes.fromhex(hexadecimal)
    if digest == hashlib.sha256(b"").digest():
        raise StartupError(f"{where}: this is the hash of an empty key")
    return digest


def _require_distinct(keys: Iterable[tuple[str, Key]]) -> None:
    """Two clients of one key or name could not be told apart."""
    by_digest: dict[bytes, str] = {}
    by_name: dict[str, str] = {}
    for where, key in keys:
        first = by_digest.setdefault(key.digest, where)
        if first != where:
            raise StartupError(f"{where}: the key is the same as in {first}")
        if key.client.name is not None:
            first = by_name.setdefault(key.client.name, where)
            if first != where:
                raise StartupError(f"{where}: the name is the same as in {first}")
