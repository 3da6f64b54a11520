"""The worker's loop with jobs in threads: the device waits for no CPU, and nobody is answered twice or never.

The tests stop the pipeline where they want it and let it go on; none depends on how fast anything is.
"""

import dataclasses
import random
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import wait
from types import SimpleNamespace

import pytest

from service.errors import ErrorCode
from service.messages import Cancel, Drain, Failed, Finished, Ping, Pong, Report, StepProgress, Submit, Ticked
from service.request import InpaintRequest
from service.worker import background, loop
from service.worker.background import Lane, ThreadedJobs
from service.worker.batcher import Generation
from service.worker.faults import BatchTooLarge, DeviceLost
from tests.unit.fake_pipeline import DrivenWorker, FakePipeline, Hold, Turnstile, make_request


class WatchedJobs(ThreadedJobs):
    """Jobs that tell when the loop is about to sleep: only then does it ask what can wake it."""

    def __init__(self) -> None:
        super().__init__()
        self.asleep = threading.Event()

    @property
    def wake_ups(self) -> Sequence[socket.socket]:
        """As the loop's."""
        self.asleep.set()
        return super().wake_ups


class Overlapping:
    """A started worker with threads.

    Args:
        pipeline: What it runs.
        max_images: Its cap.
    """

    def __init__(self, pipeline: FakePipeline, max_images: int = 4) -> None:
        self.jobs = WatchedJobs()
        self.worker = DrivenWorker(pipeline, max_images, self.jobs)
        self.send, self.receive = self.worker.send, self.worker.receive

    def start(self, *requests: Submit) -> "Overlapping":
        """With these requests in its pipe, so that they are admitted together."""
        self.send(*requests)
        self.worker.start()
        return self

    def wait_for_job(self) -> None:
        """Until a job has ended, while the loop stands at a step and does not collect it."""
        assert wait([self.jobs._bell.ear], 60), "no job ended"

    def reports_until(self, *kinds: type[Report]) -> list[Report]:
        """Reports up to the first of these kinds."""
        reports = [self.receive()]
        while not isinstance(reports[-1], kinds):
            reports.append(self.receive())
        return reports

    def turn(self) -> list[Report]:
        """Let a loop that has nothing to step do all that was sent, and fall asleep again; what it said meanwhile."""
        reports: list[Report] = []
        for _ in range(2):
            # Asleep after the first answer: it has gone round since. The second ping wakes one that already was.
            self.jobs.asleep.clear()
            self.send(Ping(0))
            reports += self.reports_until(Pong)[:-1]
        assert self.jobs.asleep.wait(60), "the loop does not sleep"
        return reports

    def drain(self) -> list[Report]:
        """Everything it has to say, until it ends; no thread is left, and nothing of any request."""
        self.send(Drain())
        return self.rest()

    def rest(self) -> list[Report]:
        """The same, of one that is draining."""
        reports = self.worker.reports()
        assert self.worker.error is None
        assert self.worker.batcher.is_idle
        previews = self.worker._worker._previews
        assert not previews._made
        assert not previews._in_the_making
        self.assert_no_thread_left()
        return reports

    def assert_no_thread_left(self) -> None:
        """It has ended, and its threads before it."""
        self.worker.join()
        assert not any(thread.is_alive() for thread in self.jobs._lanes.values())


def steps_of(reports: Sequence[Report]) -> list[list[StepProgress]]:
    return [list(report.progress) for report in reports if isinstance(report, Ticked)]


def ids_of_steps(reports: Sequence[Report]) -> list[list[str]]:
    return [[progress.request_id for progress in step] for step in steps_of(reports)]


def answered(reports: Sequence[Report]) -> list[str]:
    return [report.request_id for report in reports if isinstance(report, Finished | Failed)]


# --- overlap ------------------------------------------------------------------------------


