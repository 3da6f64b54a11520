"""The command line: quick help, flags of every setting, one line per failure."""

import hashlib
import io
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from service import __version__
from service.cli import main
from service.settings import Settings, environment_variable

HEAVY = ("torch", "diffusers", "transformers")


def run_python(code: str) -> str:
    """Output of a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["doctor", "--help"]])
def test_help_imports_neither_torch_nor_the_web_stack(arguments: list[str]) -> None:
    """`inpaint-service --help` answers without loading what only serving needs."""
    modules = run_python(
        "import sys\n"
        "from service.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        "print('MODULES', *sys.modules)"
    ).partition("MODULES")[2]
    loaded = {name.partition(".")[0] for name in modules.split()}
    assert "pydantic" in loaded
    assert not loaded & {*HEAVY, "fastapi", "starlette", "uvicorn", "PIL"}


def test_api_process_never_imports_torch() -> None:
    """The API process, its server and the document are free of torch, diffusers and transformers."""
    modules = run_python("import sys, service.api.app, service.api.server, service.cli\nprint(*sys.modules)")
    assert not {name.partition(".")[0] for name in modules.split()} & set(HEAVY)


def test_every_setting_is_a_flag_with_its_variable_and_meaning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`serve --help` lists each setting: flag, description, environment variable."""
    monkeypatch.setenv("COLUMNS", "10000")
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')} " in text
        assert f"{field.description} [{environment_variable(name)}, default: " in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """`--version` names program and version."""
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"inpaint-service {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--port", "99999"], "--port"),
        (["--queue-size", "0"], "--queue-size"),
        (["--nsfw-policy", "off"], "--nsfw-policy"),
        (["--timeout", "soon", "--max-images", "0"], "--max-images"),
    ],
)
def test_wrong_setting_is_one_line_and_status_2(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A setting that does not fit is named in one line; nothing is started."""
    assert main(["serve", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("inpaint-service: ")
    assert named in error


@pytest.mark.parametrize("arguments", [[], ["paint"], ["serve", "--portt", "1"], ["serve", "--po", "1"]])
def test_unknown_commands_and_flags_are_status_2(arguments: list[str]) -> None:
    """What is not understood is refused; flags are not guessed from their beginnings."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


def test_taken_port_is_one_line_that_names_the_address(capsys: pytest.CaptureFixture[str]) -> None:
    """A port in use is known before anything is loaded: one line with the address, status 1."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port), "--log-level", "error"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"127.0.0.1:{port}" in error


def test_host_that_is_none_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """An address that is not this machine's is one line, status 1."""
    assert main(["serve", "--host", "192.0.2.1", "--port", "0", "--log-level", "error"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "192.0.2.1" in error


def test_hash_key_prints_what_settings_take(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`hash-key` reads a key from standard input, prints its hash, and does not repeat it."""
    monkeypatch.setattr("sys.stdin", io.StringIO("sesame\n"))
    assert main(["hash-key"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"sha256:{hashlib.sha256(b'sesame').hexdigest()}\n"
    assert printed.err == ""


def test_hash_key_needs_a_key(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing on standard input is one line and status 2, not the hash of nothing."""
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    assert main(["hash-key"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("inpaint-service: ")


def test_keys_that_cannot_be_read_are_one_line_that_shows_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing secret file or a wrong entry ends the start before anything is loaded, and no key is printed."""
    missing = tmp_path / "keys"
    assert main(["serve", "--port", "0", "--api-keys-file", str(missing), "--log-level", "error"]) == 1
    assert str(missing) in (error := capsys.readouterr().err)
    assert error.count("\n") == 1
    assert main(["serve", "--port", "0", "--api-keys", "open,sha256:sesame", "--log-level", "error"]) == 1
    error = capsys.readouterr().err
    assert "--api-keys, entry 2" in error
    assert "sesame" not in error
    assert error.count("\n") == 1


def test_openapi_prints_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    """`openapi` prints the document; no server, no worker."""
    assert main(["openapi"]) == 0
    assert capsys.readouterr().out.startswith('openapi: "3.1')
