"""The JSON that clients get: wire models of the native endpoints' answers."""

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, Field

from service.api.field_types import FreeUFactors
from service.api.fields import InpaintFields
from service.api.ip_adapter import effective_scale
from service.errors import ErrorCode
from service.imaging import OutputFormat
from service.messages import IpAdapterKind
from service.request import Batching, InpaintParams, PromptSyntax

_RESOLVED = frozenset(
    {"prompt", "num_inference_steps", "seed", "scheduler", "height", "width"},
)
"""What a request may leave open."""


class EffectiveLora(BaseModel):
    """One LoRA as it was asked for."""

    name: str
    scale: float | dict[str, Any]


class EffectiveParameters(BaseModel):
    """What the request was painted with: every default filled in."""

    prompt: str
    negative_prompt: str
    prompt_syntax: PromptSyntax
    num_inference_steps: int
    timesteps: list[int] | None
    sigmas: list[float] | None
    guidance_scale: float
    strength: float
    num_images_per_prompt: int
    seed: int
    scheduler: str
    eta: float
    height: int = Field(description="Working height.")
    width: int = Field(description="Working width.")
    padding_mask_crop: int | None
    clip_skip: int
    loras: list[EffectiveLora]
    ip_adapter_scale: float | dict[str, Any] | None = Field(description="Null without a picture to paint by.")
    freeu: FreeUFactors | None
    mask_blur: int
    mask_grow: int
    mask_invert: bool
    composite: bool
    output_format: OutputFormat
    batching: Batching
    tensors: list[str] = Field(description="Tensors that were sent, by their fields' names.")

    @classmethod
    def of(cls, fields: InpaintFields, params: InpaintParams, tensors: Sequence[str]) -> Self:
        """From what was sent and what became of it; the latter wins."""
        sent = fields.model_dump(include=set(cls.model_fields) - {"loras", "ip_adapter_scale"})
        resolved = {name: getattr(params, name) for name in sent if name in _RESOLVED}
        loras = [EffectiveLora(name=lora.name, scale=lora.scale) for lora in fields.loras]
        scale = effective_scale(params.ip_adapter)
        return cls(**{**sent, **resolved}, loras=loras, ip_adapter_scale=scale, tensors=list(tensors))


class InpaintedImage(BaseModel):
    """One painted image."""

    b64_json: str = Field(description="The file, base64.", json_schema_extra={"contentEncoding": "base64"})
    media_type: str
    seed: int = Field(description="What its noise was drawn with: the request's seed plus its index.")
    nsfw_content_detected: bool
    width: int = Field(description="Of the picture, in pixels; of latents, the working size.")
    height: int


class StageTimings(BaseModel):
    """Seconds by stage; `total` runs from the first byte in to the start of the answer."""

    queue: float
    prepare: float
    denoise: float
    decode: float
    safety: float
    render: float
    total: float


class BatchShare(BaseModel):
    """What the request shared its steps with."""

    mean_images: float = Field(description="Mean number of images in the batch, this request's included.")


class InpaintAnswer(BaseModel):
    """The answer to an inpainting request as JSON."""

    id: str
    created: int = Field(description="Unix time.")
    model: str
    parameters: EffectiveParameters
    images: list[InpaintedImage]
    timings: StageTimings
    batch: BatchShare


class FieldError(BaseModel):
    """What is wrong with one field."""

    field: str
    message: str


class Problem(BaseModel):
    """An error, as RFC 9457 has it."""

    type: Literal["about:blank"]
    title: str
    status: int
    detail: str
    code: ErrorCode
    request_id: str
    errors: list[FieldError]


class ModelLimits(BaseModel):
    """What a request may ask for."""

    max_prompt_characters: int
    max_steps: int
    max_clip_skip: int
    max_images_per_prompt: int
    min_side: int
    max_side: int
    side_multiple: int
    max_pixels: int
    max_body_bytes: int
    timeout_seconds: float
    queue_size: int


class ModelWorker(BaseModel):
    """One worker of the model."""

    name: str
    state: str
    device: str
    dtype: str | None
    max_images: int | None
    step_seconds: dict[int, float] = Field(description="Measured seconds of one step, by UNet rows.")


class WorkingSize(BaseModel):
    """A size that pictures are painted at when a request names none."""

    height: int
    width: int


class ServedEmbedding(BaseModel):
    """A textual inversion: prompts that hold the token mean its vectors."""

    token: str
    num_vectors: int


class ModelAdapter(BaseModel):
    """An adapter that requests can name."""

    name: str
    kind: Literal["lora"] = "lora"


class ServedIpAdapter(BaseModel):
    """The IP-Adapter that requests can paint by pictures with."""

    name: str
    kind: IpAdapterKind
    embeds_width: int = Field(
        description="Width D of `ip_adapter_image_embeds`: (2, n, D) of the plain kind, (2, n, T, D) of others."
    )
    embeds_tokens: int | None = Field(description="T that the image encoder gives; null where it gives one embedding.")
    takes_images: bool = Field(description="Whether `ip_adapter_image` can be sent: there is an image encoder.")


class ServedModel(BaseModel):
    """The served model: OpenAI's fields, and ours."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    kind: str = Field(description="`demo` for the bundled model, else `checkpoint`.")
    description: str
    native_size: int = Field(description="Side of the square that the model was trained on.")
    working_sizes: list[WorkingSize]
    schedulers: list[str]
    default_scheduler: str
    default_steps: int
    timesteps_schedulers: list[str] = Field(description="Schedulers that take `timesteps`.")
    sigmas_schedulers: list[str] = Field(description="Schedulers that take `sigmas`.")
    prediction_type: str
    unet_in_channels: int = Field(description="9 for an inpainting UNet, 4 for a plain one.")
    embeds_guidance: bool = Field(description="Whether guidance is an input of the UNet, and costs no second row.")
    embeds_width: int = Field(description="Width D of `prompt_embeds`, (T, D).")
    max_tokens: int = Field(description="Tokens of a prompt that the text encoder reads.")
    latent_channels: int = Field(description="Channels C of latents, (C, height / `latent_multiple`, …).")
    latent_multiple: int
    vae: str
    attention_backend: str
    embeddings: list[ServedEmbedding]
    ip_adapter: ServedIpAdapter | None
    has_safety_checker: bool
    nsfw_policy: str
    adapters: list[ModelAdapter]
    limits: ModelLimits
    workers: list[ModelWorker]


class ModelList(BaseModel):
    """OpenAI's list shape."""

    object: Literal["list"] = "list"
    data: list[ServedModel]


class Adapter(BaseModel):
    """An adapter's file."""

    name: str
    kind: Literal["lora"] = "lora"
    num_bytes: int
    modified: int = Field(description="Unix time.")
    is_writable: bool = Field(description="False for those that ship with the service.")


class AdapterList(BaseModel):
    """All of them, by name."""

    object: Literal["list"] = "list"
    data: list[Adapter]


class StoredAdapter(BaseModel):
    """An adapter that was uploaded, as the model takes it."""

    name: str
    kind: Literal["lora"] = "lora"
    num_bytes: int
    modified: int = Field(description="Unix time.")
    rank: int = Field(description="Largest rank of its matrices.")
    num_unet_layers: int
    num_text_encoder_layers: int


class Health(BaseModel):
    """The process lives."""

    status: Literal["ok"] = "ok"


class ReadyWorker(BaseModel):
    """One worker's state."""

    name: str
    device: str
    state: str
    restarts: int


class Readiness(BaseModel):
    """Whether requests are taken now."""

    status: Literal["ready", "not_ready", "draining"]
    workers: list[ReadyWorker]