def test_batch_is_stepped_while_another_request_is_prepared() -> None:
    """A request that arrives costs the running batch nothing until it joins."""
    steps, hold = Turnstile(), Hold("prepare", "new")
    worker = Overlapping(FakePipeline(steps, hold)).start(Submit("old", make_request(num_inference_steps=4)))
    steps.wait_for_step()
    worker.send(Submit("new", make_request(num_inference_steps=1)))
    steps.let(1)
    assert hold.reached.wait(60)
    steps.let(2)
    assert ids_of_steps([worker.receive() for _ in range(3)]) == [["old"]] * 3
    for _ in range(3):
        steps.wait_for_step()
    hold.release()
    worker.wait_for_job()
    steps.let(1)
    steps.let(150)
    reports = worker.drain()
    assert ids_of_steps(reports) == [["old"], ["new"]]
    assert set(answered(reports)) == {"old", "new"}


def test_batch_is_stepped_while_a_picture_is_finished() -> None:
    """A request that has done its last step costs the running batch nothing."""
    hold = Hold("finish", "short")
    worker = Overlapping(FakePipeline(hold)).start(
        Submit("short", make_request(num_inference_steps=1)), Submit("long", make_request(num_inference_steps=20))
    )
    reports = [worker.receive() for _ in range(20)]
    assert ids_of_steps(reports) == [["short", "long"]] + [["long"]] * 19
    assert hold.reached.wait(60)
    hold.release()
    assert answered(worker.drain()) == ["short", "long"]


def test_free_place_is_filled_at_the_next_step() -> None:
    """The request that waits in line has been prepared ahead, and joins at the step after the last of another."""
    steps, hold = Turnstile(), Hold("finish")
    pipeline = FakePipeline(steps, hold)
    worker = Overlapping(pipeline, max_images=2).start(
        Submit("long", make_request(num_inference_steps=4)),
        Submit("short", make_request(num_inference_steps=2)),
        Submit("next", make_request(num_inference_steps=2)),
        Submit("last", make_request(num_inference_steps=1)),
    )
    steps.wait_for_step()
    # Three are in or ahead, the last one waits: it is prepared when "next" has joined.
    assert pipeline.calls_of("prepare") == [["long", "short", "next"]]
    steps.let(150)
    reports = [worker.receive() for _ in range(4)]
    assert ids_of_steps(reports) == [["long", "short"]] * 2 + [["long", "next"]] * 2
    hold.release()
    assert set(answered(worker.drain())) == {"long", "short", "next", "last"}
    assert pipeline.calls_of("prepare")[1:] == [["last"]]


def test_arrivals_during_a_preparation_are_prepared_together() -> None:
    """However many messages they come in, requests that wait for the preparing thread share its next turn."""
    hold = Hold("prepare", "first")
    pipeline = FakePipeline(hold)
    worker = Overlapping(pipeline, max_images=8).start(Submit("first", make_request()))
    assert hold.reached.wait(60)
    for name in ("b", "c", "d"):
        worker.send(Submit(name, make_request()))
        assert worker.turn() == []
    worker.send(Submit("large", make_request(height=16)))
    assert worker.turn() == []
    worker.send(Cancel("c"), Submit("e", make_request()))
    assert answered(worker.turn()) == ["c"]
    hold.release()
    worker.drain()
    assert pipeline.calls_of("prepare") == [["first"], ["b", "d", "e"], ["large"]]


def test_large_request_is_not_passed_for_ever() -> None:
    """A prepared request that needs many places gets them, however many small ones keep coming."""
    steps = Turnstile()
    worker = Overlapping(FakePipeline(steps), max_images=8).start(
        *[Submit(f"early {index}", make_request(num_inference_steps=3 + index % 3)) for index in range(8)]
    )
    steps.wait_for_step()
    worker.send(Submit("large", make_request(num_images_per_prompt=7, num_inference_steps=1)))
    reports: list[Report] = []
    for index in range(40):
        worker.send(Submit(f"late {index}", make_request(num_inference_steps=3)))
        steps.let(1)
        reports += worker.reports_until(Ticked)
        if "large" in ids_of_steps(reports)[-1]:
            break
        steps.wait_for_step()
    assert "large" in ids_of_steps(reports)[-1]
    steps.let(1000)
    worker.drain()


# --- no polling ---------------------------------------------------------------------------


