"""The wire format of AUTOMATIC1111's stable-diffusion-webui, under `/sdapi/v1`.

JSON ──fields, values──▶ ──samplers, prompts, options──▶ translate ──▶ Order ──▶ img2img ──▶ answers
runs ──▶ control (progress, interrupt)                    lists: what clients ask when they connect
"""

from functools import partial

from fastapi import FastAPI

from service.api.a1111 import control, img2img, lists
from service.api.a1111.errors import PREFIX, a1111_error
from service.api.a1111.runs import Runs
from service.api.openapi import Tag

__all__ = ["PREFIX", "a1111_error", "add_routes"]


def add_routes(app: FastAPI) -> None:
    """All of it."""
    app.state.a1111_runs = Runs()
    add_route = partial(app.add_api_route, tags=[Tag.OTHER_FORMATS])
    img2img.add_routes(add_route)
    control.add_routes(add_route)
    lists.add_routes(add_route)
