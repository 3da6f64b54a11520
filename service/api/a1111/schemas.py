"""The shapes of the web UI's answers, as its modules/api/models.py has them."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class A1111Error(BaseModel):
    """What goes wrong with a request as a whole."""

    error: str
    detail: str
    body: str
    errors: str


class A1111Fault(BaseModel):
    """What is wrong with one field."""

    loc: list[str]
    msg: str
    type: str


class A1111FieldErrors(BaseModel):
    """What is wrong with which fields."""

    detail: list[A1111Fault]


class A1111Answer(BaseModel):
    """The pictures."""

    images: list[str] = Field(description="PNG files in Base64, each with the notes on it in its chunk `parameters`.")
    parameters: dict[str, Any] = Field(description="The request's fields with their defaults; files are null.")
    info: str = Field(description="The notes on the pictures: a JSON object in a string.")
    nsfw_content_detected: list[bool] = Field([], description="Whether the safety checker flagged them.")
    request_id: str = ""


class A1111State(BaseModel):
    """What a client's oldest request is at."""

    skipped: bool = False
    interrupted: bool = False
    stopping_generation: bool = False
    job: str = ""
    job_count: int = 0
    job_timestamp: str = "0"
    job_no: int = 0
    sampling_step: int = 0
    sampling_steps: int = 0


class A1111Progress(BaseModel):
    """How far it has come."""

    progress: float = 0
    eta_relative: float = 0
    state: A1111State
    current_image: str | None = Field(default=None, description="JPEG in Base64, with `live_previews_enable`.")
    textinfo: str | None = None


class A1111Sampler(BaseModel):
    """A sampler."""

    name: str
    aliases: list[str]
    options: dict[str, str]


class A1111Scheduler(BaseModel):
    """A schedule type."""

    name: str
    label: str
    aliases: list[str] | None = None
    default_rho: float = -1
    need_inner_model: bool = False


class A1111Model(BaseModel):
    """The served model."""

    model_config = ConfigDict(protected_namespaces=())

    title: str
    model_name: str
    hash: str | None = None
    sha256: str | None = None
    filename: str
    config: str | None = None


class A1111Lora(BaseModel):
    """A LoRA."""

    name: str
    alias: str
    path: str
    metadata: dict[str, str] = {}


class A1111Embedding(BaseModel):
    """A textual inversion."""

    step: int | None = None
    sd_checkpoint: str | None = None
    sd_checkpoint_name: str | None = None
    shape: int
    vectors: int


class A1111Embeddings(BaseModel):
    """The textual inversions, by their tokens."""

    loaded: dict[str, A1111Embedding]
    skipped: dict[str, A1111Embedding] = {}


class A1111Upscaler(BaseModel):
    """An upscaler: there is none but "None"."""

    model_config = ConfigDict(protected_namespaces=())

    name: str = "None"
    model_name: str | None = None
    model_path: str | None = None
    model_url: str | None = None
    scale: float = 1


class A1111Scripts(BaseModel):
    """Scripts: there are none."""

    txt2img: list[str] = []
    img2img: list[str] = []


class A1111Memory(BaseModel):
    """Memory, where it is known."""

    ram: dict[str, Any]
    cuda: dict[str, Any]


class A1111Flags(BaseModel):
    """What the web UI would have been started with."""

    api: bool = True
    nowebui: bool = True
