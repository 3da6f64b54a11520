"""The scalar fields of an inpainting request: their spelling, bounds and defaults."""

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from service.api.ip_adapter import SCALE_SCHEMA, IpAdapterScale
from service.api.json_text import fault, read_json
from service.api.loras import LORAS_SCHEMA, LoraChoice, parse_loras
from service.api.scales import read_block_scales, read_scale
from service.errors import ErrorCode
from service.fitting import Size
from service.imaging import OutputFormat
from service.messages import ModelInfo
from service.request import Batching, FreeU, InpaintParams, IpAdapterUse, LoraUse, Output, PromptSyntax

MAX_PROMPT_CHARACTERS = 2000
MAX_STEPS = 150
MAX_IMAGES_PER_PROMPT = 8
MAX_CLIP_SKIP = 10
MAX_SEED = 2**32 - 1
MAX_MARGIN = 65_535
MAX_SIGMA = 1000
SIDE_MULTIPLE = 8

_OUTPUTS: Mapping[str, Output] = {"npy": "floats", "latent": "latents"}

# Height and width lie between these, in sides of the square that the model was trained on.
_MIN_NATIVE_SIZES = 1 / 8
_MAX_NATIVE_SIZES = 4

_INTEGER = re.compile(r"-?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE)
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}

# More digits than any bound has: not worth converting.
_MAX_DIGITS = 40


def _integer(value: object) -> object:
    """Read "20", but neither "20.0", "2e1" nor " 20"."""
    if not isinstance(value, str):
        return value
    if not _INTEGER.fullmatch(value):
        raise fault(ErrorCode.INVALID_FIELD, "Input should be a whole number in decimal digits")
    return int(value) if len(value) <= _MAX_DIGITS else int(value[: _MAX_DIGITS - 1] + "1")


def _number(value: object) -> object:
    """Read "7.5", "7" and "7.5e0"; also "nan" and "1e400", which no bound admits."""
    if not isinstance(value, str):
        return value
    if not _NUMBER.fullmatch(value):
        raise fault(ErrorCode.INVALID_FIELD, "Input should be a decimal number")
    return float(value)


def _boolean(value: object) -> object:
    if not isinstance(value, str):
        return value
    if value not in _BOOLEANS:
        raise fault(ErrorCode.INVALID_FIELD, "Input should be true, false, 1 or 0")
    return _BOOLEANS[value]


def _require_text(value: str) -> str:
    """Refuse what no tokenizer can read."""
    if "\0" in value:
        raise fault(ErrorCode.INVALID_PROMPT, "Input should not contain NUL")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise fault(ErrorCode.INVALID_PROMPT, "Input should be valid Unicode") from None
    return value


def _require_words(value: str) -> str:
    if not value.strip():
        raise fault(ErrorCode.INVALID_PROMPT, "Input should not be blank")
    return value


def _json(value: object) -> object:
    return read_json(value) if isinstance(value, str) else value


def _loras(value: object) -> object:
    return parse_loras(value) if isinstance(value, str) else value


def _ip_adapter_scale(value: object) -> object:
    """Read a number, or a JSON object with one for each block."""
    if not isinstance(value, str):
        return value
    if value.startswith("{"):
        return IpAdapterScale(0.0, read_block_scales(read_json(value, has_integers=False)))
    return IpAdapterScale(read_scale(_number(value)))


def _whole_number(value: object) -> object:
    """In JSON, 3 but neither 3.0, "3" nor true."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise fault(ErrorCode.INVALID_FIELD, "Input should be a list of whole numbers")
    return value


def _real_number(value: object) -> object:
    """In JSON, 3 or 3.5 but neither "3" nor true."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise fault(ErrorCode.INVALID_FIELD, "Input should be made of numbers")
    return value


def _require_descending(values: tuple[float, ...]) -> tuple[float, ...]:
    if any(later >= earlier for earlier, later in pairwise(values)):
        raise fault(ErrorCode.OUT_OF_RANGE, "Input should be in descending order")
    return values


