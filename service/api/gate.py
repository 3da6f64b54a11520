"""What is decided from a request's head alone, and how its body may arrive. Pure ASGI, around everything else.

Frameworks check keys and sizes once they have read the whole body; here
nothing of it has been read when a request is refused.
"""

import re
from base64 import b64decode
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.async_request import REQUESTS_PATH
from service.api.body import BodyGuard
from service.api.docs import DOCS_PATHS
from service.api.keys import Keyrings
from service.api.ops import METRICS_PATH
from service.api.playground_page import OPEN_PATHS as PLAYGROUND_PATHS
from service.api.problems import problem_response
from service.api.records import record_of
from service.engine.clients import ANONYMOUS, Client
from service.engine.engine import Engine
from service.errors import ErrorCode, InpaintError
from service.settings import Access, Settings

MAX_HEADER_BYTES = 64 * 1024
MAX_HEADERS = 100

# For load balancers and process managers, which hold no keys.
OPEN_PATHS = frozenset({"/healthz", "/readyz"})

ADAPTERS_PATH = "/v1/adapters"
"""What is below it, administrators alone may see and change; the list itself is for everyone with a key."""

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_CORS_METHODS = "GET, POST, PUT, DELETE"
_CORS_HEADERS = (
    "Authorization, Content-Type, Idempotency-Key, If-None-Match, Last-Event-ID, Prefer, Stability-Client-ID, "
    "Stability-Client-User-ID, Stability-Client-Version, X-API-Key, X-Request-Id, X-Webhook-URL, traceparent, "
    "tracestate"
)
# OpenAI's libraries send ever more of them, of no use to us; in browsers they work only where all are allowed.
_CORS_CLIENT_HEADER = re.compile(r"(x-stainless|openai)-[a-z0-9-]{1,64}")
_CORS_EXPOSED = (
    "Content-Disposition, ETag, Finish-Reason, Idempotent-Replayed, Location, Original-Request, Preference-Applied, "
    "Retry-After, Seed, Server-Timing, X-NSFW-Content-Detected, X-Request-Id, X-Seed, X-Should-Retry, traceparent"
)
_CORS_MAX_AGE_SECONDS = 600


