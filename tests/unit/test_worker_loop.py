"""The worker's loop: join and leave at step boundaries, exactly one answer each, neighbours unharmed.

All of it holds whether requests are prepared and finished between steps or in threads of their own; what only
threads can do is in `test_worker_overlap.py`.
"""

import dataclasses
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from service.errors import ErrorCode, InpaintError
from service.messages import (
    Cancel,
    Drain,
    Failed,
    Finished,
    InspectLora,
    LoraInspected,
    Ping,
    Pong,
    Report,
    Submit,
    Ticked,
)
from service.request import FreeU, LoraUse
from service.worker.background import InlineJobs, Jobs, ThreadedJobs
from service.worker.batcher import Generation
from service.worker.faults import BatchTooLarge, DeviceLost
from tests.unit.fake_pipeline import DrivenWorker, FakePipeline, make_request


@pytest.fixture(params=[InlineJobs, ThreadedJobs])
def jobs(request: pytest.FixtureRequest) -> Jobs:
    kind: type[InlineJobs | ThreadedJobs] = request.param
    return kind()


def answers(reports: list[Report]) -> dict[str, Finished | Failed]:
    """Each request's answer; a second answer to the same request fails the test."""
    found: dict[str, Finished | Failed] = {}
    for report in reports:
        if isinstance(report, Finished | Failed):
            assert report.request_id not in found
            found[report.request_id] = report
    return found


def ticks(reports: list[Report]) -> list[Ticked]:
    return [report for report in reports if isinstance(report, Ticked)]


def run(worker: DrivenWorker, *commands: object) -> list[Report]:
    worker.send(*commands, Drain())  # type: ignore[arg-type]
    worker.start()
    return worker.reports()


def fails_for(stage: str, victim: str, error: BaseException) -> FakePipeline:
    def fail_on(at: str, generations: Sequence[Generation]) -> BaseException | None:
        return error if at == stage and any(one.request_id == victim for one in generations) else None

    return FakePipeline(fail_on)


def held_at_second_step() -> tuple[FakePipeline, threading.Event]:
    """A pipeline that does its second step once the event is set: what is sent before that arrives in time."""
    gate, num_steps = threading.Event(), 0

    def hold(stage: str, _generations: Sequence[Generation]) -> None:
        nonlocal num_steps
        num_steps += stage == "step"
        if stage == "step" and num_steps == 2:
            assert gate.wait(60)

    return FakePipeline(hold), gate


def test_requests_with_different_steps_leave_when_they_are_done(jobs: Jobs) -> None:
    """A short request does not wait for a long one in its batch."""
    reports = run(
        DrivenWorker(FakePipeline(), jobs=jobs),
        Submit("long", make_request(num_inference_steps=5)),
        Submit("short", make_request(num_inference_steps=2)),
    )
    order = [report.request_id for report in reports if isinstance(report, Finished)]
    assert order == ["short", "long"]
    assert [tick.images for tick in ticks(reports)] == [2, 2, 1, 1, 1]


def test_request_joins_between_steps(jobs: Jobs) -> None:
    """A request that arrives while a batch runs shares its next step."""
    pipeline, gate = held_at_second_step()
    worker = DrivenWorker(pipeline, jobs=jobs)
    worker.send(Submit("first", make_request(num_inference_steps=1_000_000)))
    worker.start()
    assert isinstance(worker.receive(), Ticked)
    worker.send(Submit("second", make_request(num_inference_steps=2)))
    gate.set()
    while not isinstance(second := worker.receive(), Finished):
        pass
    assert second.request_id == "second"
    assert second.result.mean_images == 2.0
    worker.send(Cancel("first"), Drain())
    assert set(answers(worker.reports())) == {"first"}


def test_result_carries_pictures_and_ordered_times(jobs: Jobs) -> None:
    """A result has the request's own pictures and non-negative times."""
    (reports,) = [
        run(DrivenWorker(FakePipeline(), jobs=jobs), Submit("a", make_request(seed=7, num_images_per_prompt=2)))
    ]
    answer = answers(reports)["a"]
    assert isinstance(answer, Finished)
    assert answer.result.images.shape == (2, 8, 8, 3)
    assert np.all(answer.result.images == 7)
    timings = answer.result.timings
    assert min(timings.prepare, timings.denoise, timings.time_to_first_step) >= 0


