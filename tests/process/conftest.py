"""Runs each test's coroutine on an event loop that forgives nothing."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.process.support import Gate, Run

# Far beyond what anything here takes: it ends a test that would hang.
PATIENCE_SECONDS = 60.0


@pytest.fixture
def run() -> Run:
    """Run a test's coroutine, with asyncio's debug checks, and fail on what it left behind."""

    def run(main: Callable[[], Awaitable[None]]) -> None:
        problems: list[dict[str, Any]] = []

        async def checked() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
            await asyncio.wait_for(main(), PATIENCE_SECONDS)
            left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            assert left == []

        asyncio.run(checked())
        assert problems == []

    return run


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    """A closed gate."""
    return Gate(tmp_path / "gate")
