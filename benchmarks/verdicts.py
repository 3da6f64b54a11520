"""Whether promises hold: what was promised, what was measured, and the verdict."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.tables import table


@dataclass(frozen=True, slots=True)
class Verdict:
    """One promise.

    Attributes:
        promise: What, in words.
        bound: What it asks for, as a reader wants it.
        measured: What was found.
        holds: Whether it is kept.
    """

    promise: str
    bound: str
    measured: str
    holds: bool


def at_least(promise: str, measured: float | None, bound: float, form: str = "{:.3g}") -> Verdict:
    """A figure that must not be smaller; None, nothing measured, is a broken promise."""
    holds = measured is not None and measured >= bound
    return Verdict(promise, f"at least {form.format(bound)}", _shown(measured, form), holds)


def at_most(promise: str, measured: float | None, bound: float, form: str = "{:.3g}") -> Verdict:
    """A figure that must not be greater; None, nothing measured, is a broken promise."""
    holds = measured is not None and measured <= bound
    return Verdict(promise, f"at most {form.format(bound)}", _shown(measured, form), holds)


def equals(promise: str, measured: int, expected: int) -> Verdict:
    """A count that must be this one."""
    return Verdict(promise, str(expected), str(measured), measured == expected)


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """Markdown."""
    rows = [[one.promise, one.bound, one.measured, "yes" if one.holds else "**NO**"] for one in verdicts]
    return table(("promise", "bound", "measured", "holds"), rows)


def all_hold(verdicts: Sequence[Verdict]) -> bool:
    """Whether there are promises, and all are kept."""
    return bool(verdicts) and all(verdict.holds for verdict in verdicts)


def _shown(measured: float | None, form: str) -> str:
    return "nothing" if measured is None else form.format(measured)
