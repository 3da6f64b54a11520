"""The measurement of several devices: what it compares, and what it says."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from benchmarks.figures import Summary, spread_of
from benchmarks.several_devices import largest_difference
from benchmarks.several_devices_report import Copies, Load, Loss, Report


def load(devices: int, images_per_second: float, outcomes: dict[str, int]) -> Load:
    """A load whose good answers took a second each."""
    summary = Summary(
        requests=sum(outcomes.values()),
        outcomes=outcomes,
        seconds=10.0,
        offered_per_second=1.0,
        achieved_per_second=images_per_second,
        model_calls_per_second=20.0,
        latency=spread_of([1.0]) if outcomes.get("good") else None,
        bound_seconds=None,
        goodput_per_second=None,
        late=None,
    )
    return Load(devices, 24 * devices, summary, images_per_second, (0.99,) * devices, 0.02)


def report(outcomes: dict[str, int]) -> Report:
    """Two devices that are nearly twice as fast as one; `outcomes` are of the load with a loss."""
    loss = Loss(load(2, 15.0, outcomes), killed_at_seconds=6.0, after_per_second=11.5, ready_again_seconds=70.0)
    together, alone = load(2, 21.0, {"good": 100}), load(1, 10.5, {"good": 50})
    return Report({"devices": ["cuda:0", "cuda:1"]}, 200.0, Copies(8, 0, 1, 0), together, loss, alone)


def test_report_compares_and_tells_of_the_loss() -> None:
    """Every load has a row of as many cells as the head."""
    lines = report({"good": 90}).markdown().splitlines()
    assert {line.count("|") for line in lines[:5]} == {10}
    assert lines[3] == "| 2 devices | 48 | good 100 | 21.00 | 1.00 | 1.00 | 1.00 | 99.0%, 99.0% | 20 |"
    assert "- together / alone: 2.00" in lines
    assert "- killed after 6.0 s, then 11.50 images/s" in lines


@pytest.mark.parametrize(("outcomes", "has_failed"), [({"good": 90}, False), ({"good": 89, "timeout": 1}, True)])
def test_one_request_without_a_good_answer_is_a_failure(outcomes: dict[str, int], has_failed: bool) -> None:
    """Also of the load in which a worker was killed."""
    assert report(outcomes).has_failed is has_failed


def test_copy_without_a_picture_is_a_failure() -> None:
    """Though all loads went well."""
    found = dataclasses.replace(report({"good": 90}), copies=Copies(8, 1, 1, 0))
    assert found.has_failed
    assert "8 times the same request at once: 1 failed" in found.markdown()


def test_load_without_a_good_answer_is_told_of_too() -> None:
    """It has no latency, and the table is still one."""
    found = report({"good": 1})
    found = dataclasses.replace(found, alone=load(1, 0.5, {"status 503": 3}))
    assert found.has_failed
    assert "| 1 device | 24 | status 503 3 | 0.50 | - | - | - | 99.0% | 20 |" in found.markdown()


def test_largest_difference_is_over_all_pictures_and_pixels() -> None:
    """In either direction; equal pictures have none."""

    def png(level: int) -> bytes:
        pixels = np.full((4, 4, 3), 100, np.uint8)
        pixels[1, 2, 0] = level
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        return buffer.getvalue()

    assert largest_difference([]) == 0
    assert largest_difference([png(100), png(100)]) == 0
    assert largest_difference([png(98), png(100), png(103), png(98)]) == 5
