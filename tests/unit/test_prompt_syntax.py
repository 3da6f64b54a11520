"""AUTOMATIC1111's prompt syntax: its own examples, and that no text can break it."""

import math
import re
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.worker.prompt_syntax import (
    COMMA_BACKTRACK,
    MAX_CHUNKS,
    MAX_WEIGHT,
    Chunk,
    Span,
    Word,
    parse,
    split_into_chunks,
)

SIZE = 75
COMMA = 7

WEB_UI_EXAMPLES = [
    ("normal text", [("normal text", 1.0)]),
    ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
    ("(unbalanced", [("unbalanced", 1.1)]),
    (r"\(literal\]", [("(literal]", 1.0)]),
    ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
    (
        "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
        [
            ("a ", 1.0),
            ("house", 1.5730000000000004),
            (" ", 1.1),
            ("on", 1.0),
            (" a ", 1.1),
            ("hill", 0.55),
            (", sun, ", 1.1),
            ("sky", 1.4641000000000006),
            (".", 1.1),
        ],
    ),
]
"""What the web UI's documentation of `parse_prompt_attention` says comes out."""

PIECES = [*"ab :,.-+0129()[]\\", "BREAK", " BREAK ", ":1.3)", ":-9)"]
SYNTAX = st.lists(st.sampled_from(PIECES) | st.characters()).map("".join)


def pairs(prompt: str) -> list[tuple[str, float]]:
    """The spans of a prompt without BREAK."""
    (section,) = parse(prompt)
    return [(span.text, span.weight) for span in section]


def words(num: int, first: int = 100) -> list[Word]:
    """Words of one token each, all different."""
    return [((token,), 1.0) for token in range(first, first + num)]


def lengths(chunks: list[Chunk]) -> list[int]:
    return [len(chunk.ids) for chunk in chunks]


@pytest.mark.parametrize(("prompt", "expected"), WEB_UI_EXAMPLES)
def test_web_ui_examples(prompt: str, expected: list[tuple[str, float]]) -> None:
    """Each example in the web UI's own documentation gives what it says there."""
    found = pairs(prompt)
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", []),
        ("((a))", [("a", 1.21)]),
        ("[a]", [("a", 1 / 1.1)]),
        ("[[a]]", [("a", 1 / 1.21)]),
        ("(a : 1.5 )", [("a ", 1.5)]),
        ("(a:.5)(b:2.)(c:+3)(d:-1)", [("a", 0.5), ("b", 2.0), ("c", 3.0), ("d", -1.0)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(a:.)", [("a:.", 1.1)]),
        ("a:1.2)", [("a:1.2)", 1.0)]),
        ("[a:1.2)", [("a:1.2)", 1 / 1.1)]),
        ("a) b]", [("a) b]", 1.0)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1.0), (" c", 1 / 1.1)]),
        (r"\\ \[x\] a\b", [("\\ [x] ab", 1.0)]),
        ("4:3, e:o", [("4:3, e:o", 1.0)]),
        ("BREAKFAST xBREAK break", [("BREAKFAST xBREAK break", 1.0)]),
        ("(a:" + "9" * 400 + ")", [("a", MAX_WEIGHT)]),
        ("(a:-" + "9" * 400 + ")", [("a", -MAX_WEIGHT)]),
        ("(" * 2000, []),
        ("(" * 1000 + "a", [("a", MAX_WEIGHT)]),
        ("(" * 999 + "a" + ")" * 999, [("a", MAX_WEIGHT)]),
        ("(((a:1000):1000):0)", [("a", 0.0)]),
    ],
)
def test_corners_of_the_grammar(prompt: str, expected: list[tuple[str, float]]) -> None:
    """Blanks, signs, brackets that do not match, escapes, and numbers that are none or too large."""
    found = pairs(prompt)
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


def test_break_ends_a_section_within_brackets_too() -> None:
    assert parse("a BREAK b") == [[Span("a ", 1.0)], [Span(" b", 1.0)]]
    assert parse("(a BREAK b)") == [[Span("a ", 1.1)], [Span(" b", 1.1)]]
    assert parse("BREAK") == [[], []]
    assert parse("a BREAK BREAK b") == [[Span("a ", 1.0)], [Span(" ", 1.0)], [Span(" b", 1.0)]]


