"""API keys: what operators may write, what is refused at start, and that no key is ever shown."""

import hashlib
import pickle
from pathlib import Path

import pytest

from service.api.keys import Keyrings, hash_of, load_keys
from service.errors import StartupError
from service.settings import load_settings

KEY = "correct-horse-battery"
HASH = hashlib.sha256(KEY.encode()).hexdigest()


def keys(**settings: object) -> Keyrings:
    """The keys of these settings."""
    return load_keys(load_settings(settings, environ={}))


# --- what may be written -----------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "name", "has_priority"),
    [
        (KEY, None, False),
        (f"sha256:{HASH}", None, False),
        (f"sha256:{HASH.upper()}", None, False),
        (f"shop={KEY}", "shop", False),
        (f"shop = sha256:{HASH}", "shop", False),
        (f"shop:priority={KEY}", "shop", True),
        (f"eu-1.shop_2:priority=sha256:{HASH}", "eu-1.shop_2", True),
    ],
)
def test_entry_is_a_key_or_its_hash_with_a_name_or_none(entry: str, name: str | None, has_priority: bool) -> None:
    """Plain and hashed keys, named or not, with priority or not, let their holder in."""
    owner = keys(api_keys=entry).clients.owner(KEY)
    assert owner is not None
    assert (owner.name, owner.has_priority) == (name, has_priority)
    assert keys(api_keys=entry).clients.owner(HASH) is None
    assert keys(api_keys=entry).clients.owner(f"sha256:{HASH}") is None


def test_named_key_may_have_an_equals_sign() -> None:
    """Behind a name a key may be base64 with its padding."""
    assert keys(api_keys="shop=YWJjZA==").clients.owner("YWJjZA==") is not None


def test_only_the_whole_key_is_one() -> None:
    """Nothing shorter, longer, empty or of other case is taken for a key."""
    ring = keys(api_keys=KEY).clients
    assert [ring.owner(sent) for sent in ("", KEY[:-1], KEY + "x", KEY.upper(), f" {KEY}")] == [None] * 5
    assert len(ring) == 1


def test_key_of_any_alphabet_is_compared_by_its_utf_8() -> None:
    """Header values reach us as Latin-1; what counts are the bytes."""
    ring = keys(api_keys="schlüssel-ключ").clients
    assert ring.owner("schlüssel-ключ".encode().decode("latin-1")) is not None


def test_clients_and_administrators_are_told_apart() -> None:
    """Every entry is a client of its own, named or not, and no client key is an administrator's."""
    both = keys(api_keys="one-key,two-key", admin_keys="root=three-key")
    owners = [both.clients.owner("one-key"), both.clients.owner("two-key"), both.admins.owner("three-key")]
    assert len({owner.number for owner in owners if owner is not None}) == 3
    assert both.admins.owner("one-key") is None
    assert both.clients.owner("three-key") is None


def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A match does not end the comparison, so that time does not tell where a key stands; lengths are all the same."""
    compared = []

    def compare(first: bytes, second: bytes) -> bool:
        compared.append((len(first), len(second)))
        return first == second

    monkeypatch.setattr("hmac.compare_digest", compare)
    ring = keys(api_keys="one-key,two-key,three-key").clients
    for sent in ("one-key", "three-key", "", "x" * 10_000):
        compared.clear()
        ring.owner(sent)
        assert compared == [(32, 32)] * 3


# --- files ---------------------------------------------------------------------------


def test_file_holds_one_key_a_line(tmp_path: Path) -> None:
    """Secret files: entries as in the setting, comments, blank lines, a byte order mark; beside the setting's own."""
    file = tmp_path / "keys"
    text = f"# front end\n\nshop=sha256:{HASH}\r\n  # moved out\n  a,key#with-signs  \n"
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    ring = keys(api_keys="third-key", api_keys_file=str(file)).clients
    assert len(ring) == 3
    assert ring.owner(KEY).name == "shop"
    assert ring.owner("a,key#with-signs") is not None
    assert ring.owner("third-key") is not None


