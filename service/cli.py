"""The command line: one function for each command. Imports nothing heavy before it knows what to do."""

import sys
from collections.abc import Callable, Mapping, Sequence
from getpass import getpass
from pathlib import Path
from typing import Any

from service.arguments import DEFAULT_URL, parse
from service.errors import StartupError
from service.logs import configure_logging
from service.settings import KEY_VARIABLE, URL_VARIABLE, client_environment, load_settings

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Without the program's name; the process's own by default.

    Returns:
        The exit status: 0, 1 when the service could not start, 2 for wrong settings; of `inpaint` see
        `service.client.exit_status`.
    """
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        return _COMMANDS[options.pop("command")](options)
    except StartupError as error:
        return _fail(error, EXIT_FAILED)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _serve(options: Mapping[str, Any]) -> int:
    try:
        settings = load_settings(options)
    except StartupError as error:
        return _fail(error, EXIT_USAGE)
    configure_logging(settings)
    from service.api.server import serve  # noqa: PLC0415 - --help and --version answer without the web stack

    return serve(settings)


def _inpaint(options: Mapping[str, Any]) -> int:
    from service.client.command import Command  # noqa: PLC0415 - as above
    from service.client.failures import WrongUsage  # noqa: PLC0415
    from service.client.run import run  # noqa: PLC0415

    texts = {name: options[name] for name in options["text_fields"] if options[name] is not None}
    environment = client_environment()
    try:
        return run(
            Command(
                url=options["url"] or environment.get(URL_VARIABLE, DEFAULT_URL),
                key=_key(options["key_file"], environment),
                fields={name: _text(value) for name, value in texts.items()},
                files={name: options[name] for name in options["file_fields"] if options[name] is not None},
                **{
                    name: options[name]
                    for name in ("output", "metadata", "concurrency", "retries", "overwrite", "quiet")
                },
            )
        )
    except WrongUsage as error:
        return _fail(error, EXIT_USAGE)


def _text(value: str | bool) -> str:
    """A flag's value as form fields have it."""
    return str(value).lower() if isinstance(value, bool) else value


def _key(path: Path | None, environment: Mapping[str, str]) -> str | None:
    """The API key: a file's first line, else the environment's."""
    from service.client.files import read_input  # noqa: PLC0415 - as above

    if path is None:
        return environment.get(KEY_VARIABLE, "").strip() or None
    lines = read_input(path, "--key-file").decode("utf-8-sig", errors="replace").split()
    return lines[0] if lines else None


def _doctor(options: Mapping[str, Any]) -> int:
    from service.doctor.command import examine  # noqa: PLC0415 - as above

    overrides = {name: value for name, value in options.items() if name != "as_json"}
    return examine(overrides, as_json=options["as_json"])


def _openapi(_options: Mapping[str, Any]) -> int:
    from service.api.app import create_app  # noqa: PLC0415 - as above
    from service.api.openapi import to_yaml  # noqa: PLC0415
    from service.engine.engine import Engine  # noqa: PLC0415
    from service.metrics import Metrics  # noqa: PLC0415

    settings, metrics = load_settings(environ={}), Metrics()  # The document is the same everywhere.
    sys.stdout.write(to_yaml(create_app(settings, Engine(settings, metrics), metrics).openapi()))
    return 0


def _hash_key(_options: Mapping[str, Any]) -> int:
    from service.api.keys import hash_of  # noqa: PLC0415 - as above

    line = getpass("key: ") if sys.stdin.isatty() else sys.stdin.readline()
    key = line.strip()
    if not key:
        return _fail(StartupError("there is no key on standard input"), EXIT_USAGE)
    sys.stdout.write(f"{hash_of(key)}\n")
    return 0


def _fail(error: Exception, status: int) -> int:
    """One line for the operator."""
    line = " ".join(str(error).split())
    sys.stderr.write(f"inpaint-service: {line}\n")
    return status


_COMMANDS: Mapping[str, Callable[[Mapping[str, Any]], int]] = {
    "serve": _serve,
    "inpaint": _inpaint,
    "doctor": _doctor,
    "hash-key": _hash_key,
    "openapi": _openapi,
}
