"""Which requests run, which are repetitions, and what remembering them takes."""

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.kept_answers import ENTRY_BYTES, Answer, Claim, KeptAnswers
from service.errors import ErrorCode, InpaintError
from tests.unit.clock import Clock

ROOM_BYTES = 3 * (1000 + ENTRY_BYTES)
"""For three answers of 1,000 bytes."""


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def answers(clock: Clock) -> KeptAnswers:
    return KeptAnswers(ROOM_BYTES, 60.0, clock)


def answer(body: bytes = b"x" * 1000) -> Answer:
    return Answer("req_1", "image/png", {"X-Seed": "7"}, body)


def claim(answers: KeptAnswers, name: bytes, digest: bytes = b"digest") -> Claim:
    """Begin a request that is the first with its name."""
    found = answers.begin(name, digest)
    assert isinstance(found, Claim)
    return found


def keep(answers: KeptAnswers, name: bytes, body: bytes = b"x" * 1000) -> Answer:
    """Have a request run and answered."""
    given_answer = answer(body)
    held = claim(answers, name)
    held.keep(given_answer)
    held.release()
    return given_answer


def refusal(answers: KeptAnswers, name: bytes, digest: bytes = b"digest") -> InpaintError:
    with pytest.raises(InpaintError) as raised:
        answers.begin(name, digest)
    return raised.value


def test_a_repetition_gets_the_first_answer(answers: KeptAnswers) -> None:
    """Once a request was answered, the same one gets the very same bytes, as often as it comes."""
    first = keep(answers, b"a")

    assert answers.begin(b"a", b"digest") is first
    assert answers.begin(b"a", b"digest") is first
    assert isinstance(answers.begin(b"b", b"digest"), Claim)


def test_another_body_is_refused_while_it_runs_and_after(answers: KeptAnswers) -> None:
    """A name stands for one body; that is said before whether it still runs."""
    held = claim(answers, b"a")
    assert refusal(answers, b"a", b"other").code == ErrorCode.KEY_REUSE

    held.keep(answer())

    assert refusal(answers, b"a", b"other").code == ErrorCode.KEY_REUSE


def test_a_running_request_is_in_progress_for_as_long_as_it_has_run(answers: KeptAnswers, clock: Clock) -> None:
    """A repetition is told to come back; later the longer it has taken, within a bound."""
    claim(answers, b"a")
    waits = []
    for age in (0.0, 5.0, 1000.0):
        clock.now = 100.0 + age
        error = refusal(answers, b"a")
        assert error.code == ErrorCode.IN_PROGRESS
        waits.append(error.retry_after_seconds)

    assert waits == [0.0, 5.0, 30.0]


def test_without_an_answer_the_name_is_free(answers: KeptAnswers) -> None:
    """A request that failed leaves nothing: the next one runs, with whatever body."""
    held = claim(answers, b"a")
    held.release()
    held.release()

    assert not answers.is_known(b"a")
    assert (answers.num_claimed, answers.num_kept, answers.num_bytes) == (0, 0, 0)
    claim(answers, b"a", b"other")


def test_a_released_claim_has_no_power_over_the_next(answers: KeptAnswers) -> None:
    """A claim that has ended neither ends another of the same name nor answers for it."""
    old = claim(answers, b"a")
    old.release()
    claim(answers, b"a", b"other")

    old.keep(answer())
    old.release()

    assert answers.num_kept == 0
    assert refusal(answers, b"a", b"other").code == ErrorCode.IN_PROGRESS


def test_answers_expire_and_claims_do_not(answers: KeptAnswers, clock: Clock) -> None:
    """An answer is forgotten after its time, counted from when it was there; what runs is never forgotten."""
    held = claim(answers, b"slow")
    clock.now = 150.0
    keep(answers, b"a")

    clock.now = 209.9
    assert answers.is_known(b"a")
    clock.now = 210.0
    assert not answers.is_known(b"a")
    assert (answers.num_kept, answers.num_bytes) == (0, 0)
    assert refusal(answers, b"slow").code == ErrorCode.IN_PROGRESS
    held.keep(answer())
    assert answers.is_known(b"slow")


