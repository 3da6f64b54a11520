"""Coverage-guided fuzzing of uploaded pictures: `python -m tests.fuzz.decode --seconds 60`.

Needs the extra `fuzz`. Starts from small pictures of every format that is served, and
follows what reaches new lines of `service.imaging` and of Pillow. An input that raises
anything but a documented error is a find: the exit status is not 0, and the end of
libFuzzer's report on standard error says where the input is. The report begins with the
seed, and ends with the number of inputs that were tried where there was no find.
"""

import argparse
import re
import sys
import tempfile
import zlib
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["service.imaging", "PIL"]):
    from service.errors import ErrorCode, InpaintError
    from service.imaging import decode_upload

from tests.unit.picture_files import SIGNATURE, SMALL_PICTURES

MAX_PIXELS = 100_000
_ADDRESS = re.compile(r"\b0x|object at")
MAX_BYTES = 4096

DOCUMENTED = {
    ErrorCode.INVALID_IMAGE,
    ErrorCode.UNSUPPORTED_MEDIA,
    ErrorCode.TOO_MANY_PIXELS,
    ErrorCode.ANIMATED,
    ErrorCode.MASK_MISMATCH,
}


def decode(data: bytes) -> None:
    """One upload: a picture that is its own mask."""
    try:
        upload = decode_upload(data, data, max_pixels=MAX_PIXELS)
    except InpaintError as error:
        if error.code not in DOCUMENTED or _ADDRESS.search(error.message):
            raise
    else:
        height, width, channels = upload.image.shape
        assert channels == 3
        assert height * width <= MAX_PIXELS
        assert upload.mask.shape == (height, width)


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Other bytes, in a PNG with checksums that are right: wrong ones would end every try at the same line."""
    mutated = atheris.Mutate(data, max_size)
    return with_checksums(mutated) if seed % 4 else mutated


def with_checksums(data: bytes) -> bytes:
    """The same PNG, each chunk with the checksum of what is in it; anything else as it is."""
    if not data.startswith(SIGNATURE):
        return data
    fixed, position = bytearray(data), len(SIGNATURE)
    while position + 12 <= len(fixed):
        end = position + 8 + int.from_bytes(fixed[position : position + 4])
        if end + 4 > len(fixed):
            break
        fixed[end : end + 4] = zlib.crc32(fixed[position + 4 : end]).to_bytes(4)
        position = end + 4
    return bytes(fixed)


def main() -> None:
    """Fuzz for so long; libFuzzer ends the process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="how long (60)")
    parser.add_argument("--seed", type=int, default=1, help="of the mutations (1)")
    options = parser.parse_args()
    corpus = Path(tempfile.mkdtemp(prefix="decode-corpus-"))
    for name, data in SMALL_PICTURES.items():
        (corpus / name.replace(" ", "-")).write_bytes(data)
    limits = [f"-max_total_time={options.seconds}", f"-seed={options.seed}", f"-max_len={MAX_BYTES}", "-timeout=10"]
    finds = f"-artifact_prefix={tempfile.mkdtemp(prefix='decode-finds-')}/"
    atheris.Setup([sys.argv[0], *limits, finds, str(corpus)], decode, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
