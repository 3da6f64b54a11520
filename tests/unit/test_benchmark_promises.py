"""The arithmetic and the verdicts of `benchmarks.promises`, against numbers and answers that are made up."""

import base64
import dataclasses
import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from benchmarks import soak
from benchmarks.bad_requests import BadRequest
from benchmarks.cases import EVENTS, JSON, PNG, Case
from benchmarks.connections import Connections, connections_verdicts
from benchmarks.exchange import ANSWERED_TWICE, Exchange, Wire
from benchmarks.flatness import growth, theil_sen
from benchmarks.load import GOOD, NO_ANSWER, WRONG_PICTURE
from benchmarks.mixed import HUNG_UP, WRONG_REFUSAL, Outcome, refusal_of
from benchmarks.overload import Overload, overload_verdicts
from benchmarks.paced import OVERLOADED, Load, Sent, served_per_second, working_seconds
from benchmarks.references import Known, Painted, Picture, judged, least_distance, painted_in
from benchmarks.soak import BOUNDS, Look, Soak, soak_verdicts
from benchmarks.traffic import Job
from benchmarks.verdicts import Verdict, all_hold, at_least, at_most, equals, verdict_table

SIZE = 8

# --- slopes --------------------------------------------------------------------------


@given(st.floats(-100, 100), st.floats(-1e3, 1e3), st.lists(st.integers(0, 1000), min_size=2, max_size=30, unique=True))
def test_slope_of_a_line_is_its_own(slope: float, start: float, xs: list[int]) -> None:
    """Whatever the places and their order."""
    assert theil_sen(xs, [start + slope * x for x in xs]) == pytest.approx(slope, abs=1e-6)


def test_slope_is_not_moved_by_a_few_outliers() -> None:
    """A quarter of the values may be anything."""
    xs = list(range(12))
    ys = [5.0 + 2 * x for x in xs]
    ys[1], ys[6], ys[10] = 1e6, -1e6, 1e6
    assert theil_sen(xs, ys) == pytest.approx(2.0, abs=0.5)


@pytest.mark.parametrize(("xs", "ys"), [([], []), ([1.0], [1.0]), ([1.0, 1.0], [1.0, 2.0]), ([1.0, 2.0], [1.0])])
def test_slope_needs_two_places(xs: list[float], ys: list[float]) -> None:
    """Without two places there is no slope, rather than one of zero."""
    with pytest.raises(ValueError, match="slope needs"):
        theil_sen(xs, ys)


def test_growth_looks_at_the_second_half_and_counts_by_thousands() -> None:
    """What fills up in the beginning is no leak; one object a request is a thousand for each thousand."""
    xs = [float(x) for x in range(0, 1200, 100)]
    filling = growth(xs, [min(x, 500.0) for x in xs], bound=2.0)
    assert (filling.slope, filling.is_flat) == (0.0, True)
    leaking = growth(xs, xs, bound=2.0)
    assert leaking.slope == pytest.approx(1000.0)
    assert (leaking.first, leaking.last, leaking.is_flat) == (600.0, 1100.0, False)
    assert growth(xs, [-x for x in xs], bound=2.0).is_flat


def test_growth_at_its_bound_is_flat_and_beyond_it_is_not() -> None:
    """The bound decides, and nothing else."""
    xs = [float(x) for x in range(0, 8000, 1000)]
    assert growth(xs, [2.0 * x / 1000 for x in xs], bound=2.0).is_flat
    assert not growth(xs, [2.1 * x / 1000 for x in xs], bound=2.0).is_flat


