"""The wire format of AUTOMATIC1111's stable-diffusion-webui, under `/sdapi/v1`.

JSON ──fields, values──▶ ──samplers, prompts, options──▶ translate ──▶ Order ──▶ img2img ──▶ answers
runs ──▶ control (progress, interrupt)                    lists: what clients ask when they connect
"""

from fastapi import FastAPI

from service.api.a1111 import control, img2img, lists
from service.api.a1111.errors import PREFIX, a1111_error
from service.api.a1111.runs import Runs

__all__ = ["PREFIX", "a1111_error", "add_routes"]


def add_routes(app: FastAPI) -> None:
    """All of it."""
    app.state.a1111_runs = Runs()
    img2img.add_routes(app)
    control.add_routes(app)
    lists.add_routes(app)
