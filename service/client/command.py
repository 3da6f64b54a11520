"""`inpaint-service inpaint`: what was asked for, and who does it."""

import asyncio
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from service.client.exit_status import ExitStatus
from service.client.failures import WrongUsage

IMAGE, MASK = "image", "mask"


@dataclass(frozen=True, slots=True)
class Command:
    """What the command line says.

    Attributes:
        url: Where the service is.
        key: The API key.
        fields: Texts by form field, as they were typed: what they may be is the service's to say.
        files: Files by form field; `image` and `mask` may be folders.
        output: Where to: a file, "-" for standard output, or a folder where `image` is one.
        metadata: File for what the answer says beside its images; None where nobody wants to know.
        concurrency: Requests at once, of a folder.
        retries: How often a request is sent again that the service cannot take now.
        overwrite: Paint also what is in the output folder already.
        quiet: Say nothing but what went wrong.
    """

    url: str
    key: str | None = field(repr=False)
    fields: Mapping[str, str] = field(repr=False)
    files: Mapping[str, Path]
    output: Path
    metadata: Path | None
    concurrency: int
    retries: int
    overwrite: bool
    quiet: bool

    @property
    def is_folder(self) -> bool:
        """Whether a folder of pictures is to be painted."""
        return IMAGE in self.files and self.files[IMAGE].is_dir()

    @property
    def shows_progress(self) -> bool:
        """Whether somebody looks."""
        return not self.quiet and sys.stderr.isatty()


def run(command: Command) -> ExitStatus:
    """Paint.

    Raises:
        WrongUsage: Nothing was sent.
        KeyboardInterrupt: The user does not want it any more; what has not been sent a key is cancelled.
    """
    _check_texts(command.fields)
    if command.is_folder:
        from service.client.folder import paint_folder  # noqa: PLC0415 - either of the two

        return asyncio.run(paint_folder(command))
    from service.client.single import paint_single  # noqa: PLC0415 - either of the two

    return asyncio.run(paint_single(command))


def _check_texts(fields: Mapping[str, str]) -> None:
    """What a terminal sends in another encoding than it says cannot be sent on."""
    for name, text in fields.items():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise WrongUsage(f"--{name.replace('_', '-')} is not valid text") from None
