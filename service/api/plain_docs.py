"""The OpenAPI document as plain HTML, for readers without scripts. Made of the document alone, whatever its routes."""

from collections.abc import Iterator
from html import escape
from typing import Any

_BOUNDS = (
    ("minimum", "≥ {}"),
    ("exclusiveMinimum", "> {}"),
    ("maximum", "≤ {}"),
    ("multipleOf", "multiple of {}"),
    ("minLength", "≥ {} characters"),
    ("maxLength", "≤ {} characters"),
)


def plain_html(document: dict[str, Any]) -> str:
    """What stands in a page's body: headings and tables, without scripts, styles or links to anywhere else."""
    return "".join(_PlainPage(document).pieces())


class _PlainPage:
    """Writes one document.

    Args:
        document: Of OpenAPI 3.1; references in it are to its own components.
    """

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document

    def pieces(self) -> Iterator[str]:
        """The page from top to bottom."""
        info = self._document["info"]
        yield f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>"
        for paragraph in info["description"].split("\n\n"):
            yield f"<p>{_text(paragraph)}</p>"
        for path, operations in self._document["paths"].items():
            for method, operation in operations.items():
                yield from self._operation(method, path, operation)

    def _operation(self, method: str, path: str, operation: dict[str, Any]) -> Iterator[str]:
        summary = _text(operation.get("summary", ""))
        yield f"<h2><code>{escape(method.upper())} {escape(path)}</code></h2><p>{summary}.</p>"
        if "parameters" in operation:
            yield "<h3>Parameters</h3><table><tr><th>name<th>in<th>type<th>meaning"
            for parameter in operation["parameters"]:
                yield f"<tr><td><code>{escape(parameter['name'])}</code><td>{escape(parameter['in'])}"
                yield f"<td>{_type(parameter['schema'])}<td>{_text(parameter.get('description', ''))}"
            yield "</table>"
        for media_type, body in operation.get("requestBody", {}).get("content", {}).items():
            yield from self._body(media_type, self._resolved(body["schema"]))
        yield "<h3>Answers</h3><table><tr><th>status<th>content type<th>meaning"
        for status, response in operation["responses"].items():
            types = ", ".join(f"<code>{escape(media_type)}</code>" for media_type in response.get("content", {}))
            yield f"<tr><td>{escape(status)}<td>{types}<td>{_text(response['description'])}"
        yield "</table>"

    def _body(self, media_type: str, schema: dict[str, Any]) -> Iterator[str]:
        yield f"<h3>Send <code>{escape(media_type)}</code></h3>"
        if "properties" not in schema:
            return
        yield "<table><tr><th>field<th>type<th>default<th>meaning"
        for name, field in schema["properties"].items():
            default = "required" if name in schema.get("required", ()) else _default(field)
            yield f"<tr><td><code>{escape(name)}</code><td>{_type(self._resolved(field))}<td>{default}"
            yield f"<td>{_text(field.get('description', ''))}"
        yield "</table>"

    def _resolved(self, schema: dict[str, Any]) -> dict[str, Any]:
        """The schema itself, where only a reference to it stands."""
        if "$ref" not in schema:
            return schema
        found: dict[str, Any] = self._document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        return found


def _type(field: dict[str, Any]) -> str:
    if "enum" in field:
        return ", ".join(f"<code>{escape(str(value))}</code>" for value in field["enum"])
    kinds = field.get("type") or [alternative.get("type", "") for alternative in field.get("anyOf", ())]
    kind = kinds if isinstance(kinds, str) else " or ".join(str(one) for one in kinds)
    bounds = [text.format(field[key]) for key, text in _BOUNDS if key in field]
    return escape(", ".join(["file" if field.get("format") == "binary" else kind, *bounds]))


def _default(field: dict[str, Any]) -> str:
    default = field.get("default")
    if default is None or default == "":
        return ""
    return f"<code>{escape(str(default).lower() if isinstance(default, bool) else str(default))}</code>"


def _text(text: str) -> str:
    """Escaped, with `code` marked."""
    pieces = escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if index % 2 else piece for index, piece in enumerate(pieces))
