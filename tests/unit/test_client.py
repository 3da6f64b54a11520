"""The pure parts of the command-line client: pairs, names, exit statuses, events, pauses, files."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.fields import InpaintFields
from service.api.forms import FILES
from service.arguments import UNSHOWN_FIELDS, parse
from service.cli import main
from service.client import files as files_module
from service.client.answers import read_answer
from service.client.events import Event, read_events
from service.client.exit_status import MEANINGS, ExitStatus, heaviest
from service.client.failures import PaintFailed, Refused, Unreachable, Unwritable, WrongUsage, problem_of, seconds_until
from service.client.files import remove_abandoned, write_whole
from service.client.naming import format_for, num_images, numbered, suffix_for
from service.client.pairs import Pair, pair, pair_with, pictures_in
from service.client.progress import say
from service.client.retries import pause_after

# --- flags ----------------------------------------------------------------------------


def test_every_field_is_a_flag(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`inpaint --help` has a flag for each field and file of the form, and says what each exit status means."""
    monkeypatch.setenv("COLUMNS", "10000")
    with pytest.raises(SystemExit) as ended:
        main(["inpaint", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert set(InpaintFields.model_fields) > UNSHOWN_FIELDS
    for name in {*FILES, *InpaintFields.model_fields} - UNSHOWN_FIELDS:
        assert f"  --{name.replace('_', '-')} " in text or f"  --{name.replace('_', '-')}, " in text, name
    for status, meaning in MEANINGS.items():
        assert f"{status:d} {meaning}" in text


def test_a_flag_that_is_not_given_is_not_sent() -> None:
    """Defaults are the service's own: none is in the client."""
    options = parse(["inpaint", "-o", "x.png"])
    assert {name for name in options["text_fields"] if options[name] is not None} == set()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["-o", "out.gif"], "-o: .gif"),
        (["-o", "nowhere/out.png"], "no folder nowhere"),
        (["-o", "."], "is a folder"),
        (["-o", "-", "--num-images-per-prompt", "2"], "one image"),
        (["-o", "-", "--json", "-"], "--json"),
        (["-o", "out.png", "--json", "nowhere/x"], "--json"),
        (["-o", "out.png", "--mask", "missing.png"], "--mask: missing.png cannot be read"),
        (["-o", "out.png", "--mask", "."], "--mask is a folder"),
        (["-o", "out.png", "--key-file", "missing"], "--key-file"),
        (["-o", "out.png", "--key-file", "key"], "key has characters"),
        (["-o", "out.png", "--url", "ftp://somewhere"], "http://"),
        (["-o", "out.png", "--url", "http://[::1"], "http://"),
        (["-o", "out.png", "--prompt", "\udcff"], "--prompt"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(
    flags: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What cannot be sent or written is known before anything is sent, to a port here where nobody listens."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "image.png").write_bytes(b"not looked into")
    (tmp_path / "key").write_bytes(b"sesame\x07\n")
    assert main(["inpaint", "--url", "http://127.0.0.1:9", "--retries", "0", "--image", "image.png", *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert named in error
    assert "sesame" not in error


@pytest.mark.parametrize(
    "flags", [["-o", "x", "--key", "sesame"], ["-o", "x", "--concurrency", "0"], ["-o", "x", "--retries", "-1"], []]
)
def test_flags_that_do_not_exist_or_fit_are_status_2(flags: list[str]) -> None:
    """A key is no flag's value; numbers are in their bounds; an output is needed."""
    with pytest.raises(SystemExit) as ended:
        main(["inpaint", *flags])
    assert ended.value.code == 2


# --- pairs ----------------------------------------------------------------------------


def paths(*names: str) -> list[Path]:
    return [Path(name) for name in names]


def test_pairs_have_one_name() -> None:
    """A picture goes with the mask of its name, whatever the suffixes."""
    pairing = pair(paths("in/b.jpg", "in/a.b.png"), paths("m/a.b.webp", "m/b.png"))
    assert pairing.pairs == [
        Pair("a.b", Path("in/a.b.png"), Path("m/a.b.webp")),
        Pair("b", Path("in/b.jpg"), Path("m/b.png")),
    ]
    assert (pairing.odd_pictures, pairing.odd_masks) == ([], [])


def test_what_has_no_partner_or_two_is_reported() -> None:
    """Nothing is guessed: without a mask, with two, and two pictures of one name are named, and not painted."""
    pairing = pair(paths("a.png", "b.png", "c.png", "c.jpg"), paths("b.png", "b.webp", "c.png", "d.png"))
    assert pairing.pairs == []
    assert pairing.odd_pictures == [
        "a.png: no mask of this name",
        "b.png: several masks, b.png, b.webp",
        "c.png, c.jpg: pictures of one name",
    ]
    assert pairing.odd_masks == ["d.png: no picture of this name"]


def test_one_mask_for_all() -> None:
    """The same mask, or none, for each; pictures of one name would write to one file."""
    pairing = pair_with(paths("a.png", "b.png", "b.jpg"), Path("m.png"))
    assert pairing.pairs == [Pair("a", Path("a.png"), Path("m.png"))]
    assert pairing.odd_pictures == ["b.png, b.jpg: pictures of one name"]


def test_pictures_in_a_folder(tmp_path: Path) -> None:
    """Files with a picture's suffix, in whatever case, directly in the folder; hidden ones and others are none."""
    for name in ("b.PNG", "a.jpeg", ".hidden.png", "notes.txt", "c.webp", "d.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in pictures_in(tmp_path)] == ["a.jpeg", "b.PNG", "c.webp", "d.jpg"]
    with pytest.raises(WrongUsage, match="nowhere"):
        pictures_in(tmp_path / "nowhere")


# --- names ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.png", "png"), ("a.JPG", "jpeg"), ("a.jpeg", "jpeg"), ("a.webp", "webp"), ("a.npy", "npy"), ("a", "png")],
)
def test_format_of_a_name(name: str, expected: str) -> None:
    """The suffix says the format; none is PNG."""
    assert format_for(Path(name)) == expected


def test_numbered_names() -> None:
    """One image has the name as it is; several are numbered before the suffix."""
    assert numbered(Path("x/a.b.png"), 1) == paths("x/a.b.png")
    assert numbered(Path("x/a.b.png"), 2) == paths("x/a.b-0.png", "x/a.b-1.png")
    assert numbered(Path("x/a"), 2) == paths("x/a-0", "x/a-1")
    assert [suffix_for(name) for name in (None, "jpeg", "latent", "bmp")] == [".png", ".jpg", ".npy", ".png"]
    assert [num_images({"num_images_per_prompt": text}) for text in ("3", "x", "", "9" * 5000)] == [3, 1, 1, 1]


# --- exit statuses ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [((), 0), ((0, 0), 0), ((0, 4, 0), 4), ((4, 3, 0), 3), ((3, 5), 5), ((5, 1, 3), 1)],
)
def test_status_of_a_run(statuses: tuple[int, ...], expected: int) -> None:
    """The heaviest of its pictures'."""
    assert heaviest(ExitStatus(status) for status in statuses) == expected


@pytest.mark.parametrize(
    ("status", "code", "exit_status", "may_pass", "ends_run"),
    [
        (422, "invalid_field", 3, False, False),
        (413, "body_too_large", 3, False, False),
        (401, "unauthorized", 3, False, True),
        (404, "", 3, False, True),
        (408, "request_timeout", 5, True, True),
        (409, "in_progress", 5, True, True),
        (422, "key_reuse", 3, False, False),
        (429, "overloaded", 5, True, True),
        (500, "internal", 1, False, False),
        (503, "worker_lost", 5, True, True),
        (504, "deadline", 1, False, False),
        (507, "out_of_memory", 1, False, False),
    ],
)
def test_what_a_refusal_means(status: int, code: str, exit_status: int, may_pass: bool, ends_run: bool) -> None:
    """Each status of the service: what the run exits with, whether it is tried again, whether others are."""
    refused = Refused(status, {"code": code, "detail": "So it is."})
    assert (refused.exit_status, refused.may_pass, refused.ends_run) == (exit_status, may_pass, ends_run)
    assert str(refused) == f"{status} {code}".strip() + ": So it is."


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        ({"errors": [{"field": "seed", "message": "seed: too big."}]}, "422: seed: too big"),
        ({"errors": [{"field": "a", "message": "x"}, {"field": "b", "message": "y"}, "?"]}, "422: a: x; b: y"),
        ({"errors": "?", "code": 7}, "422 7: Unprocessable Content"),
        ({}, "422: Unprocessable Content"),
    ],
)
def test_refusals_name_the_fields(problem: dict[str, object], said: str) -> None:
    """Each field with its message, once; a document that is none does no harm."""
    assert str(Refused(422, problem)).replace("Entity", "Content") == said
    assert problem_of(b"<html>") == problem_of(b"[1]") == {}


# --- retries ----------------------------------------------------------------------------


def test_retry_after_is_seconds_or_a_date() -> None:
    """Both forms of the header are understood (RFC 9110, 10.2.3); nonsense is none."""
    assert seconds_until("7") == 7.0
    in_a_minute = seconds_until(format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True))
    assert in_a_minute is not None
    assert 50 < in_a_minute <= 60
    assert seconds_until("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert [seconds_until(text) for text in (None, "", "soon", "-1", "1.5", "²")] == [None] * 6


@given(st.integers(0, 50))
def test_pauses_grow_and_are_never_shorter_than_asked(attempt: int) -> None:
    """What the service says is waited for; else pauses double up to a bound."""
    asked = pause_after(Refused(429, {}, 30.0), attempt)
    assert 30 <= asked <= 36
    own = pause_after(Unreachable("gone"), attempt)
    assert min(0.5 * 2**attempt, 8) <= own <= min(0.5 * 2**attempt, 8) * 1.2


# --- events -----------------------------------------------------------------------------


def events_of(*chunks: bytes) -> list[Event]:
    async def stream() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    async def collect() -> list[Event]:
        return [event async for event in read_events(stream())]

    return asyncio.run(collect())


STREAM = (
    ": waiting\n\n"
    'event: queued\ndata: {"position": 0}\n\n'
    "event: completed\r\ndata: one\u2028line\x0bstill\r\ndata:two\r\n\r\n"
    "data: nameless\n\n"
    "event: failed\ndata: never ends\n"
).encode()


@given(st.lists(st.integers(0, len(STREAM)), max_size=8).map(sorted))
def test_events_wherever_the_stream_is_cut(cuts: list[int]) -> None:
    """Chunks are cut anywhere; comments and an event without an end are none; only LF and CR LF end a line."""
    bounds = [0, *cuts, len(STREAM)]
    chunks = [STREAM[begin:end] for begin, end in itertools.pairwise(bounds)]
    assert events_of(*chunks) == [
        Event("queued", b'{"position": 0}'),
        Event("completed", "one\u2028line\x0bstill\ntwo".encode()),
        Event("message", b"nameless"),
    ]


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b'{"images": []}', b'{"images": [{"b64_json": "?", "nsfw_content_detected": false}]}']
)
def test_answer_that_is_none(data: bytes) -> None:
    """An answer of something else is one line."""
    with pytest.raises(PaintFailed):
        read_answer(data)