def test_growth_of_too_few_samples_is_no_growth_at_all() -> None:
    """Three points in the second half could say anything: that is an error, not a promise kept."""
    with pytest.raises(ValueError, match="too few"):
        growth([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5, bound=2.0)


# --- verdicts ------------------------------------------------------------------------


def test_verdicts_hold_at_their_bounds_and_not_beyond() -> None:
    """The bound itself is kept; nothing measured is a promise broken."""
    assert at_least("a", 0.95, 0.95).holds
    assert not at_least("a", 0.949, 0.95).holds
    assert at_most("a", 50.0, 50.0).holds
    assert not at_most("a", 50.1, 50.0).holds
    assert equals("a", 3, 3).holds
    assert not equals("a", 2, 3).holds
    assert not at_least("a", None, 0.0).holds
    assert not at_most("a", None, 1e9).holds


def test_a_run_without_verdicts_keeps_no_promise() -> None:
    """Neither does one with a single broken one; the table shows which."""
    kept, broken = Verdict("kept", "1", "1", holds=True), Verdict("broken", "1", "2", holds=False)
    assert not all_hold([])
    assert all_hold([kept])
    assert not all_hold([kept, broken])
    lines = verdict_table([kept, broken]).splitlines()
    assert lines[2:] == ["| kept | 1 | 1 | yes |", "| broken | 1 | 2 | **NO** |"]


# --- rates ---------------------------------------------------------------------------


def sent(outcome: str = GOOD, *, ended: float = 1.0, worked: float = 1.0, **changes: Any) -> Sent:
    """A request, painted after a second."""
    usual = Sent(
        due_seconds=0.0,
        started_seconds=0.0,
        ended_seconds=ended,
        after_sending_seconds=0.01,
        working_seconds=worked,
        outcome=outcome,
        status={GOOD: 200, OVERLOADED: 429, WRONG_PICTURE: 200, NO_ANSWER: None}.get(outcome, 500),
        has_retry_after=outcome == OVERLOADED,
        num_steps=6,
        fault=None if outcome == GOOD else outcome,
    )
    return dataclasses.replace(usual, **changes)


@pytest.mark.parametrize("window", [7.0, 7.3, 7.6, 7.99])
def test_rate_does_not_depend_on_where_in_a_batch_the_window_ends(window: float) -> None:
    """Four places, a second each, answers four at a time: four a second, wherever the sending ends."""
    answers = [sent(ended=float(second)) for second in range(1, 10) for _ in range(4)]
    assert served_per_second(answers, window, 9.0) == pytest.approx(4.0)


def test_waiting_is_no_work() -> None:
    """Refused requests do not count, and neither does time in the queue, however long."""
    answers = [sent(ended=float(second), started_seconds=-100.0) for second in range(1, 10)]
    refused = [sent(OVERLOADED, ended=3.0, worked=0.0)] * 50
    assert served_per_second([*answers, *refused], 8.0, 9.0) == pytest.approx(1.0)


def test_server_timing_is_summed_without_waiting() -> None:
    """Queue and total are no stages of work; milliseconds are seconds then."""
    header = "queue;dur=5000.0, prepare;dur=100.0, denoise;dur=400.0, decode;dur=50, render;dur=25.5, total;dur=5600.0"
    assert working_seconds(header) == pytest.approx(0.5755)
    assert working_seconds("") == 0.0


# --- overload ------------------------------------------------------------------------


def load(*, num_refused: int = 0, extra: tuple[Sent, ...] = ()) -> Load:
    """Two requests a second for ten seconds, and some that were refused."""
    good = tuple(sent(ended=float(second)) for second in range(1, 11) for _ in range(2))
    return Load(good + (sent(OVERLOADED, worked=0.0),) * num_refused + extra, 10.0, 10.0)


def overload(**changes: Any) -> Overload:
    """One in which all promises are kept."""
    kept = Overload((load(), load()), 10.0, load(num_refused=80), (0.01,) * 100)
    return dataclasses.replace(kept, **changes)


def broken(verdicts: list[Verdict]) -> list[str]:
    return [verdict.promise for verdict in verdicts if not verdict.holds]


def test_overload_that_keeps_all_promises() -> None:
    assert broken(overload_verdicts(overload())) == []


SLOW_429 = sent(OVERLOADED, worked=0.0, after_sending_seconds=0.5)


@pytest.mark.parametrize(
    ("changes", "promise"),
    [
        ({"capacity": (load(), dataclasses.replace(load(), sent=load().sent * 2))}, "goodput at 5x capacity"),
        ({"overload": load(num_refused=9, extra=(sent("500 internal"),))}, "answers of 5xx"),
        ({"overload": load(num_refused=9, extra=(sent(NO_ANSWER),))}, "requests answered, of those sent"),
        ({"overload": load(num_refused=9, extra=(sent(WRONG_PICTURE),))}, "wrong pictures"),
        ({"overload": load(num_refused=9, extra=(SLOW_429,))}, "429, p99"),
        ({"overload": load(num_refused=0)}, "429, p99"),
        (
            {"overload": load(num_refused=9, extra=(dataclasses.replace(SLOW_429, has_retry_after=False),))},
            "429 without Retry-After",
        ),
        ({"health_seconds": (0.01,) * 90 + (0.2,) * 10}, "/healthz, p99"),
        ({"health_seconds": (0.01,) * 99 + (None,)}, "/healthz without a good answer"),
    ],
)
def test_overload_that_breaks_a_promise(changes: dict[str, Any], promise: str) -> None:
    """Each promise has a verdict that can fail."""
    assert any(one.startswith(promise) for one in broken(overload_verdicts(overload(**changes))))


# --- connections ---------------------------------------------------------------------

CROWD = Connections((load(),) * 2, (load(),) * 2, (500, 500), {"head": 9, "body": 9, "reading": 9}, 500)


def test_connections_that_keep_all_promises() -> None:
    assert broken(connections_verdicts(CROWD)) == []


@pytest.mark.parametrize(
    ("changes", "promise"),
    [
        ({"alone": (dataclasses.replace(load(), sent=load().sent * 2),) * 2}, "goodput beside"),
        ({"alone": (Load((), 10.0, 10.0),) * 2}, "goodput beside"),
        ({"crowded": (load(extra=(sent(NO_ANSWER),)), load())}, "requests answered"),
        ({"crowded": (load(num_refused=1), load())}, "answers other than a right picture"),
        ({"num_idle_alive": (500, 499)}, "idle connections"),
        ({"num_slow_bytes": {"head": 9, "body": 0, "reading": 9}}, "kinds of slow connections"),
    ],
)
def test_connections_that_break_a_promise(changes: dict[str, Any], promise: str) -> None:
    """Each promise has a verdict that can fail."""
    assert any(one.startswith(promise) for one in broken(connections_verdicts(dataclasses.replace(CROWD, **changes))))


# --- soak ----------------------------------------------------------------------------


def outcome(kind: str = GOOD, status: int | None = 200, fault: str | None = None) -> Outcome:
    return Outcome("plain", kind, status, "req_1", 0.1, fault)


def looks(**leaks: float) -> tuple[Look, ...]:
    """Twelve looks, 100 requests apart; each leak is so many for each request."""
    names = {name: name.replace(": ", "_").replace(", MiB", "") for name in BOUNDS}
    return tuple(
        Look(number, {name: 50.0 + number * leaks.get(short, 0.0) for name, short in names.items()})
        for number in range(100, 1300, 100)
    )


ALL_LEAK = looks(API_memory=0.06, API_descriptors=1.0, API_tasks=1.0)


def soaked(found: tuple[Look, ...] = looks(), *more: Outcome) -> Soak:
    return Soak((outcome(), outcome(HUNG_UP, None), *more), found, 60.0)


def test_soak_that_keeps_all_promises() -> None:
    assert broken(soak_verdicts(soaked(), soaked(ALL_LEAK))) == []


@pytest.mark.parametrize("name", BOUNDS)
def test_soak_that_leaks(name: str) -> None:
    """One of anything for each hundred requests is found, in each process."""
    short = name.replace(": ", "_").replace(", MiB", "")
    assert broken(soak_verdicts(soaked(looks(**{short: 0.01})), soaked(ALL_LEAK))) == [
        f"{name}: growth for 1000 requests"
    ]


@pytest.mark.parametrize("blind", soak.LEAKED)
def test_a_control_whose_leaks_are_not_found_fails_the_run(blind: str) -> None:
    """A check that does not see a leak proves nothing."""
    control = tuple(dataclasses.replace(look, values={**look.values, blind: 50.0}) for look in ALL_LEAK)
    assert broken(soak_verdicts(soaked(), soaked(control))) == [f"leaking control, {blind}: found"]


@pytest.mark.parametrize(
    ("bad", "promise"),
    [
        (outcome(NO_ANSWER, None, "timeout"), "requests answered exactly once"),
        (outcome(WRONG_PICTURE, 200, "wrong"), "wrong pictures and wrong refusals"),
        (outcome(WRONG_REFUSAL, 400, "wrong"), "wrong pictures and wrong refusals"),
        (outcome("500 internal", 500, "500 internal"), "answers of 5xx"),
        (outcome("429 overloaded", 429, "429 overloaded"), "unexpected answers"),
    ],
)
def test_soak_with_an_answer_that_is_not_due(bad: Outcome, promise: str) -> None:
    """Each kind of wrong answer breaks its promise."""
    assert any(one.startswith(promise) for one in broken(soak_verdicts(soaked(looks(), bad), soaked(ALL_LEAK))))


# --- answers -------------------------------------------------------------------------


def png(pixels: Picture) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


UPLOAD = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
MASK = np.zeros((SIZE, SIZE), np.uint8)
MASK[2:6, 2:6] = 255


def painted(level: int) -> Picture:
    """The upload with its masked part in one grey."""
    return np.where(MASK[..., None] > 0, np.uint8(level), UPLOAD)


def case(accept: str = PNG, count: int = 1) -> Case:
    fields = {"prompt": "a", "seed": "7", "num_images_per_prompt": str(count)}
    return Case("a case", Job(fields, png(UPLOAD), png(MASK), SIZE, 3), accept)


REFERENCE = Painted((painted(100),), (False,), (7,))
HEADERS = {"x-seed": "7", "x-nsfw-content-detected": "false", "x-request-id": "req_1"}


def answered(body: bytes, status: int = 200, fault: str | None = None, **headers: str) -> Exchange:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Exchange(status, HEADERS | named, body, 0.0, 0.5, 1.0, fault)


def test_an_answer_within_the_tolerance_is_good() -> None:
    """Two of 255 is what batches change; the answer's own time counts from the request's last byte."""
    answer = answered(png(painted(102)))
    assert judged(case(), REFERENCE, answer).outcome == GOOD
    assert answer.seconds_after_sending == 0.5


def with_pixel(place: tuple[int, int], level: int) -> Picture:
    picture = painted(100)
    picture[place] = level
    return picture


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (answered(png(painted(103))), "3 of 255"),
        (answered(png(with_pixel((0, 0), int(UPLOAD[0, 0, 0]) ^ 1))), "outside the mask"),
        (answered(png(painted(100)), x_seed="8"), "seeds"),
        (answered(png(painted(100)), x_nsfw_content_detected="true"), "flags"),
        (answered(png(painted(100)[:4])), "image 0 is (4, 8, 3)"),
        (answered(b"no picture"), "cannot be read"),
        (answered(png(painted(100)), x_nsfw_content_detected="maybe"), "cannot be read"),
    ],
)
def test_a_wrong_answer_is_found(answer: Exchange, says: str) -> None:
    """A pixel, the seed, the flag, the size or the format: each is looked at."""
    finding = judged(case(), REFERENCE, answer)
    assert finding.outcome == WRONG_PICTURE
    assert says in (finding.fault or "")


