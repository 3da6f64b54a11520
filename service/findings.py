"""What `inpaint-service doctor` finds, in its own process and in the child that may import torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

State = Literal["ok", "warn", "fail"]

Fact = str | int | float | bool | None
"""A value for machines: bytes, counts, versions. Never a key."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        topic: What was looked at.
        state: `fail` if `serve` would not start, `warn` if it would with less than may be wanted.
        text: What there is.
        hint: What to do about it.
        facts: The same for machines.
    """

    topic: str
    state: State
    text: str
    hint: str = ""
    facts: Mapping[str, Fact] = field(default_factory=dict)


def shown_bytes(num_bytes: float) -> str:
    """Bytes as a person reads them: "512 MiB", "1.5 GiB"."""
    mib = num_bytes / 2**20
    return f"{mib:.0f} MiB" if mib < 1000 else f"{mib / 1024:.1f} GiB"  # noqa: PLR2004 - as wide as it should get
