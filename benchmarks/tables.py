"""Markdown tables, and figures as they stand in them."""

from collections.abc import Sequence

NOTHING = "-"


def percent(ratio: float | None) -> str:
    """A share of one, in whole percent."""
    return NOTHING if ratio is None else f"{ratio:.0%}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], num_texts: int = 1) -> str:
    """A Markdown table; the columns after the first `num_texts` are numbers."""
    lines = [header, [("---" if column < num_texts else "---:") for column in range(len(header))], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
