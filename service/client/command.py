"""`inpaint-service inpaint`: what was asked for."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

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
