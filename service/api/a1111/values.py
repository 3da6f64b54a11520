"""JSON values of fields, spelled as the native form spells them."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from service.api.a1111.fields import DEFAULTS
from service.api.problems import Fault
from service.errors import ErrorCode

_FLAGS = {"true": True, "1": True, "false": False, "0": False}

# Beyond it, not every whole number is a float.
_MAX_EXACT = 2**53


class Values:
    """The values of one request; what is wrong with them is gathered, lest a client learns of one fault at a time.

    Args:
        payload: The request's body; null stands for the default, as in the web UI.
    """

    def __init__(self, payload: Mapping[str, Any]) -> None:
        self.sent = {name: value for name, value in payload.items() if value is not None}
        self.faults: list[Fault] = []

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401 - any JSON value
        return self.sent.get(name, DEFAULTS[name])

    def refuse(self, name: str, message: str) -> None:
        """Note a fault."""
        self.faults.append(Fault(name, ErrorCode.INVALID_FIELD, f"{name}: {message}."))

    def text(self, name: str) -> str:
        """A text or a number as the native form takes it; bounds are the native form's to check."""
        value = self[name]
        if isinstance(value, str):
            return value
        if isinstance(value, float):
            return (
                str(int(value)) if isfinite(value) and value.is_integer() and abs(value) < _MAX_EXACT else repr(value)
            )
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        self.refuse(name, "Input should be a text or a number")
        return ""

    def words(self, name: str) -> str:
        """A text."""
        value = self[name]
        if isinstance(value, str):
            return value
        self.refuse(name, "Input should be a text")
        return ""

    def flag(self, name: str) -> bool:
        """Whether something is so: true, false, 1, 0, or a text of these."""
        value = self[name]
        text = str(value).lower() if isinstance(value, bool | int | str) else ""
        if text not in _FLAGS:
            self.refuse(name, "Input should be true or false")
            return False
        return _FLAGS[text]

    def whole(self, name: str) -> int:
        """A whole number of any size; 1 in the place of what is none."""
        value = self[name]
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, str) and value.removeprefix("-").isdecimal() and len(value) < len(str(_MAX_EXACT)):
            return int(value)
        self.refuse(name, "Input should be a whole number")
        return 1

    def number(self, name: str) -> float | None:
        """A number; None where it is none, which the native form tells of."""
        try:
            return float(self.text(name))
        except ValueError:
            return None

    def echo(self) -> dict[str, Any]:
        """Every field with its value, for the answer's `parameters`; in the place of lists and objects, the default."""
        return {name: value if _is_plain(value := self[name]) else default for name, default in DEFAULTS.items()}


def _is_plain(value: object) -> bool:
    return isinstance(value, bool | int | str) or (isinstance(value, float) and isfinite(value))
