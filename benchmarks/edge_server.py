"""The service with the tests' fake worker, painting photo-like pictures: `python -m benchmarks.edge_server serve …`.

What is left to measure is the API process, on pictures as hard to encode as photographs.
"""

import functools
import sys
from multiprocessing.connection import Connection

import numpy as np
from numpy.typing import NDArray

from service import cli
from service.api import server
from service.request import REPAINT_FROM, InpaintParams
from service.settings import Settings
from tests import fake_worker

NATIVE_SIZE = 512

_GRAIN, _COLOUR_GRAIN = 6.0, 2.0


@functools.cache
def photo_like(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    """(height, width, 3) uint8: a gradient with grain, 500 kB as a PNG of 512x512.

    Args:
        height: In pixels.
        width: In pixels.
        seed: Of the grain.
    """
    draw = np.random.default_rng(seed)
    down, across = np.mgrid[0:height, 0:width] / max(height, width)
    colours = np.stack([80 + 120 * across, 60 + 140 * down, 200 - 110 * across * down], axis=-1)
    grain = draw.normal(0, _GRAIN, (height, width, 1)) + draw.normal(0, _COLOUR_GRAIN, (height, width, 3))
    picture: NDArray[np.uint8] = (colours + grain).clip(0, 255).astype(np.uint8)
    return picture


def run(connection: Connection, settings: Settings, device: str, cpu_threads: int) -> None:
    """The worker's whole life: the fake one's, with another brush."""
    fake_worker.paint = _paint
    fake_worker.run(connection, settings, device, cpu_threads)


def _paint(params: InpaintParams, image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    painted = photo_like(*image.shape[:2], seed=2)
    return np.stack([np.where(mask[..., None] >= REPAINT_FROM, painted, image)] * params.num_images_per_prompt)


if __name__ == "__main__":
    server.serve = functools.partial(server.serve, worker_target="benchmarks.edge_server:run")
    sys.exit(cli.main())