@given(SYNTAX)
@example("(" * 2000)
@example("(a" * 1000)
@example("[(" * 500 + "a" + ":9)" * 300)
def test_no_text_breaks_the_parser(prompt: str) -> None:
    """Any text gives spans of bounded weights that hold nothing but characters of the prompt, in order."""
    rest = iter(prompt)
    for section in parse(prompt):
        for span in section:
            assert span.text
            assert math.isfinite(span.weight)
            assert abs(span.weight) <= MAX_WEIGHT
            assert all(character in rest for character in span.text)
        assert all(before.weight != after.weight for before, after in pairwise(section))


@given(st.text(st.characters(exclude_characters="\\()[]"), max_size=200).filter(lambda text: "BREAK" not in text))
def test_text_without_special_characters_parses_to_itself(prompt: str) -> None:
    assert pairs(prompt) == ([(prompt, 1.0)] if prompt else [])


@given(st.text(max_size=100).filter(lambda text: "BREAK" not in text))
def test_any_text_can_be_escaped(text: str) -> None:
    """With a backslash before each special character, a prompt means its characters."""
    assert pairs(re.sub(r"([\\()\[\]])", r"\\\1", text)) == ([(text, 1.0)] if text else [])


@pytest.mark.parametrize(
    ("num_words", "expected"), [(0, [0]), (1, [1]), (75, [75]), (76, [75, 1]), (150, [75, 75]), (151, [75, 75, 1])]
)
def test_long_sections_fill_chunks(num_words: int, expected: list[int]) -> None:
    assert lengths(split_into_chunks([words(num_words)], SIZE, COMMA)) == expected


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ([3, 2], [3, 2]),
        ([3, 0], [3]),  # nothing after the last BREAK
        ([0, 3], [0, 3]),
        ([3, 0, 2], [3, 0, 2]),
        ([0, 0], [0]),
        ([75, 1], [75, 1]),
        ([80, 1], [75, 5, 1]),
    ],
)
def test_sections_start_chunks(sections: list[int], expected: list[int]) -> None:
    assert lengths(split_into_chunks([words(num) for num in sections], SIZE, COMMA)) == expected


@pytest.mark.parametrize(
    ("comma_at", "expected"),
    [
        (SIZE - COMMA_BACKTRACK - 1, [75, 10]),  # too far back
        (SIZE - COMMA_BACKTRACK, [56, 29]),
        (70, [71, 14]),
        (74, [75, 10]),
        (75, [75, 10]),  # the comma itself is the first that does not fit
    ],
)
def test_full_chunk_ends_at_a_near_comma(comma_at: int, expected: list[int]) -> None:
    """What follows the comma moves to the next chunk, in order."""
    section = words(85)
    section[comma_at] = ((COMMA,), 1.0)
    chunks = split_into_chunks([section], SIZE, COMMA)
    assert lengths(chunks) == expected
    assert [token for chunk in chunks for token in chunk.ids] == [ids[0] for ids, _ in section]


def test_vectors_of_one_word_stay_together() -> None:
    """A word of several tokens that does not fit any more starts the next chunk."""
    chunks = split_into_chunks([[*words(73), ((1, 2, 3), 1.5), *words(1, 500)]], SIZE, COMMA)
    assert lengths(chunks) == [73, 4]
    assert chunks[1] == Chunk((1, 2, 3, 500), (1.5, 1.5, 1.5, 1.0))


def test_word_longer_than_a_chunk_is_split() -> None:
    assert lengths(split_into_chunks([[(tuple(range(100)), 1.0)]], SIZE, COMMA)) == [75, 25]


def test_number_of_chunks_is_bounded() -> None:
    """Neither BREAKs nor length make more; what is too much is cut off."""
    assert lengths(split_into_chunks([words(0)] * 1000, SIZE, COMMA)) == [0] * MAX_CHUNKS
    assert lengths(split_into_chunks([words(5000)], SIZE, COMMA)) == [SIZE] * MAX_CHUNKS


@given(
    st.lists(
        st.lists(
            st.tuples(
                st.lists(st.integers(5, 9), min_size=1, max_size=90).map(tuple), st.floats(-MAX_WEIGHT, MAX_WEIGHT)
            ),
            max_size=200,
        ),
        min_size=1,
        max_size=4,
    )
)
def test_chunks_hold_every_token_in_order(sections: list[list[Word]]) -> None:
    chunks = split_into_chunks(sections, SIZE, COMMA)
    assert max(lengths(chunks)) <= SIZE
    tokens = [(token, weight) for section in sections for ids, weight in section for token in ids]
    assert [pair for chunk in chunks for pair in zip(chunk.ids, chunk.weights, strict=True)] == tokens
