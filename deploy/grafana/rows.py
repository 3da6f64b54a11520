# ruff: noqa: INP001 - read by generate.py, no module of the package
"""What the dashboard shows, row by row; `panels.py` has the short form of the expressions."""

from panels import Panel, Query, Row

REQUESTS = 'inpaint_requests_total{*, endpoint!~"/healthz|/readyz|/metrics"}'


def _stat(title: str, description: str, unit: str, source: str, red_from: float | None = None) -> Panel:
    return Panel(title, description, unit, (Query(source, title),), "stat", width=4, height=4, red_from=red_from)


def _quantiles(title: str, description: str, metric: str) -> Panel:
    buckets = f"sum by (le) (rate({metric}_bucket{{*}}[*]))"
    queries = tuple(Query(f"histogram_quantile({q}, {buckets})", f"p{100 * q:g}") for q in (0.5, 0.95, 0.99))
    return Panel(title, description, "s", queries)


NOW = Row(
    "Now",
    (
        _stat(
            "Alerts firing",
            "Of this service; /alerts of Prometheus has each one's runbook.",
            "short",
            'sum(ALERTS{alertname=~"Inpaint.*", alertstate="firing"}) or vector(0)',
            1,
        ),
        Panel(
            "Instances and workers up",
            "Instances that Prometheus reads, and their workers that take requests.",
            "short",
            (
                Query('sum(up{*, job="inpaint"})', "instances"),
                Query("sum(inpaint_worker_up{*})", "workers"),
                Query("count(inpaint_worker_up{*})", "workers in all"),
            ),
            "stat",
            width=6,
            height=4,
        ),
        _stat("Waiting", "Admitted requests that wait for a worker.", "short", "sum(inpaint_queue_depth{*})"),
        _stat(
            "p95",
            "Of painted requests, from admission to the pictures, over 5 minutes.",
            "s",
            "max(job_instance:inpaint_painted_seconds:p95_5m{*})",
            30,
        ),
        _stat(
            "5xx",
            "Share of the requests that the service took on, over 5 minutes.",
            "percentunit",
            "max(job_instance:inpaint_server_errors:ratio5m{*})",
            0.05,
        ),
        Panel(
            "Up since",
            "Start of each process.",
            "dateTimeFromNow",
            (Query("1000 * process_start_time_seconds{*}", "{{instance}}"),),
            "stat",
            width=2,
            height=4,
        ),
    ),
)

TRAFFIC = Row(
    "Traffic",
    (
        Panel(
            "Answers by code",
            "Without probes and scrapes. 499: the client hung up.",
            "reqps",
            (Query(f"sum by (code) (rate({REQUESTS}[*]))", "{{code}}"),),
            is_stacked=True,
        ),
        Panel(
            "Answers by endpoint",
            "Without probes and scrapes.",
            "reqps",
            (Query(f"sum by (endpoint) (rate({REQUESTS}[*]))", "{{endpoint}}"),),
            is_stacked=True,
        ),
        Panel(
            "Images",
            "Painted, and of these flagged by the safety checker, per second.",
            "short",
            (
                Query("sum(rate(inpaint_images_total{*}[*]))", "painted"),
                Query("sum(rate(inpaint_nsfw_flagged_total{*}[*]))", "flagged"),
            ),
        ),
        Panel(
            "Refused",
            "Before admission, by reason: overloaded is 429, the others 503.",
            "reqps",
            (Query("sum by (reason) (rate(inpaint_rejected_total{*}[*]))", "{{reason}}"),),
            is_stacked=True,
        ),
        Panel(
            "Cancelled and replayed",
            "Admitted requests given up, by reason; answers given again to a repeated Idempotency-Key.",
            "reqps",
            (
                Query("sum by (reason) (rate(inpaint_cancelled_total{*}[*]))", "cancelled: {{reason}}"),
                Query("sum(rate(inpaint_replayed_total{*}[*]))", "replayed"),
            ),
        ),
        Panel(
            "HTTP p95 by endpoint",
            "Until the last byte of the answer, refusals included: a refused request is "
            "answered within milliseconds. For painted ones see Latency.",
            "s",
            (
                Query(
                    "histogram_quantile(0.95, sum by (le, endpoint) (rate(inpaint_request_seconds_bucket{*, "
                    'endpoint!~"/healthz|/readyz|/metrics"}[*])))',
                    "{{endpoint}}",
                ),
            ),
        ),
    ),
)

