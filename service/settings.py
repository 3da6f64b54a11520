"""The operator's settings: one definition for the environment and the command line.

A setting `max_body_mib` is the environment variable `INPAINT_MAX_BODY_MIB` and
the flag `--max-body-mib` of `inpaint-service serve`; the flag wins. This is the
only module that reads the environment.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from service.errors import StartupError
from service.request import NsfwPolicy

ENVIRONMENT_PREFIX = "INPAINT_"

URL_VARIABLE = f"{ENVIRONMENT_PREFIX}URL"
KEY_VARIABLE = f"{ENVIRONMENT_PREFIX}API_KEY"
CLIENT_VARIABLES = (URL_VARIABLE, KEY_VARIABLE)
"""Of the command-line client; no settings of the service."""

BUNDLED_MODEL = "demo"

OTLP_VARIABLE, OTLP_TRACES_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
"""OpenTelemetry's own."""

_TRACES_PATH = "/v1/traces"

_HOST_NAME = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]")


def _split_commas(value: object) -> object:
    """Read "a, b" as a list, so that one spelling serves the environment and the command line."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _blank_is_none(value: object) -> object:
    return None if isinstance(value, str) and not value.strip() else value


def _auto_is_none(value: object) -> object:
    return None if isinstance(value, str) and value.strip().lower() in ("", "auto") else value


def _require_host_names(names: tuple[str, ...]) -> tuple[str, ...]:
    if not all(_HOST_NAME.fullmatch(name) for name in names):
        raise ValueError("names or addresses without scheme and port; IPv6 addresses in brackets")
    return names


def _require_http_url(url: str | None) -> str | None:
    if url is not None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("an absolute http or https URL")
    return url


CommaSeparated = Annotated[tuple[str, ...], BeforeValidator(_split_commas)]
BlankIsNone = BeforeValidator(_blank_is_none)
AutoIsNone = BeforeValidator(_auto_is_none)
OptionalText = Annotated[str | None, BlankIsNone]
OptionalPath = Annotated[Path | None, BlankIsNone]
AttentionBackend = Literal["auto", "math", "flash", "efficient", "cudnn", "xformers"]
Access = Literal["open", "clients", "admins", "off"]
OptionalPort = Annotated[Annotated[int, Field(ge=0, le=65535)] | None, BlankIsNone]


class Settings(BaseModel):
    """Everything an operator can set. Descriptions are the help texts of `serve`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # The model.
    model: str = Field(
        BUNDLED_MODEL,
        description="The bundled 'demo', a hub id, a local folder in diffusers format, or a .safetensors file.",
    )
    revision: OptionalText = Field(None, description="Revision of the hub id.")
    variant: OptionalText = Field(None, description="Weight variant of the checkpoint, e.g. fp16.")
    prediction_type: Annotated[Literal["epsilon", "v_prediction"] | None, BlankIsNone] = Field(
        None, description="What the UNet predicts; by default what the checkpoint says, or a single file looks like."
    )
    devices: CommaSeparated = Field(
        ("auto",),
        description="Comma-separated devices, one worker each: auto, cpu, cuda:0,cuda:1 or cpu,cpu.",
    )
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        "auto", description="Weights' type; auto is float16 on CUDA and float32 on a CPU."
    )
    offline: bool = Field(False, description="Never contact the model hub.")
    default_steps: Annotated[Annotated[int, Field(ge=1, le=150)] | None, BlankIsNone] = Field(
        None, description="Steps of a request that names none; by default 10 for demo, else 50."
    )
    allow_unchecked: bool = Field(
        False, description="Serve a checkpoint that has no safety checker; its images are never flagged."
    )
    safety_checker: OptionalPath = Field(
        None, description="Folder of a safety checker, or of a checkpoint that has one, to use for this model."
    )
    nsfw_policy: NsfwPolicy = Field("black", description="What a flagged image comes back as: black, blur or flag.")

    # What the model's parts cost.
    vae_slicing: bool = Field(False, description="Decode and encode pictures one by one: less memory.")
    vae_tiling: bool = Field(False, description="Decode and encode large pictures in tiles: less memory, other pixels.")
    attention_slicing: Annotated[Literal["auto", "max"] | Annotated[int, Field(ge=1)] | None, BlankIsNone] = Field(
        None, description="Compute attention in slices: auto, max or a slice's size; less memory, slower."
    )
    attention_backend: AttentionBackend = Field("auto", description="What computes attention.")

    # Speed.
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="Compile and capture the model at start: auto where it is served in half precision on CUDA."
    )
    compile_cache: OptionalPath = Field(
        None, description="Folder where compiled code is kept, for a faster next start; by default torch's own."
    )

    # Adapters.
    lora_dir: OptionalPath = Field(None, description="Folder of LoRAs, <name>.safetensors each.")
    embeddings_dir: OptionalPath = Field(
        None, description="Folder of textual inversions, .safetensors each, loaded at start."
    )
    ip_adapter: OptionalPath = Field(
        None, description="IP-Adapter: a .safetensors file, or a folder with one, loaded at start."
    )
    ip_adapter_image_encoder: OptionalPath = Field(
        None,
        description="Folder of its image encoder; by default image_encoder beside the weights, if it exists.",
    )
    max_adapter_mib: float = Field(512.0, gt=0, description="Largest LoRA in MiB that can be uploaded.")

    # Batching, queue and time.
    max_images: Annotated[Annotated[int, Field(ge=1, le=64)] | None, AutoIsNone] = Field(
        None, description="Images in the running batch; by default, auto, where throughput stops growing."
    )
    cpu_threads: Annotated[Annotated[int, Field(ge=1)] | None, AutoIsNone] = Field(
        None, description="Threads of each CPU worker; by default, auto, cores / workers."
    )
    queue_size: int = Field(64, ge=1, le=100_000, description="Requests that may wait before new ones get 429.")
    timeout: float = Field(300.0, gt=0, description="Seconds after admission within which a request is answered.")
    drain_timeout: float = Field(60.0, gt=0, description="Seconds that accepted requests get after SIGTERM.")
    hang_timeout: float = Field(
        120.0, gt=0, description="Seconds without a sign of life, or at one job, after which a worker is replaced."
    )
    load_timeout: float = Field(1800.0, gt=0, description="Seconds that a worker may take to load and warm up.")

    # HTTP.
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    metrics_port: OptionalPort = Field(None, description="Serve /metrics on this port instead.")
    api_keys: CommaSeparated = Field(
        (),
        repr=False,
        description="Keys that clients must send as 'Authorization: Bearer …'; each KEY, sha256:HASH, NAME=… or "
        "NAME:priority=….",
    )
    api_keys_file: OptionalPath = Field(None, description="File with further ones, one a line.")
    admin_keys: CommaSeparated = Field(
        (), repr=False, description="Keys that may also change adapters; without any, nobody may."
    )
    admin_keys_file: OptionalPath = Field(None, description="File with further ones, one a line.")
    docs_access: Access = Field(
        "clients",
        description="Who may read /docs and /openapi.json: everybody, holders of a key, administrators, nobody.",
    )
    metrics_access: Access = Field("clients", description="The same for /metrics, where it has no port of its own.")
    playground: bool = Field(True, description="Serve a page at / on which people try the service with a browser.")
    cors_origins: CommaSeparated = Field((), description="Web origins that may call the service.")
    allowed_hosts: Annotated[CommaSeparated, AfterValidator(_require_host_names)] = Field(
        (), description="Host names under which the service may be called, without ports; by default any."
    )
    max_body_mib: float = Field(25.0, gt=0, description="Largest request body in MiB.")
    max_pixels: int = Field(16_777_216, ge=4096, description="Largest picture, height times width.")
    idempotency_ttl: float = Field(
        3600.0, gt=0, description="Seconds that the answer to a request with an Idempotency-Key is kept."
    )
    idempotency_mib: float = Field(256.0, ge=0, description="Memory in MiB for such answers; the oldest make room.")

    # Asynchronous requests.
    async_ttl: float = Field(
        3600.0, gt=0, description="Seconds that an asynchronous request and its result are kept after its end."
    )
    async_mib: float = Field(256.0, gt=0, description="Memory in MiB for such results; the oldest make room.")
    async_max: int = Field(
        1000, ge=0, description="Number of such results; the oldest make room. 0: there are no asynchronous requests."
    )
    webhook_hosts: CommaSeparated = Field(
        (),
        description="Hosts that may be told of the end of asynchronous requests, each HOST or HOST:PORT, by https; "
        "with http:// in front without TLS. By default none.",
    )
    webhook_secret: OptionalText = Field(
        None, repr=False, description="What webhooks are signed with: whsec_ and the Base64 of 24 to 64 bytes."
    )
    webhook_secret_file: OptionalPath = Field(None, description="File that holds it instead.")

    # Traces.
    otlp_endpoint: Annotated[OptionalText, AfterValidator(_require_http_url)] = Field(
        None,
        repr=False,
        description="Send OpenTelemetry traces to this collector, by OTLP over HTTP: http://collector:4318. The "
        "standard variables OTEL_… are heeded.",
    )

    # Logs.
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe level to log.")
    log_format: Literal["auto", "text", "json"] = Field(
        "auto", description="auto is text on a terminal and JSON elsewhere."
    )

    @property
    def max_body_bytes(self) -> int:
        """`max_body_mib` in bytes."""
        return int(self.max_body_mib * 1024 * 1024)

    @property
    def idempotency_bytes(self) -> int:
        """`idempotency_mib` in bytes."""
        return int(self.idempotency_mib * 1024 * 1024)

    @property
    def async_bytes(self) -> int:
        """`async_mib` in bytes."""
        return int(self.async_mib * 1024 * 1024)

    @property
    def max_adapter_bytes(self) -> int:
        """`max_adapter_mib` in bytes."""
        return int(self.max_adapter_mib * 1024 * 1024)

    @property
    def is_bundled_model(self) -> bool:
        """Whether the model that ships with the package is served."""
        return self.model == BUNDLED_MODEL

    @property
    def model_name(self) -> str:
        """What clients see of `model`: a hub id as it is, of a path only the last part."""
        is_path = self.model.startswith((".", "/", "~")) or self.model.endswith(".safetensors")
        return Path(self.model).name if is_path else self.model


