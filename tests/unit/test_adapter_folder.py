"""The folders of LoRAs, and uploads into them."""

import fcntl
import logging
import os
import socket
from pathlib import Path

import pytest

from service.engine import adapters
from service.engine.adapters import AdapterFolder, adapter_folder
from service.errors import ErrorCode, InpaintError, StartupError
from service.settings import Settings


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "loras"
    path.mkdir()
    return path


@pytest.fixture
def folder(path: Path) -> AdapterFolder:
    return AdapterFolder((path,), path)


def code_of(error: pytest.ExceptionInfo[InpaintError]) -> ErrorCode:
    return error.value.code


def names_in(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


# --- looking --------------------------------------------------------------------------


def test_file_that_is_dropped_in_is_usable_at_once(path: Path, folder: AdapterFolder) -> None:
    """There is no registry: a file is a LoRA as soon as it is there, and none as soon as it is gone."""
    with pytest.raises(InpaintError):
        folder.resolve("pencil")
    file = path / "pencil.safetensors"
    file.write_bytes(b"12345")
    assert folder.resolve("pencil")[0] == file
    assert [entry.name for entry in folder.entries()] == ["pencil"]
    file.unlink()
    assert folder.entries() == []


def test_version_is_the_files_own(path: Path, folder: AdapterFolder) -> None:
    """Another file under the same name is another version, also one of the same size; the same file is the same."""
    file = path / "pencil.safetensors"
    file.write_bytes(b"12345")
    status = file.stat()
    first = folder.resolve("pencil")
    assert first == folder.resolve("pencil")
    assert first[1] == f"5-{status.st_mtime_ns}-{status.st_ino}"

    other = path / "other"
    other.write_bytes(b"54321")
    os.utime(other, ns=(status.st_mtime_ns, status.st_mtime_ns))
    other.replace(file)
    second = folder.resolve("pencil")
    assert second[0] == first[0]
    assert second[1] != first[1]


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".hidden",
        "-dash",
        "../outside",
        "..%2foutside",
        "sub/inside",
        "sub\\inside",
        "/etc/passwd",
        "a..b",
        "pencil\0",
        "pencil\n",
        "pen cil",
        "crayon",
        "pencil.safetensors",
        "x" * 129,
        "x" * 100_000,
        "pêncil",
        "\ud800",
        "directory",
        "pipe",
        "socket",
        "out",
        "out-relative",
        "dangling",
        "loop",
        "linked-directory",
        "other-suffix",
    ],
)
def test_what_is_no_lora_is_unknown(tmp_path: Path, path: Path, folder: AdapterFolder, name: str) -> None:
    """Names that lead elsewhere, and things that are no regular file of the folder, are unknown LoRAs."""
    (tmp_path / "outside.safetensors").write_bytes(b"secret")
    (path / "pencil.safetensors").write_bytes(b"1")
    (path / ".hidden.safetensors").write_bytes(b"1")
    (path / "other-suffix.bin").write_bytes(b"1")
    (path / "directory.safetensors").mkdir()
    (path / "sub").mkdir()
    (path / "sub" / "inside.safetensors").write_bytes(b"1")
    (path / "out.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (path / "out-relative.safetensors").symlink_to("../outside.safetensors")
    (path / "dangling.safetensors").symlink_to("nowhere")
    (path / "loop.safetensors").symlink_to("loop.safetensors")
    (path / "linked-directory.safetensors").symlink_to("sub")
    os.mkfifo(path / "pipe.safetensors")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path / "socket.safetensors"))

    with pytest.raises(InpaintError) as error:
        folder.resolve(name)

    assert (error.value.code, error.value.field) == (ErrorCode.UNKNOWN_LORA, "loras")
    assert str(tmp_path) not in error.value.message
    assert folder.find(name) is None
    assert [entry.name for entry in folder.entries()] == ["pencil"]


def test_links_inside_the_folder_count_as_their_files(path: Path, folder: AdapterFolder) -> None:
    """A link to a file of the folder is a LoRA of its own name; so are files behind a link to the folder itself."""
    (path / "..data").mkdir()
    (path / "..data" / "v1.safetensors").write_bytes(b"123")
    (path / "latest.safetensors").symlink_to("..data/v1.safetensors")
    real = path / "..data" / "v1.safetensors"
    assert folder.resolve("latest")[0] == real

    link = path.parent / "link"
    link.symlink_to(path)
    assert AdapterFolder((link,), link).resolve("latest")[0] == real