LATENCY = Row(
    "Latency",
    (
        Panel(
            "Painted requests",
            "From admission to the pictures, over 5 minutes; the slowest instance. The red line "
            "is the bound of InpaintSlow.",
            "s",
            (
                Query("max(job_instance:inpaint_painted_seconds:p50_5m{*})", "p50"),
                Query("max(job_instance:inpaint_painted_seconds:p95_5m{*})", "p95"),
                Query("max(job_instance:inpaint_painted_seconds:p99_5m{*})", "p99"),
            ),
            red_from=30,
        ),
        _quantiles(
            "Time to first step", "From admission to the end of the first step.", "inpaint_time_to_first_step_seconds"
        ),
        _quantiles("Waiting", "In the queue and between the stages, of painted requests.", "inpaint_queue_seconds"),
        Panel(
            "Stages, mean",
            "Where a painted request's time goes, on average. Denoising is shared with the batch.",
            "s",
            (
                Query(
                    "sum by (stage) (rate(inpaint_stage_seconds_sum{*}[*])) "
                    "/ sum by (stage) (rate(inpaint_stage_seconds_count{*}[*]))",
                    "{{stage}}",
                ),
            ),
            is_stacked=True,
            width=12,
        ),
        Panel(
            "Stages, p95",
            "Of requests in each stage.",
            "s",
            (
                Query(
                    "histogram_quantile(0.95, sum by (le, stage) (rate(inpaint_stage_seconds_bucket{*}[*])))",
                    "{{stage}}",
                ),
            ),
            width=12,
        ),
    ),
)

BATCH = Row(
    "Queue and batch",
    (
        Panel(
            "Queue",
            "Requests that wait, and those inside workers.",
            "short",
            (Query("sum(inpaint_queue_depth{*})", "waiting"), Query("sum(inpaint_in_flight{*})", "in workers")),
        ),
        Panel(
            "Images per step",
            "How many images shared a step: the darker, the more steps.",
            "short",
            (Query("sum by (le) (increase(inpaint_batch_images_bucket{*}[*]))", "{{le}}"),),
            "heatmap",
        ),
        Panel(
            "Images and rows per step, mean",
            "An image with guidance takes two rows. Dashed: images that may run "
            "at once, as measured at warm-up, or fewer after a lack of memory.",
            "short",
            (
                Query(
                    "sum(rate(inpaint_batch_images_sum{*}[*])) / sum(rate(inpaint_batch_images_count{*}[*]))", "images"
                ),
                Query("sum(rate(inpaint_batch_rows_sum{*}[*])) / sum(rate(inpaint_batch_rows_count{*}[*]))", "rows"),
                Query("min by (worker) (inpaint_max_images{*})", "cap, worker {{worker}}", is_dashed=True),
            ),
        ),
        Panel(
            "Step time by rows",
            "Mean over the steps of that many rows, rounded up to a power of two. Dashed: the "
            "same at warm-up, of the slowest worker. Other than native sizes take another time.",
            "s",
            (
                Query(
                    "sum by (rows) (rate(inpaint_step_seconds_sum{*}[*])) "
                    "/ sum by (rows) (rate(inpaint_step_seconds_count{*}[*]))",
                    "{{rows}} rows",
                ),
                Query("max by (rows) (inpaint_warm_up_step_seconds{*})", "{{rows}} rows, warm-up", is_dashed=True),
            ),
            width=12,
        ),
        Panel(
            "Step time, of warm-up's",
            "1 is as fast as at warm-up; 2 takes twice as long.",
            "none",
            (
                Query(
                    "sum by (rows) (rate(inpaint_step_seconds_sum{*}[*])) "
                    "/ sum by (rows) (rate(inpaint_step_seconds_count{*}[*])) "
                    "/ on (rows) max by (rows) (inpaint_warm_up_step_seconds{*})",
                    "{{rows}} rows",
                ),
            ),
            width=12,
        ),
    ),
)