class Gate:
    """Middleware that refuses requests before any byte of their body is read.

    Args:
        app: What to wrap.
        settings: The operator's settings.
        keys: Who may do what.
        engine: Asked whether it drains.
    """

    def __init__(self, app: ASGIApp, settings: Settings, keys: Keyrings, engine: Engine) -> None:
        self._app = app
        self._engine = engine
        self._keys = keys
        self._accesses: dict[str, Access] = {
            **dict.fromkeys(OPEN_PATHS, "open"),
            **(dict.fromkeys(PLAYGROUND_PATHS, "open") if settings.playground else {}),
            **dict.fromkeys(DOCS_PATHS, settings.docs_access),
            METRICS_PATH: settings.metrics_access,
        }
        self._hosts = frozenset(_host_name(host) for host in settings.allowed_hosts)
        self._origins = frozenset(_normal_origin(origin) for origin in settings.cors_origins)
        self._max_body_bytes = settings.max_body_bytes
        self._max_adapter_bytes = settings.max_adapter_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("Origin")
        is_allowed_origin = origin is not None and self._allows(origin)
        if self._origins:
            send = _with_cors(send, origin if is_allowed_origin else None)
        try:
            self._check_head(scope, headers)
            if is_allowed_origin and scope["method"] == "OPTIONS" and "Access-Control-Request-Method" in headers:
                await _preflight_response(headers)(scope, receive, send)
                return
            self._check_origin(scope["method"], headers, is_allowed_origin)
            record_of(scope).client = self._client(scope["method"], scope["path"], headers)
            max_body_bytes = self._max_bytes(scope["method"], scope["path"])
            self._check_body(headers, max_body_bytes)
            self._check_draining(scope["method"], scope["path"])
        except InpaintError as error:
            await problem_response(error, Request(scope))(scope, receive, send)
            return
        guard = BodyGuard(receive, max_body_bytes, lambda: self._engine.is_draining)
        await self._app(scope, guard.receive, send)

    # --- checks ---------------------------------------------------------------

    def _check_head(self, scope: Scope, headers: Headers) -> None:
        raw = scope["headers"]
        if len(raw) > MAX_HEADERS or sum(len(name) + len(value) for name, value in raw) > MAX_HEADER_BYTES:
            raise InpaintError(
                ErrorCode.HEADERS_TOO_LARGE, f"Send at most {MAX_HEADERS} headers and {MAX_HEADER_BYTES} bytes of them."
            )
        num_hosts = len(headers.getlist("Host"))
        is_probe = scope["path"] in OPEN_PATHS and scope["method"] in _SAFE_METHODS
        # HTTP/1.0 has none, and some load balancers ask in it.
        if num_hosts != 1 and not (num_hosts == 0 and scope["http_version"] == "1.0" and is_probe):
            raise InpaintError(ErrorCode.BAD_REQUEST, "Send exactly one Host header.")
        # Probes ask by address, whatever the service's name is.
        if self._hosts and scope["path"] not in OPEN_PATHS and _host_name(headers["Host"]) not in self._hosts:
            raise InpaintError(ErrorCode.BAD_REQUEST, "The service is not called by this host name.")
        lengths = headers.getlist("Content-Length")
        if len(lengths) > 1 or (lengths and "Transfer-Encoding" in headers):
            raise InpaintError(ErrorCode.BAD_REQUEST, "The length of the body is stated twice.")

    def _check_origin(self, method: str, headers: Headers, is_allowed_origin: bool) -> None:
        """Refuse what another site's page makes a browser send; other clients send none of these headers."""
        if method in _SAFE_METHODS or is_allowed_origin:
            return
        origin, site = headers.get("Origin"), headers.get("Sec-Fetch-Site")
        if origin == "null":
            is_cross = True
        elif site is not None:
            is_cross = site not in ("same-origin", "none")
        else:
            is_cross = origin is not None and _host_of(origin) != headers["Host"].lower()
        if is_cross:
            raise InpaintError(ErrorCode.CROSS_ORIGIN, "Pages of this origin may not call the service.")

    def _client(self, method: str, path: str, headers: Headers) -> Client:
        """Whose request it is.

        Raises:
            InpaintError: `UNAUTHORIZED` or `FORBIDDEN`, it may not do this. An administrator may do all that a client
                may.
        """
        access = "admins" if _is_for_admins(method, path) else self._accesses.get(path, "clients")
        if access == "admins" and not self._keys.admins:
            raise InpaintError(ErrorCode.FORBIDDEN, "No administrator key is set.")
        if access == "open" or (access != "admins" and not self._keys.clients):
            return ANONYMOUS
        sent = _sent_key(headers)
        client, admin = self._keys.clients.owner(sent), self._keys.admins.owner(sent)
        owner = admin or client
        if owner is None:
            raise InpaintError(
                ErrorCode.UNAUTHORIZED, "Send a valid API key as 'Authorization: Bearer …' or X-API-Key."
            )
        if access == "admins" and admin is None:
            raise InpaintError(ErrorCode.FORBIDDEN, "This takes an administrator's key.")
        return owner

    def _max_bytes(self, method: str, path: str) -> int:
        """The largest body; asked once it is known that an administrator sends what only those may."""
        is_upload = method == "PUT" and _is_for_admins(method, path)
        return self._max_adapter_bytes if is_upload else self._max_body_bytes

    def _check_body(self, headers: Headers, max_bytes: int) -> None:
        encodings = {part.strip().lower() for part in ",".join(headers.getlist("Content-Encoding")).split(",")}
        if encodings - {"", "identity"}:
            raise InpaintError(ErrorCode.UNSUPPORTED_MEDIA, "Send the body without a Content-Encoding.")
        declared = headers.get("Content-Length", "0")
        if not declared.isdecimal():
            raise InpaintError(ErrorCode.BAD_REQUEST, "The Content-Length is no number.")
        if int(declared) > max_bytes:
            raise InpaintError(ErrorCode.BODY_TOO_LARGE, f"The body may have at most {max_bytes} bytes.")

    def _check_draining(self, method: str, path: str) -> None:
        is_giving_up = method == "DELETE" and path.startswith(f"{REQUESTS_PATH}/")
        if method not in _SAFE_METHODS and not is_giving_up and self._engine.is_draining:
            self._engine.check_room()

    def _allows(self, origin: str) -> bool:
        return origin != "null" and ("*" in self._origins or _normal_origin(origin) in self._origins)


def _is_for_admins(method: str, path: str) -> bool:
    """Whether a request could reach a route that only administrators may use.

    Routes are found by this very path, percent-decoded, and theirs all begin so: what is refused here is more than
    they match, whatever a client does with slashes and dots behind it.
    """
    return path.startswith(ADAPTERS_PATH) and not (path == ADAPTERS_PATH and method in _SAFE_METHODS)


def _sent_key(headers: Headers) -> str:
    """The key that came along; of a user's name and password, which some clients know alone, the password."""
    scheme, _, token = headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    if scheme.lower() == "basic":
        with suppress(ValueError):  # No Base64.
            return b64decode(token.strip(), validate=True).decode("latin-1").partition(":")[2]
    return headers.get("X-API-Key", "")


def _normal_origin(origin: str) -> str:
    return origin.strip().rstrip("/").lower()


def _host_name(host: str) -> str | None:
    """A `Host` header or a setting without its port."""
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        return None
    return None if name is None else name.rstrip(".")


def _host_of(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def _preflight_response(headers: Headers) -> Response:
    """Leave for a page of an allowed origin."""
    asked = (name.strip().lower() for name in headers.get("Access-Control-Request-Headers", "").split(","))
    of_clients = [name for name in asked if _CORS_CLIENT_HEADER.fullmatch(name)]
    return Response(
        status_code=204,
        headers={
            "Access-Control-Allow-Methods": _CORS_METHODS,
            "Access-Control-Allow-Headers": ", ".join([_CORS_HEADERS, *of_clients]),
            "Access-Control-Max-Age": str(_CORS_MAX_AGE_SECONDS),
        },
    )


def _with_cors(send: Send, origin: str | None) -> Send:
    """Let pages of an allowed origin read the answer, and keep caches from mixing up origins."""

    async def send_with_cors(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.add_vary_header("Origin")
            if origin is not None:
                headers["Access-Control-Allow-Origin"] = origin
                headers["Access-Control-Expose-Headers"] = _CORS_EXPOSED
        await send(message)

    return send_with_cors
