"""The README's code blocks, as a reader would paste them."""

import re
from dataclasses import dataclass
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"

LANGUAGES = ("bash", "python", "javascript", "html")
"""What is run. Blocks in other languages show files or answers."""

_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
_EXCUSE = "not run: "
_TEST_COMMAND = "test-command"  # How the tests are run, marked for the CI script.


@dataclass(frozen=True, slots=True)
class Block:
    """One code block.

    Attributes:
        language: What it is written in.
        code: The text.
        line: Where it stands.
        excuse: Why it is not run; None where it is.
    """

    language: str
    code: str
    line: int
    excuse: str | None


def blocks_of(text: str) -> list[Block]:
    """Every block in one of the languages, in order.

    A comment `<!-- not run: why -->` in the line before a block excuses it.
    """
    found = []
    for match in _BLOCK.finditer(text):
        mark = match["mark"] or ""
        excuse = mark.removeprefix(_EXCUSE) if mark.startswith((_EXCUSE, _TEST_COMMAND)) else None
        if match["language"] in LANGUAGES:
            line = text.count("\n", 0, match.start("language")) + 1
            found.append(Block(match["language"], match["code"], line, excuse))
    return found
