"""The weight files of a part's folder: which there are, which are taken, and whether they are whole."""

import json
import logging
import re
from pathlib import Path

from service.errors import StartupError

logger = logging.getLogger(__name__)

MAX_HEADER_BYTES = 100_000_000
"""Of a safetensors file, as in its library."""

_PICKLES = (".bin", ".ckpt", ".pt", ".pth")

_WEIGHT_FILE = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:-\d{5}-of-\d{5})?(?:\.(?P<variant>\w+))?(?:-\d{5}-of-\d{5})?\.safetensors"
)
"""The names that diffusers and transformers look for; shards are numbered before the variant, and once were after."""


def variants(folder: Path) -> dict[str | None, list[Path]]:
    """A part's weight files by variant; those without one under None."""
    found: dict[str | None, list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        match = _WEIGHT_FILE.fullmatch(path.name)
        if match is not None:
            found.setdefault(match["variant"], []).append(path)
    return found


def choose_variant(folder: Path, variant: str | None, what: str) -> str | None:
    """The variant to load: the one asked for, else the plain weights, as in stock where only some parts have it.

    Args:
        folder: The part's.
        variant: What the operator asked for.
        what: What messages call the part, e.g. "model 'x': unet".

    Raises:
        StartupError: There are no weights, none of these, or none that are whole.
    """
    found = variants(folder)
    if not found:
        pickles = sorted(path.name for path in folder.glob("*") if path.suffix in _PICKLES)
        beside = f", only {pickles[0]}" if pickles else ""
        raise StartupError(f"{what} has no .safetensors weights{beside}; pickles are not loaded")
    chosen = variant if variant in found else None
    if chosen not in found:
        raise StartupError(f"{what} has its weights only as variants: set INPAINT_VARIANT to {listed(found)}")
    for path in found[chosen]:
        check_whole(path, what)
    return chosen


def listed(found: dict[str | None, list[Path]]) -> str:
    """The names of variants, for a message."""
    return ", ".join(sorted(variant for variant in found if variant)) or "none"


def check_whole(path: Path, what: str) -> None:
    """Whether a file is what its name says and all there, by its header.

    Raises:
        StartupError: It is a pickle, cut off, or no safetensors file.
    """
    try:
        with path.open("rb") as file:
            # Eight bytes of the header's length, little endian; then the header, in JSON; then the tensors.
            header_length = int.from_bytes(file.read(8), "little")
            is_whole = header_length <= MAX_HEADER_BYTES
            if is_whole:
                entries = json.loads(file.read(header_length))
                ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
                is_whole = path.stat().st_size == 8 + header_length + max(ends, default=0)
    except (ValueError, KeyError, AttributeError, OSError) as error:
        logger.debug("reading failed", exc_info=error)
        is_whole = False
    if is_whole:
        return
    if is_pickle(path):
        raise StartupError(f"{what}: {path.name} is a pickle under another name; pickles are not loaded")
    raise StartupError(f"{what}: {path.name} is truncated or no safetensors file")


def is_pickle(path: Path) -> bool:
    """Whether a file that is no safetensors is what `torch.save` writes, now or in its old format.

    Says nothing of whole safetensors: the length of their header may begin with the same bytes.
    """
    with path.open("rb") as file:
        return file.read(4).startswith((b"PK\x03\x04", b"\x80"))
