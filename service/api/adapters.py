"""`/v1/adapters`: the LoRAs that requests can name; administrators add and remove them while the service runs."""

import asyncio
import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from service.api.gate import ADAPTERS_PATH
from service.api.openapi import Tag, problems
from service.api.schemas import Adapter, AdapterList, StoredAdapter
from service.api.state import ServiceState, state_of
from service.engine.adapters import AdapterEntry, is_adapter_name, storage_error
from service.engine.lora_file import check_safetensors
from service.engine.upload import Upload
from service.errors import ErrorCode, InpaintError
from service.messages import LoraInfo

logger = logging.getLogger(__name__)

_WRITE_BYTES = 1024 * 1024

_FILE: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "The `.safetensors` file itself. The content type does not matter.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


def add_routes(app: FastAPI) -> None:
    """Their routes."""
    one = f"{ADAPTERS_PATH}/{{name}}"
    app.add_api_route(
        ADAPTERS_PATH,
        list_adapters,
        tags=[Tag.MODELS],
        summary="The adapters that requests can name",
        responses=problems(),
    )
    app.add_api_route(
        one,
        get_adapter,
        tags=[Tag.MODELS],
        summary="One adapter; for administrators",
        responses=problems(ErrorCode.FORBIDDEN, ErrorCode.NOT_FOUND, ErrorCode.INVALID_FIELD),
    )
    app.add_api_route(
        one,
        put_adapter,
        methods=["PUT"],
        status_code=HTTPStatus.CREATED,
        tags=[Tag.MODELS],
        summary="Add or replace a LoRA; for administrators",
        openapi_extra=_FILE,
        responses={
            HTTPStatus.OK: {"model": StoredAdapter, "description": "It replaced one of this name."},
            **problems(
                ErrorCode.FORBIDDEN,
                ErrorCode.CROSS_ORIGIN,
                ErrorCode.REQUEST_TIMEOUT,
                ErrorCode.BODY_TOO_LARGE,
                ErrorCode.UNSUPPORTED_MEDIA,
                ErrorCode.INVALID_FIELD,
                ErrorCode.INVALID_LORA,
                ErrorCode.OVERLOADED,
                ErrorCode.NOT_READY,
                ErrorCode.DRAINING,
                ErrorCode.WORKER_LOST,
                ErrorCode.DEADLINE,
            ),
        },
    )
    app.add_api_route(
        one,
        delete_adapter,
        methods=["DELETE"],
        status_code=HTTPStatus.NO_CONTENT,
        tags=[Tag.MODELS],
        summary="Remove a LoRA; for administrators",
        responses=problems(
            ErrorCode.FORBIDDEN,
            ErrorCode.CROSS_ORIGIN,
            ErrorCode.NOT_FOUND,
            ErrorCode.INVALID_FIELD,
            ErrorCode.DRAINING,
        ),
    )


async def list_adapters(request: Request) -> AdapterList:
    """Read from the folders each time: a file that was dropped in is listed at once."""
    entries = await asyncio.to_thread(state_of(request).engine.adapters.entries)
    return AdapterList(data=[_adapter(entry) for entry in entries])


async def get_adapter(name: str, request: Request) -> Adapter:
    """What the list says of it."""
    _require_name(name)
    entry = await asyncio.to_thread(state_of(request).engine.adapters.find, name)
    if entry is None:
        raise InpaintError(ErrorCode.NOT_FOUND, "There is no adapter of this name.")
    return _adapter(entry)


async def put_adapter(name: str, request: Request, response: Response) -> StoredAdapter:
    """Send the file as the body. It is checked, shown to a worker that has the model, and only then put in place."""
    _require_name(name)
    state = state_of(request)
    # Opened on the event loop, so that nothing can come between the file and its removal.
    with state.uploads.place(), state.engine.adapters.open_upload() as upload:
        state.engine.check_ready()
        info = await _receive(request, upload, state)
        entry, is_new = await asyncio.to_thread(state.engine.adapters.save, name, upload)
    logger.info("adapter %s %s: %d bytes", name, "added" if is_new else "replaced", entry.num_bytes)
    if not is_new:
        response.status_code = HTTPStatus.OK
    return StoredAdapter(
        name=name,
        num_bytes=entry.num_bytes,
        modified=entry.modified,
        rank=info.rank,
        num_unet_layers=info.num_unet_layers,
        num_text_encoder_layers=info.num_text_encoder_layers,
    )


async def delete_adapter(name: str, request: Request) -> None:
    """Requests that use it already are painted with it."""
    _require_name(name)
    await asyncio.to_thread(state_of(request).engine.adapters.delete, name)
    logger.info("adapter %s removed", name)


async def _receive(request: Request, upload: Upload, state: ServiceState) -> LoraInfo:
    """Write the body to the disk, chunk by chunk, and have it looked at."""
    try:
        buffer = bytearray()
        async for chunk in request.stream():
            buffer += chunk
            if len(buffer) >= _WRITE_BYTES:
                await asyncio.to_thread(upload.write, buffer)
                buffer = bytearray()
        await asyncio.to_thread(upload.write, buffer)
        await asyncio.to_thread(upload.finish)
        await asyncio.to_thread(check_safetensors, upload.path)
    except OSError as error:
        raise storage_error(error) from None
    return await state.engine.inspect_lora(upload.path)


def _require_name(name: str) -> None:
    if not is_adapter_name(name):
        raise InpaintError(
            ErrorCode.INVALID_FIELD,
            "A name has 1 to 128 letters, digits, dots, dashes and underscores, begins with a letter or digit, and "
            "has no two dots in a row.",
            field="name",
        )


def _adapter(entry: AdapterEntry) -> Adapter:
    return Adapter(name=entry.name, num_bytes=entry.num_bytes, modified=entry.modified, is_writable=entry.is_writable)
