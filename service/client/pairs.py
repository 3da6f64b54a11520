"""Which mask belongs to which picture of a folder: the one with the same name, whatever its suffix."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from service.client.failures import WrongUsage

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, slots=True)
class Pair:
    """A picture to paint.

    Attributes:
        stem: Its name without the suffix.
        image: Its file.
        mask: Its mask's; None where the picture's alpha is the mask.
    """

    stem: str
    image: Path
    mask: Path | None


@dataclass(frozen=True, slots=True)
class Pairing:
    """What is in the folders.

    Attributes:
        pairs: By name.
        odd_pictures: What cannot be painted, a line each.
        odd_masks: Masks without a picture, a line each.
    """

    pairs: Sequence[Pair]
    odd_pictures: Sequence[str]
    odd_masks: Sequence[str]


def pictures_in(folder: Path) -> list[Path]:
    """The pictures that lie directly in a folder, by name; hidden ones are none.

    Raises:
        WrongUsage: The folder cannot be read.
    """
    try:
        return sorted(
            path
            for path in folder.iterdir()
            if path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith(".") and path.is_file()
        )
    except OSError as error:
        raise WrongUsage(f"the folder {folder} cannot be read: {error.strerror or error}") from None


def pair(images: Iterable[Path], masks: Iterable[Path]) -> Pairing:
    """Pair pictures with masks.

    Args:
        images: Pictures.
        masks: Masks.
    """
    images_of, masks_of = _by_stem(images), _by_stem(masks)
    pairs, odd_pictures = [], []
    for stem, found in sorted(images_of.items()):
        mask_files = masks_of.get(stem, [])
        if len(found) > 1:
            odd_pictures.append(f"{_names(found)}: pictures of one name")
        elif not mask_files:
            odd_pictures.append(f"{_names(found)}: no mask of this name")
        elif len(mask_files) > 1:
            odd_pictures.append(f"{_names(found)}: several masks, {_names(mask_files)}")
        else:
            pairs.append(Pair(stem, found[0], mask_files[0]))
    odd_masks = [
        f"{_names(found)}: no picture of this name" for stem, found in masks_of.items() if stem not in images_of
    ]
    return Pairing(pairs, odd_pictures, sorted(odd_masks))


def pair_with(images: Iterable[Path], mask: Path | None) -> Pairing:
    """The same mask for all pictures; with None the alpha of each."""
    pairs, odd_pictures = [], []
    for stem, found in sorted(_by_stem(images).items()):
        if len(found) > 1:
            odd_pictures.append(f"{_names(found)}: pictures of one name")
        else:
            pairs.append(Pair(stem, found[0], mask))
    return Pairing(pairs, odd_pictures, ())


def _by_stem(paths: Iterable[Path]) -> dict[str, list[Path]]:
    found = defaultdict(list)
    for path in paths:
        found[path.stem].append(path)
    return found


def _names(paths: Iterable[Path]) -> str:
    return ", ".join(path.name for path in paths)
