"""Textual inversions, written in each layout that is found in the wild."""

from pathlib import Path

import torch
from safetensors.torch import save_file


def vectors(num: int, width: int, *, seed: int = 0) -> torch.Tensor:
    """(num, width) random vectors, larger than the usual ones so that a picture shows them."""
    return torch.randn(num, width, generator=torch.Generator().manual_seed(seed))


def diffusers_file(folder: Path, name: str, token: str, tensor: torch.Tensor) -> Path:
    """As `textual_inversion.py` of diffusers saves it: the tensor is called by its token."""
    return _write(folder, name, {token: tensor})


def web_ui_file(folder: Path, token: str, tensor: torch.Tensor, *, key: str = "emb_params") -> Path:
    """As AUTOMATIC1111's web UI reads it: the file is called by its token."""
    return _write(folder, token, {key: tensor})


def _write(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    save_file(tensors, path)
    return path
