"""Webhooks: where the end of an asynchronous request may be told, and what says that it was the service that told it.

They are signed as Standard Webhooks has it (github.com/standard-webhooks/standard-webhooks). A client names the
address, the operator the hosts. An address is taken apart once, by the library that will call it, and what was taken
apart is what is called: there is no second reading of it that could come to another host.
"""

import base64
import binascii
import hmac
from dataclasses import dataclass

import httpx
from starlette.requests import Request

from service.errors import ErrorCode, InpaintError, StartupError
from service.settings import Settings, setting_label

HEADER = "X-Webhook-URL"
MAX_CHARACTERS = 2048

_SECRET_PREFIX = "whsec_"  # noqa: S105 - how secrets begin
_SECRET_BYTES = range(24, 65)
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Receiver:
    """Who may be called.

    Attributes:
        scheme: http or https.
        host: In lower case, IDNA as ASCII.
        port: The port.
    """

    scheme: str
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Webhook:
    """Where one request's end is told.

    Attributes:
        receiver: Whose address it is.
        url: The address.
    """

    receiver: Receiver
    url: httpx.URL


class WebhookPolicy:
    """Which addresses clients may name.

    Args:
        receivers: The operator's.
    """

    def __init__(self, receivers: frozenset[Receiver]) -> None:
        self._receivers = receivers

    def webhook_of(self, request: Request, *, is_async: bool) -> Webhook | None:
        """The address that came with a request; None where there is none.

        Raises:
            InpaintError: `INVALID_FIELD`, it is none, or the request is not asynchronous; `FORBIDDEN`, the operator
                does not allow it. The message does not repeat it.
        """
        sent = request.headers.getlist(HEADER)
        if not sent:
            return None
        if not is_async:
            raise _refused(ErrorCode.INVALID_FIELD, f"{HEADER} is for requests with 'Prefer: respond-async'.")
        if len(sent) > 1 or not 1 <= len(sent[0]) <= MAX_CHARACTERS:
            raise _refused(ErrorCode.INVALID_FIELD, f"Send one {HEADER} of at most {MAX_CHARACTERS} characters.")
        try:
            url = httpx.URL(sent[0].encode("latin-1").decode())  # Bytes of a header are read as Latin-1.
        except (httpx.InvalidURL, ValueError):
            raise _refused(ErrorCode.INVALID_FIELD, f"{HEADER} is no URL.") from None
        receiver = _receiver(url)
        if receiver is None:
            message = f"{HEADER} has to be an https URL with a host, and without a user or a fragment."
            raise _refused(ErrorCode.INVALID_FIELD, message)
        if receiver not in self._receivers:
            raise _refused(ErrorCode.FORBIDDEN, "Webhooks to this host are not allowed.")
        return Webhook(receiver, url)


def webhook_policy(settings: Settings) -> WebhookPolicy:
    """The operator's.

    Raises:
        StartupError: A host is none.
    """
    return WebhookPolicy(frozenset(_allowed(entry) for entry in settings.webhook_hosts))


def webhook_secret(settings: Settings) -> bytes | None:
    """What webhooks are signed with; None where no host may be called.

    Raises:
        StartupError: It is missing, cannot be read, or is no secret of Standard Webhooks.
    """
    if not settings.webhook_hosts:
        return None
    text, path = settings.webhook_secret, settings.webhook_secret_file
    label = setting_label("webhook_secret" if path is None else "webhook_secret_file")
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8-sig").strip()
        except OSError as error:
            raise StartupError(f"{label}: {path} cannot be read: {error.strerror or 'unknown error'}") from None
        except UnicodeDecodeError:
            raise StartupError(f"{label}: {path} is not UTF-8") from None
    if not text:
        raise StartupError(f"{label}: webhooks are signed: with {setting_label('webhook_hosts')} there has to be one")
    try:
        secret = base64.b64decode(text.removeprefix(_SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        secret = b""
    if len(secret) not in _SECRET_BYTES:
        raise StartupError(
            f"{label}: a secret is {_SECRET_PREFIX} and the Base64 of {_SECRET_BYTES[0]} to {_SECRET_BYTES[-1]} bytes, "
            f"such as what 'openssl rand -base64 32' prints"
        )
    return secret


def signed_headers(secret: bytes, message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The headers by which a receiver knows who sent a message, and that it is no old one.

    Args:
        secret: What both sides know.
        message_id: The same in each try to deliver it.
        timestamp: Unix time of this try.
        body: What is sent.
    """
    said = f"{message_id}.{timestamp}.".encode() + body
    signature = base64.b64encode(hmac.digest(secret, said, "sha256")).decode("ascii")
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{signature}",
    }


def _receiver(url: httpx.URL) -> Receiver | None:
    """Whose address it is; None where that does not say, or says more than an address should."""
    if url.scheme not in _DEFAULT_PORTS or not url.raw_host or url.userinfo or url.fragment:
        return None
    port = _DEFAULT_PORTS[url.scheme] if url.port is None else url.port
    return Receiver(url.scheme, url.raw_host.decode("ascii"), port)


def _allowed(entry: str) -> Receiver:
    try:
        url = httpx.URL(entry if "://" in entry else f"https://{entry}")
    except (httpx.InvalidURL, ValueError):
        url = httpx.URL()
    receiver = _receiver(url)
    if receiver is None or url.raw_path != b"/":
        label = setting_label("webhook_hosts")
        raise StartupError(f"{label}: hosts are written HOST or HOST:PORT, with http:// in front where there is no TLS")
    return receiver


def _refused(code: ErrorCode, message: str) -> InpaintError:
    return InpaintError(code, message, field=HEADER)
