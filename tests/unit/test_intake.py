"""From the loop to the thread that prepares: one key at a time, oldest first, nobody twice."""

from service.worker.batcher import Generation
from service.worker.intake import Intake
from tests.unit.fake_pipeline import make_request


def generation(name: str, **changes: object) -> Generation:
    return Generation(name, make_request(**changes))  # type: ignore[arg-type]


def take(intake: Intake) -> list[str]:
    return [one.request_id for one in intake.take()]


def test_all_of_the_oldest_key_are_taken_together() -> None:
    """Whatever has come for one key by the time that its turn comes is prepared at once."""
    intake = Intake()
    intake.add([generation("a"), generation("large", height=16), generation("b")])
    intake.add([generation("c")])
    assert [take(intake) for _ in range(3)] == [["a", "b", "c"], ["large"], []]


def test_discarded_are_not_prepared() -> None:
    """Nobody prepares for a client that has gone; to discard what has been taken is no error."""
    intake = Intake()
    gone, stays = generation("gone"), generation("stays")
    intake.add([gone, stays])
    intake.discard(gone)
    assert take(intake) == ["stays"]
    intake.discard(stays)
    assert take(intake) == []
