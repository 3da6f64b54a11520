"""Which of the offered media types a client wants: the `Accept` header with its weights (RFC 9110, 12.5.1)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from service.errors import ErrorCode, InpaintError

_WEIGHT = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")


@dataclass(frozen=True, slots=True)
class _Range:
    """One element of the header: a media range and its weight."""

    media_type: str
    weight: float

    def specificity_for(self, offered: str) -> int | None:
        """2 for the type itself, 1 for type/*, 0 for */*; None where it does not match."""
        if self.media_type == offered:
            return 2
        if self.media_type == f"{offered.partition('/')[0]}/*":
            return 1
        return 0 if self.media_type == "*/*" else None


def choose_media_type(accept: str | None, offers: Sequence[str]) -> str:
    """The offer that fits best.

    Among offers of equal weight, one that the client names wins over one that
    only a wildcard covers, and then the first: "application/json, */*" is a
    client that reads JSON.

    Args:
        accept: The header; None or blank takes the first offer.
        offers: Media types, the service's own preference first.

    Raises:
        InpaintError: `NOT_ACCEPTABLE`.
    """
    if accept is None or not accept.strip():
        return offers[0]
    ranges = [parsed for element in accept.split(",") if (parsed := _parse(element)) is not None]
    best: tuple[float, int] = (0.0, 0)
    chosen = None
    for offer in offers:
        matching = [(place, found.weight) for found in ranges if (place := found.specificity_for(offer)) is not None]
        if not matching:
            continue
        specificity, weight = max(matching)
        if weight > 0 and (weight, specificity) > best:
            best, chosen = (weight, specificity), offer
    if chosen is None:
        raise InpaintError(ErrorCode.NOT_ACCEPTABLE, f"The answer can be had as {', '.join(offers)}.")
    return chosen


def _parse(element: str) -> _Range | None:
    """A range; None for what is none. Parameters other than the weight do not matter to what is offered."""
    media_type, *parameters = (piece.strip().lower() for piece in element.split(";"))
    weight = "1"
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            weight = value.strip()
    if "/" not in media_type or not _WEIGHT.fullmatch(weight):
        return None
    return _Range(media_type, float(weight))