def test_loop_sleeps_until_a_message_or_a_job_wakes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """While nothing can be stepped the loop waits without a timeout, and a job's end is enough to go on."""
    timeouts: list[float | None] = []

    def watched(objects: list[object], timeout: float | None = None) -> list[object]:
        timeouts.append(timeout)
        return wait(objects, timeout)  # type: ignore[arg-type, return-value]

    monkeypatch.setattr(loop, "wait", watched)
    prepare, finish = Hold("prepare"), Hold("finish")
    worker = Overlapping(FakePipeline(prepare, finish)).start(Submit("a", make_request()))
    assert prepare.reached.wait(60)
    prepare.release()
    assert [type(report) for report in worker.reports_until(Ticked)] == [Ticked]
    assert finish.reached.wait(60)
    finish.release()
    assert isinstance(worker.reports_until(Finished)[-1], Finished)
    worker.drain()
    assert set(timeouts) == {None}
    # Before each of: the submission, the end of either job, the drain; a job's end may ring once it has been collected.
    assert len(timeouts) <= 6


def test_request_expires_while_nothing_else_happens() -> None:
    """A deadline is kept though neither a message nor a job's end wakes the loop."""
    hold = Hold("prepare")
    request = dataclasses.replace(make_request(), deadline=time.monotonic() + 0.05)
    worker = Overlapping(FakePipeline(hold)).start(Submit("a", request))
    answer = worker.receive()
    assert isinstance(answer, Failed)
    assert answer.code is ErrorCode.DEADLINE
    hold.release()
    assert worker.drain() == []


# --- cancel and expire in every stage -----------------------------------------------------


@dataclasses.dataclass
class Scene:
    """A worker with request "x" in some stage, and how to let it go on."""

    worker: Overlapping
    pipeline: FakePipeline
    go_on: Callable[[], None]


def stand_at(stage: str, request: InpaintRequest) -> Scene:
    """A worker in which "x" stands in a stage and is not the only one where the stage has several."""
    if stage in {"preparing", "finishing"}:
        hold = Hold(stage.removesuffix("ing").replace("prepar", "prepare"), "x")
        pipeline = FakePipeline(hold)
        worker = Overlapping(pipeline).start(Submit("x", request), Submit("y", make_request()))
        assert hold.reached.wait(60)
        return Scene(worker, pipeline, hold.release)
    steps = Turnstile()
    pipeline = FakePipeline(steps)
    others = [Submit(name, make_request()) for name in "yz"]
    x = Submit("x", request)
    in_line = {"running": [x, *others], "prepared": [others[0], x, others[1]], "waiting": [*others, x]}[stage]
    worker = Overlapping(pipeline, max_images=1).start(*in_line)
    steps.wait_for_step()
    return Scene(worker, pipeline, lambda: steps.let(1000))


