"""A few distinct requests: all of the same work, or of every kind; and the model that they are for."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import httpx

from benchmarks.exchange import Wire, post_form
from benchmarks.peers.wire import PATH
from benchmarks.traffic import SCHEDULERS, Job, Mix, draw_jobs

ILL_CONDITIONED = "ddim"
"""Left out: with random weights, which models for trials have, it amplifies rounding so much that the stock pipeline
itself, in a batch of two, gives another picture than alone."""

PNG, JSON, EVENTS = "image/png", "application/json", "text/event-stream"


@dataclass(frozen=True, slots=True)
class Case:
    """One distinct request.

    Attributes:
        name: What it is about.
        job: Fields, picture and mask.
        accept: Media type of the answer.
    """

    name: str
    job: Job
    accept: str = PNG

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of each image."""
        first, count = int(self.job.fields["seed"]), int(self.job.fields.get("num_images_per_prompt", "1"))
        return tuple(range(first, first + count))

    def with_fields(self, **fields: str) -> "Case":
        """The same with further fields."""
        return dataclasses.replace(self, job=_changed(self.job, fields))

    def wire(self, headers: Mapping[str, str]) -> Wire:
        """The request as it is sent."""
        files = {name: (f"{name}.png", getattr(self.job, name), "image/png") for name in ("image", "mask")}
        return post_form(PATH, self.job.fields, files, {"Accept": self.accept, **headers})


# --- the requests ---------------------------------------------------------------------


def equal_cases(served: "Served", num_steps: int, seed: int, count: int = 10) -> tuple[Case, ...]:
    """Requests that differ in all but the work they make.

    Args:
        served: The model.
        num_steps: Steps of each.
        seed: Of what is drawn.
        count: How many; every two of them share a picture and its mask.
    """
    jobs = _in_pairs(draw_jobs(count, Mix((num_steps, num_steps), {served.size: 1.0}, served.schedulers), seed))
    return tuple(Case(f"{job.fields['scheduler']} {number}", job) for number, job in enumerate(jobs))


def mixed_cases(served: "Served", steps: tuple[int, int], seed: int) -> tuple[Case, ...]:
    """Requests of every kind of answer, and of batches that take turns.

    Args:
        served: The model.
        steps: Least and most steps.
        seed: Of what is drawn.
    """
    kinds: list[tuple[str, str, dict[str, str]]] = [
        ("plain", PNG, {}),
        ("as JSON", JSON, {}),
        ("two images", JSON, {"num_images_per_prompt": "2"}),
        ("events", EVENTS, {}),
        ("previews", EVENTS, {"previews": "true"}),
        ("no guidance", PNG, {"guidance_scale": "1"}),
        ("half strength", PNG, {"strength": "0.6"}),
        ("the default scheduler", PNG, {"scheduler": served.default_scheduler}),
        ("many steps", JSON, {"num_inference_steps": str(3 * steps[1])}),
        ("solo", PNG, {"batching": "solo"}),
        ("flagged by the bundled model", PNG, {"prompt": "a pirate flag", "num_inference_steps": "10"}),
        ("a negative prompt", PNG, {"negative_prompt": "a green tree"}),
    ]
    kinds += [(f"LoRA {name}", PNG, {"loras": json.dumps([{"name": name}])}) for name in served.adapters[:1]]
    jobs = _in_pairs(draw_jobs(len(kinds), Mix(steps, {served.size: 1.0}, served.schedulers), seed))
    cases = [Case(name, _changed(job, fields), accept) for (name, accept, fields), job in zip(kinds, jobs, strict=True)]
    small = draw_jobs(2, Mix(steps, {served.size // 2: 1.0}, served.schedulers), seed + 1)
    return (*cases, *(Case(f"half the size {number}", job) for number, job in enumerate(small)))


def _in_pairs(jobs: Sequence[Job]) -> list[Job]:
    """Every second one gets the picture and the mask of that before: only what is painted tells them apart."""
    first = [jobs[number - number % 2] for number in range(len(jobs))]
    return [dataclasses.replace(job, image=one.image, mask=one.mask) for job, one in zip(jobs, first, strict=True)]


def _changed(job: Job, fields: Mapping[str, str]) -> Job:
    merged = {**job.fields, **fields}
    return dataclasses.replace(job, fields=merged, num_steps=int(merged["num_inference_steps"]))


# --- the served model -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Served:
    """What `/v1/models` says of the model that bears on the load.

    Attributes:
        size: Native side in pixels.
        max_images: Images in the running batches of all workers.
        adapters: LoRAs that can be named.
        schedulers: Those of one model call a step that it has, and that are well-conditioned.
        default_scheduler: The checkpoint's own.
    """

    size: int
    max_images: int
    adapters: tuple[str, ...]
    schedulers: tuple[str, ...]
    default_scheduler: str


def served_model(base_url: str, headers: Mapping[str, str]) -> Served:
    """Ask the service.

    Raises:
        httpx.HTTPError: It did not answer well.
    """
    response = httpx.get(f"{base_url}/v1/models", headers=dict(headers), timeout=10.0, trust_env=False)
    served = response.raise_for_status().json()["data"][0]
    return Served(
        size=served["native_size"],
        max_images=sum(worker["max_images"] for worker in served["workers"]),
        adapters=tuple(adapter["name"] for adapter in served["adapters"]),
        schedulers=tuple(name for name in SCHEDULERS if name in served["schedulers"] and name != ILL_CONDITIONED),
        default_scheduler=served["default_scheduler"],
    )
