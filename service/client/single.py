"""One request: its pictures into files or to standard output."""

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from service.client.answers import Answer
from service.client.command import MASK, Command
from service.client.connection import Connection, Order
from service.client.exit_status import ExitStatus
from service.client.failures import PaintFailed, Unwritable, WrongUsage
from service.client.files import read_input, write_whole
from service.client.naming import STDOUT, format_for, num_images, numbered
from service.client.progress import StepBar, say
from service.client.retries import paint


async def paint_single(command: Command) -> ExitStatus:
    """Paint one request.

    It has no `Idempotency-Key`, so that hanging up cancels it.

    Raises:
        WrongUsage: Nothing was sent.
    """
    _check_outputs(command)
    order = Order(_fields(command), _files(command.files))
    try:
        async with Connection(command.url, command.key, max_connections=1) as connection:
            with StepBar(is_shown=command.shows_progress) as bar:
                answer = await paint(connection, order, bar, command.retries)
        await asyncio.to_thread(_write, command, answer)
    except PaintFailed as failure:
        say(str(failure))
        return failure.exit_status
    return _judge(answer)


def _check_outputs(command: Command) -> None:
    """Before minutes are spent on what cannot be written."""
    if MASK in command.files and command.files[MASK].is_dir():
        raise WrongUsage("--mask is a folder, but --image is none")
    if command.output == STDOUT and num_images(command.fields) > 1:
        raise WrongUsage("-o -: standard output takes one image")
    if command.output == STDOUT and command.metadata == STDOUT:
        raise WrongUsage("-o - and --json - cannot share standard output")
    for flag, path in (("-o", command.output), ("--json", command.metadata)):
        if path is None or path == STDOUT:
            continue
        if path.is_dir():
            raise WrongUsage(f"{flag}: {path} is a folder; for a folder of results --image has to be one, too")
        if not path.parent.is_dir():
            raise WrongUsage(f"{flag}: there is no folder {path.parent}")


def _fields(command: Command) -> Mapping[str, str]:
    if "output_format" in command.fields or command.output == STDOUT:
        return command.fields
    return {**command.fields, "output_format": format_for(command.output)}


def _files(paths: Mapping[str, Path]) -> dict[str, bytes]:
    return {name: read_input(path, f"--{name.replace('_', '-')}") for name, path in paths.items()}


def _write(command: Command, answer: Answer) -> None:
    """Pictures, then what is said of them.

    Raises:
        Unwritable: Something cannot be written.
    """
    names: Sequence[Path] = []
    if command.output == STDOUT:
        _to_stdout(answer.pictures[0].data)
    else:
        names = numbered(command.output, len(answer.pictures))
        write_whole([(path, picture.data) for path, picture in zip(names, answer.pictures, strict=True)])
    if command.metadata is not None:
        text = json.dumps(answer.described(names), ensure_ascii=False, indent=2).encode() + b"\n"
        if command.metadata == STDOUT:
            _to_stdout(text)
        else:
            write_whole([(command.metadata, text)])


def _to_stdout(data: bytes) -> None:
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except OSError as error:
        raise Unwritable(f"standard output cannot be written: {error.strerror or error}") from None


def _judge(answer: Answer) -> ExitStatus:
    if not answer.num_flagged:
        return ExitStatus.PAINTED
    which = "the image" if len(answer.pictures) == 1 else f"{answer.num_flagged} of {len(answer.pictures)} images"
    say(f"the safety checker flagged {which}; written as the service sent it")
    return ExitStatus.FLAGGED