Integer = Annotated[int, Field(strict=True), BeforeValidator(_integer)]
Number = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_number)]
Boolean = Annotated[bool, Field(strict=True), BeforeValidator(_boolean)]
JsonInteger = Annotated[int, Field(ge=0), BeforeValidator(_whole_number)]
JsonNumber = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_real_number)]
Text = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS), AfterValidator(_require_text)]

# Optional fields: with the bounds inside the union, where the schema shows them as such.
Steps = Annotated[int, Field(strict=True, ge=1, le=MAX_STEPS), BeforeValidator(_integer)]
Seed = Annotated[int, Field(strict=True, ge=0, le=MAX_SEED), BeforeValidator(_integer)]
Side = Annotated[int, Field(strict=True, ge=SIDE_MULTIPLE, multiple_of=SIDE_MULTIPLE), BeforeValidator(_integer)]
Margin = Annotated[int, Field(strict=True, ge=0, le=MAX_MARGIN), BeforeValidator(_integer)]
Timeout = Annotated[float, Field(allow_inf_nan=False, gt=0), BeforeValidator(_number)]
Prompt = Annotated[
    str,
    Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS),
    AfterValidator(_require_text),
    AfterValidator(_require_words),
]
Timesteps = Annotated[
    tuple[JsonInteger, ...],
    Field(min_length=1, max_length=MAX_STEPS),
    BeforeValidator(_json),
    AfterValidator(_require_descending),
]
Sigmas = Annotated[
    tuple[Annotated[JsonNumber, Field(gt=0, le=MAX_SIGMA)], ...],
    Field(min_length=2, max_length=MAX_STEPS),
    BeforeValidator(_json),
    AfterValidator(_require_descending),
]
FreeUFactor = Annotated[JsonNumber, Field(ge=0, le=10)]