def test_a_flagged_picture_is_black_in_all() -> None:
    """With the flag that it had alone, and nothing of the upload shown."""
    reference = Painted((np.zeros_like(UPLOAD),), (True,), (7,))
    black, shown = png(np.zeros_like(UPLOAD)), png(painted(0))
    assert judged(case(), reference, answered(black, x_nsfw_content_detected="true")).outcome == GOOD
    assert judged(case(), reference, answered(shown, x_nsfw_content_detected="true")).outcome == WRONG_PICTURE


def document(*levels: int) -> dict[str, Any]:
    return {
        "images": [
            {
                "b64_json": base64.b64encode(png(painted(level))).decode(),
                "seed": 7 + index,
                "nsfw_content_detected": False,
            }
            for index, level in enumerate(levels)
        ]
    }


def test_images_of_one_answer_are_told_apart() -> None:
    """Each is compared with its own reference: swapped ones are wrong."""
    reference = Painted((painted(100), painted(150)), (False, False), (7, 8))
    two = case(JSON, count=2)
    assert judged(two, reference, answered(json.dumps(document(100, 150)).encode())).outcome == GOOD
    assert judged(two, reference, answered(json.dumps(document(150, 100)).encode())).outcome == WRONG_PICTURE


def stream(*events: tuple[str, Any]) -> bytes:
    return "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events).encode()


