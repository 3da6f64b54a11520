"""`/docs`: the OpenAPI document as one plain page. It loads nothing, so it works offline."""

from collections.abc import Iterator
from html import escape
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import HTMLResponse

DOCS_PATH = "/docs"
OPENAPI_PATH = "/openapi.json"

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; border-top: 1px solid #8886; padding-top: 1rem; }
code { font-size: .95em; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid #8884; }
"""

_BOUNDS = (
    ("minimum", "≥ {}"),
    ("exclusiveMinimum", "> {}"),
    ("maximum", "≤ {}"),
    ("multipleOf", "multiple of {}"),
    ("minLength", "≥ {} characters"),
    ("maxLength", "≤ {} characters"),
)


def add_routes(app: FastAPI) -> None:
    """The page's route."""
    app.add_api_route(DOCS_PATH, docs, include_in_schema=False, response_class=HTMLResponse, response_model=None)


async def docs(request: Request) -> HTMLResponse:
    """The page."""
    page = "".join(_page(request.app.openapi()))
    return HTMLResponse(page, headers={"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"})


def _page(document: dict[str, Any]) -> Iterator[str]:
    title = escape(f"{document['info']['title']} {document['info']['version']}")
    yield f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    yield f"<h1>{title}</h1>"
    for paragraph in document["info"]["description"].split("\n\n"):
        yield f"<p>{_text(paragraph)}</p>"
    yield f'<p>For programs: <a href="{OPENAPI_PATH}">{OPENAPI_PATH}</a>.</p>'
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            yield from _operation(method, path, operation)


def _operation(method: str, path: str, operation: dict[str, Any]) -> Iterator[str]:
    yield f"<h2><code>{escape(method.upper())} {escape(path)}</code></h2><p>{_text(operation.get('summary', ''))}.</p>"
    if "parameters" in operation:
        yield "<h3>Parameters</h3><table><tr><th>name<th>in<th>type<th>meaning"
        for parameter in operation["parameters"]:
            yield f"<tr><td><code>{escape(parameter['name'])}</code><td>{escape(parameter['in'])}"
            yield f"<td>{_type(parameter['schema'])}<td>{_text(parameter.get('description', ''))}"
        yield "</table>"
    for media_type, body in operation.get("requestBody", {}).get("content", {}).items():
        yield f"<h3>Send <code>{escape(media_type)}</code></h3>"
        yield "<table><tr><th>field<th>type<th>default<th>meaning"
        required = body["schema"].get("required", ())
        for name, field in body["schema"].get("properties", {}).items():
            default = "required" if name in required else _default(field)
            yield f"<tr><td><code>{escape(name)}</code><td>{_type(field)}<td>{default}"
            yield f"<td>{_text(field.get('description', ''))}"
        yield "</table>"
    yield "<h3>Answers</h3><table><tr><th>status<th>content type<th>meaning"
    for status, response in operation["responses"].items():
        types = ", ".join(f"<code>{escape(media_type)}</code>" for media_type in response.get("content", {}))
        yield f"<tr><td>{escape(status)}<td>{types}<td>{_text(response['description'])}"
    yield "</table>"


def _type(field: dict[str, Any]) -> str:
    if "enum" in field:
        return ", ".join(f"<code>{escape(str(value))}</code>" for value in field["enum"])
    kind = "file" if field.get("format") == "binary" else field.get("type", "")
    bounds = [text.format(field[key]) for key, text in _BOUNDS if key in field]
    return escape(", ".join([kind, *bounds]))


def _default(field: dict[str, Any]) -> str:
    default = field.get("default")
    if default is None or default == "":
        return ""
    return f"<code>{escape(str(default).lower() if isinstance(default, bool) else str(default))}</code>"


def _text(text: str) -> str:
    """Escaped, with `code` marked."""
    pieces = escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if index % 2 else piece for index, piece in enumerate(pieces))
