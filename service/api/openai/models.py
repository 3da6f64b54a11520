"""`GET /v1/models/{model}`: what OpenAI's clients ask before they use a model."""

from fastapi import FastAPI
from starlette.requests import Request

from service.api.openai.document import openai_problems
from service.api.openapi import Tag
from service.api.ops import served_model
from service.api.schemas import ServedModel
from service.api.state import state_of
from service.errors import ErrorCode, InpaintError


def add_routes(app: FastAPI) -> None:
    """The endpoint; ids may have slashes."""
    app.add_api_route(
        "/v1/models/{model:path}",
        get_model,
        tags=[Tag.MODELS],
        summary="The served model by its id, as OpenAI's clients ask for it",
        responses=openai_problems(ErrorCode.NOT_READY, ErrorCode.UNKNOWN_MODEL),
    )


async def get_model(model: str, request: Request) -> ServedModel:
    """What the list says of it."""
    served = await served_model(state_of(request))
    if model != served.id:
        raise InpaintError(ErrorCode.UNKNOWN_MODEL, "There is no such model: GET /v1/models has it.", field="model")
    return served