def test_an_event_stream_has_exactly_one_end() -> None:
    """Its last event is the answer; none, two, or one before the last are not good."""
    queued, end = ("queued", {"position": 0}), ("completed", document(100))
    assert judged(case(EVENTS), REFERENCE, answered(stream(queued, end))).outcome == GOOD
    assert painted_in(case(EVENTS), answered(b": waiting\n\n" + stream(queued, end))).seeds == (7,)
    for wrong in ([queued], [queued, end, end], [end, queued]):
        finding = judged(case(EVENTS), REFERENCE, answered(stream(*wrong)))
        assert finding.outcome.startswith("200 events that end with")
        assert finding.fault is not None


def test_a_stream_that_fails_counts_under_its_own_status() -> None:
    """It began with 200, and is a 503 all the same."""
    failed = stream(("queued", {"position": 0}), ("failed", {"status": 503, "code": "worker_lost"}))
    finding = judged(case(EVENTS), REFERENCE, answered(failed))
    assert (finding.outcome, finding.status) == ("503 worker_lost", 503)


def test_no_answer_and_two_are_no_answer() -> None:
    """Exactly one counts."""
    assert judged(case(), REFERENCE, Exchange(None, {}, b"", 0.0, None, 1.0, "timeout")).outcome == NO_ANSWER
    twice = answered(png(painted(100)), fault=f"{ANSWERED_TWICE}: 10 bytes after the answer")
    assert judged(case(), REFERENCE, twice).outcome == NO_ANSWER


