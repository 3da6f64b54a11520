"""The wire formats of other services: their routes, and how their clients are told of errors.

Each is a package of its own and nothing but translation: the same queue, limits, flags and metrics stand behind all.
"""

from collections.abc import Mapping

from fastapi import FastAPI

from service.api import a1111
from service.api.openai import edits as openai_edits
from service.api.openai import models as openai_models
from service.api.openai.errors import openai_error
from service.api.problems import problem
from service.api.records import ErrorForm
from service.api.stability import route as stability
from service.api.stability.errors import PATH_PREFIX as STABILITY_PREFIX
from service.api.stability.errors import stability_error

_ERROR_FORMS: Mapping[str, ErrorForm] = {
    "/v1/images/": openai_error,
    "/v1/models/": openai_error,
    STABILITY_PREFIX: stability_error,
    a1111.PREFIX: a1111.a1111_error,
}
"""By what their paths begin with."""


def error_form_of(path: str) -> ErrorForm:
    """How who asks for a path is told of errors; the native form is for all that other services do not have."""
    return next((form for prefix, form in _ERROR_FORMS.items() if path.startswith(prefix)), problem)


def add_routes(app: FastAPI) -> None:
    """All of their routes."""
    openai_edits.add_routes(app)
    openai_models.add_routes(app)
    stability.add_routes(app)
    a1111.add_routes(app)
