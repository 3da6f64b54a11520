"""Requests that nobody thought of: whatever is sent, the answer is one that the API's document names, and no fault."""

import json
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode, checks
from schemathesis.core.result import Ok
from schemathesis.schemas import APIOperation

from service.api.fields import InpaintFields
from service.api.forms import FILES
from tests.http.serving import BOUNDARY, CLOSING, LiveServer, check_problem, part, png, scene, serving, square_mask

FIELDS = (*FILES, *InpaintFields.model_fields)

FORMS = ("/v1/inpaint", "/v1/images/edits", "/sdapi/v1/img2img")

# A run is the same every time and on every machine, and takes a bounded number of requests.
bounded = settings(derandomize=True, database=None, suppress_health_check=list(HealthCheck), print_blob=False)


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server on which everything is allowed."""
    lora_dir = tmp_path_factory.mktemp("loras")
    with serving(admin_keys="key", lora_dir=lora_dir, max_body_mib=1.0, max_pixels=1_000_000) as live:
        yield live
        assert all(worker.restarts == 0 for worker in live.engine.workers())


# --- any text in any field --------------------------------------------------------------------

numbers = st.one_of(
    st.integers().map(str), st.floats().map(str), st.integers(-2, 200).map(str), st.floats(0, 1).map(str)
)
documents = st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(), st.integers(), st.text(max_size=8)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["name", "scale", "unet", "up", "s1", "block_0"]) | st.text(max_size=4), inner
        )
    ),
    max_leaves=8,
).map(json.dumps)
texts = st.one_of(
    st.text(max_size=60), numbers, documents, st.sampled_from(["true", "png", "solo", "ddim", "NaN", "1e400"])
)
contents = st.one_of(texts.map(lambda text: text.encode("utf-8", "surrogatepass")), st.binary(max_size=60))


@settings(bounded, max_examples=400)
@given(name=st.sampled_from(FIELDS), content=contents, is_file=st.sampled_from([False, False, False, True]))
def test_any_text_in_any_field(open_server: LiveServer, name: str, content: bytes, is_file: bool) -> None:
    """Any bytes in any one field, beside sound ones, give a picture, or a problem that names this field."""
    usual = {"image": png(scene()), "mask": png(square_mask()), "prompt": b"a red house"}
    body = b"".join(
        part(other, data, other if other in FILES else None) for other, data in usual.items() if other != name
    )
    body += part(name, content, "file" if is_file else None) + CLOSING
    response = open_server.client.post(
        "/v1/inpaint",
        content=body,
        headers={"Content-Type": f"multipart/form-data; boundary={BOUNDARY}", "Accept": "application/json"},
    )
    if response.status_code == 200:
        return
    if name == "timeout" and response.status_code == 504:
        return  # A limit of less than the work takes.
    assert response.status_code in {415, 422}, response.text
    problem = check_problem(dict(response.headers), response.content, response.status_code, response.json()["code"])
    # A mask can be widened or blurred away; then it is the mask that has nothing to repaint.
    assert problem["errors"][0]["field"] in {name, "mask" if problem["code"] == "empty_mask" else name}


@settings(bounded, max_examples=100)
@given(st.lists(st.tuples(st.sampled_from(FIELDS) | st.text(max_size=8), contents, st.booleans()), max_size=8))
def test_any_form(open_server: LiveServer, form: list[tuple[str, bytes, bool]]) -> None:
    """Any set of fields is answered, with a picture or with what is wrong."""
    names = {ord(character): None for character in '\r\n"\\'}
    body = b"".join(
        part(name.translate(names), content, "file" if is_file else None) for name, content, is_file in form
    )
    response = open_server.post_body(body + CLOSING)
    assert response.status_code in {200, 400, 415, 422}, response.text


# --- any request that the document describes, or does not ---------------------------------------

CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.unsupported_method,
]
"""Whether data is refused or accepted is not one of them: no document tells which bytes are a picture."""


def operations(server: LiveServer) -> list[APIOperation]:
    """Every operation of the served document, as an administrator may call it."""
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")
    return [result.ok() for result in schema.get_all_operations() if isinstance(result, Ok)]


@st.composite
def cases(draw: st.DrawFn, operation: APIOperation, mode: GenerationMode) -> Case:
    """Requests of an operation, but for those in the making of which schemathesis fails.

    It has some wrong values with files in them looked at by a library that knows no files.
    """
    try:
        return draw(operation.as_strategy(generation_mode=mode))
    except ValueError as error:
        if str(error) != "Unsupported type: 'Binary'":
            raise
        reject()


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_answers_are_those_of_the_document(open_server: LiveServer, mode: GenerationMode) -> None:
    """Whatever the document allows, and what it does not, has an answer of a status, type and shape that it names."""
    num_cases = 0
    asked = operations(open_server)
    assert len(asked) >= 8
    if mode is GenerationMode.NEGATIVE:  # Only forms can be wrong: any text may be a name, any bytes a file.
        asked = [operation for operation in asked if operation.path in FORMS]

    for operation in asked:

        @settings(bounded, max_examples=150 if operation.path in FORMS else 30)
        @given(case=cases(operation, mode))
        def check(case: Case) -> None:
            nonlocal num_cases
            num_cases += 1
            response = case.call(headers={"Authorization": "Bearer key"}, timeout=20)
            case.validate_response(response, checks=CHECKS)

        check()
    assert num_cases >= 100
