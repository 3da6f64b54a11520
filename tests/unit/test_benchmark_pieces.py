"""What is measured, at which rates, in which order, and what a time allows."""

import pytest

from benchmarks.pieces import (
    COMPILED,
    FULL,
    MAIN,
    OWN_SHARES,
    PEERS,
    SERVICE,
    STATIC,
    STOCK,
    TINY,
    Budget,
    Plan,
    burst_pieces,
    closed_pieces,
    own_rate_pieces,
    same_rate_pieces,
)

CAPACITIES = {SERVICE: 10.0, STATIC: 8.0, STOCK: 2.0}


def test_servers_are_compared_kind_by_kind() -> None:
    """When time runs out, what was measured was measured of all of the first servers."""
    pieces = closed_pieces(FULL, MAIN)
    assert [piece.server for piece in pieces] == [*MAIN] * 4
    assert [piece.kind for piece in pieces] == ["alone"] * 6 + ["saturated"] * 6


def test_only_as_many_clients_as_keep_a_server_busy() -> None:
    """Servers behind a lock get few clients; one that is asked alone gets one."""
    clients = {(piece.server, piece.kind): piece.clients for piece in closed_pieces(FULL, (*MAIN, COMPILED))}
    assert clients[SERVICE, "saturated"] == clients[STATIC, "saturated"] == 32
    assert clients[STOCK, "saturated"] == clients[COMPILED, "saturated"] == 4
    assert clients[SERVICE, "alone"] == 1


def test_one_rate_for_all_that_can_keep_up() -> None:
    """The rate is a share of the static server's capacity; servers that it overloads are left out."""
    pieces = same_rate_pieces(FULL, CAPACITIES, 0.8, 24.0)
    assert {piece.server: piece.rate for piece in pieces} == {SERVICE: pytest.approx(6.4), STATIC: pytest.approx(6.4)}
    assert all(piece.share_of == STATIC and piece.seconds == 24.0 for piece in pieces)


def test_no_common_rate_without_the_static_server() -> None:
    """Without its capacity there is nothing to take a share of."""
    assert same_rate_pieces(FULL, {SERVICE: 10.0}, 0.8, 24.0) == []


def test_each_server_at_shares_of_its_own_capacity() -> None:
    """Every share of every server once; a capacity of nothing gives no rate."""
    pieces = own_rate_pieces(FULL, CAPACITIES | {COMPILED: 0.0})
    assert {(piece.server, piece.share): piece.rate for piece in pieces} == {
        (server, share): pytest.approx(share * capacity)
        for server, capacity in CAPACITIES.items()
        for share in OWN_SHARES
    }


def test_bursts_are_the_same_for_all() -> None:
    """The background is a share of the slowest server's capacity, so that no burst meets an overload."""
    pieces = burst_pieces(FULL, CAPACITIES)
    assert {piece.server: piece.rate for piece in pieces} == dict.fromkeys(CAPACITIES, pytest.approx(0.4))
    assert burst_pieces(FULL, {}) == []


def test_titles_say_rate_and_share() -> None:
    """A row of a table is understood without the code."""
    title = same_rate_pieces(FULL, CAPACITIES, 0.8, 24.0)[0].title
    assert title == "Poisson, 6.40/s (80% of static micro-batching), 10 to 30 steps"
    assert closed_pieces(FULL, [SERVICE])[0].title == "one client, 20 steps"


def test_a_piece_must_end_in_time_with_its_last_answers() -> None:
    """A piece is begun only if its sending and the answers after it fit what is left."""
    now = 100.0
    budget = Budget(20.0, clock=lambda: now)
    piece = closed_pieces(FULL, [SERVICE])[0]
    needed = piece.seconds + FULL.tail_seconds
    now = 120.0 - needed
    assert budget.allows(piece, FULL)
    now += 0.1
    assert not budget.allows(piece, FULL)
    now = 500.0
    assert budget.left_seconds() == 0.0


@pytest.mark.parametrize("plan", [FULL, TINY])
def test_mixed_steps_weigh_what_equal_steps_do(plan: Plan) -> None:
    """The mean of the mixed steps is the number of the equal ones, so that both capacities can be compared."""
    assert sum(plan.mixed_steps) == 2 * plan.steps


def test_the_main_comparison_fits_the_time_of_the_full_run() -> None:
    """After four minutes of starts, alone, saturated, one rate and bursts of the first three still fit."""
    pieces = closed_pieces(FULL, MAIN) + same_rate_pieces(FULL, CAPACITIES, 0.8, FULL.same_rate_seconds)
    assert sum(piece.seconds + FULL.tail_seconds for piece in pieces + burst_pieces(FULL, CAPACITIES)) <= 560 - 240
    assert set(MAIN) - {SERVICE} <= set(PEERS)