def load_settings(overrides: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Settings from the environment, with `overrides` (flags) on top.

    A variable that is blank, as `${PORT:-}` in a compose file makes it, is one that is not set.

    Args:
        overrides: Values by setting name; `None` values are ignored.
        environ: The environment to read; the process's own by default.

    Raises:
        StartupError: A value does not fit; the message names each setting at fault.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    for name in Settings.model_fields:
        variable = environment_variable(name)
        if environ.get(variable, "").strip():
            values[name] = environ[variable]
    values.update({name: value for name, value in (overrides or {}).items() if value is not None})
    try:
        return Settings(**values)
    except ValidationError as error:
        faults = "; ".join(f"{setting_label(str(fault['loc'][0]))}: {fault['msg']}" for fault in error.errors())
        raise StartupError(f"invalid settings: {faults}") from None


def traces_url(settings: Settings, environ: Mapping[str, str] | None = None) -> str | None:
    """Where traces are posted to; None for nowhere. Our own setting goes before the standard variables.

    Those are https://opentelemetry.io/docs/specs/otel/protocol/exporter/: of a collector's URL `v1/traces` is a part
    below, the one for traces alone is whole.

    Args:
        settings: The operator's settings.
        environ: The environment to read; the process's own by default.

    Raises:
        StartupError: A standard variable is no URL.
    """
    environ = os.environ if environ is None else environ
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    if settings.otlp_endpoint is not None:
        return _below(settings.otlp_endpoint)
    if environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() == "none":
        return None
    for variable, in_full in ((OTLP_TRACES_VARIABLE, str), (OTLP_VARIABLE, _below)):
        url = environ.get(variable, "").strip()
        if url:
            try:
                _require_http_url(url)
            except ValueError:
                raise StartupError(f"{variable} has to be an absolute http or https URL") from None
            return in_full(url)
    return None


def _below(endpoint: str) -> str:
    """Where a collector takes traces."""
    return endpoint if endpoint.endswith(_TRACES_PATH) else endpoint.rstrip("/") + _TRACES_PATH


def client_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """What the environment says to `inpaint-service inpaint`: values by variable, those of `CLIENT_VARIABLES` alone.

    Args:
        environ: The environment to read; the process's own by default.
    """
    environ = os.environ if environ is None else environ
    return {name: environ[name] for name in CLIENT_VARIABLES if environ.get(name, "").strip()}


def given_variables(environ: Mapping[str, str] | None = None) -> tuple[list[str], list[str]]:
    """The variables with our prefix that are set, by name: those of settings, and those that mean nothing to `serve`.

    Args:
        environ: The environment to read; the process's own by default.
    """
    environ = os.environ if environ is None else environ
    known = {environment_variable(name) for name in Settings.model_fields}
    ours = sorted(name for name in environ if name.startswith(ENVIRONMENT_PREFIX) and name not in CLIENT_VARIABLES)
    return [name for name in ours if name in known], [name for name in ours if name not in known]


def environment_variable(name: str) -> str:
    """The environment variable of a setting."""
    return f"{ENVIRONMENT_PREFIX}{name.upper()}"


def setting_label(name: str) -> str:
    """What an error calls a setting: its variable and its flag."""
    return f"{environment_variable(name)} / --{name.replace('_', '-')}"