@pytest.mark.parametrize("name", ["a", "A.b_c-9", "v1.5", "0", "x" * 128])
def test_names_that_files_may_have(path: Path, folder: AdapterFolder, name: str) -> None:
    """Letters, digits, dots, dashes and underscores, 128 at most."""
    (path / f"{name}.safetensors").write_bytes(b"1")
    assert folder.resolve(name)[0] == path / f"{name}.safetensors"


def test_entries_are_sorted_and_the_first_folder_wins(tmp_path: Path, path: Path) -> None:
    """Of two files of one name the first folder's is used; only those of the writable folder can be changed."""
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    for place, name, size in ((path, "b", 1), (shipped, "b", 2), (shipped, "a", 3), (path, "c", 4)):
        (place / f"{name}.safetensors").write_bytes(bytes(size))
    os.utime(path / "c.safetensors", (1.5, 1.5))
    folder = AdapterFolder((path, shipped), path)

    entries = folder.entries()

    assert [(entry.name, entry.num_bytes, entry.is_writable) for entry in entries] == [
        ("a", 3, False),
        ("b", 1, True),
        ("c", 4, True),
    ]
    assert entries[2].modified == 1
    assert folder.resolve("b")[0] == path / "b.safetensors"
    assert folder.find("a") == entries[0]


def test_folder_that_goes_away_is_empty(path: Path, folder: AdapterFolder) -> None:
    """A folder that is gone holds nothing; that is no failure."""
    path.rmdir()
    assert folder.entries() == []
    assert folder.find("pencil") is None


# --- changing -------------------------------------------------------------------------


def test_upload_becomes_a_lora_only_when_saved(path: Path, folder: AdapterFolder) -> None:
    """Until it is saved, an upload is hidden; then it is whole, and says whether there was one before."""
    for data, is_new in ((b"first", True), (b"second!", False)):
        with folder.open_upload() as upload:
            upload.write(data)
            upload.finish()
            assert upload.path.read_bytes() == data
            assert [entry.name for entry in folder.entries()] == ([] if is_new else ["pencil"])
            entry, was_new = folder.save("pencil", upload)
        assert was_new is is_new
        assert folder.find("pencil") == entry
        assert (path / "pencil.safetensors").read_bytes() == data
        assert names_in(path) == ["pencil.safetensors"]


def test_upload_that_is_not_saved_leaves_nothing(path: Path, folder: AdapterFolder) -> None:
    """Whatever ends an upload, nothing of it stays."""
    with folder.open_upload() as upload:
        upload.write(b"half")
    upload.discard()
    assert names_in(path) == []


def test_former_file_stays_with_those_who_use_it(path: Path, folder: AdapterFolder) -> None:
    """Replacing and deleting do not change what was opened before."""
    (path / "pencil.safetensors").write_bytes(b"old")
    with (path / "pencil.safetensors").open("rb") as in_use:
        with folder.open_upload() as upload:
            upload.write(b"new")
            upload.finish()
            folder.save("pencil", upload)
        folder.delete("pencil")
        assert in_use.read() == b"old"
    assert names_in(path) == []


def test_saving_over_a_link_leaves_what_it_led_to(tmp_path: Path, path: Path, folder: AdapterFolder) -> None:
    """A link is replaced or removed itself."""
    (tmp_path / "outside").write_bytes(b"outside")
    (path / "pencil.safetensors").symlink_to(tmp_path / "outside")
    with folder.open_upload() as upload:
        upload.write(b"new")
        upload.finish()
        folder.save("pencil", upload)
    assert (tmp_path / "outside").read_bytes() == b"outside"
    (path / "twin.safetensors").symlink_to("pencil.safetensors")
    folder.delete("twin")
    assert names_in(path) == ["pencil.safetensors"]


def test_delete_of_what_is_not_there_or_not_ours(tmp_path: Path, path: Path) -> None:
    """Unknown names are not found, and what ships with the service stays, also below one of the same name."""
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    for place in (path, shipped):
        (place / "pencil.safetensors").write_bytes(b"1")
    folder = AdapterFolder((path, shipped), path)

    for name in ("crayon", "../shipped/pencil"):
        with pytest.raises(InpaintError) as error:
            folder.delete(name)
        assert code_of(error) == ErrorCode.NOT_FOUND
    folder.delete("pencil")
    with pytest.raises(InpaintError) as error:
        folder.delete("pencil")
    assert code_of(error) == ErrorCode.FORBIDDEN
    assert (shipped / "pencil.safetensors").exists()


