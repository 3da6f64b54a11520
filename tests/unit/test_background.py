"""Jobs beside the loop: in order, one at a time, collected on the loop's thread, and never in its way."""

import sys
import threading
import time
import weakref
from collections.abc import Iterator
from multiprocessing.connection import wait

import pytest

from service.worker import background
from service.worker.background import InlineJobs, Lane, ThreadedJobs
from service.worker.faults import DeviceLost


@pytest.fixture
def jobs() -> Iterator[ThreadedJobs]:
    with ThreadedJobs() as threaded:
        yield threaded
    assert not any(lane.is_alive() for lane in threaded._lanes.values())


def collect_all(jobs: ThreadedJobs) -> None:
    """Wait for the jobs' ends as the loop does, and collect them."""
    while not jobs.is_idle:
        assert wait(jobs.wake_ups, 60), "no job ended"
        jobs.collect()


def test_inline_job_is_done_and_collected_at_once() -> None:
    """Where threads would not help, submitting is doing."""
    thens: list[str] = []
    with InlineJobs() as jobs:
        jobs.submit(Lane.PREPARE, lambda: threading.current_thread().name, thens.append)
        assert thens == [threading.current_thread().name]
        assert jobs.is_idle
        with pytest.raises(SystemExit):
            jobs.submit(Lane.FINISH, sys.exit, thens.append)


def test_work_runs_elsewhere_and_its_end_here(jobs: ThreadedJobs) -> None:
    """A job's result is handed over on the thread that collects, not before."""
    threads: list[threading.Thread] = []
    jobs.submit(
        Lane.PREPARE, threading.current_thread, lambda worker: threads.extend([worker, threading.current_thread()])
    )
    assert wait(jobs.wake_ups, 60)
    assert not threads
    assert not jobs.is_idle
    collect_all(jobs)
    assert threads == [jobs._lanes[Lane.PREPARE], threading.current_thread()]


@pytest.mark.parametrize("lane", Lane)
def test_job_that_hangs_loses_the_device(lane: Lane) -> None:
    """Whoever collects is told, though no job ends."""
    gate = threading.Event()
    with ThreadedJobs(max_job_seconds=0.05) as jobs:
        jobs.submit(lane, gate.wait, lambda _: None)
        while jobs._lanes[lane].seconds_at_job <= 0.05:
            time.sleep(0.01)
        with pytest.raises(DeviceLost, match=lane.value):
            jobs.collect()
        gate.set()


def test_lane_without_a_job_does_not_hang(jobs: ThreadedJobs) -> None:
    """Neither before its first job nor after one is time counted."""
    lanes = jobs._lanes.values()
    assert [lane.seconds_at_job for lane in lanes] == [0.0, 0.0]
    reached, gate = threading.Event(), threading.Event()
    jobs.submit(Lane.PREPARE, lambda: (reached.set(), gate.wait(60)), lambda _: None)
    assert reached.wait(60)
    assert jobs._lanes[Lane.PREPARE].seconds_at_job > 0.0
    jobs.collect()  # Far from the limit, which is none here.
    gate.set()
    collect_all(jobs)
    assert [lane.seconds_at_job for lane in lanes] == [0.0, 0.0]


def test_lanes_do_not_wait_for_each_other(jobs: ThreadedJobs) -> None:
    """A picture is finished while another request is prepared."""
    gate, order = threading.Event(), list[str]()
    jobs.submit(Lane.PREPARE, lambda: gate.wait(60), lambda _: order.append("prepared"))
    jobs.submit(Lane.FINISH, lambda: None, lambda _: order.append("finished"))
    assert wait(jobs.wake_ups, 60)
    jobs.collect()
    assert order == ["finished"]
    gate.set()
    collect_all(jobs)
    assert order == ["finished", "prepared"]


def test_jobs_of_a_lane_are_done_in_order_courtesies_last(jobs: ThreadedJobs) -> None:
    """Whatever is asked for before it is done, pictures that somebody waits for go first."""
    gate, order = threading.Event(), list[object]()
    jobs.submit(Lane.FINISH, lambda: gate.wait(60), lambda _: None)
    for number in range(10):
        is_courtesy = number % 2 == 0
        jobs.submit(Lane.FINISH, lambda number=number: order.append(number), lambda _: None, is_courtesy=is_courtesy)  # type: ignore[misc, func-returns-value]
    gate.set()
    collect_all(jobs)
    assert order == [1, 3, 5, 7, 9, 0, 2, 4, 6, 8]


@pytest.mark.parametrize("kind", [ValueError, SystemExit, KeyboardInterrupt])
def test_what_a_job_raises_is_raised_where_it_is_collected(jobs: ThreadedJobs, kind: type[BaseException]) -> None:
    """No failure is lost in a thread, and the thread goes on."""
    error = kind("surprise")

    def fail() -> None:
        raise error

    jobs.submit(Lane.PREPARE, fail, lambda _: None)
    assert wait(jobs.wake_ups, 60)
    with pytest.raises(kind) as raised:
        jobs.collect()
    assert raised.value is error
    done: list[int] = []
    jobs.submit(Lane.PREPARE, lambda: 1, done.append)
    collect_all(jobs)
    assert done == [1]


def test_bell_rings_without_blocking_or_raising() -> None:
    """However often jobs end while nobody listens, or after nobody does, their threads are not held up."""
    bell = background._Bell()
    for _ in range(100_000):
        bell.ring()
    assert wait([bell.ear], 0)
    bell.hush()
    assert not wait([bell.ear], 0)
    bell.ring()
    assert wait([bell.ear], 0)
    bell.close()
    bell.ring()


def test_jobs_that_wait_at_the_end_are_dropped() -> None:
    """The end waits for the job under way, and for no other."""
    gate, started, done = threading.Event(), threading.Event(), list[int]()
    with ThreadedJobs() as jobs:
        jobs.submit(Lane.FINISH, lambda: (started.set(), gate.wait(60)), lambda _: None)
        assert started.wait(60)
        jobs.submit(Lane.FINISH, lambda: done.append(1), lambda _: None)  # type: ignore[func-returns-value]
        jobs._lanes[Lane.FINISH].stop()
        gate.set()
    assert not any(lane.is_alive() for lane in jobs._lanes.values())
    assert not done


def test_job_that_hangs_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that never comes back is left behind, and does not keep the process alive."""
    monkeypatch.setattr(background, "CLOSE_SECONDS", 0.01)
    gate, started = threading.Event(), threading.Event()
    with ThreadedJobs() as jobs:
        jobs.submit(Lane.PREPARE, lambda: (started.set(), gate.wait(60)), lambda _: None)
        assert started.wait(60)
    thread = jobs._lanes[Lane.PREPARE]
    assert thread.is_alive()
    assert thread.daemon
    gate.set()
    thread.join(60)
    assert not thread.is_alive()


def test_collected_job_keeps_nothing_alive(jobs: ThreadedJobs) -> None:
    """What a job worked on is not kept by an idle thread until its next job."""

    class Tensor:
        """What a job works on."""

    tensor = Tensor()
    kept = weakref.ref(tensor)
    jobs.submit(Lane.FINISH, lambda tensor=tensor: tensor, lambda _: None)  # type: ignore[misc]
    del tensor
    collect_all(jobs)
    while kept() is not None:  # The thread lets go a moment after the job's end can be collected.
        time.sleep(0.001)