WORKERS = Row(
    "Workers and devices",
    (
        Panel(
            "Busy",
            "Share of time: with anything, as the worker says, and in steps alone.",
            "percentunit",
            (
                Query("job_instance_worker:inpaint_gpu_busy:ratio{*}", "{{instance}} worker {{worker}}"),
                Query(
                    "job_instance_worker:inpaint_stepping:ratio5m{*}",
                    "{{instance}} worker {{worker}}, in steps, 5 min",
                    is_dashed=True,
                ),
            ),
        ),
        Panel(
            "Device memory",
            "By kind: allocated is in use, reserved is held; resident is what a CPU worker's process has.",
            "bytes",
            (Query("inpaint_gpu_memory_bytes{*}", "{{instance}} worker {{worker}} {{kind}}"),),
        ),
        Panel(
            "Workers up",
            "1 where the worker takes requests, 0 while it loads or is lost.",
            "short",
            (Query("inpaint_worker_up{*}", "{{instance}} worker {{worker}}"),),
            width=4,
        ),
        Panel(
            "Restarts",
            "Within 15 minutes.",
            "short",
            (Query("increase(inpaint_worker_restarts_total{*}[15m])", "{{instance}} worker {{worker}}"),),
            width=4,
            red_from=3,
        ),
    ),
)

FAILURES = Row(
    "Failures",
    (
        Panel(
            "Failures by reason",
            "Admitted requests that ended in an error.",
            "reqps",
            (Query("sum by (reason) (rate(inpaint_failed_total{*}[*]))", "{{reason}}"),),
            is_stacked=True,
        ),
        Panel(
            "Flagged share",
            "Of the pictures of 30 minutes. Dashed: of a day.",
            "percentunit",
            (
                Query("job_instance:inpaint_flagged:ratio30m{*}", "{{instance}}"),
                Query("job_instance:inpaint_flagged:ratio1d{*}", "{{instance}}, a day", is_dashed=True),
            ),
            red_from=0.2,
        ),
        Panel(
            "5xx share",
            "Of the requests that were neither refused nor wrong, over 5 minutes.",
            "percentunit",
            (Query("job_instance:inpaint_server_errors:ratio5m{*}", "{{instance}}"),),
            red_from=0.05,
        ),
    ),
)

PROCESS = Row(
    "API process",
    (
        Panel(
            "CPU",
            "Cores in use. The API process decodes and encodes pictures; workers are not counted.",
            "short",
            (Query("rate(process_cpu_seconds_total{*}[*])", "{{instance}}"),),
        ),
        Panel(
            "Memory",
            "Resident, of the API process alone.",
            "bytes",
            (Query("process_resident_memory_bytes{*}", "{{instance}}"),),
        ),
        Panel(
            "File descriptors",
            "Open ones, of the API process alone. Dashed: how many it may have.",
            "short",
            (
                Query("process_open_fds{*}", "{{instance}}"),
                Query("process_max_fds{*}", "{{instance}}, limit", is_dashed=True),
            ),
        ),
    ),
)

ASYNCHRONOUS = Row(
    "Asynchronous requests",
    (
        Panel(
            "Kept results",
            "Asynchronous requests that ended and can still be fetched.",
            "short",
            (Query("inpaint_async_kept{*}", "{{instance}}"),),
        ),
        Panel(
            "Memory of kept results",
            "In the API process. At its bound the client that holds most loses its oldest.",
            "bytes",
            (Query("inpaint_async_kept_bytes{*}", "{{instance}}"),),
        ),
        Panel(
            "Webhooks",
            "Ends of requests that were to be told, by what became of it.",
            "reqps",
            (Query("sum by (outcome) (rate(inpaint_webhooks_total{*}[*]))", "{{outcome}}"),),
            is_stacked=True,
        ),
    ),
)

ROWS = (NOW, TRAFFIC, LATENCY, BATCH, WORKERS, FAILURES, ASYNCHRONOUS, PROCESS)
