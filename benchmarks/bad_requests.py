"""Requests that must be refused, each with the answer that it must get, and clients that hang up."""

import asyncio
import io
import random
from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image

from benchmarks.exchange import READ_BYTES, Address, Wire, connected, post_form, with_body
from benchmarks.peers.wire import PATH
from benchmarks.traffic import Job

BOUNDARY_END = b"--\r\n"
CHUNK_BYTES = 64 * 1024
MAX_PAINTING_SECONDS = 1.0

STAGES = ("in the head", "in the body", "once sent", "while it is painted", "in the answer")
"""When a client hangs up."""


@dataclass(frozen=True, slots=True)
class BadRequest:
    """One that must be refused.

    Attributes:
        name: What is wrong with it.
        wire: As it is sent.
        status: The status that it must get.
        code: The code.
    """

    name: str
    wire: Wire
    status: int
    code: str


def bad_requests(job: Job, headers: Mapping[str, str], max_body_bytes: int) -> tuple[BadRequest, ...]:
    """One of each kind.

    Args:
        job: A good request, which each of them spoils in one way.
        headers: What a good one has, its key among them.
        max_body_bytes: The largest body that the service takes.
    """
    good = {"image": ("image.png", job.image, "image/png"), "mask": ("mask.png", job.mask, "image/png")}

    def form(fields: Mapping[str, str] = {}, files: Mapping[str, bytes] = {}, **changes: str) -> Wire:
        replaced = {name: (f"{name}.png", data, "image/png") for name, data in files.items()}
        return post_form(PATH, {**job.fields, **fields}, {**good, **replaced}, {**headers, **changes})

    whole = form()
    unclosed = whole.body.removesuffix(BOUNDARY_END)
    content_type = _header(whole, "Content-Type")
    size = (job.size, job.size)
    too_many_headers = {f"X-Filler-{number}": "1" for number in range(120)}
    # The last part goes on and on, so that nothing but its length is wrong with the body.
    endless = unclosed.rpartition(b"\r\n--")[0] + bytes(max_body_bytes)
    too_large = b"".join(_chunk(endless[at : at + CHUNK_BYTES]) for at in range(0, len(endless), CHUNK_BYTES))
    multipart = {**headers, "Content-Type": content_type}
    return (
        BadRequest("no closing boundary", with_body(PATH, unclosed, multipart), 400, "malformed_multipart"),
        BadRequest(
            "no boundary named",
            with_body(PATH, whole.body, {**headers, "Content-Type": "multipart/form-data"}),
            400,
            "malformed_multipart",
        ),
        BadRequest("not HTTP", Wire(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"), 400, "bad_request"),
        BadRequest("wrong key", form(Authorization="Bearer wrong"), 401, "unauthorized"),
        BadRequest("no such path", with_body("/v1/outpaint", whole.body, multipart), 404, "not_found"),
        BadRequest("wrong method", with_body(PATH, b"", headers, method="GET"), 405, "method_not_allowed"),
        BadRequest(
            "too large, stated",
            with_body(PATH, b"", {**multipart, "Content-Length": str(max_body_bytes + 1)}),
            413,
            "body_too_large",
        ),
        BadRequest(
            "too large, in chunks",
            with_body(PATH, too_large + _chunk(b""), {**multipart, "Transfer-Encoding": "chunked"}),
            413,
            "body_too_large",
        ),
        BadRequest(
            "JSON",
            with_body(PATH, b'{"prompt": "a red house"}', {**headers, "Content-Type": "application/json"}),
            415,
            "unsupported_media",
        ),
        BadRequest("a GIF", form(files={"image": _picture(size, "GIF")}), 415, "unsupported_media"),
        BadRequest("truncated picture", form(files={"image": job.image[: len(job.image) // 2]}), 422, "invalid_image"),
        BadRequest("no picture at all", form(files={"image": b""}), 422, "invalid_image"),
        BadRequest("mask of another size", form(files={"mask": _picture((8, 8), "PNG", 255)}), 422, "mask_mismatch"),
        BadRequest("empty mask", form(files={"mask": _picture(size, "PNG")}), 422, "empty_mask"),
        BadRequest("no steps", form({"num_inference_steps": "0"}), 422, "out_of_range"),
        BadRequest("not a number", form({"guidance_scale": "much"}), 422, "invalid_field"),
        BadRequest("unknown field", form({"prompts": "a red house"}), 422, "invalid_field"),
        BadRequest("unknown scheduler", form({"scheduler": "fast"}), 422, "unknown_scheduler"),
        BadRequest("unknown LoRA", form({"loras": '[{"name": "../x"}]'}), 422, "unknown_lora"),
        BadRequest(
            "too many headers",
            post_form(PATH, job.fields, good, {**headers, **too_many_headers}),
            431,
            "headers_too_large",
        ),
    )


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _header(wire: Wire, name: str) -> str:
    start = f"{name}: ".encode()
    return next(line for line in wire.head.split(b"\r\n") if line.startswith(start)).removeprefix(start).decode()


def _picture(size: tuple[int, int], form: str, level: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size, level).save(buffer, format=form)
    return buffer.getvalue()


async def hang_up(address: Address, wire: Wire, stage: str, draw: random.Random) -> None:
    """Send a request and be gone before its answer is complete.

    Args:
        address: Where to.
        wire: A good request.
        stage: One of `STAGES`.
        draw: Chooses the byte or the moment.
    """
    data = wire.data
    if stage == "in the head":
        data = data[: draw.randrange(1, len(wire.head))]
    elif stage == "in the body":
        data = data[: draw.randrange(len(wire.head), len(data))]
    try:
        async with connected(address) as (reader, writer):
            writer.write(data)
            await writer.drain()
            if stage == "while it is painted":
                await asyncio.sleep(draw.uniform(0.0, MAX_PAINTING_SECONDS))
            elif stage == "in the answer":
                async with asyncio.timeout(60.0):
                    await reader.read(draw.randrange(1, READ_BYTES))
    except (OSError, TimeoutError):
        pass  # Who is about to hang up does not care.
