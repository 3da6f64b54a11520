"""`/v1/requests`: asynchronous requests, for the clients that made them."""

from http import HTTPStatus
from math import ceil
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from service.api.answers import EVENT_STREAM_HEADERS, EVENT_STREAM_MEDIA_TYPE, JSON_MEDIA_TYPE, image_headers
from service.api.async_documents import retry_headers, retry_seconds, state_text
from service.api.async_events import request_events
from service.api.async_request import REQUESTS_PATH, AsyncRequest
from service.api.async_schemas import RequestState
from service.api.etags import is_known
from service.api.kept_result import KeptImage
from service.api.openapi import Tag, problems
from service.api.records import record_of
from service.api.state import state_of
from service.errors import ErrorCode, InpaintError
from service.imaging import ARRAY_MEDIA_TYPE, MEDIA_TYPES

MAX_WAIT_SECONDS = 60

Include = Annotated[
    Literal["b64_json"] | None,
    Query(description="`b64_json`: the images are in the JSON, base64, beside their URLs."),
]
Wait = Annotated[
    int, Query(ge=0, le=MAX_WAIT_SECONDS, description="Seconds to wait for the end before the state is answered.")
]

_ENDINGS = {**{kind: name for name, kind in MEDIA_TYPES.items()}, ARRAY_MEDIA_TYPE: "npy"}

_NO_STORE = {"Cache-Control": "no-store"}
_TEXT = {"type": "string"}
_RETRY_AFTER = {"description": "Seconds after which to ask again; as long as it runs.", "schema": {"type": "integer"}}


def add_routes(app: FastAPI) -> None:
    """Their routes."""
    one = f"{REQUESTS_PATH}/{{request_id}}"
    absent = (ErrorCode.NOT_FOUND, ErrorCode.GONE, ErrorCode.INVALID_FIELD)
    app.add_api_route(
        one,
        get_request,
        response_model=RequestState,
        tags=[Tag.INPAINTING],
        summary="What became of an asynchronous request",
        responses={200: {"headers": {"Retry-After": _RETRY_AFTER}}, **problems(*absent)},
    )
    app.add_api_route(
        one,
        delete_request,
        methods=["DELETE"],
        status_code=HTTPStatus.NO_CONTENT,
        tags=[Tag.INPAINTING],
        summary="Give an asynchronous request up, or forget its result",
        responses=problems(*absent, ErrorCode.CROSS_ORIGIN),
    )
    app.add_api_route(
        f"{one}/events",
        get_events,
        response_class=Response,
        response_model=None,
        tags=[Tag.INPAINTING],
        summary="Its progress, from now to its end",
        responses=_EVENTS | problems(*absent),
    )
    app.add_api_route(
        f"{one}/images/{{index}}",
        get_image,
        response_class=Response,
        response_model=None,
        tags=[Tag.INPAINTING],
        summary="One of its images",
        responses=_IMAGE | problems(*(code for code in ErrorCode if code not in _NOT_OF_IMAGES)),
    )


async def get_request(request_id: str, request: Request, include: Include = None, wait: Wait = 0) -> Response:
    """Where it is in the queue, how far it is, or its result with links to the images."""
    state, one = state_of(request), _find(request_id, request)
    if wait and one.ended is None:
        await one.wait_ended(wait, request)
    if include is None:
        text = state_text(one)
    else:
        text = await state.in_thread(lambda: state_text(one, with_base64=True))
    return Response(text, headers=_NO_STORE | retry_headers(one), media_type=JSON_MEDIA_TYPE)


async def delete_request(request_id: str, request: Request) -> None:
    """It leaves the queue, or the batch at the next step; a result is forgotten. Afterwards it is `gone`."""
    state_of(request).async_requests.delete(_find(request_id, request))


