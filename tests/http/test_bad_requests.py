"""Bad requests as they arrive on the wire: the promised table in one place, and HTTP/1.1 spoken wrongly.

Each is sent over a socket of its own, to a server that cannot make a temporary
file. Whatever is sent, the answer is a definite one, never a 5xx, and the next
request is served.
"""

import json
import pickle
import socket
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pytest

from tests.http.serving import (
    BOUNDARY,
    CLOSING,
    LiveServer,
    check_problem,
    form,
    head,
    part,
    png,
    read_answer,
    scene,
    serving,
    square_mask,
    usual_parts,
)
from tests.unit.picture_files import PICTURE_HEADERS, chunk, saved, small_png

KEY = "a-key"
SITE = "https://shop.example"
MAX_BODY_BYTES = 1024 * 1024
AUTHORIZED = f"Authorization: Bearer {KEY}"
MULTIPART = f"Content-Type: multipart/form-data; boundary={BOUNDARY}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with a key, an allowed origin and a folder of LoRAs, on a machine without room for temporary files."""
    folder = tmp_path_factory.mktemp("loras")
    (folder.parent / "outside.safetensors").write_bytes(b"outside")
    (folder / "link.safetensors").symlink_to(folder.parent / "outside.safetensors")
    patch = pytest.MonkeyPatch()
    patch.setattr(tempfile, "tempdir", str(folder / "nowhere"))
    settings = {"api_keys": KEY, "cors_origins": SITE, "max_body_mib": 1.0, "max_pixels": 1_000_000, "lora_dir": folder}
    with patch.context(), serving(**settings) as live:
        yield live
        live.client.headers["Authorization"] = f"Bearer {KEY}"
        exposition = live.client.get("/metrics").text
        assert "inpaint_requests_total{code=" in exposition
        assert 'code="5' not in exposition
    patch.undo()


@dataclass(frozen=True)
class Row:
    """What is sent, and how it is answered.

    Attributes:
        name: For people.
        status: Of the answer.
        code: Of the problem.
        sent: All that is sent.
    """

    name: str
    status: int
    code: str
    sent: bytes


def post(*lines: str, body: bytes = b"", has_length: bool = True) -> bytes:
    """A request with these header lines beside those that name the host, the key and the kind of body."""
    own = "".join(f"\n{line.lower()}" for line in lines)
    usual = [
        line for line in ("Host: localhost", AUTHORIZED, MULTIPART) if f"\n{line.split(':')[0].lower()}" not in own
    ]
    length = [f"Content-Length: {len(body)}"] if has_length and "\ncontent-length" not in own else []
    return head(*usual, *lines, *length) + body


def of_fields(**fields: object) -> bytes:
    """The usual request with other fields; None leaves one out."""
    files, texts = form(**fields)
    body = b"".join(part(name, data, filename) for name, (filename, data) in files.items())
    body += b"".join(part(name, str(text).encode(errors="surrogateescape")) for name, text in texts.items())
    return post(body=body + CLOSING)


def of_parts(*parts: bytes) -> bytes:
    return post(body=b"".join(parts) + CLOSING)


def in_chunks(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)


WHOLE = usual_parts() + CLOSING
START = part("image", b"", "a.png")[:-2]
BLACK = png(np.zeros((64, 64), np.uint8))
BOMB = zlib.compress(bytes(8 * 2**20))
IMAGE, MASK, PROMPT = (
    part("image", png(scene()), "a.png"),
    part("mask", png(square_mask()), "m.png"),
    part("prompt", b"a"),
)
OF_OTHER_KINDS = {"GIF": "GIF", "TIFF": "TIFF", "EPS": "EPS", "BMP": "BMP"}


def malformed(name: str, body: bytes, *lines: str) -> Row:
    return Row(name, 400, "malformed_multipart", post(*lines, body=body))


def bad_request(name: str, sent: bytes) -> Row:
    return Row(name, 400, "bad_request", sent)


