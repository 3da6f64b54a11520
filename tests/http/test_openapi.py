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


def test_every_operation_is_presented(document: dict[str, Any]) -> None:
    """Each has a heading that is explained, a summary, a description, and an id of its own; in answers, all headers."""
    explained = [tag["name"] for tag in document["tags"] if tag["description"]]
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]

    assert len({operation["operationId"] for operation in operations}) == len(operations)
    for operation in operations:
        assert len(operation["tags"]) == 1
        assert operation["tags"][0] in explained
        assert operation["summary"]
        assert not operation["summary"].endswith(".")
        assert operation["description"]
        for status, response in operation["responses"].items():
            assert "X-Request-Id" in response["headers"], (operation["operationId"], status)
    answers = document["paths"]["/v1/inpaint"]["post"]["responses"].items()
    sent = {status: set(response["headers"]) - {"X-Request-Id"} for status, response in answers if status != "202"}
    assert sent["401"] == {"X-Should-Retry", "WWW-Authenticate"}
    assert sent["409"] == sent["429"] == {"Retry-After"}
    assert sent["422"] == {"X-Should-Retry"}
    assert sent["503"] == {"Retry-After"}
    assert set(document["components"]["headers"]) == {"X-Request-Id"}.union(*sent.values()) - set(sent["200"])


def test_fields_of_json_say_so(document: dict[str, Any]) -> None:
    """Fields that hold JSON are encoded as such, and their bounds are words that JSON Schema knows."""
    form = document["paths"]["/v1/inpaint"]["post"]["requestBody"]["content"]["multipart/form-data"]
    as_json = {name for name, how in form["encoding"].items() if how["contentType"] == "application/json"}

    assert as_json == {"timesteps", "sigmas", "loras", "ip_adapter_scale", "freeu"}
    assert form["schema"]["properties"]["sigmas"]["items"] == {"type": "number", "exclusiveMinimum": 0, "maximum": 1000}


def test_document_is_valid_openapi(document: dict[str, Any]) -> None:
    """Tools that read OpenAPI find nothing to complain about."""
    openapi_spec_validator.validate(document)
