"""The endpoint, and its two answers: an image's bytes with headers, or JSON."""

import base64

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from service.api.accept import choose_media_type
from service.api.answers import JSON_MEDIA_TYPE, Painted, response_of
from service.api.kept_answers import Answer
from service.api.multipart import read_parts
from service.api.openapi import Tag
from service.api.painting import Body, Order, admit, replay, start
from service.api.pictures import ImageFile
from service.api.stability.form import translate
from service.api.stability.openapi import OPERATION, RESPONSES, FinishReason, StabilityAnswer
from service.imaging import MEDIA_TYPES
from service.messages import ModelInfo

_OFFERS = (*MEDIA_TYPES.values(), JSON_MEDIA_TYPE)


def add_routes(app: FastAPI) -> None:
    """The endpoint of Stability's wire format."""
    app.add_api_route(
        "/v2beta/stable-image/edit/inpaint",
        stability_inpaint,
        methods=["POST"],
        response_class=Response,
        response_model=None,
        tags=[Tag.OTHER_FORMATS],
        summary="Repaint the masked part of a picture, in the wire format of Stability's API",
        openapi_extra=OPERATION,
        responses=RESPONSES,
    )


async def stability_inpaint(request: Request) -> Response:
    """What clients of Stability's `v2beta` inpainting endpoint send and read; with another base URL they work here."""
    accept = ", ".join(request.headers.getlist("Accept"))
    choose_media_type(accept, _OFFERS)  # Nobody uploads megabytes for a refusal.

    def order(body: Body, model: ModelInfo) -> Order:
        assert not isinstance(body, bytes)  # noqa: S101 - for the type checker: `read_parts` gives parts
        return translate(body, model, accept)

    content_type = request.headers.get("Content-Type", "")
    admitted = await admit(request, lambda: read_parts(content_type, request.stream()), order)
    if isinstance(admitted, Answer):
        choose_media_type(accept, (admitted.media_type,))  # Who now takes only another shape does not repeat.
        return replay(request, admitted)
    is_json = admitted.order.media_type == JSON_MEDIA_TYPE
    work = start(admitted, _json_answer if is_json else _image_answer)
    return response_of(await work.answer_unless_gone(request))


def _image_answer(painted: Painted) -> Answer:
    """The bytes; what else there is to say, in headers."""
    file = painted.files[0]
    headers = {"Finish-Reason": _finish_reason(file), "Seed": str(painted.params.seed)}
    return Answer(painted.request_id, file.media_type, headers, file.data)


def _json_answer(painted: Painted) -> Answer:
    """The image in Base64. What it is stands in the content type, as in the format's reference."""
    file = painted.files[0]
    answer = StabilityAnswer(
        image=base64.b64encode(file.data).decode("ascii"),
        finish_reason=_finish_reason(file),
        seed=painted.params.seed,
    )
    headers = {"Content-Type": f"{JSON_MEDIA_TYPE}; type={file.media_type}"}
    return Answer(painted.request_id, JSON_MEDIA_TYPE, headers, answer.model_dump_json().encode())


def _finish_reason(file: ImageFile) -> FinishReason:
    return "CONTENT_FILTERED" if file.is_flagged else "SUCCESS"
