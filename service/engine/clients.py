"""Who requests are of, as far as they share the service."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Client:
    """The holder of one key. Not the key: nothing here needs to be kept secret.

    Attributes:
        number: Tells clients apart.
        name: What the operator calls it, for the log; None where the operator gave no name.
        has_priority: Whether its requests go before those of others.
    """

    number: int
    name: str | None = None
    has_priority: bool = False


ANONYMOUS = Client(0)
"""Everybody, where there are no keys: addresses do not tell clients apart behind proxies."""