STAGES = ["waiting", "preparing", "prepared", "running", "finishing"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("code", [ErrorCode.CANCELLED, ErrorCode.DEADLINE])
def test_request_can_end_in_every_stage(monkeypatch: pytest.MonkeyPatch, stage: str, code: ErrorCode) -> None:
    """Cancelled or too late: one answer, while a job still works on it; its outcome is dropped, neighbours finish."""
    clock = [0.0]
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    scene = stand_at(stage, dataclasses.replace(make_request(), deadline=100.0))
    worker = scene.worker
    in_stage = {
        "waiting": worker.worker.batcher.waiting,
        "preparing": worker.worker.batcher.preparing,
        "prepared": worker.worker.batcher.prepared,
        "running": [one for batch in worker.worker.batcher.running.values() for one in batch],
        "finishing": worker.worker.batcher.finishing,
    }[stage]
    (x,) = [one for one in in_stage if one.request_id == "x"]
    if code is ErrorCode.CANCELLED:
        worker.send(Cancel("x"))
    else:
        clock[0] = 101.0
    reports: list[Report] = []
    if stage in {"preparing", "finishing"}:
        reports = worker.turn()
        # A loop that slept read the ping before it looked at the clock: it has by the next one.
        reports += worker.turn()
        assert answered(reports) == ["x"]
        assert not worker.jobs.is_idle
        assert (x.latents is None) == (stage == "preparing")
    scene.go_on()
    reports += worker.drain()
    (answer,) = [report for report in reports if isinstance(report, Failed)]
    assert (answer.request_id, answer.code) == ("x", code)
    others = {"y"} if stage in {"preparing", "finishing"} else {"y", "z"}
    assert sorted(answered(reports)) == sorted({"x", *others})
    assert all("x" not in ids for ids in ids_of_steps(reports[reports.index(answer) :]))
    assert x.latents is None
    if stage == "waiting":
        assert all("x" not in ids for _, ids in scene.pipeline.calls)


def test_drain_waits_for_the_job_of_a_cancelled_request() -> None:
    """A worker does not end under a job that nobody waits for any more; nor does it say more of that request."""
    hold = Hold("prepare")
    worker = Overlapping(FakePipeline(hold)).start(Submit("a", make_request()))
    assert hold.reached.wait(60)
    worker.send(Cancel("a"), Drain())
    assert answered(worker.turn()) == ["a"]
    assert worker.turn() == []
    hold.release()
    assert worker.rest() == []


def test_place_of_a_cancelled_request_is_free_at_once() -> None:
    """Another request is admitted and prepared though the job of the one that was cancelled is not over."""
    hold = Hold("finish", "a")
    pipeline = FakePipeline(hold)
    worker = Overlapping(pipeline, max_images=1).start(
        Submit("a", make_request(num_images_per_prompt=2, num_inference_steps=1))
    )
    assert ids_of_steps([worker.receive()]) == [["a"]]
    assert hold.reached.wait(60)
    worker.send(Cancel("a"), Submit("b", make_request(num_inference_steps=1)))
    reports = worker.reports_until(Ticked)
    assert ids_of_steps(reports) == [["b"]]
    hold.release()
    assert answered([*reports, *worker.drain()]) == ["a", "b"]


# --- failures -----------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["prepare", "finish"])
def test_failed_job_harms_no_running_neighbour(stage: str) -> None:
    """A request that breaks a job while others are stepped is answered alone; those of its job are not harmed."""
    steps = Turnstile()

    def fail(at: str, generations: Sequence[Generation]) -> Exception | None:
        return ValueError("secret") if at == stage and any(one.request_id == "bad" for one in generations) else None

    worker = Overlapping(FakePipeline(steps, fail), max_images=8).start(
        Submit("running", make_request(num_inference_steps=10))
    )
    steps.wait_for_step()
    worker.send(*[Submit(name, make_request(num_inference_steps=2)) for name in ("good", "bad", "fine")])
    steps.let(1000)
    reports = worker.drain()
    assert sorted(answered(reports)) == ["bad", "fine", "good", "running"]
    (failed,) = [report for report in reports if isinstance(report, Failed)]
    assert (failed.request_id, failed.code) == ("bad", ErrorCode.INTERNAL)


@pytest.mark.parametrize("stage", ["prepare", "finish"])
def test_memory_that_is_short_beside_the_batch_lowers_the_cap_by_both(stage: str) -> None:
    """A job that does not fit beside the running images says that all of them together are too many, no more."""
    steps, hold = Turnstile(), Hold(stage, "a")

    def fail(at: str, generations: Sequence[Generation]) -> Exception | None:
        return BatchTooLarge() if at == stage and len(generations) == 2 else None

    worker = Overlapping(FakePipeline(steps, hold, fail), max_images=16).start(
        Submit("running", make_request(num_inference_steps=4, num_images_per_prompt=4))
    )
    steps.wait_for_step()
    worker.send(*[Submit(name, make_request(num_inference_steps=1)) for name in "ab"])
    steps.let(1)
    steps.wait_for_step()
    if stage == "finish":
        worker.wait_for_job()  # Their preparation: they join at the third step, which is their last.
        steps.let(2)
        steps.wait_for_step()
        steps.wait_for_step()
    assert hold.reached.wait(60)
    hold.release()
    worker.wait_for_job()
    steps.let(1000)
    reports = worker.drain()
    assert not any(isinstance(report, Failed) for report in reports)
    assert worker.worker.batcher.max_images == 3


@pytest.mark.parametrize("stage", ["prepare", "finish"])
def test_lost_device_in_a_thread_wakes_a_sleeping_loop(stage: str) -> None:
    """A job that loses the device ends the worker though no message comes, and leaves no thread."""

    def fail(at: str, _generations: Sequence[Generation]) -> Exception | None:
        return DeviceLost("sticky") if at == stage else None

    hold = Hold(stage)
    worker = Overlapping(FakePipeline(hold, fail)).start(Submit("a", make_request()))
    assert hold.reached.wait(60)
    hold.release()
    assert answered(worker.worker.reports()) == []
    assert isinstance(worker.worker.error, DeviceLost)
    worker.assert_no_thread_left()


def test_worker_ends_under_a_job_when_the_service_is_gone() -> None:
    """A preparation under way is waited for, and its thread ended."""
    hold = Hold("prepare")
    worker = Overlapping(FakePipeline(hold)).start(Submit("a", make_request()))
    assert hold.reached.wait(60)
    worker.worker.connection.close()
    hold.release()
    worker.assert_no_thread_left()
    assert worker.worker.error is None


def test_hanging_job_does_not_keep_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that never comes back does not hold up a worker whose service is gone."""
    monkeypatch.setattr(background, "CLOSE_SECONDS", 0.01)
    hold = Hold("prepare")
    worker = Overlapping(FakePipeline(hold)).start(Submit("a", make_request()))
    assert hold.reached.wait(60)
    worker.worker.connection.close()
    worker.worker.join()
    assert worker.worker.error is None
    thread = worker.jobs._lanes[Lane.PREPARE]
    assert thread.is_alive()
    hold.release()
    thread.join(60)
    worker.assert_no_thread_left()


@pytest.mark.parametrize("stage", ["prepare", "finish"])
def test_job_that_hangs_ends_the_worker_though_its_loop_goes_on(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """A loop that answers its pings over a device that never does would keep its requests for ever."""
    monkeypatch.setattr(background, "CLOSE_SECONDS", 0.01)
    hold, jobs = Hold(stage), ThreadedJobs(max_job_seconds=0.05)
    worker = DrivenWorker(FakePipeline(hold), jobs=jobs)
    worker.send(Submit("a", make_request()))
    worker.start()
    assert hold.reached.wait(60)
    with suppress(OSError):  # It is gone.
        while not worker.gone.wait(0.01):
            worker.send(Ping(0))
    assert worker.gone.wait(60)
    assert isinstance(worker.error, DeviceLost)
    hold.release()
    for thread in jobs._lanes.values():
        thread.join(60)
        assert not thread.is_alive()


# --- previews -----------------------------------------------------------------------------


def shown(reports: Sequence[Report]) -> list[int]:
    """Steps whose report had a preview."""
    return [progress.step for step in steps_of(reports) for progress in step if progress.preview is not None]


def test_preview_does_not_delay_the_step_and_is_shown_when_it_is_ready() -> None:
    """Steps go on while a preview is made; it goes out with the next report, and no second one is made meanwhile."""
    steps, hold = Turnstile(), Hold("preview")
    pipeline = FakePipeline(steps, hold)
    worker = Overlapping(pipeline).start(Submit("a", make_request(num_inference_steps=8, previews=True)))
    steps.let(2)
    assert hold.reached.wait(60)
    steps.let(3)
    reports = [worker.receive() for _ in range(5)]
    assert pipeline.calls_of("preview") == [["a"]]
    assert shown(reports) == []
    for _ in range(6):
        steps.wait_for_step()
    hold.release()
    worker.wait_for_job()
    steps.let(2)
    reports = [worker.receive() for _ in range(2)]
    assert shown(reports) == [7]
    steps.let(1000)
    worker.drain()


def test_finishing_goes_before_previews_and_a_late_one_is_dropped() -> None:
    """Pictures that somebody waits for come before courtesies; nothing is shown of a request that has its answer."""
    hold = Hold("finish", "held")
    pipeline = FakePipeline(hold)
    worker = Overlapping(pipeline).start(
        Submit("held", make_request(num_inference_steps=1)),
        Submit("a", make_request(num_inference_steps=6, previews=True)),
    )
    reports = [worker.receive() for _ in range(6)]
    assert worker.turn() == []
    hold.release()
    reports += worker.drain()
    assert [call for call in pipeline.calls if call[0] in {"finish", "preview"}] == [
        ("finish", ["held"]),
        ("finish", ["a"]),
        ("preview", ["a"]),
    ]
    assert shown(reports) == []
    assert answered(reports) == ["held", "a"]
    assert pipeline.generations["a"].latents is None


def test_preview_of_a_cancelled_request_is_dropped() -> None:
    """A preview in the making outlives its request without a word; the other's in the same job is shown."""
    steps, hold = Turnstile(), Hold("preview")
    pipeline = FakePipeline(steps, hold)
    worker = Overlapping(pipeline).start(
        *[Submit(name, make_request(num_inference_steps=9, previews=True)) for name in "ab"]
    )
    steps.let(2)
    assert hold.reached.wait(60)
    worker.send(Cancel("a"))
    steps.let(1)
    reports = [worker.receive() for _ in range(4)]
    assert answered(reports) == ["a"]
    assert pipeline.generations["a"].latents is not None
    for _ in range(4):
        steps.wait_for_step()
    hold.release()
    worker.wait_for_job()
    steps.let(2)
    reports = [worker.receive() for _ in range(2)]
    assert ids_of_steps(reports) == [["b"], ["b"]]
    assert shown(reports) == [5]
    steps.let(1000)
    assert answered(worker.drain()) == ["b"]
    assert pipeline.generations["a"].latents is None


# --- order and times ----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_each_request_is_answered_once_and_last(seed: int) -> None:
    """Under any traffic: every request has one answer, all its steps are told before it, in order, nothing after."""
    chance = random.Random(seed)  # noqa: S311 - a repeatable choice, not a secret

    def fail(_stage: str, generations: Sequence[Generation]) -> Exception | None:
        if chance.random() < 0.02:
            return BatchTooLarge() if len(generations) > 1 else ValueError("bad luck")
        return None

    worker = Overlapping(FakePipeline(fail), max_images=8)
    names = [f"{seed}-{index}" for index in range(80)]
    sender_chance = random.Random(seed)  # noqa: S311
    with ThreadPoolExecutor(max_workers=1) as reader:
        reading = reader.submit(worker.rest)
        worker.worker.start()
        for name in names:
            worker.send(
                Submit(
                    name,
                    make_request(
                        num_inference_steps=sender_chance.randint(1, 12),
                        num_images_per_prompt=sender_chance.choice([1, 1, 2, 4, 8]),
                        height=sender_chance.choice([8, 8, 16]),
                        batching=sender_chance.choice(["shared", "shared", "shared", "solo"]),
                        previews=sender_chance.random() < 0.5,
                    ),
                )
            )
            if sender_chance.random() < 0.3:
                worker.send(Cancel(sender_chance.choice(names)))
        worker.send(Drain())
    reports = reading.result()
    assert sorted(answered(reports)) == sorted(names)
    done: set[str] = set()
    steps: dict[str, int] = {}
    for report in reports:
        if isinstance(report, Finished | Failed):
            done.add(report.request_id)
            if isinstance(report, Finished):
                assert steps[report.request_id] > 0
        elif isinstance(report, Ticked):
            for progress in report.progress:
                assert progress.request_id not in done
                assert progress.step == steps.get(progress.request_id, 0) + 1
                steps[progress.request_id] = progress.step


def test_parts_of_the_time_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not work on a request is queue: before its preparation, for room in the batch, and for its decoding."""
    clock = [0.0]
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def work(stage: str, _generations: Sequence[Generation]) -> None:
        clock[0] += {"prepare": 2.0, "step": 3.0}.get(stage, 0.0)

    steps, hold = Turnstile(), Hold("finish", "first")
    worker = Overlapping(FakePipeline(steps, work, hold), max_images=1).start(
        Submit("first", make_request(num_inference_steps=3)), Submit("second", make_request(num_inference_steps=2))
    )
    steps.let(3)
    assert hold.reached.wait(60)
    steps.let(2)
    reports = [worker.receive() for _ in range(5)]
    assert worker.turn() == []
    clock[0] += 10.0  # Both wait for the finishing thread, the first one inside it.
    hold.release()
    reports += worker.drain()
    timings = {report.request_id: report.result.timings for report in reports if isinstance(report, Finished)}
    first, second = timings["first"], timings["second"]
    assert (first.queue, first.prepare, first.denoise) == (0.0, 2.0, 9.0)
    assert first.time_to_first_step == 5.0
    assert (second.queue, second.prepare, second.denoise) == (9.0 + 10.0, 2.0, 6.0)
    assert second.time_to_first_step == 14.0
