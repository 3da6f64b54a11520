"""What crosses the pipe between the API process and a worker process.

Each `Submit` is answered by exactly one `Finished` or `Failed` with its id,
also after a `Cancel`. Everything else is information.
"""

from dataclasses import dataclass
from typing import Literal

from service.errors import ErrorCode
from service.request import NO_MOMENTS, InpaintRequest, InpaintResult, Moments, Pixels

IpAdapterKind = Literal["plain", "full", "plus"]

# --- API process -> worker ---------------------------------------------------


@dataclass(frozen=True, slots=True)
class Submit:
    """Paint this."""

    request_id: str
    request: InpaintRequest


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody waits for this request any more: drop it at the next step. Answered by `Failed(CANCELLED)`."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Drain:
    """Finish what was submitted, then exit with status 0."""


@dataclass(frozen=True, slots=True)
class Ping:
    """Answer with a `Pong` of the same number at the next step boundary."""

    number: int


@dataclass(frozen=True, slots=True)
class InspectLora:
    """Would this file serve as a LoRA of the loaded model? Answered by `LoraInspected` of the same number."""

    number: int
    path: str


Command = Submit | Cancel | Drain | Ping | InspectLora

# --- worker -> API process ---------------------------------------------------


@dataclass(frozen=True, slots=True)
class EmbeddingInfo:
    """A textual inversion: prompts that hold `token` mean its vectors."""

    token: str
    num_vectors: int


@dataclass(frozen=True, slots=True)
class LoraInfo:
    """A LoRA as the model takes it.

    Attributes:
        rank: Largest rank of its matrices.
        num_unet_layers: Layers of the UNet that it changes.
        num_text_encoder_layers: Layers of the text encoder that it changes.
    """

    rank: int
    num_unet_layers: int
    num_text_encoder_layers: int


@dataclass(frozen=True, slots=True)
class IpAdapterInfo:
    """The IP-Adapter that requests can use.

    Attributes:
        name: Its file's.
        kind: "plain" takes one embedding of a picture; "full" and "plus" take one of each of its patches, which
            "plus" resamples.
        embeds_width: D of `ip_adapter_image_embeds`.
        embeds_tokens: T that the image encoder gives; None where there is none, or of the plain kind.
        takes_images: Whether there is an image encoder; else embeddings have to be sent.
    """

    name: str
    kind: IpAdapterKind
    embeds_width: int
    embeds_tokens: int | None
    takes_images: bool


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The loaded model, the same for every worker of a service.

    Attributes:
        id: What the operator named, or the bundled model's id.
        kind: "demo" for the bundled model, else "checkpoint".
        native_size: Side in pixels of the square that the model was trained on.
        size_multiple: Working heights and widths are multiples of this.
        unet_in_channels: 9 for inpainting UNets, 4 for plain ones.
        schedulers: Short names that requests may ask for.
        default_scheduler: The checkpoint's own.
        default_steps: Steps when a request names none.
        has_safety_checker: False only where the operator allowed it.
        latent_channels: Channels of the VAE's latents.
        latent_multiple: Pixels to a latent's side.
        embeds_width: Width of the text encoder, D of `prompt_embeds`.
        max_tokens: Tokens of a prompt, start and end included; what is longer is cut off.
        max_clip_skip: Layers that the text encoder can leave out.
        prediction_type: What the UNet predicts: "epsilon", "v_prediction" or "sample".
        embeds_guidance: Whether the UNet takes the guidance scale as an input, as LCM-distilled ones do.
        num_train_timesteps: Timesteps lie below this.
        timesteps_schedulers: Schedulers that take a list of timesteps.
        sigmas_schedulers: Schedulers that take a list of sigmas.
        embeddings: Textual inversions that prompts can name.
        vae: The autoencoder's class.
        attention_backend: What computes attention.
        ip_adapter: The loaded IP-Adapter, None for none.
    """

    id: str
    kind: str
    native_size: int
    size_multiple: int
    unet_in_channels: int
    schedulers: tuple[str, ...]
    default_scheduler: str
    default_steps: int
    has_safety_checker: bool
    latent_channels: int = 4
    latent_multiple: int = 8
    embeds_width: int = 768
    max_tokens: int = 77
    max_clip_skip: int = 12
    prediction_type: str = "epsilon"
    embeds_guidance: bool = False
    num_train_timesteps: int = 1000
    timesteps_schedulers: tuple[str, ...] = ()
    sigmas_schedulers: tuple[str, ...] = ()
    embeddings: tuple[EmbeddingInfo, ...] = ()
    vae: str = "AutoencoderKL"
    attention_backend: str = "auto"
    ip_adapter: IpAdapterInfo | None = None


@dataclass(frozen=True, slots=True)
class Loading:
    """The worker is not ready yet; `stage` is a few words for `/readyz` and the log."""

    stage: str


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker has loaded, warmed up and takes requests.

    Attributes:
        model: The loaded model.
        device: Where it runs, e.g. "cpu" or "cuda:0".
        dtype: Weights' type, e.g. "float32".
        max_images: Images that may share the running batch.
        step_seconds: Measured seconds of one step, by UNet rows, at the native size.
        load_seconds: Seconds from the start of loading, imports included, to this message.
    """

    model: ModelInfo
    device: str
    dtype: str
    max_images: int
    step_seconds: dict[int, float]
    load_seconds: float


@dataclass(frozen=True, slots=True)
class StepProgress:
    """One request after a step.

    Attributes:
        request_id: The request.
        step: Model calls done.
        steps: Model calls in all.
        preview: (height, width, 3) uint8 RGB, its first image as it may become, at working size. Only of
            requests that ask for previews, not after every step, and only what the safety checker passes.
    """

    request_id: str
    step: int
    steps: int
    preview: Pixels | None = None


@dataclass(frozen=True, slots=True)
class Ticked:
    """One step of the running batch.

    Attributes:
        rows: UNet rows, padding not counted.
        images: Images that shared the step.
        step_seconds: Wall time of the step.
        max_images: Images that may share the running batch now: it sinks when device memory did not suffice.
        busy_ratio: Share of the last seconds that the worker spent computing, 0 to 1.
        memory_bytes: Device memory by kind, see `service.worker.memory`.
        progress: Every running request.
    """

    rows: int
    images: int
    step_seconds: float
    max_images: int
    busy_ratio: float
    memory_bytes: dict[str, int]
    progress: tuple[StepProgress, ...]


@dataclass(frozen=True, slots=True)
class LoraInspected:
    """The answer to `InspectLora`: either what it is, or one sentence on why it is refused."""

    number: int
    info: LoraInfo | None
    refusal: str | None


@dataclass(frozen=True, slots=True)
class Finished:
    """A request is done."""

    request_id: str
    result: InpaintResult


@dataclass(frozen=True, slots=True)
class Failed:
    """A request ended without a picture; `field` is the form field at fault, where there is one.

    `moments` says how far it came.
    """

    request_id: str
    code: ErrorCode
    message: str
    field: str | None = None
    moments: Moments = NO_MOMENTS


@dataclass(frozen=True, slots=True)
class Pong:
    """The worker's loop is alive."""

    number: int


@dataclass(frozen=True, slots=True)
class CannotStart:
    """Loading failed for good: `message` is one line for the operator. The process exits after it."""

    message: str


Report = Loading | Ready | Ticked | Finished | Failed | Pong | LoraInspected | CannotStart
