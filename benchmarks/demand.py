"""Faults that workers have for as long as they are asked to."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

FOLDER_VARIABLE = "MONITORING_FAULTS"
"""Environment variable of the benchmark's own worker: the folder in which faults are asked for."""


@dataclass(frozen=True, slots=True)
class Demand:
    """Which faults workers are to have now.

    Attributes:
        folder: Holds a file for each.
    """

    folder: Path

    @property
    def is_not_a_number(self) -> bool:
        """Whether latents lose their numbers."""
        return (self.folder / "nan").exists()

    @property
    def max_images(self) -> int | None:
        """Images of a step that memory suffices for; None for any number."""
        if (self.folder / "no-memory").exists():
            return 0
        return 1 if (self.folder / "little-memory").exists() else None

    @contextmanager
    def not_a_number(self) -> Iterator[None]:
        """Ask for it while the block runs."""
        with self._while_exists("nan"):
            yield

    @contextmanager
    def little_memory(self) -> Iterator[None]:
        """While the block runs, memory suffices for one image at a time."""
        with self._while_exists("little-memory"):
            yield

    @contextmanager
    def no_memory(self) -> Iterator[None]:
        """While the block runs, it suffices for none."""
        with self._while_exists("no-memory"):
            yield

    @contextmanager
    def _while_exists(self, name: str) -> Iterator[None]:
        (self.folder / name).touch()
        try:
            yield
        finally:
            (self.folder / name).unlink()
