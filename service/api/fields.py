"""The scalar fields of an inpainting request: their spelling, bounds and defaults."""

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from service.errors import ErrorCode
from service.fitting import Size
from service.imaging import ImageFormat
from service.messages import ModelInfo
from service.request import Batching, InpaintParams

MAX_PROMPT_CHARACTERS = 2000
MAX_STEPS = 150
MAX_IMAGES_PER_PROMPT = 8
MAX_SEED = 2**32 - 1
MAX_MARGIN = 65_535
SIDE_MULTIPLE = 8

# Height and width lie between these, in sides of the square that the model was trained on.
_MIN_NATIVE_SIZES = 1 / 8
_MAX_NATIVE_SIZES = 4

_INTEGER = re.compile(r"-?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE)
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}

# More digits than any bound has: not worth converting.
_MAX_DIGITS = 40


def fault(code: ErrorCode, message: str) -> PydanticCustomError:
    """What a validator raises; the code is the error's type."""
    return PydanticCustomError(code.value, message)


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


def _refuse_arrays(value: object) -> object:
    if value in ("npy", "latent"):
        raise fault(ErrorCode.INVALID_FIELD, "This output format is not supported by this version")
    return value


Integer = Annotated[int, Field(strict=True), BeforeValidator(_integer)]
Number = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_number)]
Boolean = Annotated[bool, Field(strict=True), BeforeValidator(_boolean)]
Text = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS), AfterValidator(_require_text)]

# Optional fields: with the bounds inside the union, where the schema shows them as such.
Steps = Annotated[int, Field(strict=True, ge=1, le=MAX_STEPS), BeforeValidator(_integer)]
Seed = Annotated[int, Field(strict=True, ge=0, le=MAX_SEED), BeforeValidator(_integer)]
Side = Annotated[int, Field(strict=True, ge=SIDE_MULTIPLE, multiple_of=SIDE_MULTIPLE), BeforeValidator(_integer)]
Margin = Annotated[int, Field(strict=True, ge=0, le=MAX_MARGIN), BeforeValidator(_integer)]
Timeout = Annotated[float, Field(allow_inf_nan=False, gt=0), BeforeValidator(_number)]


class InpaintFields(BaseModel):
    """The scalar fields of an inpainting request, in the documented order.

    Values are read from the text of form fields. Validation needs the served
    model as its context, because some bounds are the model's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Annotated[Text, AfterValidator(_require_words)] = Field(min_length=1, description="What to paint.")
    negative_prompt: Text = Field("", description="What to steer away from; unused when guidance is off.")
    num_inference_steps: Steps | None = Field(
        None, description="Denoising steps; by default what the server is set to, see `/v1/models`."
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
        None, description="Noise scheduler, one of those in `/v1/models`; by default the checkpoint's own."
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
    clip_skip: Integer = Field(0, ge=0, le=10, description="Text-encoder layers to skip; positive prompt only.")
    mask_blur: Integer = Field(0, ge=0, le=64, description="Blur the mask by so many pixels; feathers the paste.")
    mask_grow: Integer = Field(0, ge=0, le=64, description="Widen the mask by so many pixels.")
    mask_invert: Boolean = Field(False, description="Repaint what is black and keep what is white.")
    composite: Boolean = Field(
        True,
        description="Paste back, so that pixels outside the mask are the upload's own; false: all that was painted.",
    )
    output_format: Annotated[ImageFormat, BeforeValidator(_refuse_arrays)] = Field(
        "png", description="Encoding of the images."
    )
    batching: Batching = Field("shared", description="`solo` asks for a batch of its own: bitwise repeatable.")
    timeout: Timeout | None = Field(
        None, description="Seconds that the client waits; the server's own limit applies anyway."
    )

    @field_validator("strength")
    @classmethod
    def _run_a_step(cls, strength: float, info: ValidationInfo) -> float:
        """Stock raises when `strength` leaves no step to run."""
        if "num_inference_steps" not in info.data:
            return strength  # That field has a fault of its own.
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

    @field_validator("height", "width")
    @classmethod
    def _bound_side(cls, side: int | None, info: ValidationInfo) -> int | None:
        min_side, max_side = side_bounds(_model(info))
        if side is not None and not min_side <= side <= max_side:
            raise fault(ErrorCode.OUT_OF_RANGE, f"Input should be from {min_side} to {max_side}")
        return side

    def params(self, model: ModelInfo, working: Size, seed: int) -> InpaintParams:
        """The parameters with every default filled in.

        Args:
            model: The served model.
            working: The working size.
            seed: Used when the client named none.
        """
        return InpaintParams(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            num_inference_steps=self.num_inference_steps or model.default_steps,
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
        )


def side_bounds(model: ModelInfo) -> tuple[int, int]:
    """Least and largest height and width that a model is asked to paint at."""
    min_side = max(model.size_multiple, round(model.native_size * _MIN_NATIVE_SIZES))
    return min_side, model.native_size * _MAX_NATIVE_SIZES


def _model(info: ValidationInfo) -> ModelInfo:
    assert isinstance(info.context, ModelInfo)  # noqa: S101 - for the type checker: see InpaintFields
    return info.context
