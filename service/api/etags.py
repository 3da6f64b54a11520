"""Whether a client has what it asks for already: `If-None-Match` (RFC 9110, 13.1.2)."""

from starlette.requests import Request


def is_known(request: Request, etag: str) -> bool:
    """Whether the request names this tag, weakly or not, or any."""
    sent = ",".join(request.headers.getlist("If-None-Match")).split(",")
    return not {etag, "*"}.isdisjoint(tag.strip().removeprefix("W/") for tag in sent)
