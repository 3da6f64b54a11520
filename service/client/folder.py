"""A folder of pictures: each is one request, some at a time; what is in the output folder already is not painted anew.

Requests have an `Idempotency-Key`: one whose connection broke is painted once, however often it is sent.
"""

import asyncio
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from service.client.answers import Answer
from service.client.command import IMAGE, MASK, Command
from service.client.connection import Connection, Order
from service.client.exit_status import ExitStatus, heaviest
from service.client.failures import PaintFailed, Unwritable, WrongUsage
from service.client.files import read_input, remove_abandoned, write_whole
from service.client.naming import STDOUT, num_images, numbered, suffix_for
from service.client.pairs import Pair, Pairing, pair, pair_with, pictures_in
from service.client.progress import PictureBar, say
from service.client.retries import paint


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What became of a picture.

    Attributes:
        status: What it would exit with alone.
        line: What there is to say; empty where all is well.
    """

    status: ExitStatus
    line: str = ""


async def paint_folder(command: Command) -> ExitStatus:
    """Paint all pictures of a folder that have a mask.

    Raises:
        WrongUsage: Nothing was sent.
    """
    pairing = _pairing(command)
    shared = {
        name: read_input(path, f"--{name.replace('_', '-')}")
        for name, path in command.files.items()
        if name not in (IMAGE, MASK)
    }
    _prepare_output(command)
    to_do = [one for one in pairing.pairs if command.overwrite or not _is_painted(command, one)]
    num_there = len(pairing.pairs) - len(to_do)
    for line in (*pairing.odd_pictures, *pairing.odd_masks):
        say(line)
    async with Connection(command.url, command.key, command.concurrency) as connection:
        with PictureBar(len(pairing.pairs), num_there, is_shown=command.shows_progress) as bar:
            painting = _Run(command, connection, shared, bar)
            try:
                await painting.all_of(to_do)
            except asyncio.CancelledError:
                say(f"interrupted; {_summary(painting, num_there, len(to_do))}; the same command goes on from here")
                raise
    for outcome in painting.outcomes:
        if outcome.line:
            say(outcome.line)
    if not command.quiet:
        say(_summary(painting, num_there, len(to_do)))
    odd = [ExitStatus.REFUSED] if pairing.odd_pictures else []
    return heaviest([*odd, *(outcome.status for outcome in painting.outcomes)])


class _Run:
    """Paints pictures, some at a time, until all are done or it is no use.

    Args:
        command: What was asked for.
        connection: To the service.
        shared: Files that go along with each picture.
        bar: Told of each picture.
    """

    def __init__(self, command: Command, connection: Connection, shared: Mapping[str, bytes], bar: PictureBar) -> None:
        self.outcomes: list[_Outcome] = []
        self._command = command
        self._connection = connection
        self._shared = shared
        self._bar = bar
        self._is_over = False

    async def all_of(self, pairs: list[Pair]) -> None:
        """Paint."""
        waiting = iter(pairs)
        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._command.concurrency, len(pairs))):
                group.create_task(self._some_of(waiting))

    async def _some_of(self, waiting: Iterator[Pair]) -> None:
        for one in waiting:
            if self._is_over:
                return
            outcome = await self._paint(one)
            self.outcomes.append(outcome)
            self._bar.one_done()

    async def _paint(self, one: Pair) -> _Outcome:
        """One picture; whatever is wrong with it costs the others nothing."""
        try:
            order = await asyncio.to_thread(self._order, one)
            answer = await paint(self._connection, order, self._bar, self._command.retries, str(uuid4()))
            await asyncio.to_thread(self._write, one, answer)
        except WrongUsage as error:
            return _Outcome(ExitStatus.REFUSED, str(error))
        except PaintFailed as failure:
            self._is_over = self._is_over or failure.ends_run
            return _Outcome(failure.exit_status, f"{one.image.name}: {failure}")
        if answer.num_flagged:
            return _Outcome(ExitStatus.FLAGGED, f"{one.image.name}: flagged by the safety checker")
        return _Outcome(ExitStatus.PAINTED)

    def _order(self, one: Pair) -> Order:
        files = {IMAGE: read_input(one.image, "--image"), **self._shared}
        if one.mask is not None:
            files[MASK] = read_input(one.mask, "--mask")
        return Order(self._command.fields, files)

    def _write(self, one: Pair, answer: Answer) -> None:
        names = numbered(_output(self._command, one), len(answer.pictures))
        write_whole([(path, picture.data) for path, picture in zip(names, answer.pictures, strict=True)])
        if self._command.metadata is not None:
            line = json.dumps(answer.described(names), ensure_ascii=False) + "\n"
            _append(self._command.metadata, line)


def _pairing(command: Command) -> Pairing:
    """Pictures with their masks.

    Raises:
        WrongUsage: A folder cannot be read, or there is nothing to paint in it.
    """
    images, mask = pictures_in(command.files[IMAGE]), command.files.get(MASK)
    if not images:
        raise WrongUsage(f"--image: there is no picture in {command.files[IMAGE]}")
    return pair(images, pictures_in(mask)) if mask is not None and mask.is_dir() else pair_with(images, mask)


def _prepare_output(command: Command) -> None:
    """Make the folder of results.

    Raises:
        WrongUsage: It cannot be, or it is one of the others.
    """
    if STDOUT in (command.output, command.metadata):
        raise WrongUsage("a folder of pictures cannot go to standard output")
    inputs = [command.files[name].resolve() for name in (IMAGE, MASK) if name in command.files]
    if command.output.resolve() in inputs:
        raise WrongUsage("-o: results would be mixed with what they are made of; take another folder")
    if command.metadata is not None and not command.metadata.parent.is_dir():
        raise WrongUsage(f"--json: there is no folder {command.metadata.parent}")
    try:
        command.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WrongUsage(f"-o: the folder {command.output} cannot be made: {error.strerror or error}") from None
    remove_abandoned(command.output)


def _output(command: Command, one: Pair) -> Path:
    return command.output / f"{one.stem}{suffix_for(command.fields.get('output_format'))}"


def _is_painted(command: Command, one: Pair) -> bool:
    """Files come into the folder whole: those that are there are complete."""
    return all(path.exists() for path in numbered(_output(command, one), num_images(command.fields)))


def _append(path: Path, line: str) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        raise Unwritable(f"{path} cannot be written: {error.strerror or error}") from None


def _summary(painting: _Run, num_there: int, num_to_do: int) -> str:
    painted = sum(one.status in (ExitStatus.PAINTED, ExitStatus.FLAGGED) for one in painting.outcomes)
    failed = len(painting.outcomes) - painted
    counts = {"painted": painted, "there already": num_there, "failed": failed}
    counts["not tried"] = num_to_do - len(painting.outcomes)
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "nothing to do"
