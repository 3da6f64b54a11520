"""What each request gave when it ran alone, and whether later answers are the same.

A later answer must be within `TOLERANCE` of its own reference, and references differ
by more than twice that: an answer that belongs to another request cannot pass.
"""

import asyncio
import base64
import binascii
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.cases import EVENTS, JSON, PNG, Case
from benchmarks.exchange import Address, Exchange, exchange
from benchmarks.load import GOOD, NO_ANSWER, WRONG_PICTURE

Picture = NDArray[np.uint8]

TOLERANCE = 2
"""Of 255: batches of other sizes change low bits of a result."""

ANSWER_SECONDS = 120.0
OK = 200


class WrongAnswerError(Exception):
    """An answer is not what was asked for; the message says how."""


@dataclass(frozen=True, slots=True, eq=False)
class Painted:
    """What an answer holds, by image.

    Attributes:
        pictures: (H, W, 3) uint8 each.
        flags: What the safety checker said.
        seeds: What each was drawn with.
    """

    pictures: tuple[Picture, ...]
    flags: tuple[bool, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """What an answer to a case counts as.

    Attributes:
        outcome: `GOOD`, `WRONG_PICTURE`, `NO_ANSWER`, or status and code such as "429 overloaded".
        status: Of the answer, also where an event stream says so; None without one.
        request_id: The service's name for the request; empty without one.
        fault: Why it is not good, None when it is.
    """

    outcome: str
    status: int | None
    request_id: str
    fault: str | None


# --- answers --------------------------------------------------------------------------


def painted_in(case: Case, answer: Exchange) -> Painted:
    """The pictures of a good answer.

    Raises:
        WrongAnswerError: There are none where they should be.
    """
    try:
        if case.accept == PNG:
            flag = {"true": True, "false": False}[answer.headers["x-nsfw-content-detected"]]
            return Painted((_decoded(answer.body),), (flag,), (int(answer.headers["x-seed"]),))
        document = json.loads(answer.body) if case.accept == JSON else dict(_events(answer.body))["completed"]
        images = document["images"]
        return Painted(
            tuple(_decoded(base64.b64decode(image["b64_json"], validate=True)) for image in images),
            tuple(image["nsfw_content_detected"] for image in images),
            tuple(image["seed"] for image in images),
        )
    except (KeyError, TypeError, ValueError, OSError, SyntaxError, binascii.Error) as error:
        raise WrongAnswerError(f"it cannot be read: {type(error).__name__}: {error}") from error


def judged(case: Case, reference: Painted | None, answer: Exchange) -> Finding:
    """What an answer counts as.

    Args:
        case: What was asked for.
        reference: What it gave alone; None only checks what can be known without.
        answer: What came.
    """
    request_id = answer.headers.get("x-request-id", "")
    if answer.fault is not None or answer.status is None:
        return Finding(NO_ANSWER, None, request_id, answer.fault or NO_ANSWER)
    problem = problem_in(case.accept, answer)
    if problem is not None:
        status, code = problem
        return Finding(f"{status} {code}", status, request_id, f"{status} {code}")
    try:
        check(case, reference, painted_in(case, answer))
    except WrongAnswerError as error:
        return Finding(WRONG_PICTURE, OK, request_id, f"{case.name}: {error}")
    return Finding(GOOD, OK, request_id, None)


def check(case: Case, reference: Painted | None, painted: Painted) -> None:
    """Seeds, flags, sizes, pixels outside the mask, and the picture itself.

    Raises:
        WrongAnswerError: One of them is wrong.
    """
    if painted.seeds != case.seeds:
        raise WrongAnswerError(f"seeds {painted.seeds} instead of {case.seeds}")
    if reference is not None and painted.flags != reference.flags:
        raise WrongAnswerError(f"flags {painted.flags} instead of {reference.flags}")
    upload, kept = _decoded(case.job.image), _decoded(case.job.mask).max(axis=2) < 128
    for index, (picture, is_flagged) in enumerate(zip(painted.pictures, painted.flags, strict=True)):
        if picture.shape != upload.shape:
            raise WrongAnswerError(f"image {index} is {picture.shape}, not {upload.shape}")
        expected = np.zeros_like(upload) if is_flagged else upload
        if num_changed := int(np.count_nonzero((picture != expected).any(axis=2) & kept)):
            raise WrongAnswerError(f"image {index}: {num_changed} pixels outside the mask are not the upload's")
        if reference is not None and (apart := distance(picture, reference.pictures[index])) > TOLERANCE:
            raise WrongAnswerError(f"image {index} is {apart} of 255 from what it was alone")


def problem_in(accept: str, answer: Exchange) -> tuple[int, str] | None:
    """Status and code of an answer that is a problem, None of one that is none.

    An event stream begins with 200 and says in its last event what became of the request.
    """
    if answer.status != OK:
        return answer.status or 0, code_in(answer)
    if accept == EVENTS:
        events = _events(answer.body)
        ends = [name for name, _ in events if name in ("completed", "failed")]
        if len(ends) != 1 or events[-1][0] != ends[0]:
            return OK, f"events that end with {ends}"
        if ends[0] == "failed":
            return int(events[-1][1]["status"]), str(events[-1][1]["code"])
    return None


def code_in(answer: Exchange) -> str:
    """The code of a problem document; "no problem document" where there is none."""
    try:
        return str(json.loads(answer.body)["code"])
    except (ValueError, KeyError, TypeError):
        return "no problem document"


def _events(body: bytes) -> list[tuple[str, Any]]:
    """Names and data of an event stream, comments left out."""
    events = []
    for block in body.decode().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":") and ": " in line)
        if lines:
            events.append((lines["event"], json.loads(lines["data"])))
    return events


