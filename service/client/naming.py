"""What results are called, and which format a name asks for."""

from collections.abc import Mapping
from pathlib import Path

from service.client.failures import WrongUsage

STDOUT = Path("-")
"""The name that means standard output."""

_FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".npy": "npy"}
_SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp", "npy": ".npy", "latent": ".npy"}
_DEFAULT_FORMAT = "png"


def format_for(output: Path) -> str:
    """The `output_format` that a name's suffix stands for; without a suffix PNG.

    Raises:
        WrongUsage: It stands for none.
    """
    if not output.suffix:
        return _DEFAULT_FORMAT
    if output.suffix.lower() not in _FORMATS:
        raise WrongUsage(
            f"-o: {output.suffix} is no format of the service's; take one of {', '.join(_FORMATS)}, or --output-format"
        )
    return _FORMATS[output.suffix.lower()]


def suffix_for(output_format: str | None) -> str:
    """The suffix of a format's files; of one that the service will refuse, PNG's."""
    return _SUFFIXES.get(output_format or _DEFAULT_FORMAT, _SUFFIXES[_DEFAULT_FORMAT])


def numbered(output: Path, count: int) -> list[Path]:
    """A name for each image: `out.png` for one, else `out-0.png`, `out-1.png` and so on."""
    if count == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{index}{output.suffix}") for index in range(count)]


def num_images(fields: Mapping[str, str]) -> int:
    """How many images a request asks for; 1 where that is no number, which the service will refuse."""
    text = fields.get("num_images_per_prompt", "1")
    return int(text) if text.isascii() and text.isdigit() and 0 < len(text) <= len("1000") else 1
