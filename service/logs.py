"""Where log lines go and what they look like: text for people, JSON for machines. Never a prompt or a picture.

What libraries write is out of our hands: of theirs nothing below INFO is
logged (Pillow logs the metadata of pictures, for one), and of exceptions not
the message, which may echo a value, but where and of what kind they are.
"""

import asyncio
import json
import logging
import sys
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from service.errors import InpaintError, StartupError
from service.settings import Settings

logger = logging.getLogger(__name__)

# How the names of all loggers here begin.
_OURS = "service."

# Libraries whose informative lines say nothing that ours do not, or that clients can provoke at will.
# httpx names every address that it calls.
_QUIET = {
    "uvicorn": logging.WARNING,
    "uvicorn.error": logging.WARNING,
    "python_multipart": logging.ERROR,
    "httpx": logging.WARNING,
    # It quotes headers and URLs; but what its queue drops, it says without either.
    "opentelemetry": logging.CRITICAL,
    "opentelemetry.sdk": logging.WARNING,
}


def configure_logging(settings: Settings) -> None:
    """Send everything to standard error, once for the process."""
    is_text = settings.log_format == "text" or (settings.log_format == "auto" and sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TextFormatter() if is_text else JsonFormatter())
    handler.addFilter(_is_wanted)
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    for name, level in _QUIET.items():
        logging.getLogger(name).setLevel(level)


def _is_wanted(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.INFO or record.name.startswith(_OURS)


def log_loop_error(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What an event loop has to report. Its own handler would write out tasks, callbacks and their arguments."""
    error = context.get("exception")
    if isinstance(error, BaseException):
        logger.error("an exception that nobody waited for", exc_info=error)
    else:
        logger.error("event loop: %s", context["message"])


class TextFormatter(logging.Formatter):
    """`time LEVEL message name=value …`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and a traceback where there is one."""
        fields = "".join(f" {name}={value}" for name, value in _fields(record).items())
        line = f"{_time(record)} {record.levelname} {record.getMessage()}{fields}"
        return f"{line}\n{_trace(record.exc_info[1])}" if record.exc_info and record.exc_info[1] else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        entry: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info and record.exc_info[1]:
            entry["exception"] = _trace(record.exc_info[1])
        return json.dumps(entry, ensure_ascii=False, default=str)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    """What a line was given as `extra={"fields": …}`."""
    fields = getattr(record, "fields", None)
    return fields if isinstance(fields, dict) else {}


def _trace(error: BaseException) -> str:
    """A traceback in Python's form, causes first, without messages that may echo what a client sent."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return "\n\n".join("".join(_lines(link)).rstrip() for link in reversed(chain))


def _lines(error: BaseException) -> Iterator[str]:
    yield "Traceback (most recent call last):\n"
    yield from traceback.format_tb(error.__traceback__)
    kind, message = type(error), _harmless_message(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    yield f"{name}: {message}" if message else name


def _harmless_message(error: BaseException) -> str:
    """What is safe to log of an exception's message: our own, the system's, and the device's."""
    if isinstance(error, OSError):
        return error.strerror or ""
    # RuntimeError is what torch and CUDA raise; ValueError, KeyError and the like quote the value.
    is_harmless = isinstance(error, InpaintError | StartupError | RuntimeError | MemoryError | ImportError)
    return str(error) if is_harmless else ""


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
