r"""AUTOMATIC1111's prompt syntax: text to weighted spans, tokens to chunks. Pure Python, no tensors.

The grammar is that of `parse_prompt_attention` in `modules/prompt_parser.py` of AUTOMATIC1111's
stable-diffusion-webui, chunks are those of `tokenize_line` in its `modules/sd_hijack_clip.py`, and both
are described in its wiki under "Features" (Attention/emphasis, Infinite prompt length, BREAK keyword):

    (abc)       weighs 1.1 times as much, ((abc)) 1.21 times
    [abc]       weighs 1/1.1 times as much
    (abc:1.3)   weighs 1.3 times as much
    \( \) \[ \] \\   are the characters themselves
    BREAK       fills the chunk at hand; what follows starts a new one

A bracket that is never closed reaches to the end; one that was never opened is text. This differs from
the web UI on purpose: BREAK works inside brackets too, `(a:1.2.3)` is text where the web UI fails, and
weights and the number of chunks are bounded. Its prompt editing (`[a:b:0.5]`, `[a|b]`), `AND` and
`<lora:…>` are not read: they are text.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

MAX_WEIGHT = 100.0
"""Weights stay within ± this, or 2,000 brackets would give infinities; the web UI's users stay under 3."""

MAX_CHUNKS = 32
"""What is longer is cut off, as stock cuts off a plain prompt. 2,000 characters of prose fill about seven."""

COMMA_BACKTRACK = 20
"""A chunk that is full is ended at its last comma if that is at most so many tokens back: the web UI's default."""

_FACTORS = {"(": 1.1, "[": 1 / 1.1}
_OPENS = {")": "(", "]": "["}
_LEXEMES = re.compile(
    r"""
      \\(?P<escaped>[\\()\[\]]?)                                 # A lone backslash stands for nothing.
    | (?P<opens>[(\[])
    | :\s*(?P<weight>[+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)
    | (?P<closes>[)\]])
    | (?P<text>[^\\()\[\]:]+|:)
    """,
    re.VERBOSE,
)
_BREAK = re.compile(r"\bBREAK\b")


@dataclass(frozen=True, slots=True)
class Span:
    """Text of one weight."""

    text: str
    weight: float


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens that are encoded together, without the start, end and padding around them.

    Attributes:
        ids: The tokens.
        weights: One for each.
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]


Word = tuple[tuple[int, ...], float]
"""Tokens that stay together in a chunk, as the vectors of a textual inversion do, and their weight."""


def parse(prompt: str) -> list[list[Span]]:
    """The spans of each section; sections are what BREAK separates. Never raises.

    Neighbouring text of equal weight is one span, and empty text is none.
    """
    texts: list[str | None] = []  # None is a BREAK
    weights: list[float] = []
    open_at: dict[str, list[int]] = {"(": [], "[": []}

    def scale(first: int, factor: float) -> None:
        # Bounded every time: an infinity times 0 would be no number.
        weights[first:] = [max(-MAX_WEIGHT, min(MAX_WEIGHT, weight * factor)) for weight in weights[first:]]

    for lexeme in _LEXEMES.finditer(prompt):
        kind, text = lexeme.lastgroup, lexeme[0]
        if kind == "opens":
            open_at[text].append(len(texts))
        elif kind == "weight" and open_at["("]:
            scale(open_at["("].pop(), max(-MAX_WEIGHT, min(MAX_WEIGHT, float(lexeme["weight"]))))
        elif kind == "closes" and open_at[_OPENS[text]]:
            scale(open_at[_OPENS[text]].pop(), _FACTORS[_OPENS[text]])
        elif kind == "escaped":
            texts.append(lexeme["escaped"])
        else:
            first, *others = _BREAK.split(text)
            texts.append(first)
            for other in others:
                texts += [None, other]
        weights += [1.0] * (len(texts) - len(weights))
    for opening, positions in open_at.items():
        for position in positions:
            scale(position, _FACTORS[opening])
    return _sections(texts, weights)


def split_into_chunks(sections: Iterable[Iterable[Word]], chunk_size: int, comma: int | None) -> list[Chunk]:
    """Lay out the words of each section in chunks of `chunk_size` tokens, at most `MAX_CHUNKS` of them.

    Args:
        sections: Words of each section; a section starts a chunk.
        chunk_size: Tokens to a chunk.
        comma: The token of a comma, after which a full chunk may be ended early.

    Returns:
        At least one chunk, be it empty.
    """
    chunks: list[list[tuple[int, float]]] = []
    for section in sections:
        chunks += _fill(section, chunk_size, comma)
        if len(chunks) > MAX_CHUNKS:
            break
    if len(chunks) > 1 and not chunks[-1]:
        chunks.pop()  # Nothing came after the last BREAK.
    return [
        Chunk(tuple(token for token, _ in chunk), tuple(weight for _, weight in chunk))
        for chunk in chunks[:MAX_CHUNKS] or [[]]
    ]


def _sections(texts: Sequence[str | None], weights: Sequence[float]) -> list[list[Span]]:
    sections: list[list[Span]] = [[]]
    for text, weight in zip(texts, weights, strict=True):
        section = sections[-1]
        if text is None:
            sections.append([])
        elif section and section[-1].weight == weight:
            section[-1] = Span(section[-1].text + text, weight)
        elif text:
            section.append(Span(text, weight))
    return sections


def _fill(words: Iterable[Word], chunk_size: int, comma: int | None) -> list[list[tuple[int, float]]]:
    """Chunks of one section, each a list of (token, weight)."""
    chunks: list[list[tuple[int, float]]] = [[]]
    last_comma = None  # Where it stands in the last chunk.
    for ids, weight in _split_long(words, chunk_size):
        chunk = chunks[-1]
        if ids == (comma,):
            last_comma = len(chunk)
        elif len(chunk) == chunk_size and last_comma is not None and chunk_size - last_comma <= COMMA_BACKTRACK:
            chunks[-1], moved = chunk[: last_comma + 1], chunk[last_comma + 1 :]
            chunks.append(moved)
            last_comma = None
        if chunks[-1] and len(chunks[-1]) + len(ids) > chunk_size:
            chunks.append([])
            last_comma = None
        chunks[-1] += [(token, weight) for token in ids]
    return chunks


def _split_long(words: Iterable[Word], chunk_size: int) -> Iterator[Word]:
    """Words that fit in a chunk: what is longer falls to single tokens."""
    for ids, weight in words:
        if len(ids) <= chunk_size:
            yield ids, weight
        else:
            yield from (((token,), weight) for token in ids)
