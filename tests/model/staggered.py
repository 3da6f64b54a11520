"""A real worker fed while it works: each request arrives one step after the one before."""

from concurrent.futures import ThreadPoolExecutor

from service.messages import Drain, Failed, Finished, Report, Submit, Ticked
from service.request import InpaintRequest, InpaintResult
from service.worker.background import Jobs
from service.worker.pipeline import InpaintPipeline
from tests.unit.fake_pipeline import DrivenWorker


def run_staggered(
    pipeline: InpaintPipeline, requests: list[InpaintRequest], *, max_images: int = 12, jobs: Jobs | None = None
) -> tuple[dict[str, InpaintResult], list[Ticked]]:
    """Send requests while earlier ones run.

    Args:
        pipeline: What the worker runs.
        requests: What to send, in order.
        max_images: The worker's cap.
        jobs: Where it prepares and finishes; by default where it steps.

    Returns:
        Results by the request's index, and every step.
    """
    worker = DrivenWorker(pipeline, max_images, jobs)
    pending = [Submit(str(index), request) for index, request in enumerate(requests)]
    reports: list[Report] = []
    # Sent by a thread, as the engine does: two ends that both wait to send large pictures would wait for ever.
    with ThreadPoolExecutor(max_workers=1) as sender:
        sender.submit(worker.send, pending.pop(0))
        worker.start()
        while pending:
            reports.append(worker.receive())
            assert not isinstance(reports[-1], Failed), reports[-1]
            if isinstance(reports[-1], Ticked | Finished):
                sender.submit(worker.send, pending.pop(0))
        sender.submit(worker.send, Drain())
        reports += worker.reports()
    assert not [report for report in reports if isinstance(report, Failed)]
    results = {report.request_id: report.result for report in reports if isinstance(report, Finished)}
    return results, [report for report in reports if isinstance(report, Ticked)]
