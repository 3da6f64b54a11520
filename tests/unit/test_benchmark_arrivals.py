"""When requests arrive, and what they are: bursts, traces, mixes."""

import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.arrivals import TraceError, burst_arrivals, poisson_arrivals, read_trace
from benchmarks.traffic import Mix, Wish, draw_jobs, fulfil

MIX = Mix(steps=(10, 14), sizes={32: 3.0, 64: 1.0})


def test_bursts_come_at_once_and_at_their_interval() -> None:
    """Without a background there are only bursts, each at one moment, the first after half an interval."""
    moments = burst_arrivals(size=3, interval_seconds=10.0, seconds=30.0, background_per_second=0.0, seed=1)
    assert Counter(moments) == {5.0: 3, 15.0: 3, 25.0: 3}


def test_bursts_lie_over_a_poisson_background() -> None:
    """The background is the Poisson process of the same seed; both together ascend."""
    moments = burst_arrivals(size=2, interval_seconds=4.0, seconds=9.0, background_per_second=2.0, seed=3)
    assert list(moments) == sorted(moments)
    assert sorted([2.0, 2.0, 6.0, 6.0, *poisson_arrivals(2.0, 9.0, 3)]) == list(moments)


@pytest.mark.parametrize("wrong", [{"size": 0}, {"interval_seconds": 0.0}, {"seconds": 0.0}, {"seconds": -1.0}])
def test_bursts_refuse_nonsense(wrong: dict[str, float]) -> None:
    """A size, interval or window that is not positive is an error, not an endless loop."""
    usual = {"size": 1, "interval_seconds": 1.0, "seconds": 1.0, "background_per_second": 0.0, "seed": 1}
    with pytest.raises(ValueError, match="positive"):
        burst_arrivals(**(usual | wrong))  # type: ignore[arg-type]


def test_a_trace_is_the_same_as_csv_and_as_json_lines(tmp_path: Path) -> None:
    """Both forms give moments in order; fields that are empty or not there are left to the mix."""
    table, lines = tmp_path / "trace.csv", tmp_path / "trace.jsonl"
    table.write_text("seconds,steps,size,scheduler\n2.5,,,\n0,20,64,ddim\n", encoding="utf-8")
    entries = [{"seconds": 2.5}, {"seconds": 0, "steps": 20, "size": 64, "scheduler": "ddim"}]
    lines.write_text("\n\n".join(json.dumps(entry) for entry in entries), encoding="utf-8")
    arrivals = read_trace(table)
    assert arrivals == read_trace(lines)
    assert [arrival.seconds for arrival in arrivals] == [0.0, 2.5]
    assert [arrival.wish for arrival in arrivals] == [Wish(20, 64, "ddim"), Wish()]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "seconds\n1\nsoon\n", "line 3"),
        ("a.csv", "seconds\n-1\n", "0 or more"),
        ("a.csv", "seconds\nnan\n", "0 or more"),
        ("a.csv", "second\n1\n", "no field is called second"),
        ("a.csv", "seconds\n1,2\n", "line 2"),
        ("a.csv", "seconds,steps\n1,0\n", "steps must be positive"),
        ("a.csv", "seconds\n", "no requests"),
        ("a.jsonl", '{"seconds": 1}\n{"seconds"\n', "line 2"),
        ("a.jsonl", '{"steps": 4}\n', "line 1"),
        ("a.jsonl", "7\n", "line 1"),
    ],
)
def test_a_trace_that_cannot_be_read_names_the_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    """What is wrong with a trace is said before anything is sent."""
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TraceError, match=message):
        read_trace(path)


def test_wishes_come_true_and_the_rest_is_drawn() -> None:
    """A trace's own values are sent as they are; others are what the mix has there anyway."""
    first, second = fulfil([Wish(99, 64, "unipc"), Wish()], MIX, seed=1)
    assert (first.num_steps, first.size, first.fields["scheduler"]) == (99, 64, "unipc")
    assert first.fields["num_inference_steps"] == "99"
    assert 10 <= second.num_steps <= 14


def test_sizes_follow_their_weights_and_guidance_its_share() -> None:
    """Three in four are of the size with three times the weight; requests without guidance have scale 1."""
    jobs = draw_jobs(2000, Mix((4, 4), {32: 3.0, 64: 1.0}, guided_share=0.25, guidance_scale=6.0), seed=1)
    assert Counter(job.size for job in jobs)[32] == pytest.approx(1500, abs=100)
    assert Counter(job.fields["guidance_scale"] for job in jobs)["6.0"] == pytest.approx(500, abs=100)
    assert {job.fields["guidance_scale"] for job in jobs} == {"6.0", "1.0"}