def refused(name: str, code: str, **fields: object) -> Row:
    return Row(name, 415 if code == "unsupported_media" else 422, code, of_fields(**fields))


def table() -> Iterator[Row]:
    """The promised table, row by row."""
    yield malformed("boundary missing", WHOLE, "Content-Type: multipart/form-data")
    yield malformed("boundary wrong", WHOLE, "Content-Type: multipart/form-data; boundary=other")
    yield malformed("boundary not closed", usual_parts())
    yield malformed("part header bad", f"--{BOUNDARY}\r\nno colon\r\n\r\n1\r\n".encode() + CLOSING)
    yield malformed("part without a name", part(None, b"1") + CLOSING)
    yield malformed("empty body", b"")

    yield bad_request("two kinds of length", post("Content-Length: 5", "Transfer-Encoding: chunked", body=b"0\r\n\r\n"))
    yield bad_request("two lengths", post("Content-Length: 5", "Content-Length: 6", body=b"12345"))
    yield bad_request("two equal lengths", post("Content-Length: 5", "Content-Length: 5", body=b"12345"))
    yield bad_request("no host", head(AUTHORIZED, MULTIPART, "Content-Length: 0"))
    yield bad_request("two hosts", post("Host: a", "Host: b"))

    yield Row("no key", 401, "unauthorized", head("Host: a", MULTIPART, "Content-Length: 60000000") + bytes(70_000))
    yield Row("wrong key", 401, "unauthorized", post("Authorization: Bearer wrong", "Content-Length: 60000000"))

    yield Row("null origin", 403, "cross_origin", post("Origin: null", body=WHOLE))
    cross = ("Origin: https://evil.example", "Sec-Fetch-Site: cross-site")
    yield Row("cross site", 403, "cross_origin", post(*cross, body=WHOLE))

    for name in ("none", "../outside", "/etc/passwd", "a\\u0000", "link", "sub/dir", "."):
        yield refused(f"LoRA {name}", "unknown_lora", loras=f'[{{"name": "{name}"}}]')

    yield Row("body too large", 413, "body_too_large", post(f"Content-Length: {MAX_BODY_BYTES + 1}"))
    chunks = in_chunks(START, *[bytes(65536)] * 17)
    yield Row(
        "chunks too large", 413, "body_too_large", post("Transfer-Encoding: chunked", body=chunks, has_length=False)
    )

    for kind in ("application/json", "application/x-www-form-urlencoded", "text/plain", "multipart/mixed; boundary=b"):
        yield Row(f"body of {kind}", 415, "unsupported_media", post(f"Content-Type: {kind}", body=WHOLE))
    yield Row("gzip", 415, "unsupported_media", post("Content-Encoding: gzip", body=WHOLE))
    for kind in OF_OTHER_KINDS:
        yield refused(f"{kind} named .png", "unsupported_media", image=saved(scene(16, 16), kind))
    for name, data in PICTURE_HEADERS.items():
        yield refused(f"{name} named .png", "unsupported_media", image=data)

    yield refused("prompt missing", "invalid_field", prompt=None)
    yield refused("image missing", "invalid_field", image=None)
    yield Row("field sent twice", 422, "invalid_field", of_parts(usual_parts(), PROMPT))
    yield refused("unknown field", "invalid_field", generator="1")
    yield Row("image as text", 422, "invalid_field", of_parts(part("image", png(scene())), MASK, PROMPT))
    yield Row("prompt as a file", 422, "invalid_field", of_parts(IMAGE, MASK, part("prompt", b"a", "p.txt")))

    yield refused("image empty", "invalid_image", image=b"")
    yield refused("image cut", "invalid_image", image=png(scene())[:400])
    corrupt = bytearray(png(scene()))
    corrupt[len(corrupt) // 2] ^= 0x55
    yield refused("image corrupt", "invalid_image", image=bytes(corrupt))
    yield refused("mask corrupt", "invalid_image", mask=bytes(corrupt))
    for kind, body in ((b"zTXt", b"k\0\0"), (b"iCCP", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0")):
        yield refused(f"{kind.decode()} bomb", "invalid_image", image=small_png(chunk(kind, body + BOMB)))

    yield refused("too many pixels", "too_many_pixels", image=png(np.zeros((1000, 1001), np.uint8)))
    for kind in ("PNG", "WEBP"):
        frames = saved(scene(), kind, save_all=True, append_images=[_image(scene(64, 64)[::-1])])
        yield refused(f"animated {kind}", "animated", image=frames)
    yield refused("mask of another size", "mask_mismatch", mask=png(square_mask(32, 32)))
    yield refused("nothing to repaint", "empty_mask", mask=BLACK)

    for name, texts in {
        "num_inference_steps": ("0", "1000000"),
        "guidance_scale": ("NaN", "1e400", "-1"),
        "seed": ("-1", "1" + "0" * 30),
        "strength": ("0", "inf"),
    }.items():
        for text in texts:
            yield refused(f"{name} {text}", "out_of_range", **{name: text})
    yield refused("unknown scheduler", "unknown_scheduler", scheduler="../euler")

    for name, prompt in {"empty": "", "too long": "a" * 2001, "with NUL": "a\0b", "broken": "a \udcff b"}.items():
        yield refused(f"prompt {name}", "invalid_prompt", prompt=prompt)
    yield refused("pickle as tensor", "invalid_field", prompt=None, prompt_embeds=pickle.dumps([1.0]))

    many = [f"X-{number}: 1" for number in range(101)]
    yield Row("many headers", 431, "headers_too_large", post(*many, body=WHOLE))
    yield Row("large headers", 431, "headers_too_large", post(f"X: {'a' * 66_000}", body=WHOLE))


def _image(pixels: np.ndarray) -> object:
    from PIL import Image  # noqa: PLC0415 - the one place

    return Image.fromarray(pixels)


def http() -> Iterator[Row]:
    """HTTP/1.1 spoken wrongly."""
    for name, line in {
        "encoding that is not understood": "Transfer-Encoding: gzip, chunked",
        "chunked twice": "Transfer-Encoding: chunked, chunked",
        "encoding of no name": "Transfer-Encoding: identity",
        "length with a sign": "Content-Length: +5",
        "negative length": "Content-Length: -5",
        "length with an exponent": "Content-Length: 1e3",
        "length of 5000 digits": f"Content-Length: {'9' * 5000}",
        "list of lengths": "Content-Length: 5, 6",
        "folded length": "Content-Length: 5\r\n 6",
        "space before the colon": "X-A : 1",
        "header without a name": ": 1",
        "name with a space": "X A: 1",
        "NUL in a header": "X-A: a\0b",
        "line feed in a name": "X\n-A: 1",
    }.items():
        yield bad_request(name, post(line, has_length=False))
    for name, start in {
        "no version": "GET /healthz",
        "version that is none": "GET /healthz HTTP/a.b",
        "two spaces": "GET  /healthz HTTP/1.1",
        "bytes in the path": "GET /h\xe9 HTTP/1.1",
        "method that is none": "G(T /healthz HTTP/1.1",
        "nothing but a method": "GET",
    }.items():
        yield bad_request(name, f"{start}\r\nHost: a\r\n\r\n".encode("latin-1"))
    yield bad_request("TLS", b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(range(256)) + b"\r\n\r\n")
    yield bad_request("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    yield bad_request("SSH", b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
    for name, size in {"letter": b"g", "sign": b"-1", "prefix": b"0x5", "21 digits": b"1" * 21, "none": b""}.items():
        chunked = post("Transfer-Encoding: chunked", body=size + b"\r\nabcde\r\n0\r\n\r\n", has_length=False)
        yield bad_request(f"chunk's size: {name}", chunked)
    longer = post("Transfer-Encoding: chunked", body=b"3\r\nabcde\r\n0\r\n\r\n", has_length=False)
    yield bad_request("chunk longer than its size", longer)
    extension = b"5;" + b"x" * 200_000 + b"\r\nabcde\r\n0\r\n\r\n"
    yield Row(
        "chunk's extension",
        431,
        "headers_too_large",
        post("Transfer-Encoding: chunked", body=extension, has_length=False),
    )
    trailer = in_chunks(WHOLE) + b"0\r\n" + b"X-A: " + b"a" * 200_000 + b"\r\n\r\n"
    yield Row("trailers", 431, "headers_too_large", post("Transfer-Encoding: chunked", body=trailer, has_length=False))
    overflow = in_chunks(START) + b"FFFFFFFFFFFFFFFFFFFF\r\n" + bytes(MAX_BODY_BYTES + 1)
    yield Row(
        "chunk of 2**80 bytes",
        413,
        "body_too_large",
        post("Transfer-Encoding: chunked", body=overflow, has_length=False),
    )
    for path in (
        "/nothing",
        "/../../etc/passwd",
        "/%00",
        "/%ff%fe",
        "//v1/inpaint",
        "/v1/inpaint/",
        "/" + "a" * 60_000,
    ):
        yield Row(f"path {path[:20]}", 404, "not_found", head("Host: a", AUTHORIZED, method="GET", path=path))
    yield Row("absolute target", 404, "not_found", head("Host: a", AUTHORIZED, path="http://a/v1/inpaint"))
    yield Row("tunnel", 404, "not_found", head("Host: a", AUTHORIZED, method="CONNECT", path="a:443"))
    yield Row("asterisk", 404, "not_found", head("Host: a", AUTHORIZED, method="OPTIONS", path="*"))
    for method in ("GET", "PUT", "TRACE", "post", "BREW"):
        yield Row(f"method {method}", 405, "method_not_allowed", head("Host: a", AUTHORIZED, method=method))


ROWS = [*table(), *http()]


def answer_of(server: LiveServer, sent: bytes) -> tuple[int, dict[str, str], bytes]:
    """The answer to what is sent, whether or not the server reads all of it."""
    with server.raw() as connection:
        with suppress(BrokenPipeError, ConnectionResetError):  # It has been answered already.
            connection.sendall(sent)
        status, headers, received = read_answer(connection)
        return status, headers, received[: int(headers["content-length"])]  # What follows answers what followed.


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_bad_request_has_its_answer(server: LiveServer, row: Row) -> None:
    """Every row of the table, and every way to break HTTP, has its status and code, as a problem document."""
    status, headers, body = answer_of(server, row.sent)
    problem = check_problem(headers, body, row.status, row.code)
    assert status == row.status
    assert headers["x-should-retry"] == "false"
    shown = json.dumps(problem)
    assert "/etc" not in shown
    assert "Traceback" not in shown
    with server.raw(head("Host: a", method="GET", path="/healthz")) as connection:
        assert read_answer(connection)[0] == 200


@pytest.mark.parametrize("row", [row for row in ROWS if row.status == 431], ids=lambda row: row.name)
def test_size_counts_however_it_arrives(server: LiveServer, row: Row) -> None:
    """What is too large is refused also where all of it has come before the server looks."""
    with server.raw() as connection:
        sending = threading.Thread(target=connection.sendall, args=(row.sent,), daemon=True)
        server.loop.call_soon_threadsafe(time.sleep, 0.5)
        sending.start()
        status, headers, received = read_answer(connection)
        check_problem(headers, received[: int(headers["content-length"])], row.status, row.code)
        assert status == row.status


@pytest.mark.parametrize(
    "lines",
    [
        ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Key: x", "Sec-WebSocket-Version: 13"],
        ["Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AA"],
        ["X-Folded: a\r\n b"],
        ["Connection: close"],
        ["Expect: something"],
        ["TE: trailers"],
    ],
    ids=lambda lines: lines[0],
)
def test_offers_that_are_not_taken_up(server: LiveServer, lines: list[str]) -> None:
    """What a server may ignore is ignored: the request is answered as if it were not there."""
    assert answer_of(server, post(*lines, body=WHOLE))[0] == 200


def test_body_in_chunks_with_extensions_and_trailers(server: LiveServer) -> None:
    """Odd but allowed framing is read."""
    chunks = b"".join(b"%x;a=b\r\n%s\r\n" % (len(piece), piece) for piece in (WHOLE[:7], WHOLE[7:500], WHOLE[500:]))
    sent = post("Transfer-Encoding: chunked", body=chunks + b"0\r\nX-Trailer: 1\r\n\r\n", has_length=False)
    assert answer_of(server, sent)[0] == 200


def test_pipelined_requests_are_answered_in_order(server: LiveServer) -> None:
    """Several requests in one piece have several answers; one that is broken ends the connection after those before."""
    probe = head("Host: a", AUTHORIZED, method="GET", path="/v1/models")
    with server.raw(probe + post(body=WHOLE) + probe + b"nonsense\r\n\r\n" + probe) as connection:
        stream = connection.makefile("rb")
        kinds = []
        while line := stream.readline():
            headers = {}
            while (header := stream.readline().decode().strip()) != "":
                name, _, value = header.partition(":")
                headers[name.lower()] = value.strip()
            stream.read(int(headers["content-length"]))
            kinds.append((int(line.split()[1]), headers["content-type"]))
    assert kinds == [
        (200, "application/json"),
        (200, "image/png"),
        (200, "application/json"),
        (400, "application/problem+json"),
    ]


def test_leave_to_send_a_body(server: LiveServer) -> None:
    """Who waits for leave to send gets it, or its refusal without sending anything."""
    with server.raw(post("Expect: 100-continue", f"Content-Length: {len(WHOLE)}")) as connection:
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(WHOLE)
        assert read_answer(connection)[0] == 200
    for lines, status in (
        (["Authorization: Bearer no", "Content-Length: 9"], 401),
        ([f"Content-Length: {MAX_BODY_BYTES + 1}"], 413),
        (["Accept: text/html", "Content-Length: 9"], 406),
    ):
        assert answer_of(server, post("Expect: 100-continue", *lines))[0] == status


def test_refusal_in_the_middle_of_an_answer(server: LiveServer) -> None:
    """A body that breaks while the request is already answered neither spoils the answer nor the log."""
    broken = head("Host: a", "Transfer-Encoding: chunked", method="GET", path="/healthz") + b"x\r\n\r\n"
    with server.raw(broken) as connection:
        status, headers, body = read_answer(connection)
        check_problem(headers, body, 400, "bad_request")
        assert connection.recv(1) == b""
    assert status == 400


def test_half_closed_connection_is_answered(server: LiveServer) -> None:
    """A client that has nothing more to send may say so, and still gets its answer or none, but no error."""
    with server.raw(post(body=WHOLE)) as connection:
        connection.shutdown(socket.SHUT_WR)
        received = connection.recv(65536)
    assert received == b"" or received.startswith(b"HTTP/1.1 200 ")


def test_no_temporary_file_is_needed(server: LiveServer) -> None:
    """Bodies are held in memory: one that frameworks would write to a temporary file is read where none can be made."""
    large = png(np.random.default_rng(1).integers(0, 256, (560, 560, 3), dtype=np.uint8))
    assert len(large) > 900_000
    mask = png(square_mask(560, 560))
    assert answer_of(server, of_fields(image=large, mask=mask, composite="false"))[0] == 200
    with pytest.raises(FileNotFoundError):
        tempfile.TemporaryFile()  # noqa: SIM115 - it cannot be made