def test_expired_answers_are_dropped_without_a_request(answers: KeptAnswers, clock: Clock) -> None:
    """A sweep alone frees the memory, of the old ones only."""
    keep(answers, b"old")
    clock.now = 140.0
    keep(answers, b"new")
    clock.now = 170.0

    answers.drop_expired()

    assert (answers.num_kept, answers.num_bytes) == (1, 1000 + ENTRY_BYTES)
    assert answers.is_known(b"new")


def test_the_oldest_make_room(answers: KeptAnswers) -> None:
    """Where the memory is full, the oldest answers go first, and only as many as it takes."""
    for name in (b"a", b"b", b"c", b"d"):
        keep(answers, name)

    assert [answers.is_known(name) for name in (b"a", b"b", b"c", b"d")] == [False, True, True, True]
    assert answers.num_bytes == ROOM_BYTES


def test_what_can_never_fit_is_not_kept_and_drives_nobody_out(answers: KeptAnswers) -> None:
    """An answer larger than all the room leaves the others alone; its name is free."""
    keep(answers, b"a")
    keep(answers, b"huge", b"x" * ROOM_BYTES)

    assert answers.is_known(b"a")
    assert not answers.is_known(b"huge")


def test_no_room_keeps_nothing_but_still_guards_what_runs() -> None:
    """With a memory of 0 every request runs, though not twice at once."""
    answers = KeptAnswers(0, 60.0)
    held = claim(answers, b"a")
    assert refusal(answers, b"a").code == ErrorCode.IN_PROGRESS
    held.keep(answer(b""))
    claim(answers, b"a")


def test_small_answers_are_counted_with_all_that_keeps_them() -> None:
    """However small the answers, the process grows by no more than is counted for them."""
    answers = KeptAnswers(100_000_000, 60.0)

    def keep_one(number: int) -> None:
        held = answers.begin(number.to_bytes(32, "big"), number.to_bytes(32, "little"))
        assert isinstance(held, Claim)
        # As large as they come: a client's own id has up to 128 characters.
        stages = ", ".join(f"stage{stage};dur={number * 1000 + stage}.0" for stage in range(7))
        headers = {"X-Seed": str(number), "X-NSFW-Content-Detected": "false", "Server-Timing": stages}
        held.keep(Answer(f"{number:0128}", "image/png", headers, b"%d" % number))

    keep_one(0)
    tracemalloc.start()
    try:
        for number in range(1, 2000):
            keep_one(number)
        grown = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()

    assert grown <= answers.num_bytes
    assert answers.num_bytes <= 3 * grown


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["begin", "keep", "release", "wait", "sweep"]),
            st.integers(0, 5),
            st.integers(0, 2 * (1000 + ENTRY_BYTES)),
        ),
        max_size=60,
    )
)
def test_whatever_happens_the_books_are_right(events: list[tuple[str, int, int]]) -> None:
    """In any order of events: memory is what is kept and within its bound, and what runs stays claimed."""
    clock = Clock()
    answers = KeptAnswers(ROOM_BYTES, 60.0, clock)
    running: dict[int, Claim] = {}
    for kind, number, size in events:
        if kind == "begin" and number not in running:
            found = answers.begin(bytes([number]), b"digest")
            if isinstance(found, Claim):
                running[number] = found
        elif kind == "keep" and number in running:
            running.pop(number).keep(answer(b"x" * size))
        elif kind == "release" and number in running:
            running.pop(number).release()
        elif kind == "wait":
            clock.now += size / 100
        else:
            answers.drop_expired()
        assert answers.num_bytes == sum(kept.answer.num_bytes for kept in answers._kept.values()) <= ROOM_BYTES
        assert answers.num_claimed == len(running)
        assert all(refusal(answers, bytes([one])).code == ErrorCode.IN_PROGRESS for one in running)


def test_an_early_answer_is_given_while_the_request_still_runs_and_after(answers: KeptAnswers, clock: Clock) -> None:
    """A request that was answered before it ended is repeated by that answer, however long it runs, and then kept."""
    early = answer()
    held = claim(answers, b"a")
    held.early = early
    clock.now = 1000.0

    assert answers.begin(b"a", b"digest") is early
    assert refusal(answers, b"a", b"other").code == ErrorCode.KEY_REUSE
    assert answers.num_kept == 0

    held.keep(early)
    held.release()
    clock.now = 1059.9
    assert answers.begin(b"a", b"digest") is early
    clock.now = 1060.0
    assert not answers.is_known(b"a")
