"""What this service's `/metrics` say of a stretch of time: the difference of two scrapes."""

from collections.abc import Iterator
from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True, slots=True)
class Histogram:
    """How often which values were observed.

    Attributes:
        bounds: Upper bounds of the buckets, ascending; the last is infinity.
        counts: Observations of each bucket alone.
        total: Sum of all observations.
    """

    bounds: tuple[float, ...]
    counts: tuple[float, ...]
    total: float

    @property
    def mean(self) -> float | None:
        """The mean of what was observed, None of nothing."""
        return self.total / sum(self.counts) if sum(self.counts) > 0 else None

    def since(self, earlier: "Histogram | None") -> "Histogram":
        """What was observed after an earlier scrape; everything when there was nothing yet.

        Raises:
            ValueError: The other has other buckets, or holds more: it is no earlier scrape of this one.
        """
        if earlier is None:
            return self
        counts = tuple(mine - other for mine, other in zip(self.counts, earlier.counts, strict=False))
        if self.bounds != earlier.bounds or any(count < 0 for count in counts):
            raise ValueError("not an earlier state of this histogram")
        return Histogram(self.bounds, counts, self.total - earlier.total)


@dataclass(frozen=True, slots=True)
class Scrape:
    """The samples of one scrape by name and labels."""

    samples: dict[tuple[str, frozenset[tuple[str, str]]], float]

    def values(self, name: str, label: str) -> dict[str, float]:
        """A counter or gauge, by one of its labels; samples that differ in other labels add up."""
        found: dict[str, float] = {}
        for labels, value in self._named(name):
            found[labels.get(label, "")] = found.get(labels.get(label, ""), 0.0) + value
        return found

    def histogram(self, name: str, **wanted: str) -> Histogram | None:
        """A histogram of these labels, None when it is not there."""
        cumulative = sorted(
            (float(labels["le"]), value)
            for labels, value in self._named(f"{name}_bucket")
            if labels == wanted | {"le": labels["le"]}
        )
        if not cumulative:
            return None
        counts, below = [], 0.0
        for _, value in cumulative:
            counts.append(value - below)
            below = value
        total = self.samples[f"{name}_sum", frozenset(wanted.items())]
        return Histogram(tuple(bound for bound, _ in cumulative), tuple(counts), total)

    def labels(self, name: str, label: str) -> tuple[str, ...]:
        """The values of a label of a histogram."""
        return tuple(sorted({labels[label] for labels, _ in self._named(f"{name}_sum")}))

    def _named(self, name: str) -> Iterator[tuple[dict[str, str], float]]:
        for (sample, labels), value in self.samples.items():
            if sample == name:
                yield dict(labels), value


@dataclass(frozen=True, slots=True)
class ServiceUse:
    """What this service counted of a stretch of load.

    Attributes:
        batch_images: Upper bound of images per step -> steps, up to the last bound that has any.
        mean_images: Images per step.
        mean_rows: UNet rows per step, two for an image with guidance.
        steps: Steps of the running batch.
        stepping_seconds: What they took together, over all workers.
        step_seconds: UNet rows, rounded up to a power of two -> mean seconds of a step.
        queue_seconds: Mean wait of a request before prepare.
        stage_seconds: Stage -> mean seconds of a request in it.
        rejected: Reason -> refused requests.
    """

    batch_images: dict[str, int]
    mean_images: float | None
    mean_rows: float | None
    steps: int
    stepping_seconds: float
    step_seconds: dict[str, float]
    queue_seconds: float | None
    stage_seconds: dict[str, float]
    rejected: dict[str, int]


def parse(text: str) -> Scrape:
    """Prometheus' text format."""
    return Scrape(
        {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
    )


def scrape(client: httpx.Client, base_url: str) -> Scrape:
    """Ask the service now.

    Raises:
        httpx.HTTPError: It did not answer well.
    """
    return parse(client.get(f"{base_url}/metrics").raise_for_status().text)


def use_between(before: Scrape, after: Scrape) -> ServiceUse:
    """What the service counted between two scrapes."""
    images = _since(before, after, "inpaint_batch_images")
    rows = _since(before, after, "inpaint_batch_rows")
    queue = _since(before, after, "inpaint_queue_seconds")
    rejected_before = before.values("inpaint_rejected_total", "reason")
    rejected = {
        reason: round(count - rejected_before.get(reason, 0.0))
        for reason, count in after.values("inpaint_rejected_total", "reason").items()
    }
    return ServiceUse(
        batch_images=_by_bound(images),
        mean_images=images.mean,
        mean_rows=rows.mean,
        steps=round(sum(images.counts)),
        stepping_seconds=sum(
            _since(before, after, "inpaint_step_seconds", rows=rows).total
            for rows in after.labels("inpaint_step_seconds", "rows")
        ),
        step_seconds=_means(before, after, "inpaint_step_seconds", "rows"),
        queue_seconds=queue.mean,
        stage_seconds=_means(before, after, "inpaint_stage_seconds", "stage"),
        rejected={reason: count for reason, count in rejected.items() if count},
    )


def _by_bound(histogram: Histogram) -> dict[str, int]:
    last = max((place for place, count in enumerate(histogram.counts, start=1) if count), default=0)
    return {
        f"{bound:g}": round(count)
        for bound, count in zip(histogram.bounds[:last], histogram.counts[:last], strict=True)
    }


def _since(before: Scrape, after: Scrape, name: str, **labels: str) -> Histogram:
    found = after.histogram(name, **labels)
    return Histogram((), (), 0.0) if found is None else found.since(before.histogram(name, **labels))


def _means(before: Scrape, after: Scrape, name: str, label: str) -> dict[str, float]:
    means = {value: _since(before, after, name, **{label: value}).mean for value in after.labels(name, label)}
    return {value: mean for value, mean in means.items() if mean is not None}
