"""Why there is no picture.

Messages are one line for the user, and may hold what a service or a file name says: `service.client.progress.say`
makes them fit for a terminal.

    Exception
    ├── WrongUsage            the command line, or a file that it names
    └── PaintFailed           a request has no picture
        ├── Refused           the service said so, as problem+json or in an event
        ├── Unreachable       nobody said anything
        └── Unwritable        it was painted
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any

from service.client.exit_status import ExitStatus

IN_PROGRESS = "in_progress"
"""The code for a request that is sent again while the first one still runs."""

# Of no one picture: any other would be answered so, too.
_ENDS_RUN = frozenset({401, 403, 404, 405, 406, 421})
_MAY_PASS = frozenset({408, 429, 503})


class WrongUsage(Exception):  # noqa: N818 - named for what it says
    """Nothing was sent. The message is one line for the user."""


class PaintFailed(Exception):  # noqa: N818 - as above
    """A request has no picture.

    Args:
        message: One line for the user.
    """

    exit_status = ExitStatus.FAILED
    """What the run exits with if this was the last word."""

    may_pass = False
    """Whether the same request may succeed later."""

    ends_run = False
    """Whether the next picture would fare no better."""

    retry_after_seconds: float | None = None
    """When to come back, where the service says so."""


class Unreachable(PaintFailed):
    """The connection could not be made, or broke."""

    may_pass = True
    ends_run = True


class Unwritable(PaintFailed):
    """A result cannot be written."""

    ends_run = True


class Refused(PaintFailed):
    """The service answered with an error.

    Args:
        status: HTTP's.
        problem: The members of the problem document; empty where there is none.
        retry_after_seconds: What the header says.
    """

    def __init__(self, status: int, problem: Mapping[str, Any], retry_after_seconds: float | None = None) -> None:
        self.status = status
        self.code = str(problem.get("code", ""))
        self.retry_after_seconds = retry_after_seconds
        self.may_pass = status in _MAY_PASS or self.code == IN_PROGRESS
        self.ends_run = self.may_pass or status in _ENDS_RUN
        if self.may_pass:
            self.exit_status = ExitStatus.BUSY
        elif HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR:
            self.exit_status = ExitStatus.REFUSED
        super().__init__(f"{' '.join([str(status), self.code]).strip()}: {_detail(status, problem)}")


def problem_of(body: bytes) -> Mapping[str, Any]:
    """A problem document's members; none where the body is something else, a proxy's page for one."""
    try:
        problem = json.loads(body)
    except ValueError:
        return {}
    return problem if isinstance(problem, dict) else {}


def seconds_until(retry_after: str | None) -> float | None:
    """What a `Retry-After` header says, which is seconds or a date (RFC 9110, 10.2.3); None for anything else."""
    if retry_after is None:
        return None
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after[:9])
    try:
        at = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    return max(0.0, (at - datetime.now(UTC)).total_seconds()) if at.tzinfo else None


def _detail(status: int, problem: Mapping[str, Any]) -> str:
    """Each field at fault with its message, else the one sentence there is."""
    errors = problem.get("errors")
    faults = [fault for fault in errors if isinstance(fault, dict)] if isinstance(errors, Sequence) else []
    if faults:
        return "; ".join(_fault(str(fault.get("field", "?")), str(fault.get("message", ""))) for fault in faults)
    if problem.get("detail"):
        return str(problem["detail"])
    return HTTPStatus(status).phrase if status in {known.value for known in HTTPStatus} else "an unknown error"


def _fault(field: str, message: str) -> str:
    return f"{field}: {message.removeprefix(f'{field}: ').removesuffix('.')}"