def test_without_a_folder_nothing_can_be_changed(path: Path) -> None:
    """No folder set: what ships can be used, and nothing added or removed."""
    (path / "pencil.safetensors").write_bytes(b"1")
    folder = AdapterFolder((path,), None)
    folder.prepare()
    assert [entry.is_writable for entry in folder.entries()] == [False]
    for change in (folder.open_upload, lambda: folder.delete("pencil"), lambda: folder.delete("crayon")):
        with pytest.raises(InpaintError) as error:
            change()
        assert code_of(error) == ErrorCode.FORBIDDEN


@pytest.mark.parametrize("number", ["EACCES", "EPERM", "EROFS"])
def test_read_only_folder_is_forbidden(
    path: Path, folder: AdapterFolder, monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    """A folder that the service may not write to refuses changes, in a sentence without paths."""
    (path / "pencil.safetensors").write_bytes(b"1")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(getattr(adapters.errno, number), "denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    for change in (folder.open_upload, lambda: folder.delete("pencil")):
        with pytest.raises(InpaintError) as error:
            change()
        assert code_of(error) == ErrorCode.FORBIDDEN
        assert str(path) not in error.value.message


def test_full_disk_is_a_fault_that_is_reported(
    path: Path, folder: AdapterFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What the disk does not take is a failure of the service, and leaves nothing."""

    def refuse(*_: object) -> None:
        raise OSError(adapters.errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with folder.open_upload() as upload, pytest.raises(InpaintError) as error:
        folder.save("pencil", upload)
    assert code_of(error) == ErrorCode.INTERNAL
    assert "No space left" in caplog.text
    assert names_in(path) == []


# --- the start ------------------------------------------------------------------------


def test_missing_folder_is_made(tmp_path: Path) -> None:
    """An operator need not make the folder."""
    path = tmp_path / "a" / "b"
    AdapterFolder((path,), path).prepare()
    assert path.is_dir()
    AdapterFolder((path,), path).prepare()


def test_folder_that_cannot_be_made_ends_the_start(tmp_path: Path) -> None:
    """The one line names the folder and why."""
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StartupError, match="cannot use the folder for LoRAs") as error:
            AdapterFolder((path,), path).prepare()
        assert str(path) in str(error.value)


def test_pickled_files_are_named_once_as_refused(
    path: Path, folder: AdapterFolder, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says at the start which files will not be used, by name alone."""
    for name in ("a.pt", "b.CKPT", "c.bin", "d.pth", "e.safetensors", "f.txt", "evil\n.pt"):
        (path / name).touch()
    with caplog.at_level(logging.WARNING):
        folder.prepare()
        folder.entries()
    (record,) = caplog.records
    message = record.getMessage()
    assert "5 files" in message
    assert all(name in message for name in ("a.pt", "b.CKPT", "c.bin", "d.pth", r"evil\n.pt"))
    assert "e.safetensors" not in message
    assert str(path) not in message
    assert "\n" not in message


def test_what_a_killed_service_left_is_removed_at_the_next_start(path: Path, folder: AdapterFolder) -> None:
    """Uploads that nobody writes any more go; one that a living service still writes stays, and so does all else."""
    abandoned = path / ".upload-0123.safetensors"
    abandoned.write_bytes(b"half")
    os.mkfifo(path / ".upload-pipe")
    (path / ".upload-link").symlink_to(path / "pencil.safetensors")
    (path / "pencil.safetensors").write_bytes(b"1")
    with folder.open_upload() as living:
        folder.prepare()
        assert living.path.exists()
        assert not abandoned.exists()
    assert names_in(path) == [".upload-link", ".upload-pipe", "pencil.safetensors"]


def test_uploads_work_where_the_file_system_has_no_locks(
    path: Path, folder: AdapterFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locks only help to tidy up."""

    def refuse(*_: object) -> None:
        raise OSError(adapters.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with folder.open_upload() as upload:
        upload.write(b"1")
        upload.finish()
        folder.prepare()
        folder.save("pencil", upload)
    assert names_in(path) == ["pencil.safetensors"]


def test_folders_of_a_service(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The operator's folder comes first; what ships belongs to the bundled model alone."""
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    (shipped / "pencil.safetensors").write_bytes(b"1")
    monkeypatch.setattr(adapters, "BUNDLED_LORAS", shipped)

    def names(**settings: object) -> list[tuple[str, bool]]:
        return [(entry.name, entry.is_writable) for entry in adapter_folder(Settings(**settings)).entries()]

    assert names() == [("pencil", False)]
    assert names(model="some/checkpoint") == []
    (path / "pencil.safetensors").write_bytes(b"1")
    assert names(lora_dir=path) == [("pencil", True)]
    assert names(lora_dir=path, model="some/checkpoint") == [("pencil", True)]
