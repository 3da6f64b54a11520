"""The `Idempotency-Key` header (draft-ietf-httpapi-idempotency-key-header): which request repeats which."""

import re
from collections.abc import Sequence
from hashlib import blake2b

from starlette.requests import Request

from service.api.multipart import Part
from service.api.records import record_of
from service.errors import ErrorCode, InpaintError

HEADER = "Idempotency-Key"
MAX_CHARACTERS = 255
PATTERN = f"[ -~]{{1,{MAX_CHARACTERS}}}"

_DIGEST_BYTES = 32


def request_name(request: Request) -> bytes | None:
    """What the client calls its request: its key as it was sent, quotes included, among this client's own.

    A digest, because keys are the client's and need not lie about here.

    Returns:
        32 bytes; None where there is no such header.

    Raises:
        InpaintError: `INVALID_FIELD`.
    """
    keys = request.headers.getlist(HEADER)
    if not keys:
        return None
    if len(keys) > 1 or not re.fullmatch(PATTERN, keys[0]):
        message = f"Send one {HEADER} of 1 to {MAX_CHARACTERS} printable ASCII characters."
        raise InpaintError(ErrorCode.INVALID_FIELD, message, field=HEADER)
    client = record_of(request.scope).client
    return _digest(f"{client.number} ".encode(), keys[0].encode("ascii"))


def body_digest(path: str, body: Sequence[Part] | bytes) -> bytes:
    """What a request says, in 32 bytes; of a form whatever its boundary, the order of its parts and its files' names.

    A body of 25 MiB takes some 30 ms: not for the event loop.

    Args:
        path: Where it was sent.
        body: The parts of a form, or the bytes of what is none.
    """
    said = [_digest(b"bytes ", body)] if isinstance(body, bytes) else sorted(_part_digest(part) for part in body)
    return _digest(*said, path.encode())


def _part_digest(part: Part) -> bytes:
    name = part.name.encode()
    return _digest(f"{len(name)} {part.is_file} ".encode(), name, part.data)


def _digest(*pieces: bytes) -> bytes:
    """Of the pieces one after the other; where they end has to follow from what they are."""
    digest = blake2b(digest_size=_DIGEST_BYTES)
    for piece in pieces:
        digest.update(piece)
    return digest.digest()
