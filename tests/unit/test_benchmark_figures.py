"""From answers to figures: goodput, rates, outcomes, the steady part of a closed loop."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.figures import goodput, rate_within, spread_of, steady_rates, summary_of
from benchmarks.load import GOOD, TIMEOUT, Answer, Round


def answer(due: float, latency: float, outcome: str = GOOD, num_steps: int = 20) -> Answer:
    """An answer to a request that was sent 1 ms late."""
    return Answer(due, 0.001, latency, num_steps, outcome, None if outcome == GOOD else outcome)


def test_goodput_counts_answers_within_the_bound() -> None:
    """The bound itself still counts; what is slower does not, however good."""
    assert goodput([0.5, 1.0, 1.1, 3.0], bound_seconds=1.0, window_seconds=4.0) == 0.5
    assert goodput([], 1.0, 4.0) == 0.0


def test_rates_are_over_their_own_time() -> None:
    """Offered and goodput are over the window of sending, achieved up to the last answer."""
    answers = (answer(0, 1), answer(1, 9), answer(2, 0.1, "status 429"), answer(3, 5, TIMEOUT))
    summary = summary_of(Round(answers, seconds=10.0, sending_seconds=4.0, is_cut_short=False), bound_seconds=2.0)
    assert summary.offered_per_second == 1.0
    assert summary.achieved_per_second == 0.2
    assert summary.model_calls_per_second == 4.0
    assert summary.goodput_per_second == 0.25


def test_outcomes_are_counted_apart_and_only_good_ones_have_a_latency() -> None:
    """A server that refuses fast does not look fast."""
    answers = (answer(0, 4), answer(1, 0.1, "status 429"), answer(1, 0.1, "status 429"), answer(2, 60, TIMEOUT))
    summary = summary_of(Round(answers, 60.0, 4.0, is_cut_short=False))
    assert summary.outcomes == {GOOD: 1, "status 429": 2, TIMEOUT: 1}
    assert summary.latency == spread_of([4.0])
    assert summary.late is not None
    assert summary.late.max_seconds == 0.001
    assert summary.goodput_per_second is None


def test_a_round_without_a_good_answer_has_figures_too() -> None:
    """Nothing good is zero a second and no latency, not an error that ends the measurement."""
    summary = summary_of(Round((answer(0, 1, "status 503"),), 1.0, 1.0, is_cut_short=False), bound_seconds=1.0)
    assert (summary.achieved_per_second, summary.goodput_per_second, summary.latency) == (0.0, 0.0, None)


def test_rate_within_counts_good_answers_by_their_ends() -> None:
    """Those that end at its end belong to what follows."""
    answers = (answer(0, 2), answer(1, 2), answer(1, 3), answer(2, 1.5, TIMEOUT), answer(0, 1))
    one = Round(answers, 4.0, 4.0, is_cut_short=False)
    assert rate_within(one, 2.0, 4.0) == 1.0
    assert rate_within(one, 4.0, 6.0) == 0.5
    with pytest.raises(ValueError, match="length"):
        rate_within(one, 2.0, 2.0)


@pytest.mark.parametrize("first_end", [0.5, 2.0])
def test_the_steady_rate_of_clumped_answers_is_the_batch_over_its_time(first_end: float) -> None:
    """Four at once every two seconds are two a second, wherever the window begins and ends between clumps."""
    starts = [0.0, *(first_end + 2.0 * number for number in range(6))]
    lives = [first_end, *(2.0 for _ in range(6))]
    answers = tuple(answer(due, life) for due, life in zip(starts, lives, strict=True) for _ in range(4))
    one = Round(answers, seconds=first_end + 12.0, sending_seconds=first_end + 11.0, is_cut_short=True)
    requests, model_calls = steady_rates(one)
    assert requests == pytest.approx(2.0)
    assert model_calls == pytest.approx(40.0)


@given(st.integers(1, 8), st.floats(0.1, 3.0), st.integers(3, 20))
def test_the_steady_rate_is_clients_over_life(clients: int, life: float, turns: int) -> None:
    """With a constant number of clients and lives the rate is their quotient, as Little's law has it."""
    answers = tuple(answer(life * turn, life) for turn in range(turns) for _ in range(clients))
    one = Round(answers, turns * life, sending_seconds=(turns - 0.5) * life, is_cut_short=True)
    assert steady_rates(one)[0] == pytest.approx(clients / life)


def test_a_round_that_ends_before_it_is_steady_counts_as_a_whole() -> None:
    """One generation of answers, or none that is good, leaves no window to look at."""
    one = Round((answer(0, 2), answer(0, 2)), seconds=2.0, sending_seconds=1.0, is_cut_short=True)
    assert steady_rates(one) == (1.0, 20.0)
    assert steady_rates(Round((answer(0, 2, TIMEOUT),), 2.0, 1.0, is_cut_short=True)) == (0.0, 0.0)
