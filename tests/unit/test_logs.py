"""What log lines look like, and what is kept out of them."""

import asyncio
import gc
import io
import json
import logging
from collections.abc import Iterator

import pytest

from service.errors import ErrorCode, InpaintError
from service.logs import configure_logging, log_loop_error
from service.settings import load_settings

CANARY = "canary-in-a-prompt"


@pytest.fixture(autouse=True)
def _loggers_as_before() -> Iterator[None]:
    """Logging is the process's: put it back."""
    loggers = [logging.getLogger(name) for name in (None, "service", "uvicorn", "uvicorn.error", "python_multipart")]
    loggers += [logging.getLogger(name) for name in ("opentelemetry", "opentelemetry.sdk")]
    before = [(logger, logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


def logging_to(log_format: str, log_level: str = "debug") -> io.StringIO:
    """Configure logging, into a buffer."""
    configure_logging(load_settings({"log_format": log_format, "log_level": log_level}, environ={}))
    (handler,) = logging.getLogger().handlers
    assert isinstance(handler, logging.StreamHandler)
    buffer = io.StringIO()
    handler.setStream(buffer)
    return buffer


def fail_with(error: Exception) -> Exception:
    """The error, raised and caught, behind another."""
    try:
        try:
            {}[CANARY]
        except KeyError as cause:
            raise error from cause
    except Exception as caught:  # noqa: BLE001 - whatever was given
        return caught


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_exceptions_are_logged_without_values(log_format: str) -> None:
    """A traceback says where and of what kind an exception is, also its cause; not what it says of a value."""
    written = logging_to(log_format)
    logging.getLogger("service.test").error("it failed", exc_info=fail_with(ValueError(f"bad value: '{CANARY}'")))
    logging.getLogger("asyncio").error(
        "Task exception", exc_info=fail_with(UnicodeDecodeError("x", b"y", 0, 1, CANARY))
    )
    text = written.getvalue()
    for expected in ("it failed", "Task exception", "KeyError", "ValueError", "UnicodeDecodeError", "in fail_with"):
        assert expected in text
    assert CANARY not in text


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("CUDA error: an illegal memory access"), "RuntimeError: CUDA error: an illegal memory access"),
        (InpaintError(ErrorCode.INTERNAL, "It failed."), "service.errors.InpaintError: It failed."),
        (OSError(28, "No space left on device", f"/tmp/{CANARY}"), "OSError: No space left on device"),  # noqa: S108
    ],
)
def test_what_devices_and_systems_say_is_logged(error: Exception, expected: str) -> None:
    """Messages that come from the hardware, the system or ourselves are what an operator needs."""
    written = logging_to("text")
    logging.getLogger("service.test").error("it failed", exc_info=fail_with(error))
    assert expected in written.getvalue().splitlines()
    assert CANARY not in written.getvalue()


def test_libraries_do_not_log_details() -> None:
    """At level debug only the service's own lines are finer than INFO: Pillow's, for one, hold pictures' metadata."""
    written = logging_to("json")
    logging.getLogger("PIL.TiffImagePlugin").debug("tag: %s", CANARY)
    logging.getLogger("python_multipart.multipart").warning("skipped %r", CANARY)
    logging.getLogger("PIL").info("kept")
    logging.getLogger("service.test").debug("kept too")
    assert [json.loads(line)["message"] for line in written.getvalue().splitlines()] == ["kept", "kept too"]


def test_level_is_that_of_the_settings() -> None:
    """A level above INFO holds for everybody."""
    written = logging_to("text", "error")
    logging.getLogger("service.test").warning("no")
    logging.getLogger("PIL").warning("no")
    logging.getLogger("service.test").error("yes")
    assert [line.split()[2] for line in written.getvalue().splitlines()] == ["yes"]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_event_loop_reports_without_values(log_format: str) -> None:
    """A task whose failure nobody waits for, and a callback that fails, are logged, but not what they were given."""
    written = logging_to(log_format)

    async def fail(prompt: str) -> None:
        raise ValueError(prompt)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(log_loop_error)
        loop.call_soon(int, CANARY)
        task = asyncio.create_task(fail(CANARY), name=CANARY)
        await asyncio.wait([task])
        del task
        gc.collect()

    asyncio.run(main())
    assert written.getvalue().count("an exception that nobody waited for") == 2
    assert CANARY not in written.getvalue()


def test_exception_chain_that_bites_its_tail_ends() -> None:
    """An exception that is its own cause is logged once."""
    error = ValueError("x")
    error.__cause__ = error
    written = logging_to("text")
    logging.getLogger("service.test").error("it failed", exc_info=error)
    assert written.getvalue().count("ValueError") == 1