async def get_events(request_id: str, request: Request, include: Include = None) -> Response:
    """Can be joined at any time, by several readers; `Last-Event-ID` is not repeated. Leaving cancels nothing."""
    one = _find(request_id, request)
    last_id = request.headers.get("Last-Event-ID")
    if one.ended is not None and last_id == one.mark:
        return Response(status_code=HTTPStatus.NO_CONTENT)  # By which browsers know not to come back.
    events = request_events(state_of(request), one, last_id, with_base64=include is not None)
    return StreamingResponse(events, headers=EVENT_STREAM_HEADERS, media_type=EVENT_STREAM_MEDIA_TYPE)


async def get_image(request_id: str, index: str, request: Request) -> Response:
    """The file as it was encoded."""
    one = _find(request_id, request)
    image = _image(one, index)
    headers = {
        "ETag": f'"{one.id}-{index}"',
        "Cache-Control": "private, no-cache",  # To be asked for each time: it can be deleted.
    }
    if is_known(request, headers["ETag"]):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    file = image.file
    headers |= image_headers(file, image.seed)
    headers["Content-Disposition"] = f'inline; filename="{one.id}-{index}.{_ENDINGS[file.media_type]}"'
    return Response(file.data, headers=headers, media_type=file.media_type)


def _find(request_id: str, request: Request) -> AsyncRequest:
    """The request of this id, for its client.

    Raises:
        InpaintError: `NOT_FOUND` or `GONE`.
    """
    return state_of(request).async_requests.kept.find(request_id, record_of(request.scope).client)


def _image(one: AsyncRequest, index: str) -> KeptImage:
    """An image of it.

    Raises:
        InpaintError: `IN_PROGRESS`; why there is none, where the request failed; `NOT_FOUND`, it has fewer.
    """
    if one.ended is None:
        message = "The request has not ended."
        raise InpaintError(ErrorCode.IN_PROGRESS, message, retry_after_seconds=ceil(retry_seconds(one)))
    if one.ended.result is None:
        error = one.ended.error
        assert error is not None  # noqa: S101 - for the type checker: there is one of both
        raise InpaintError(error.code, error.message, field=error.field)  # Asking again would not help.
    images = one.ended.result.images
    names = [str(number) for number in range(len(images))]
    if index not in names:
        raise InpaintError(ErrorCode.NOT_FOUND, "The request has no such image.")
    return images[int(index)]


# --- documentation ----------------------------------------------------------------

_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The stream.",
        "content": {
            EVENT_STREAM_MEDIA_TYPE: {
                "schema": {
                    "type": "string",
                    "description": "What there is to see now, and then what changes: `queued` {position, eta}, "
                    "`progress` {step, steps, eta; with `previews`, now and then a preview {b64_json, media_type}}, "
                    "then `completed` (as `result` of the state), `failed` or `cancelled` (a problem).",
                }
            }
        },
    },
    204: {"description": "`Last-Event-ID` was the last one."},
}

_IMAGE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The image.",
        "headers": {
            "X-Seed": {"description": "Repeats the image.", "schema": {"type": "integer"}},
            "X-NSFW-Content-Detected": {
                "description": "Whether the safety checker flagged it.",
                "schema": {"type": "string", "enum": ["true", "false"]},
            },
            "ETag": {"description": "For `If-None-Match`.", "schema": _TEXT},
            "Content-Disposition": {"description": "A name for the file.", "schema": _TEXT},
        },
        "content": {
            kind: {"schema": {"type": "string", "format": "binary", "contentMediaType": kind}} for kind in _ENDINGS
        },
    },
    304: {"description": "`If-None-Match` names it."},
}

# What the request itself may have failed with is an answer here, too.
_NOT_OF_IMAGES = frozenset(
    {
        ErrorCode.MALFORMED_MULTIPART,
        ErrorCode.CROSS_ORIGIN,
        ErrorCode.FORBIDDEN,
        ErrorCode.METHOD_NOT_ALLOWED,
        ErrorCode.NOT_ACCEPTABLE,
        ErrorCode.REQUEST_TIMEOUT,
        ErrorCode.BODY_TOO_LARGE,
        ErrorCode.UNSUPPORTED_MEDIA,
        ErrorCode.KEY_REUSE,
        ErrorCode.OVERLOADED,
        ErrorCode.NOT_READY,
        ErrorCode.CANCELLED,
    }
)
