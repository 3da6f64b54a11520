"""The command line: `serve`, `openapi`, `hash-key`. Imports nothing heavy before it knows what to do."""

import argparse
import sys
from collections.abc import Sequence
from getpass import getpass
from typing import Any, get_args

from pydantic.fields import FieldInfo

from service import __version__
from service.errors import StartupError
from service.logs import configure_logging
from service.settings import Settings, environment_variable, load_settings

EXIT_FAILED = 1
EXIT_USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Without the program's name; the process's own by default.

    Returns:
        The exit status: 0, 1 when the service could not start, 2 for wrong settings.
    """
    options = vars(_parser().parse_args(arguments))
    command = options.pop("command")
    if command == "openapi":
        return _openapi()
    if command == "hash-key":
        return _hash_key()
    try:
        settings = load_settings(options)
    except StartupError as error:
        return _fail(error, EXIT_USAGE)
    try:
        return _serve(settings)
    except StartupError as error:
        return _fail(error, EXIT_FAILED)


def _serve(settings: Settings) -> int:
    configure_logging(settings)
    from service.api.server import serve  # noqa: PLC0415 - --help and --version answer without the web stack

    return serve(settings)


def _openapi() -> int:
    from service.api.app import create_app  # noqa: PLC0415 - as above
    from service.api.openapi import to_yaml  # noqa: PLC0415
    from service.engine.engine import Engine  # noqa: PLC0415
    from service.metrics import Metrics  # noqa: PLC0415

    settings, metrics = load_settings(environ={}), Metrics()  # The document is the same everywhere.
    sys.stdout.write(to_yaml(create_app(settings, Engine(settings, metrics), metrics).openapi()))
    return 0


def _hash_key() -> int:
    from service.api.keys import hash_of  # noqa: PLC0415 - as above

    line = getpass("key: ") if sys.stdin.isatty() else sys.stdin.readline()
    key = line.strip()
    if not key:
        return _fail(StartupError("there is no key on standard input"), EXIT_USAGE)
    sys.stdout.write(f"{hash_of(key)}\n")
    return 0


def _fail(error: StartupError, status: int) -> int:
    """One line for the operator."""
    line = " ".join(str(error).split())
    sys.stderr.write(f"inpaint-service: {line}\n")
    return status


# --- flags, from the settings -------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="inpaint-service", description="Stable Diffusion inpainting over HTTP.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    serve = commands.add_parser(
        "serve",
        help="serve a model",
        description="Serve a model until SIGTERM. Each setting is a flag and an environment variable; the flag wins.",
        allow_abbrev=False,
    )
    for name, field in Settings.model_fields.items():
        _add_flag(serve, name, field)
    commands.add_parser(
        "hash-key",
        help="read an API key from standard input and print the hash to put into settings",
        allow_abbrev=False,
    )
    commands.add_parser("openapi", help="print the API's OpenAPI document as YAML", allow_abbrev=False)
    return parser


def _add_flag(parser: argparse.ArgumentParser, name: str, field: FieldInfo) -> None:
    """A flag without a default of its own: one that is not given leaves the setting to the environment."""
    help_text = f"{field.description} [{environment_variable(name)}, default: {_shown(field.default)}]"
    options: dict[str, Any] = {"dest": name, "default": None, "help": help_text.replace("%", "%%")}
    if field.annotation is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        choices = [value for value in get_args(field.annotation) if isinstance(value, str)]
        options["metavar"] = "|".join(choices) or name.rpartition("_")[2].upper()
    parser.add_argument(f"--{name.replace('_', '-')}", **options)


def _shown(default: object) -> str:
    """A default as it would be written."""
    if default is None or default == ():
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    return ",".join(default) if isinstance(default, tuple) else str(default)