def test_administrators_have_a_file_of_their_own(tmp_path: Path) -> None:
    """`admin_keys_file` is to `admin_keys` what `api_keys_file` is to `api_keys`."""
    file = tmp_path / "admins"
    file.write_text("root=secret-of-root\n")
    both = keys(admin_keys_file=str(file))
    assert len(both.clients) == 0
    assert both.admins.owner("secret-of-root").name == "root"


@pytest.mark.parametrize("setting", ["api_keys_file", "admin_keys_file"])
def test_file_that_cannot_be_read_is_named(tmp_path: Path, setting: str) -> None:
    """No such file, a folder, bytes that are no text: one line with setting and file. None of it opens the service."""
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "missing", tmp_path, binary):
        with pytest.raises(StartupError) as raised:
            keys(**{setting: str(path)})
        assert str(path) in str(raised.value)
        assert f"INPAINT_{setting.upper()}" in str(raised.value)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["", "\n", "# only a comment\n"])
def test_file_without_a_key_does_not_open_the_service(tmp_path: Path, text: str) -> None:
    """Who names a file means keys: an empty one ends the start."""
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(StartupError, match="holds no key"):
        keys(api_keys_file=str(file))


# --- what is refused ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "entries",
    [
        "shop=",
        "shop:priority=",
        "=sesame",
        "YWJjc2VzYW1l==",
        "YWJjc2VzYW1l=",
        "sesame shop=x",
        "shop:vip=sesame",
        "shop:priority:priority=sesame",
        "-sesame=x",
        "sesame" * 20 + "=x",
        "sha256:sesame",
        "sha256:",
        f"shop=sha256:{HASH[:-1]}",
        f"shop=sha256:{HASH}0",
        f"sha256:{HASH[:-1]}g",
        f"sha256:{hashlib.sha256(b'').hexdigest()}",
        "sesame,sesame",
        f"sesame,shop=sha256:{hashlib.sha256(b'sesame').hexdigest()}",
        "sesame=one,sesame=two",
    ],
)
def test_wrong_entry_ends_the_start_and_is_not_shown(entries: str) -> None:
    """An entry that is none, or there twice, is one line that says where and shows nothing of it."""
    with pytest.raises(StartupError) as raised:
        keys(api_keys=entries)
    message = str(raised.value)
    assert "INPAINT_API_KEYS / --api-keys, entry " in message
    for secret in ("sesame", "YWJj", HASH[:-1], "vip", "e3b0c442"):
        assert secret not in message


def test_key_cannot_be_a_clients_and_an_administrators() -> None:
    """A key that is in both lists, or a name, ends the start."""
    for client, admin in (("sesame", "sesame"), ("a=sesame", "b=sesame"), ("a=sesame", "a=open")):
        with pytest.raises(StartupError) as raised:
            keys(api_keys=client, admin_keys=admin)
        assert "INPAINT_ADMIN_KEYS" in str(raised.value)
        assert "sesame" not in str(raised.value)


def test_fault_in_a_file_is_named_by_its_line(tmp_path: Path) -> None:
    """The line of a wrong entry is named, comments and blank lines counted."""
    file = tmp_path / "keys"
    file.write_text("# keys\n\ngood-sesame\nshop=sha256:sesame\n")
    with pytest.raises(StartupError) as raised:
        keys(api_keys_file=str(file))
    assert f"{file}, line 4: " in str(raised.value)
    assert "sesame" not in str(raised.value)


# --- what is shown -------------------------------------------------------------------------


def test_neither_keys_nor_hashes_are_shown_or_kept() -> None:
    """Printing what was read shows no key and no hash, and plain keys are not in it at all."""
    both = keys(api_keys=f"shop={KEY}", admin_keys="sesame")
    shown = repr(both) + repr(both.clients._keys) + repr(both.admins._keys)
    assert "shop" in shown
    assert not any(secret in shown for secret in (KEY, HASH, "sesame", repr(bytes.fromhex(HASH))))
    assert KEY.encode() not in pickle.dumps(both)


def test_hash_is_what_settings_take() -> None:
    """What `hash-key` prints can be put in the place of the key."""
    assert hash_of(KEY) == f"sha256:{HASH}"
    assert keys(api_keys=hash_of("schlüssel")).clients.owner("schlüssel".encode().decode("latin-1")) is not None
