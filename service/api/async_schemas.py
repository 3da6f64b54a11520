"""The JSON of asynchronous requests."""

from typing import Literal

from pydantic import BaseModel, Field

from service.api.schemas import BatchShare, EffectiveParameters, Problem, StageTimings


class LinkedImage(BaseModel):
    """One painted image, and where it is to be had."""

    url: str
    b64_json: str | None = Field(
        description="The file, base64; null unless asked for by `include=b64_json`.",
        json_schema_extra={"contentEncoding": "base64"},
    )
    media_type: str
    seed: int = Field(description="What its noise was drawn with: the request's seed plus its index.")
    nsfw_content_detected: bool
    width: int = Field(description="Of the picture, in pixels; of latents, the working size.")
    height: int


class LinkedAnswer(BaseModel):
    """The answer to an inpainting request, with links to its images."""

    id: str = Field(description="The `X-Request-Id` that the request was answered with.")
    created: int = Field(description="Unix time.")
    model: str
    parameters: EffectiveParameters
    images: list[LinkedImage]
    timings: StageTimings
    batch: BatchShare


class StepsDone(BaseModel):
    """How far a request is."""

    step: int
    steps: int


class RequestLinks(BaseModel):
    """Where there is more."""

    itself: str = Field(alias="self")
    events: str


class RequestState(BaseModel):
    """An asynchronous request."""

    id: str
    status: Literal["queued", "running", "completed", "failed", "cancelled"]
    created: int = Field(description="Unix time.")
    position: int | None = Field(description="Place in the queue, 0 for the next; null where it does not wait.")
    eta: float | None = Field(
        description="Seconds until it is painted, estimated by the measured pace; null where nobody can tell, and once "
        "it has ended."
    )
    progress: StepsDone
    expires: int | None = Field(
        description="Unix time at which it is forgotten, if not before for want of room; null as long as it runs."
    )
    result: LinkedAnswer | None = Field(description="Once completed.")
    error: Problem | None = Field(description="Once failed or cancelled.")
    links: RequestLinks