def test_least_distance_is_of_the_two_most_alike() -> None:
    """Only pictures of one size are compared, and black ones, which are all alike, are not."""
    assert least_distance([painted(100), painted(105), painted(200)]) == 5
    assert least_distance([painted(100), painted(100)[:4]]) is None
    assert least_distance([np.zeros_like(UPLOAD)] * 2) is None
    known = Known((case(),) * 2, (REFERENCE, Painted((painted(109),), (False,), (8,))))
    assert known.least_distance == 9


def test_a_bad_request_must_be_refused_as_it_is_due() -> None:
    """With its own status and code, or, where that is no fault, for want of room."""
    bad = BadRequest("a GIF", Wire(b""), 415, "unsupported_media")
    due = answered(b'{"code": "unsupported_media"}', 415)
    full = answered(b'{"code": "overloaded"}', 429)
    assert refusal_of(bad, due) == ("415 unsupported_media", None)
    assert refusal_of(bad, full)[0] == WRONG_REFUSAL
    assert refusal_of(bad, full, frozenset({OVERLOADED})) == (OVERLOADED, None)
    assert refusal_of(bad, answered(png(painted(1))))[0] == WRONG_REFUSAL
    assert refusal_of(bad, Exchange(None, {}, b"", 0.0, None, 1.0, "timeout"))[0] == NO_ANSWER
