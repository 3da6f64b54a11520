"""How connections are set up."""

import asyncio
import socket

import pytest

from service.api import server
from service.api.protocol import HttpProtocol
from tests.http.serving import serving


def test_no_answer_waits_for_an_acknowledgement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nagle's algorithm is off, or every small answer on a connection that is kept would take 40 ms more."""
    options: list[int] = []

    class Noting(HttpProtocol):
        """Notes the option once a connection is set up."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            accepted = transport.get_extra_info("socket")
            options.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(server, "HttpProtocol", Noting)
    with serving() as live:
        assert live.client.get("/healthz").status_code == 200
    assert options
    assert all(options)
