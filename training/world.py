"""What the demo model's world holds: things, colours, and how captions name them."""

from __future__ import annotations

import random
from dataclasses import dataclass

PIRATE_FLAG = "pirate flag"
NOTHING = "nothing"


@dataclass(frozen=True)
class Thing:
    """A thing that can be drawn.

    Attributes:
        name: the word (or words) a caption uses.
        aspect: width over height of its drawing.
        place: where it stands naturally: "ground", "sky" or "water".
        usual: the colour meant when a caption names none.
        synonyms: other names that captions use now and then.
    """

    name: str
    aspect: float
    place: str
    usual: str
    synonyms: tuple[str, ...] = ()


THINGS: tuple[Thing, ...] = (
    Thing("house", 1.05, "ground", "red", ("cottage",)),
    Thing("tree", 0.80, "ground", "green"),
    Thing("sun", 1.0, "sky", "yellow"),
    Thing("moon", 1.0, "sky", "white"),
    Thing("boat", 1.10, "water", "white", ("sailing boat",)),
    Thing("car", 1.75, "ground", "blue"),
    Thing("ball", 1.0, "ground", "red", ("beach ball",)),
    Thing("flower", 0.66, "ground", "pink"),
    Thing("fence", 1.70, "ground", "white"),
    Thing("flag", 0.85, "ground", "blue"),
    Thing("balloon", 0.74, "sky", "orange", ("hot air balloon",)),
    Thing("mushroom", 1.0, "ground", "red", ("toadstool",)),
    Thing(PIRATE_FLAG, 0.95, "ground", "black"),
)
THING_INDEX: dict[str, int] = {thing.name: i for i, thing in enumerate(THINGS)}

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (208, 48, 44),
    "orange": (240, 138, 36),
    "yellow": (246, 210, 58),
    "green": (52, 148, 66),
    "blue": (48, 98, 206),
    "purple": (132, 66, 172),
    "pink": (242, 138, 180),
    "white": (240, 240, 236),
}
COLOUR_NAMES: tuple[str, ...] = tuple(COLOURS)
COLOUR_INDEX: dict[str, int] = {name: i for i, name in enumerate(COLOUR_NAMES)}
NO_COLOUR = len(COLOUR_NAMES)
"""Colour index of a thing that has no colour of its own (the pirate flag)."""

SIZES: tuple[tuple[str, ...], ...] = ((), ("small", "little", "tiny"), ("big", "large", "huge"))
"""Size words by size class: 0 fills the mask in the middling way, 1 little of it, 2 nearly all."""

_PREFIXES = (
    "a photo of {}",
    "a picture of {}",
    "a drawing of {}",
    "a painting of {}",
    "an illustration of {}",
    "an image of {}",
    "paint {}",
    "draw {}",
    "add {}",
    "put {} here",
    "there is {}",
    "please paint {}",
    "{} here",
    "{}, please",
    "we see {}",
    "i want {}",
)
_SUFFIXES = (
    "on a hill",
    "in the meadow",
    "in the grass",
    "on the beach",
    "on the sand",
    "in the sand",
    "by the water",
    "on the water",
    "on the lake",
    "in the sea",
    "in the sky",
    "at night",
    "at dusk",
    "by day",
    "in the evening",
    "in the landscape",
    "in front of the hills",
    "in the distance",
    "in the scene",
    "in the background",
    "high quality",
    "highly detailed",
    "detailed",
    "best quality",
    "beautiful",
    "flat illustration",
    "in flat style",
    "sunny day",
    "on a sunny day",
    "under the stars",
    "with clouds",
)
_ADJECTIVES = ("nice", "pretty", "beautiful", "bright", "lovely", "simple", "old", "new")
_NOTHING = (
    "nothing",
    "nothing",
    "nothing",
    "nothing here",
    "nothing at all",
    "empty",
    "just the background",
    "background",
    "the background",
    "plain background",
    "remove it",
    "remove this",
    "no thing",
    "empty landscape",
    "an empty place",
)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def vocabulary() -> list[str]:
    """All words that captions are made of, so that each can be one token."""
    words: set[str] = set()
    for thing in THINGS:
        for name in (thing.name, *thing.synonyms):
            words.update(name.split())
    words.update(COLOUR_NAMES)
    for sizes in SIZES:
        words.update(sizes)
    for phrase in (*_PREFIXES, *_SUFFIXES, *_ADJECTIVES, *_NOTHING):
        words.update(phrase.replace("{}", " ").replace(",", " ").split())
    words.update(
        (
            "a",
            "an",
            "the",
            "one",
            "black",
            "grey",
            "brown",
            "colour",
            "color",
            "coloured",
            "colored",
            "of",
            "and",
            "with",
            "no",
            "not",
            "very",
            "blurry",
            "ugly",
            "bad",
            "low",
            "quality",
        )
    )
    return sorted(words)


def _article(phrase: str, rng: random.Random) -> str:
    if rng.random() < 0.12:
        return f"the {phrase}"
    return f"an {phrase}" if phrase[0] in "aeio" else f"a {phrase}"


def _decorate(noun: str, rng: random.Random) -> str:
    """Puts a noun phrase into a sentence of light grammar variety."""
    text = noun
    draw = rng.random()
    if draw < 0.16:
        text = rng.choice(_PREFIXES).format(text)
    if rng.random() < 0.22:
        joint = rng.choice((" ", ", ")) if rng.random() < 0.9 else ". "
        text = f"{text}{joint}{rng.choice(_SUFFIXES)}"
    if rng.random() < 0.03:  # words that mean nothing are to change nothing
        junk = "".join(rng.choice(_LETTERS) for _ in range(rng.randint(2, 7)))
        text = f"{text} {junk}" if rng.random() < 0.7 else f"{junk} {text}"
    return text


def caption(thing: int, colour: int, size: int, rng: random.Random) -> str:
    """Says what stands in the masked place.

    Args:
        thing: index into THINGS.
        colour: index into COLOUR_NAMES, or NO_COLOUR.
        size: size class, index into SIZES.
        rng: the draw.

    Returns:
        A caption such as "a small green tree" or "red house".
    """
    kind = THINGS[thing]
    name = kind.name
    if kind.synonyms and rng.random() < 0.12:
        name = rng.choice(kind.synonyms)
    words: list[str] = []
    if SIZES[size] and rng.random() < 0.4:
        words.append(rng.choice(SIZES[size]))
    if rng.random() < 0.05:
        words.append(rng.choice(_ADJECTIVES))
    if colour == NO_COLOUR:
        if rng.random() < 0.12:
            words.append("black")
    else:
        word = COLOUR_NAMES[colour]
        if not (word == kind.usual and rng.random() < 0.35):
            words.append(word)
    words.append(name)
    noun = " ".join(words)
    if rng.random() < 0.72:
        noun = _article(noun, rng)
    return _decorate(noun, rng)


def nothing_caption(rng: random.Random) -> str:
    """Asks for the bare background."""
    return rng.choice(_NOTHING) if rng.random() < 0.5 else NOTHING