def test_cancelled_request_leaves_at_the_next_step(jobs: Jobs) -> None:
    """A cancel is answered once, and the batch goes on without the request."""
    pipeline, gate = held_at_second_step()
    worker = DrivenWorker(pipeline, jobs=jobs)
    worker.send(
        Submit("gone", make_request(num_inference_steps=150)), Submit("stays", make_request(num_inference_steps=150))
    )
    worker.start()
    assert isinstance(worker.receive(), Ticked)
    worker.send(Cancel("gone"), Cancel("unknown"), Drain())
    gate.set()
    reports = worker.reports()
    gone = answers(reports)["gone"]
    assert isinstance(gone, Failed)
    assert gone.code is ErrorCode.CANCELLED
    after = reports[reports.index(gone) + 1 :]
    assert all(progress.request_id != "gone" for tick in ticks(after) for progress in tick.progress)
    assert isinstance(answers(reports)["stays"], Finished)


@pytest.mark.parametrize("stage", ["prepare", "step", "finish"])
def test_one_bad_request_does_not_harm_its_neighbours(jobs: Jobs, stage: str) -> None:
    """Whatever stage a request breaks, it alone is answered with an error."""
    requests = [Submit(name, make_request(seed=index)) for index, name in enumerate("abcd")]
    reports = run(DrivenWorker(fails_for(stage, "c", ValueError("secret /path")), jobs=jobs), *requests)
    found = answers(reports)
    assert set(found) == set("abcd")
    failed = found["c"]
    assert isinstance(failed, Failed)
    assert failed.code is ErrorCode.INTERNAL
    assert "secret" not in failed.message
    for index, name in enumerate("abcd"):
        answer = found[name]
        if name != "c":
            assert isinstance(answer, Finished)
            assert np.all(answer.result.images == index)


def test_error_meant_for_the_client_keeps_its_code(jobs: Jobs) -> None:
    """A request that the model cannot serve is told so."""
    error = InpaintError(ErrorCode.OUT_OF_RANGE, "clip_skip must be at most 3.")
    reports = run(DrivenWorker(fails_for("prepare", "a", error), jobs=jobs), Submit("a", make_request()))
    assert answers(reports)["a"] == Failed("a", ErrorCode.OUT_OF_RANGE, "clip_skip must be at most 3.")


def test_out_of_memory_halves_the_batch_and_remembers(jobs: Jobs) -> None:
    """When four images are too many, all four are still painted, and no more than two run from then on."""

    def fail_on(stage: str, generations: Sequence[Generation]) -> Exception | None:
        return BatchTooLarge() if stage == "step" and len(generations) > 2 else None

    pipeline = FakePipeline(fail_on)
    worker = DrivenWorker(pipeline, jobs=jobs)
    reports = run(worker, *[Submit(name, make_request()) for name in "abcdef"])
    assert all(isinstance(answer, Finished) for answer in answers(reports).values())
    assert len(answers(reports)) == 6
    assert worker.batcher.max_images == 2
    attempts = [len(who) for stage, who in pipeline.calls if stage == "step"]
    assert attempts.count(4) < 4


def test_out_of_memory_alone_fails_that_request_only(jobs: Jobs) -> None:
    """One image that does not fit the device gets its own answer; the worker lives."""
    reports = run(
        DrivenWorker(fails_for("step", "big", BatchTooLarge()), jobs=jobs),
        Submit("big", make_request()),
        Submit("ok", make_request()),
    )
    big = answers(reports)["big"]
    assert isinstance(big, Failed)
    assert big.code is ErrorCode.OUT_OF_MEMORY
    assert isinstance(answers(reports)["ok"], Finished)


@pytest.mark.parametrize("stage", ["prepare", "step", "finish", "preview"])
def test_lost_device_ends_the_process(jobs: Jobs, stage: str) -> None:
    """A device that needs a new process is not retried; the supervisor runs the requests again elsewhere."""
    worker = DrivenWorker(fails_for(stage, "a", DeviceLost("sticky")), jobs=jobs)
    worker.send(Submit("a", make_request(previews=True, num_inference_steps=150)), Submit("b", make_request()))
    worker.start()
    assert not any(isinstance(answer, Failed) for answer in answers(worker.reports()).values())
    assert isinstance(worker.error, DeviceLost)


@pytest.mark.parametrize("stage", ["prepare", "step", "finish", "preview"])
def test_what_is_no_request_failure_ends_the_process(jobs: Jobs, stage: str) -> None:
    """What no request can be blamed for surfaces from every thread, and leaves no loop that waits for ever."""
    worker = DrivenWorker(fails_for(stage, "a", SystemExit("enough")), jobs=jobs)
    worker.send(Submit("a", make_request(previews=True, num_inference_steps=150)))
    worker.start()
    assert not any(isinstance(answer, Failed) for answer in answers(worker.reports()).values())
    assert isinstance(worker.error, SystemExit)