def _decoded(data: bytes) -> Picture:
    with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
        return np.asarray(picture.convert("RGB"))


def distance(one: Picture, other: Picture) -> int:
    """The largest difference of a channel, of 255."""
    return int(np.abs(one.astype(np.int16) - other.astype(np.int16)).max())


# --- references -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Known:
    """Requests with their references.

    Attributes:
        cases: The requests.
        references: What each gave alone.
    """

    cases: tuple[Case, ...]
    references: tuple[Painted, ...]

    def judged(self, number: int, answer: Exchange) -> Finding:
        """What an answer to request `number` counts as."""
        return judged(self.cases[number], self.references[number], answer)

    @property
    def least_distance(self) -> int | None:
        """Of the two references of one size that are nearest to each other; None where there are no two."""
        return least_distance([picture for reference in self.references for picture in reference.pictures])


def least_distance(pictures: Iterable[Picture]) -> int | None:
    """The largest difference of a channel between the two most alike of one size; None where there are no two.

    Black pictures do not count: all that are flagged are alike.
    """
    shown = [picture for picture in pictures if picture.any()]
    apart = [distance(one, other) for one, other in combinations(shown, 2) if one.shape == other.shape]
    return min(apart, default=None)


async def take_references(address: Address, cases: Sequence[Case], headers: Mapping[str, str]) -> Known:
    """Send each request alone.

    Raises:
        WrongAnswerError: One is not answered well even so, or two of the answers cannot be told apart.
    """
    references = []
    for case in cases:
        answer = await exchange(address, case.wire(headers), ANSWER_SECONDS)
        finding = judged(case, None, answer)
        if finding.outcome != GOOD:
            raise WrongAnswerError(f"{case.name}, alone: {finding.fault}")
        references.append(painted_in(case, answer))
    known = Known(tuple(cases), tuple(references))
    least = await asyncio.to_thread(lambda: known.least_distance)
    if least is not None and least <= 2 * TOLERANCE:
        raise WrongAnswerError(f"two references are only {least} of 255 apart: answers could be mixed up unseen")
    return known
