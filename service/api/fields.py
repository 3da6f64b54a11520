"""The scalar fields of an inpainting request, their defaults, and what they become."""

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from service.api.field_types import (
    MAX_CLIP_SKIP,
    MAX_IMAGES_PER_PROMPT,
    Boolean,
    FreeUField,
    Integer,
    IpAdapterScaleField,
    Loras,
    Margin,
    Number,
    Prompt,
    Seed,
    Side,
    Sigmas,
    Steps,
    Text,
    Timeout,
    Timesteps,
)
from service.api.json_text import fault
from service.errors import ErrorCode
from service.fitting import Size
from service.imaging import OutputFormat
from service.messages import ModelInfo
from service.request import Batching, FreeU, InpaintParams, IpAdapterUse, LoraUse, Output, PromptSyntax

_OUTPUTS: Mapping[str, Output] = {"npy": "floats", "latent": "latents"}

# Height and width lie between these, in sides of the square that the model was trained on.
_MIN_NATIVE_SIZES = 1 / 8
_MAX_NATIVE_SIZES = 4


class InpaintFields(BaseModel):
    """The scalar fields of an inpainting request, in the documented order.

    Values are read from the text of form fields. Validation needs the served
    model as its context, because some bounds are the model's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Prompt | None = Field(
        None, description="What to paint; required unless `prompt_embeds` is sent.", examples=["a red house"]
    )
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

    @field_validator("clip_skip")
    @classmethod
    def _leave_a_layer(cls, clip_skip: int, info: ValidationInfo) -> int:
        """Refuse to leave out more layers than the model's text encoder has."""
        limit = _model(info).max_clip_skip
        if clip_skip > limit:
            raise fault(ErrorCode.OUT_OF_RANGE, f"Input should be at most {limit}")
        return clip_skip

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
