"""`POST /sdapi/v1/img2img`: a picture, a mask and a prompt in the web UI's words."""

from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.api.a1111.answers import img2img_answer, interrupted_body
from service.api.a1111.errors import documented
from service.api.a1111.fields import DEFAULTS, INERT, NEUTRAL
from service.api.a1111.runs import runs_of
from service.api.a1111.schemas import A1111Answer
from service.api.a1111.translate import answered_fields, translate
from service.api.answers import response_of
from service.api.json_body import JSON_MEDIA_TYPE, read_json_body
from service.api.kept_answers import Answer
from service.api.openapi import INPAINT_OPERATION
from service.api.painting import Body, Order, admit, replay, start
from service.errors import ErrorCode, InpaintError
from service.messages import ModelInfo

_NOT_OF_IMG2IMG = frozenset(
    {
        ErrorCode.FORBIDDEN,
        ErrorCode.METHOD_NOT_ALLOWED,
        ErrorCode.NOT_ACCEPTABLE,
        ErrorCode.MALFORMED_MULTIPART,
        ErrorCode.INVALID_LORA,
        ErrorCode.CANCELLED,
    }
)

_FILE = "PNG, JPEG or WebP in Base64, or a data URL."
_DESCRIPTIONS = {
    "init_images": f"One picture: {_FILE} Required.",
    "mask": f"{_FILE} White is repainted; of a mask with transparent pixels, what is opaque. Without a mask, "
    "everything is.",
    "prompt": "In the web UI's syntax, with `<lora:name:0.8>`.",
    "negative_prompt": "In the web UI's syntax.",
    "seed": "-1 is random. Picture i is drawn with seed + i.",
    "denoising_strength": "Above 0, up to 1.",
    "sampler_name": "One of `samplers`; `DPM++ 2M Karras` and the like name the schedule type, too.",
    "sampler_index": "Read where there is no `sampler_name`.",
    "scheduler": "One of `schedulers`.",
    "eta": "Of DDIM.",
    "width": "The whole picture is brought to this size, and answered so; with `inpaint_full_res`, the crop is.",
    "resize_mode": "0 stretches, 1 crops, 2 fills from the edges.",
    "batch_size": "At most 8 pictures with those of `n_iter`.",
    "inpainting_fill": "0 fill, 1 original; 2 and 3 only with a denoising_strength of 1, where all are alike.",
    "inpaint_full_res": "Paint a crop around the mask, and paste it into the picture at the picture's own size.",
    "override_settings": "`CLIP_stop_at_last_layers`, `live_previews_enable`; others only as `options` has them.",
}


def add_routes(add_route: Callable[..., None]) -> None:
    """The endpoint."""
    add_route(
        "/sdapi/v1/img2img",
        img2img,
        methods=["POST"],
        response_class=Response,
        response_model=None,
        summary="Repaint in AUTOMATIC1111's words",
        openapi_extra={
            "parameters": INPAINT_OPERATION["parameters"],
            "requestBody": {"required": True, "content": {JSON_MEDIA_TYPE: {"schema": _schema()}}},
        },
        responses={
            200: {"model": A1111Answer, "description": "The pictures; none where the request was interrupted."},
            **documented(*(code for code in ErrorCode if code not in _NOT_OF_IMG2IMG)),
        },
    )


def _schema() -> dict[str, Any]:
    """The fields: those that are read, at their defaults; those that are not served, at the values that are taken."""
    properties: dict[str, dict[str, Any]] = {}
    for name, default in DEFAULTS.items():
        field: dict[str, Any] = {} if default is None else {"default": default}
        if name in NEUTRAL:
            field = {
                "enum": [None, *(value for value in NEUTRAL[name] if value is not None)],
                "description": "Not served otherwise.",
            }
        elif name in INERT:
            field["description"] = f"Of no effect: {INERT[name][1]}."
        elif name in _DESCRIPTIONS:
            field["description"] = _DESCRIPTIONS[name]
        properties[name] = field
    properties["init_images"] |= {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 1}
    return {"type": "object", "properties": properties, "required": ["init_images"], "additionalProperties": False}


async def img2img(request: Request) -> Response:
    """Send a picture, a mask and a prompt as AUTOMATIC1111's web UI takes them."""

    def order_of(body: Body, model: ModelInfo) -> Order:
        assert isinstance(body, bytes)  # noqa: S101 - for the type checker: see below
        return translate(body, model)

    admitted = await admit(
        request, lambda: read_json_body(request.headers.get("Content-Type", ""), request.stream()), order_of
    )
    if isinstance(admitted, Answer):
        return replay(request, admitted)
    call = answered_fields(admitted.order)
    with runs_of(request).run(admitted) as run:
        work = start(admitted, lambda painted: img2img_answer(call, painted, run.job_timestamp))
        try:
            return response_of(await work.answer_unless_gone(request))
        except InpaintError as error:
            if run.is_interrupted and error.code is ErrorCode.CANCELLED:
                return JSONResponse(
                    {**interrupted_body(call, run.job_timestamp), "request_id": admitted.record.request_id}
                )
            raise