class FreeUFactors(BaseModel):
    """FreeU's factors: s for skip connections, b for backbone features."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    s1: FreeUFactor
    s2: FreeUFactor
    b1: FreeUFactor
    b2: FreeUFactor


Loras = Annotated[tuple[LoraChoice, ...], PlainValidator(_loras), WithJsonSchema(LORAS_SCHEMA)]
IpAdapterScaleField = Annotated[IpAdapterScale, PlainValidator(_ip_adapter_scale), WithJsonSchema(SCALE_SCHEMA)]
FreeUField = Annotated[FreeUFactors, BeforeValidator(_json)]


class InpaintFields(BaseModel):
    """The scalar fields of an inpainting request, in the documented order.

    Values are read from the text of form fields. Validation needs the served
    model as its context, because some bounds are the model's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Prompt | None = Field(None, description="What to paint; required unless `prompt_embeds` is sent.")
    negative_prompt: Text = Field("", description="What to steer away from; unused when guidance is off.")
    num_inference_steps: Steps | None = Field(
        None, description="Denoising steps; by default what the server is set to, see `/v1/models`."
    )
    prompt_syntax: PromptSyntax = Field(
        "plain",
        description="`a1111` reads both prompts as AUTOMATIC1111's web UI does: `(red:1.3)`, `[grey]`, `BREAK`, and "
        "more tokens than the text encoder takes at once.",
    )
    timesteps: Timesteps | None = Field(
        None,
        description="JSON list of timesteps in the place of the scheduler's own, in descending order; see "
        "`timesteps_schedulers` in `/v1/models`.",
    )
    sigmas: Sigmas | None = Field(
        None,
        description="JSON list of noise levels in the place of the scheduler's own, in descending order; see "
        "`sigmas_schedulers` in `/v1/models`.",
    )
    guidance_scale: Number = Field(7.5, ge=0, le=30, description="Weight of the prompt; ≤ 1 turns guidance off.")
    strength: Number = Field(
        1.0, gt=0, le=1, description="Share of the steps to run; below 1 some of the picture under the mask remains."
    )
    num_images_per_prompt: Integer = Field(
        1,
        ge=1,
        le=MAX_IMAGES_PER_PROMPT,
        description="Images to paint; image i uses seed + i. More than one needs `application/json`.",
    )
    seed: Seed | None = Field(None, description="Random by default, and always reported back.")
    scheduler: str | None = Field(
        None,
        validate_default=True,
        description="Noise scheduler, one of those in `/v1/models`; by default the checkpoint's own.",
    )
    eta: Number = Field(0.0, ge=0, le=1, description="η of DDIM; other schedulers ignore it.")
    height: Side | None = Field(
        None,
        description="Working height, from 1/8 of the model's native size to 4 times it; by default chosen from the "
        "picture.",
    )
    width: Side | None = Field(
        None,
        description="Working width, from 1/8 of the model's native size to 4 times it; by default chosen from the "
        "picture.",
    )
    padding_mask_crop: Margin | None = Field(
        None, description="Paint a crop around the mask with a margin of so many pixels."
    )
    clip_skip: Integer = Field(
        0, ge=0, le=MAX_CLIP_SKIP, description="Text-encoder layers to skip; positive prompt only."
    )
    loras: Loras = Field(
        (),
        description='LoRAs, as JSON: `[{"name": "pencil", "scale": 0.8}]`, of those in `/v1/adapters`. A scale may be '
        'an object: `{"unet": 0.8, "text_encoder": 0.5}`, and that of the UNet one by block, as in `set_adapters`.',
    )
    ip_adapter_scale: IpAdapterScaleField | None = Field(
        None,
        description="How much `ip_adapter_image` or its embeddings count. A number, or one by block as JSON, as in "
        '`set_ip_adapter_scale`: `{"down": {"block_2": [0.0, 1.0]}, "up": {"block_0": [0.0, 1.0, 0.0]}}`; blocks that '
        "are left out have 0.",
    )
    freeu: FreeUField | None = Field(
        None, description='FreeU, as JSON: `{"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4}` for Stable Diffusion 1.x.'
    )
    mask_blur: Integer = Field(0, ge=0, le=64, description="Blur the mask by so many pixels; feathers the paste.")
    mask_grow: Integer = Field(0, ge=0, le=64, description="Widen the mask by so many pixels.")
    mask_invert: Boolean = Field(False, description="Repaint what is black and keep what is white.")
    composite: Boolean = Field(
        True,
        description="Paste back, so that pixels outside the mask are the upload's own; false: all that was painted.",
    )
    output_format: OutputFormat = Field(
        "png",
        description="Encoding of the images; `npy` is a float32 array from 0 to 1, (height, width, 3), and `latent` "
        "the scaled latents as such an array, (channels, height / 8, width / 8).",
    )
    previews: Boolean = Field(
        False, description="Show pictures of unfinished steps in `text/event-stream` answers, at most ten."
    )
    batching: Batching = Field("shared", description="`solo` asks for a batch of its own: bitwise repeatable.")
    timeout: Timeout | None = Field(
        None, description="Seconds that the client waits; the server's own limit applies anyway."
    )

    @field_validator("strength")
    @classmethod
    def _run_a_step(cls, strength: float, info: ValidationInfo) -> float:
        """Stock raises when `strength` leaves no step to run."""
        given = [info.data.get(name, ()) for name in ("timesteps", "sigmas")]
        if "num_inference_steps" not in info.data or () in given or any(given):
            return strength  # A field with a fault of its own, or a list that the scheduler will count.
        steps = info.data["num_inference_steps"] or _model(info).default_steps
        if int(steps * strength) < 1:
            raise fault(ErrorCode.OUT_OF_RANGE, f"Input should leave at least one of {steps} steps to run")
        return strength

    @field_validator("scheduler")
    @classmethod
    def _know_scheduler(cls, scheduler: str | None, info: ValidationInfo) -> str | None:
        names = _model(info).schedulers
        if scheduler is not None and scheduler not in names:
            raise fault(ErrorCode.UNKNOWN_SCHEDULER, f"Input should be one of: {', '.join(names)}")
        return scheduler

    @field_validator("timesteps")
    @classmethod
    def _bound_timesteps(cls, timesteps: tuple[int, ...] | None, info: ValidationInfo) -> tuple[int, ...] | None:
        limit = _model(info).num_train_timesteps
        if timesteps is not None and timesteps[0] >= limit:
            raise fault(ErrorCode.OUT_OF_RANGE, f"Input should be less than {limit}")
        return timesteps

    @field_validator("sigmas")
    @classmethod
    def _choose_a_list(cls, sigmas: tuple[float, ...] | None, info: ValidationInfo) -> tuple[float, ...] | None:
        if sigmas is not None and info.data.get("timesteps") is not None:
            raise fault(ErrorCode.INVALID_FIELD, "Input should not be sent beside timesteps")
        return sigmas

    @field_validator("scheduler")
    @classmethod
    def _take_lists(cls, scheduler: str | None, info: ValidationInfo) -> str | None:
        """Refuse a scheduler for the lists that came with it; see `service.worker.schedulers.names_taking`."""
        model = _model(info)
        name = scheduler or model.default_scheduler
        for argument, names in (("timesteps", model.timesteps_schedulers), ("sigmas", model.sigmas_schedulers)):
            if info.data.get(argument) and name not in names:
                raise fault(ErrorCode.INVALID_FIELD, f"Input should take {argument}: {', '.join(names) or 'none does'}")
        return scheduler

    @field_validator("height", "width")
    @classmethod
    def _bound_side(cls, side: int | None, info: ValidationInfo) -> int | None:
        min_side, max_side = side_bounds(_model(info))
        if side is not None and not min_side <= side <= max_side:
            raise fault(ErrorCode.OUT_OF_RANGE, f"Input should be from {min_side} to {max_side}")
        return side

    def params(
        self,
        model: ModelInfo,
        working: Size,
        seed: int,
        loras: tuple[LoraUse, ...],
        ip_adapter: IpAdapterUse | None,
    ) -> InpaintParams:
        """The parameters with every default filled in.

        Args:
            model: The served model.
            working: The working size.
            seed: Used when the client named none.
            loras: The files that `loras` names.
            ip_adapter: How to use the IP-Adapter.
        """
        return InpaintParams(
            prompt=self.prompt or "",
            negative_prompt=self.negative_prompt,
            num_inference_steps=self._num_steps(model),
            guidance_scale=self.guidance_scale,
            strength=self.strength,
            num_images_per_prompt=self.num_images_per_prompt,
            seed=seed if self.seed is None else self.seed,
            scheduler=self.scheduler or model.default_scheduler,
            eta=self.eta,
            clip_skip=self.clip_skip,
            height=working.height,
            width=working.width,
            batching=self.batching,
            prompt_syntax=self.prompt_syntax,
            timesteps=self.timesteps,
            sigmas=self.sigmas,
            loras=loras,
            freeu=None if self.freeu is None else FreeU(**self.freeu.model_dump()),
            ip_adapter=ip_adapter,
            embeds_guidance=model.embeds_guidance,
            output=_OUTPUTS.get(self.output_format, "pixels"),
            previews=self.previews,
        )

    def is_guided(self, model: ModelInfo) -> bool:
        """Whether a negative prompt is needed, as `InpaintParams.is_guided`."""
        return self.guidance_scale > 1 and not model.embeds_guidance

    def _num_steps(self, model: ModelInfo) -> int:
        if self.timesteps is not None:
            return len(self.timesteps)
        if self.sigmas is not None:
            return len(self.sigmas)
        return self.num_inference_steps or model.default_steps


def side_bounds(model: ModelInfo) -> tuple[int, int]:
    """Least and largest height and width that a model is asked to paint at."""
    min_side = max(model.size_multiple, round(model.native_size * _MIN_NATIVE_SIZES))
    return min_side, model.native_size * _MAX_NATIVE_SIZES


def _model(info: ValidationInfo) -> ModelInfo:
    assert isinstance(info.context, ModelInfo)  # noqa: S101 - for the type checker: see InpaintFields
    return info.context
