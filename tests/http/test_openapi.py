"""The OpenAPI document: true, valid, and the same as the committed file."""

from pathlib import Path
from typing import Any

import openapi_spec_validator
import pytest
import yaml

from service.api.app import create_app
from service.api.fields import InpaintFields
from service.api.forms import FILES
from service.api.openapi import to_yaml
from service.engine.engine import Engine
from service.metrics import Metrics
from service.settings import load_settings

COMMITTED = Path(__file__).parents[2] / "openapi.yaml"


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """The document of the default settings."""
    settings, metrics = load_settings(environ={}), Metrics()
    return create_app(settings, Engine(settings, metrics), metrics).openapi()


def test_committed_file_is_the_apps_own(document: dict[str, Any]) -> None:
    """`openapi.yaml` is what `inpaint-service openapi` prints; if not, run it again and commit."""
    assert COMMITTED.read_text() == to_yaml(document)


def test_yaml_reads_back_as_the_same_document(document: dict[str, Any]) -> None:
    """What is written as YAML is read by any YAML parser as the document itself."""
    assert yaml.safe_load(to_yaml(document)) == document


@pytest.mark.parametrize(
    "value",
    [{}, [], "", "no", {"on": None, "a b": [[], {}, [1, [2.5, True]]], "x": {"y": "ü\n\"'\\: #"}}, [[["-"]]]],
)
def test_yaml_of_odd_values(value: object) -> None:
    """Empty, nested and strangely spelled values survive."""
    assert yaml.safe_load(to_yaml(value)) == value


def test_form_has_files_bounds_defaults_and_descriptions(document: dict[str, Any]) -> None:
    """The form is described as it is read: binary files and each scalar with its bounds."""
    body = document["paths"]["/v1/inpaint"]["post"]["requestBody"]
    form = body["content"]["multipart/form-data"]["schema"]

    assert body["required"] is True
    prompt, image = form["allOf"]
    assert prompt["anyOf"] == [{"required": ["prompt"]}, {"required": ["prompt_embeds"]}]
    assert image["anyOf"][0] == {"required": ["image"]}
    assert form["additionalProperties"] is False
    assert list(form["properties"]) == [*FILES, *InpaintFields.model_fields]
    assert form["properties"]["image"]["format"] == form["properties"]["mask"]["format"] == "binary"
    assert all(field["description"] for field in form["properties"].values())
    steps, seed = form["properties"]["num_inference_steps"], form["properties"]["seed"]
    assert (steps["type"], steps["minimum"], steps["maximum"]) == ("integer", 1, 150)
    assert (seed["minimum"], seed["maximum"]) == (0, 2**32 - 1)
    assert form["properties"]["guidance_scale"]["default"] == 7.5
    assert form["properties"]["output_format"]["enum"] == ["png", "jpeg", "webp", "npy", "latent"]
    # A form field is sent or left out, so none is a union with null; a scale has two shapes.
    assert "null" not in str(form["properties"])
    scaled = ("loras", "ip_adapter_scale")
    assert "anyOf" not in str({name: field for name, field in form["properties"].items() if name not in scaled})


def test_answers_have_their_true_content_types(document: dict[str, Any]) -> None:
    """Images, JSON and events for success, problem documents for every failure."""
    responses = document["paths"]["/v1/inpaint"]["post"]["responses"]

    success = {"image/png", "image/jpeg", "image/webp", "application/x-npy", "application/json", "text/event-stream"}
    assert set(responses["200"]["content"]) == success
    assert responses["202"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/RequestState"}
    failures = {status: response for status, response in responses.items() if status not in ("200", "202")}
    assert set(failures) == {
        str(status) for status in (400, 401, 403, 406, 408, 409, 413, 415, 422, 429, 431, 500, 503, 504, 507)
    }
    for response in failures.values():
        schema = response["content"]["application/problem+json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/Problem"}
    assert {"Problem", "InpaintAnswer", "ModelList", "RequestState"} <= set(document["components"]["schemas"])


def test_document_is_valid_openapi(document: dict[str, Any]) -> None:
    """Tools that read OpenAPI find nothing to complain about."""
    openapi_spec_validator.validate(document)
