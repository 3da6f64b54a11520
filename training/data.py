"""Draws many scenes at once, in parallel, into arrays that the training stages share."""

from __future__ import annotations

import mmap
import multiprocessing
from dataclasses import dataclass
from multiprocessing.pool import AsyncResult, Pool

import numpy as np

from training.landscape import SIZE
from training.scenes import draw_scene

CHUNK = 64
"""Scenes drawn by one task."""


@dataclass(frozen=True)
class SceneArrays:
    """Scenes as arrays; N scenes, K targets each, M masks each.

    Attributes:
        bare: scenes without any target, uint8, (N, SIZE, SIZE, 3).
        shown: scenes with each target, uint8, (N, K, SIZE, SIZE, 3).
        masks: bit-packed masks, uint8, (N, K, M, SIZE * SIZE // 8).
        label: thing and colour of each target, uint8, (N, K, 2).
        box: bounds of each target in pixels, int16, (N, K, 4).
        mask_label: size class, and whether nothing else reaches into the mask, uint8, (N, K, M, 2).
    """

    bare: np.ndarray
    shown: np.ndarray
    masks: np.ndarray
    label: np.ndarray
    box: np.ndarray
    mask_label: np.ndarray


def _shared(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """An array of zeros that forked processes write into."""
    count = int(np.prod(shape))
    store = mmap.mmap(-1, max(1, count * np.dtype(dtype).itemsize))
    return np.frombuffer(store, dtype=dtype, count=count).reshape(shape)


def empty_arrays(scenes: int, targets: int, masks: int) -> SceneArrays:
    """Room for that many scenes, in memory shared with forked processes."""
    return SceneArrays(
        bare=_shared((scenes, SIZE, SIZE, 3), np.uint8),
        shown=_shared((scenes, targets, SIZE, SIZE, 3), np.uint8),
        masks=_shared((scenes, targets, masks, SIZE * SIZE // 8), np.uint8),
        label=_shared((scenes, targets, 2), np.uint8),
        box=_shared((scenes, targets, 4), np.int16),
        mask_label=_shared((scenes, targets, masks, 2), np.uint8),
    )


def _fill(arrays: SceneArrays, first: int, last: int, seed: int, thing: int | None) -> None:
    count, masks = arrays.label.shape[1], arrays.masks.shape[2]
    for n in range(first, last):
        scene = draw_scene(seed + n, count, masks, thing)
        arrays.bare[n] = scene.pixels
        for k, target in enumerate(scene.targets):
            arrays.shown[n, k] = target.pixels
            arrays.label[n, k] = target.thing, target.colour
            arrays.box[n, k] = target.box
            for m, mask in enumerate(target.masks):
                arrays.masks[n, k, m] = np.packbits(mask.cover.reshape(-1) > 127)
                arrays.mask_label[n, k, m] = mask.size, mask.clear


_SHARED: dict[str, SceneArrays] = {}
"""What forked processes write into; set just before they are forked."""


def _task(args: tuple[int, int, int, int | None]) -> None:
    _fill(_SHARED["arrays"], *args)


class Drawing:
    """Scenes being drawn by forked processes; start it before the accelerator is first used.

    Attributes:
        arrays: the scenes; rows below `ready()` are finished.
    """

    def __init__(
        self, scenes: int, targets: int, masks: int, *, seed: int, processes: int, thing: int | None = None
    ) -> None:
        self.arrays = empty_arrays(scenes, targets, masks)
        self._count = scenes
        _SHARED["arrays"] = self.arrays
        self._pool: Pool = multiprocessing.get_context("fork").Pool(processes)
        _SHARED.clear()
        tasks = [(a, min(a + CHUNK, scenes), seed, thing) for a in range(0, scenes, CHUNK)]
        self._results: list[AsyncResult] = [self._pool.apply_async(_task, (task,)) for task in tasks]
        self._pool.close()

    def ready(self) -> int:
        """How many scenes, from the first on, are finished."""
        for done, result in enumerate(self._results):
            if not result.ready():
                return min(done * CHUNK, self._count)
            result.get()
        return self._count

    def wait(self, count: int | None = None) -> int:
        """Waits until at least `count` scenes (all, if None) are finished; returns how many are."""
        goal = self._count if count is None else min(count, self._count)
        for result in self._results:
            if self.ready() >= goal:
                break
            result.get()
        return self.ready()


def draw_arrays(scenes: int, seed: int, targets: int = 1, masks: int = 1, thing: int | None = None) -> SceneArrays:
    """Draws scenes in this process.

    Args:
        scenes: how many.
        seed: seed of the first; the others follow.
        targets: targets per scene.
        masks: masks per target.
        thing: index into THINGS of every target, or None for random ones.

    Returns:
        The scenes.
    """
    arrays = empty_arrays(scenes, targets, masks)
    _fill(arrays, 0, scenes, seed, thing)
    return arrays