def test_flag_counts_unless_it_is_false() -> None:
    """Only what the service says is not flagged is not."""
    images = ", ".join(f'{{"b64_json": "AA==", "nsfw_content_detected": {flag}}}' for flag in ("true", "false", "null"))
    assert read_answer(f'{{"images": [{images}]}}'.encode()).num_flagged == 2


# --- files ------------------------------------------------------------------------------


def test_files_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one of several cannot be written, none is, and nothing hidden is left."""
    (tmp_path / "a").write_bytes(b"old")
    write = files_module._write_part

    def fail_on_second(path: Path, data: bytes) -> None:
        write(path, data)
        if data == b"second":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files_module, "_write_part", fail_on_second)
    with pytest.raises(Unwritable, match="b cannot be written: No space left"):
        write_whole([(tmp_path / "a", b"first"), (tmp_path / "b", b"second")])
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


def test_links_are_followed(tmp_path: Path) -> None:
    """A link stays one: what it leads to is written."""
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_whole([(tmp_path / "link", b"new")])
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"


def test_only_what_nobody_writes_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed run left goes; what a living one writes is locked and stays, as do all other files."""
    (tmp_path / ".inpaint-left.part").touch()
    (tmp_path / ".other.part").touch()
    write = files_module.os.fsync

    def look(descriptor: int) -> None:
        remove_abandoned(tmp_path)
        write(descriptor)

    monkeypatch.setattr(files_module.os, "fsync", look)
    write_whole([(tmp_path / "a", b"whole")])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.part", "a"]


def test_lines_hold_nothing_that_a_terminal_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    """What a service or a file name says cannot move the cursor or span lines."""
    say("a\x1b[2J\nb\u009b c")
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.removesuffix("\n").isprintable()
