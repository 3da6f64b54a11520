"""What makes two requests the same: the client, its key, and what the form says."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from service.api.idempotency import body_digest, request_name
from service.api.multipart import Part
from service.api.problems import problem
from service.api.records import RequestRecord, attach_record
from service.engine.clients import ANONYMOUS, Client
from service.errors import ErrorCode, InpaintError

parts = st.builds(Part, st.text(max_size=4), st.binary(max_size=4), st.booleans())
forms = st.lists(parts, max_size=5)


def name_of(*keys: str, client: Client = ANONYMOUS) -> bytes | None:
    scope = {"type": "http", "headers": [(b"idempotency-key", key.encode("latin-1")) for key in keys]}
    attach_record(scope, RequestRecord("req_1", problem, client))
    return request_name(Request(scope))


@given(forms.flatmap(lambda form: st.tuples(st.just(form), st.permutations(form))))
def test_the_order_of_the_parts_does_not_matter(forms: tuple[Sequence[Part], Sequence[Part]]) -> None:
    """Browsers and libraries send a form's parts in an order of their own."""
    form, shuffled = forms
    assert body_digest("/", form) == body_digest("/", shuffled)


def contents(form: Sequence[Part]) -> list[tuple[str, bytes, bool]]:
    return sorted((part.name, part.data, part.is_file) for part in form)


@given(forms, forms)
def test_forms_are_the_same_exactly_when_they_say_the_same(one: Sequence[Part], other: Sequence[Part]) -> None:
    """No two forms that differ in a name, a byte or a part are taken for each other."""
    assert (body_digest("/", one) == body_digest("/", other)) == (contents(one) == contents(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([Part("ab", b"c", is_file=False)], [Part("a", b"bc", is_file=False)]),
        ([Part("a", b"b", is_file=False)], [Part("a", b"b", is_file=True)]),
        (
            [Part("a", b"1", is_file=False), Part("b", b"2", is_file=False)],
            [Part("a", b"2", is_file=False), Part("b", b"1", is_file=False)],
        ),
        ([Part("a", b"", is_file=False)], [Part("a", b"", is_file=False)] * 2),
        ([], [Part("", b"", is_file=False)]),
    ],
)
def test_what_is_easily_confused_is_not(one: Sequence[Part], other: Sequence[Part]) -> None:
    """Where a name ends and a value begins, which value belongs to which name, and how many there are, counts."""
    assert body_digest("/", one) != body_digest("/", other)


def test_a_name_is_one_clients_key() -> None:
    """The same key of the same client is the same name; else it is another."""
    alice, bob = Client(1, "alice"), Client(11)

    name = name_of("1", client=alice)
    assert name == name_of("1", client=alice)
    others = [name_of("2", client=alice), name_of("1", client=bob), name_of("1"), name_of('"1"', client=alice)]
    assert len({name, *others}) == 5
    assert name_of("11", client=alice) != name_of("1", client=bob)


def test_without_the_header_there_is_no_name() -> None:
    """A request without a key is never a repetition."""
    assert name_of(client=Client(1)) is None


@pytest.mark.parametrize(
    "keys", [["a"], ["a" * 255], ["8e03978e-40d5-43e8-bc93-6894a57f9324"], ['"quoted, with~all !"']]
)
def test_keys_that_are_taken(keys: list[str]) -> None:
    """Up to 255 printable ASCII characters, quoted or not."""
    assert name_of(*keys) is not None


@pytest.mark.parametrize("keys", [[""], ["a" * 256], ["a\tb"], ["é"], ["a\x7f"], ["a\n"], ["a", "b"], ["a", "a"]])
def test_keys_that_are_refused(keys: list[str]) -> None:
    """Anything else is the client's mistake, and the answer names the header, not what was sent."""
    with pytest.raises(InpaintError) as raised:
        name_of(*keys)
    assert (raised.value.code, raised.value.field) == (ErrorCode.INVALID_FIELD, "Idempotency-Key")


def test_where_it_was_sent_counts() -> None:
    """The same body sent elsewhere, or as something else than a form, says something else."""
    form = [Part("a", b"1", is_file=False)]
    digests = {body_digest("/a", form), body_digest("/b", form), body_digest("/a", b"1"), body_digest("/b", b"1")}
    assert len(digests) == 4
