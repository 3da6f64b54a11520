"""Checkpoints that the model tests share."""

from pathlib import Path

import pytest
import torch

from tests.model.checkpoints import make_checkpoint


@pytest.fixture(scope="session")
def inpainting_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with a 9-channel UNet."""
    return make_checkpoint(tmp_path_factory.mktemp("inpainting"), in_channels=9)


@pytest.fixture(scope="session")
def plain_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with a 4-channel UNet."""
    return make_checkpoint(tmp_path_factory.mktemp("plain"), in_channels=4)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors lose more to threads than they gain."""
    torch.set_num_threads(1)