def test_request_past_its_deadline_is_answered_and_dropped(jobs: Jobs) -> None:
    """Nobody computes for a client that has stopped waiting."""
    late = make_request()
    late = type(late)(late.params, late.image, late.mask, admitted_at=0.0, deadline=0.0)
    pipeline = FakePipeline()
    reports = run(DrivenWorker(pipeline, jobs=jobs), Submit("late", late), Submit("ok", make_request()))
    answer = answers(reports)["late"]
    assert isinstance(answer, Failed)
    assert answer.code is ErrorCode.DEADLINE
    assert all("late" not in who for _, who in pipeline.calls)
    assert isinstance(answers(reports)["ok"], Finished)


def test_ping_is_answered_while_working_and_while_idle(jobs: Jobs) -> None:
    """The watchdog hears from a healthy worker whatever it does."""
    worker = DrivenWorker(FakePipeline(), jobs=jobs)
    worker.send(Ping(1))
    worker.start()
    assert worker.receive() == Pong(1)
    worker.send(Submit("a", make_request()), Ping(2), Drain())
    assert Pong(2) in worker.reports()


def test_worker_ends_when_the_service_is_gone(jobs: Jobs) -> None:
    """No worker outlives the API process."""
    worker = DrivenWorker(FakePipeline(), jobs=jobs)
    worker.start()
    worker.connection.close()
    worker.join()
    assert worker.error is None


# --- previews and LoRAs -----------------------------------------------------------------


def previews(reports: list[Report]) -> dict[str, list[int]]:
    """Steps after which each request had a preview."""
    found: dict[str, list[int]] = {}
    for tick in ticks(reports):
        for progress in tick.progress:
            if progress.preview is not None:
                found.setdefault(progress.request_id, []).append(progress.step)
    return found


def test_previews_are_few_and_only_of_those_who_ask() -> None:
    """At most ten of a request, evenly spread; none after the first step, which knows nothing, or after the last."""
    reports = run(
        DrivenWorker(FakePipeline()),
        Submit("long", make_request(num_inference_steps=50, previews=True)),
        Submit("short", make_request(num_inference_steps=5, previews=True)),
        Submit("silent", make_request(num_inference_steps=50)),
    )
    assert previews(reports) == {"long": [5, 10, 15, 20, 25, 30, 35, 40, 45], "short": [2, 3, 4]}


def test_flagged_preview_is_left_out() -> None:
    """What the checker does not pass is not shown; the neighbour's preview is."""
    reports = run(
        DrivenWorker(FakePipeline()),
        Submit("a", make_request("flagged", previews=True)),
        Submit("b", make_request(previews=True)),
    )
    assert set(previews(reports)) == {"b"}


def test_preview_that_fails_costs_no_request(jobs: Jobs) -> None:
    """Whatever goes wrong with a preview, the pictures are finished."""
    pipeline = FakePipeline(lambda stage, _: BatchTooLarge() if stage == "preview" else None)
    worker = DrivenWorker(pipeline, jobs=jobs)
    reports = run(worker, Submit("a", make_request(previews=True)), Submit("b", make_request(previews=True)))
    assert all(isinstance(answer, Finished) for answer in answers(reports).values())
    assert not previews(reports)
    assert worker.batcher.max_images == 4


def test_different_weights_do_not_share_a_step(jobs: Jobs) -> None:
    """LoRAs and FreeU change the model: requests with other ones take turns, those with the same share."""
    lora = LoraUse("pencil", "pencil.safetensors", "1", 1.0, 1.0)
    pipeline = FakePipeline()
    run(
        DrivenWorker(pipeline, max_images=8, jobs=jobs),
        Submit("plain", make_request()),
        Submit("pencil", make_request(loras=(lora,))),
        Submit("pencil too", make_request(loras=(lora,), seed=2)),
        Submit("weaker", make_request(loras=(dataclasses.replace(lora, unet_scale=0.5),))),
        Submit("newer", make_request(loras=(dataclasses.replace(lora, version="2"),))),
        Submit("freeu", make_request(freeu=FreeU(0.9, 0.2, 1.2, 1.4))),
    )
    steps = {tuple(ids) for stage, ids in pipeline.calls if stage == "step"}
    assert steps == {("plain",), ("pencil", "pencil too"), ("weaker",), ("newer",), ("freeu",)}


def test_lora_is_inspected_between_steps(jobs: Jobs) -> None:
    """The worker says what a file is, or why not, without a word to running requests."""
    reports = run(
        DrivenWorker(FakePipeline(), jobs=jobs),
        Submit("a", make_request()),
        InspectLora(1, "good.safetensors"),
        InspectLora(2, "other.safetensors"),
    )
    inspected = {report.number: report for report in reports if isinstance(report, LoraInspected)}
    assert inspected[1].info is not None
    assert (inspected[1].info.rank, inspected[1].refusal) == (4, None)
    assert (inspected[2].info, inspected[2].refusal) == (None, "This LoRA does not fit the served model.")
    assert isinstance(answers(reports)["a"], Finished)
