"""What a person sees on standard error while pictures are painted. Nothing where nobody looks."""

import json
import sys
from types import TracebackType
from typing import Protocol, Self

from tqdm import tqdm

from service.client.events import Event
from service.client.failures import PaintFailed

_WORDS_ALONE = "{desc}"
"""The look of a bar before there are steps to show."""


class Watcher(Protocol):
    """Is told how a request gets on."""

    def on_event(self, event: Event) -> None:
        """The service reports."""

    def on_pause(self, failure: PaintFailed, seconds: float) -> None:
        """The request will be sent again."""


class StepBar:
    """A line for one request: its place in the queue, then its steps. As a context manager it leaves no line behind.

    Args:
        is_shown: Whether to show anything.
    """

    def __init__(self, *, is_shown: bool) -> None:
        self._bar = tqdm(
            desc="sending",
            bar_format=_WORDS_ALONE,
            unit=" steps",
            file=sys.stderr,
            disable=not is_shown,
            leave=False,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()

    def on_event(self, event: Event) -> None:
        """`queued` and `progress`."""
        if self._bar.disable:
            return
        numbers = _numbers(event.data)
        if event.name == "queued":
            ahead = int(numbers.get("position", 0))
            self._say(f"waiting, {ahead} ahead" if ahead else "waiting")
        elif event.name == "progress":
            if self._bar.bar_format is not None:
                self._bar.reset()  # The pace is that of the steps.
                self._bar.bar_format = None
            self._bar.total = int(numbers.get("steps", 0))
            self._bar.n = int(numbers.get("step", 0))
            self._bar.set_description("painting")

    def on_pause(self, failure: PaintFailed, seconds: float) -> None:
        """Why, and how long."""
        self._say(_printable(f"again in {seconds:.0f} s ({failure})"))

    def _say(self, words: str) -> None:
        self._bar.bar_format = _WORDS_ALONE
        self._bar.set_description_str(words)


class PictureBar:
    """A line for many pictures, of which each is told of when it is done.

    Args:
        num_pictures: All of them.
        num_done: Those that were there already.
        is_shown: Whether to show anything.
    """

    def __init__(self, num_pictures: int, num_done: int, *, is_shown: bool) -> None:
        self._bar = tqdm(
            total=num_pictures,
            initial=num_done,
            unit=" pictures",
            file=sys.stderr,
            disable=not is_shown,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()

    def one_done(self) -> None:
        """One more picture, painted or given up."""
        self._bar.set_postfix_str("")
        self._bar.update()

    def on_event(self, event: Event) -> None:
        """Steps of single pictures are not shown."""

    def on_pause(self, failure: PaintFailed, seconds: float) -> None:
        """Why it takes so long."""
        self._bar.set_postfix_str(_printable(f"again in {seconds:.0f} s ({failure})"))


def say(line: str) -> None:
    """A line on standard error, beside a bar that may be there."""
    tqdm.write(f"inpaint-service: {_printable(line)}", file=sys.stderr)


def _printable(text: str) -> str:
    """One line, with nothing in it that a terminal would obey: services and file names may say anything."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.split()))


def _numbers(data: bytes) -> dict[str, float]:
    """The numbers of an event's JSON."""
    try:
        values = json.loads(data)
    except ValueError:
        return {}
    if not isinstance(values, dict):
        return {}
    return {name: value for name, value in values.items() if isinstance(value, int | float)}
