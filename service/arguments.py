"""The command line's grammar: commands and flags, of which most are settings or form fields."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo

from service import __version__
from service.client.exit_status import MEANINGS
from service.settings import KEY_VARIABLE, URL_VARIABLE, Settings, environment_variable

DEFAULT_URL = "http://127.0.0.1:8000"

UNSHOWN_FIELDS = frozenset({"previews"})
"""Form fields that are no flags of `inpaint`, which shows no unfinished pictures."""


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """What was typed, by name; `command` is always there.

    Raises:
        SystemExit: Help was asked for, or it is not understood.
    """
    return vars(_parser(arguments[0] if arguments else "").parse_args(arguments))


def _parser(command: str) -> argparse.ArgumentParser:
    """All commands; of flags that take an import to know, those of one command."""
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
    _add_settings(serve)
    inpaint = commands.add_parser(
        "inpaint",
        help="paint a picture, or a folder of them, on a running service",
        description="Paint on a running service. With a folder as --image and as -o, each picture is painted with the "
        "mask of the same name; what is in the output folder already is skipped, so that the same command goes on "
        "where it was interrupted. The API key comes from the variable "
        f"{KEY_VARIABLE} or a file, never from a flag, which others could see.",
        epilog="exit status: " + "; ".join(f"{status:d} {meaning}" for status, meaning in MEANINGS.items()) + ". "
        "Of several failures in a folder the first in the order 1, 5, 3, 4.",
        allow_abbrev=False,
    )
    if command == "inpaint":
        _add_inpaint_flags(inpaint)
    doctor = commands.add_parser(
        "doctor",
        help="say what this machine has and whether serve would start",
        description="Look at this machine and at the settings, which are serve's, without serving.",
        epilog="exit status: 0 serve would start; 1 it would not; 2 the command line is wrong.",
        allow_abbrev=False,
    )
    doctor.add_argument("--json", dest="as_json", action="store_true", help="print JSON")
    _add_settings(doctor)
    commands.add_parser(
        "hash-key",
        help="read an API key from standard input and print the hash to put into settings",
        allow_abbrev=False,
    )
    commands.add_parser("openapi", help="print the API's OpenAPI document as YAML", allow_abbrev=False)
    return parser


# --- flags of settings --------------------------------------------------------------


def _add_settings(parser: argparse.ArgumentParser) -> None:
    for name, field in Settings.model_fields.items():
        default = f"[{environment_variable(name)}, default: {_shown(field.default)}]"
        _add_flag(parser, name, field, f"{field.description} {default}")


def _shown(default: object) -> str:
    """A default as it would be written."""
    if default is None or default == ():
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    return ",".join(default) if isinstance(default, tuple) else str(default)


# --- flags of form fields -----------------------------------------------------------


def _add_inpaint_flags(parser: argparse.ArgumentParser) -> None:
    from service.api.fields import InpaintFields  # noqa: PLC0415 - brings the web stack along
    from service.api.ip_adapter import IMAGE  # noqa: PLC0415 - as above
    from service.api.tensors import TENSORS  # noqa: PLC0415 - as above

    parser.add_argument("-o", "--output", type=Path, required=True, help="file or folder to write; - is stdout")
    parser.add_argument("--url", help=f"address of the service [{URL_VARIABLE}, default: {DEFAULT_URL}]", metavar="URL")
    parser.add_argument("--key-file", type=Path, help=f"file with the API key; by default {KEY_VARIABLE} has it")
    parser.add_argument(
        "--json",
        dest="metadata",
        type=Path,
        metavar="FILE",
        help="write what the answer says beside its images; - is stdout; of a folder a line is added for each picture",
    )
    parser.add_argument("--concurrency", type=_count(1, 256), default=4, help="requests at once, of a folder")
    parser.add_argument(
        "--retries", type=_count(0, 100), default=5, help="how often to come back to a service that is busy"
    )
    parser.add_argument("--overwrite", action="store_true", help="paint also what is in the output folder already")
    parser.add_argument("--quiet", action="store_true", help="say nothing but what went wrong")

    files = parser.add_argument_group("files to send")
    files.add_argument("--image", type=Path, help="picture, or folder of pictures: PNG, JPEG or WebP")
    files.add_argument("--mask", type=Path, help="white is repainted; by default what is transparent in the picture")
    files.add_argument(f"--{IMAGE.replace('_', '-')}", type=Path, help="picture to paint by")
    for name in TENSORS:
        files.add_argument(f"--{name.replace('_', '-')}", type=Path, help="a .npy or .safetensors file")

    fields = parser.add_argument_group("fields", "What they may be is for the service to say; see its /docs.")
    for name, field in InpaintFields.model_fields.items():
        if name not in UNSHOWN_FIELDS:
            _add_flag(fields, name, field, f"{field.description} {_default_of(field)}")
    parser.set_defaults(
        file_fields=("image", "mask", IMAGE, *TENSORS),
        text_fields=tuple(name for name in InpaintFields.model_fields if name not in UNSHOWN_FIELDS),
    )


def _default_of(field: FieldInfo) -> str:
    return "" if field.default in (None, "", ()) else f"[default: {_shown(field.default)}]"


def _count(least: int, most: int) -> Any:  # noqa: ANN401 - what argparse calls
    def count(text: str) -> int:
        if not (text.isascii() and text.isdigit() and least <= int(text[:9]) <= most):
            raise argparse.ArgumentTypeError(f"a whole number from {least} to {most}")
        return int(text)

    return count


# --- one flag -----------------------------------------------------------------------


def _add_flag(parser: argparse._ActionsContainer, name: str, field: FieldInfo, help_text: str) -> None:
    """A flag without a default of its own: what is not given is left to the environment, or to the service."""
    options: dict[str, Any] = {"dest": name, "default": None, "help": help_text.strip().replace("%", "%%")}
    if field.annotation is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        choices = [value for value in get_args(field.annotation) if isinstance(value, str)]
        options["metavar"] = "|".join(choices) or name.rpartition("_")[2].upper()
    parser.add_argument(f"--{name.replace('_', '-')}", **options)
