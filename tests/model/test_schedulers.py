"""The scheduler names: what the stock pipeline runs, and what a stock user would get by switching."""

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMInverseScheduler,
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    IPNDMScheduler,
    PNDMScheduler,
    SASolverScheduler,
    SchedulerMixin,
    StableDiffusionInpaintPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)

from service.errors import ErrorCode, InpaintError, StartupError
from service.worker import schedulers
from service.worker.probe import Steps
from service.worker.sampler import MAX_HISTORY, InstancePlan, Schedule, SchedulePlanner
from service.worker.schedulers import make_scheduler, scheduler_names, short_name, takes_eta

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # diffusers with numpy 2
    pytest.mark.filterwarnings("ignore:Should have t:UserWarning"),  # torchsde, of times rounded to float32
]

NAMES = scheduler_names()
SPACINGS = ("_karras", "_exponential", "_beta")
PLAIN_NAMES = tuple(name for name in NAMES if not name.endswith(SPACINGS))
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SIZE = 32
SEED = 5


def ddim(**settings: Any) -> DDIMScheduler:
    return DDIMScheduler(**BETAS, **{"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, **settings})


@functools.cache
def _unused(name: str) -> SchedulerMixin:
    """To copy: some take long to construct."""
    return make_scheduler(name, config_of(ddim()), seed=SEED)


def made(name: str) -> SchedulerMixin:
    return copy.deepcopy(_unused(name))


def config_of(scheduler: SchedulerMixin) -> dict[str, Any]:
    """A configuration as a checkpoint has it, with the name of its class."""
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


# --- names -------------------------------------------------------------------


def test_names_are_the_documented_ones() -> None:
    """Every name of the wire contract is there, once, and the module's table lists each."""
    assert len(set(NAMES)) == len(NAMES)
    contract = "ddim ddpm pndm lms euler euler_a heun dpm2 dpm2_a dpmpp_2m dpmpp_2m_karras dpmpp_sde dpmpp_2m_sde unipc"
    assert {*contract.split(), "deis", "lcm", "tcd"} <= set(NAMES)
    table = {line.split()[0]: line for line in (schedulers.__doc__ or "").splitlines() if line.startswith("    ")}
    for name in PLAIN_NAMES:
        assert name in table
        has_variants = {name + spacing for spacing in SPACINGS} <= set(NAMES)
        assert has_variants == (" * " in table[name]), name
    assert scheduler_names() == NAMES


def test_name_of_a_scheduler_is_the_name_it_was_made_by() -> None:
    """What a checkpoint reports as its own scheduler makes that scheduler again, with every setting."""
    for name in NAMES:
        scheduler = made(name)
        assert short_name(scheduler) == name
        if name.startswith("dpm2") and name not in PLAIN_NAMES:
            continue  # slow to construct, and their variants are set as all others' are
        again = make_scheduler(name, config_of(scheduler), seed=SEED)
        assert _settings(again) == _settings(scheduler), name


@pytest.mark.parametrize(
    ("own", "name"),
    [
        (DPMSolverMultistepScheduler(solver_order=3, use_lu_lambdas=True), "dpmpp_2m"),
        (DPMSolverMultistepScheduler(solver_type="heun", use_karras_sigmas=True), "dpmpp_2m_karras"),
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), "dpmpp_2m_sde"),
        (UniPCMultistepScheduler(solver_order=3, predict_x0=False), "unipc"),
        (EulerDiscreteScheduler(timestep_spacing="trailing", use_exponential_sigmas=True), "euler_exponential"),
        (PNDMScheduler(steps_offset=1, skip_prk_steps=True), "pndm"),
    ],
)
def test_own_scheduler_keeps_its_settings(own: SchedulerMixin, name: str) -> None:
    """The checkpoint's own scheduler is not bent to what its name stands for elsewhere."""
    assert short_name(own) == name
    assert _settings(make_scheduler(name, config_of(own), seed=SEED)) == _settings(own)


def test_corrected_settings_of_the_own_scheduler_are_kept() -> None:
    """What the stock pipeline's constructor corrects in a configuration holds, though it was a default before."""
    own = DDIMScheduler(**BETAS, clip_sample=False)
    with pytest.warns(FutureWarning, match="steps_offset"):
        pipeline = tiny_pipeline(4, own)
    expected = pipeline.scheduler
    expected.set_timesteps(4)
    made = make_scheduler("ddim", config_of(pipeline.scheduler), seed=SEED)
    made.set_timesteps(4)
    assert made.timesteps.tolist() == expected.timesteps.tolist() == [751, 501, 251, 1]


def test_unknown_names_and_classes_are_refused() -> None:
    """An unknown name is the client's error, a checkpoint with an unknown scheduler the operator's."""
    for call in (lambda: make_scheduler("nonesuch", config_of(ddim()), seed=0), lambda: takes_eta("")):
        with pytest.raises(InpaintError) as refusal:
            call()
        assert refusal.value.code is ErrorCode.UNKNOWN_SCHEDULER
    with pytest.raises(StartupError, match="IPNDMScheduler"):
        short_name(IPNDMScheduler())


@pytest.mark.parametrize(
    "base",
    [
        PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
        EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True, timestep_spacing="trailing"),
        DPMSolverMultistepScheduler(**BETAS, algorithm_type="sde-dpmsolver++", solver_order=3),
        UniPCMultistepScheduler(**BETAS, solver_type="bh1", use_beta_sigmas=True),
        DEISMultistepScheduler(**BETAS, use_exponential_sigmas=True),
        SASolverScheduler(**BETAS),
    ],
    ids=lambda base: type(base).__name__,
)
def test_any_checkpoint_can_switch_to_any_scheduler(base: SchedulerMixin) -> None:
    """Settings of one scheduler that another cannot take do not get in the way, and the name says what it is."""
    for name in PLAIN_NAMES:
        scheduler = make_scheduler(name, config_of(base), seed=SEED)
        if short_name(base) != name:
            assert short_name(scheduler) == name
        scheduler.set_timesteps(5)
        assert scheduler.config.beta_end == BETAS["beta_end"]


def test_seed_reaches_only_schedulers_with_noise_of_their_own() -> None:
    """The seed is part of a scheduler only where stock has no other way to seed it."""
    seeded = {name for name in PLAIN_NAMES if "noise_sampler_seed" in _settings(made(name))}
    assert seeded == {"dpmpp_sde"}
    assert _settings(make_scheduler("dpmpp_sde", config_of(ddim()), seed=11))["noise_sampler_seed"] == 11


def _settings(scheduler: SchedulerMixin) -> dict[str, Any]:
    """The arguments that a scheduler was constructed with."""
    names = type(scheduler)._get_init_keys(type(scheduler))
    return {key: value for key, value in scheduler.config.items() if key in names}


# --- in the stock pipeline ---------------------------------------------------


def tiny_pipeline(in_channels: int, scheduler: SchedulerMixin) -> StableDiffusionInpaintPipeline:
    """The stock pipeline with a random UNet and VAE; prompts are given as embeddings."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    pipeline = StableDiffusionInpaintPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=SIZE,
        ),
        text_encoder=None,
        tokenizer=None,
        unet=UNet2DConditionModel(
            sample_size=SIZE // 8,
            in_channels=in_channels,
            out_channels=4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            attention_head_dim=8,
            cross_attention_dim=16,
        ),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    torch.set_rng_state(state)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Recording:
    """What the stock pipeline gave its UNet and got from it, and what it started from."""

    def __init__(self) -> None:
        self.latents: list[torch.Tensor] = []
        self.timesteps: list[float] = []
        self.noise_preds: list[torch.Tensor] = []
        self.generator_state: torch.Tensor | None = None
        self.start: tuple[torch.Tensor, ...] = ()


@contextmanager
def recording(pipeline: StableDiffusionInpaintPipeline, generator: torch.Generator) -> Iterator[Recording]:
    record = Recording()
    unet, prepare_latents = pipeline.unet.forward, pipeline.prepare_latents

    def recorded_unet(sample: torch.Tensor, timestep: torch.Tensor, **kwargs: Any) -> Any:
        if record.generator_state is None:
            record.generator_state = generator.get_state()
        output = unet(sample, timestep, **kwargs)
        record.latents.append(sample[:, :4].clone())
        record.timesteps.append(float(timestep))
        record.noise_preds.append(output[0].clone())
        return output

    def recorded_prepare(*args: Any, **kwargs: Any) -> Any:
        record.start = prepare_latents(*args, **kwargs)
        return record.start

    pipeline.unet.forward, pipeline.prepare_latents = recorded_unet, recorded_prepare
    try:
        yield record
    finally:
        pipeline.unet.forward, pipeline.prepare_latents = unet, prepare_latents


@pytest.fixture(scope="module")
def pipelines() -> dict[int, StableDiffusionInpaintPipeline]:
    """By the number of the UNet's input channels."""
    return {in_channels: tiny_pipeline(in_channels, ddim()) for in_channels in (4, 9)}


@pytest.fixture(scope="module")
def planner() -> SchedulePlanner:
    return SchedulePlanner(ddim())


@pytest.mark.parametrize(
    ("name", "in_channels"), [*((name, 9) for name in NAMES), *((name, 4) for name in PLAIN_NAMES)]
)
def test_schedule_replays_the_stock_pipeline(
    name: str, in_channels: int, pipelines: dict[int, StableDiffusionInpaintPipeline], planner: SchedulePlanner
) -> None:
    """The stock pipeline itself runs with every name, and the schedule leads through the same latents.

    With the inpainting UNet at full strength; with the plain UNet, whose known
    region is put back after each step, at a strength that starts from the image.
    """
    pipeline, is_plain = pipelines[in_channels], in_channels == 4
    steps, strength = (5, 0.6) if is_plain else (3, 1.0)
    pipeline.scheduler = made(name)
    generator = torch.Generator().manual_seed(SEED)
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., : SIZE // 2] = 1.0
    source = torch.Generator().manual_seed(1)
    with recording(pipeline, generator) as stock, torch.inference_mode():
        expected = pipeline(
            prompt_embeds=torch.randn(1, 4, 16, generator=source),
            image=torch.rand(1, 3, SIZE, SIZE, generator=source),
            mask_image=mask,
            height=SIZE,
            width=SIZE,
            num_inference_steps=steps,
            strength=strength,
            guidance_scale=1.0,
            eta=0.3,
            generator=generator,
            output_type="latent",
        ).images

    plan = planner.plan(name, Steps(steps, strength), eta=0.3, seed=SEED)
    assert plan.timesteps.tolist() == pytest.approx(stock.timesteps)
    latents, noise, image = (*stock.start, None) if len(stock.start) == 2 else stock.start
    start = plan.initial[1] * noise + (plan.initial[0] * image if image is not None else 0.0)
    torch.testing.assert_close(start, latents, rtol=1e-6, atol=1e-6)

    latent_mask = torch.nn.functional.interpolate(mask, size=start.shape[2:])
    assert stock.generator_state is not None
    replayed = torch.Generator()
    replayed.set_state(stock.generator_state)
    state = torch.cat([start, torch.zeros(MAX_HISTORY, *start.shape[1:])])
    instance = plan.start() if isinstance(plan, InstancePlan) else None
    for call, noise_pred in enumerate(stock.noise_preds):
        x = state[:1]
        if isinstance(plan, Schedule):
            scaled = plan.input_scale[call] * x
            z = torch.randn(x.shape, generator=replayed) if plan.draws_noise[call] else torch.zeros_like(x)
            inputs = torch.cat([state, noise_pred, z])
            state = (plan.transition[call] @ inputs.flatten(1)).view_as(state)
        else:
            assert instance is not None
            scaled = instance.scale(x, call)
            state = torch.cat([instance.step(noise_pred, x, call, replayed), state[1:]])
        torch.testing.assert_close(scaled, stock.latents[call], rtol=1e-4, atol=1e-4)
        if is_plain:
            known = plan.renoise[call, 0] * image + plan.renoise[call, 1] * noise
            state[:1] = (1 - latent_mask) * known + latent_mask * state[:1]
    torch.testing.assert_close(state[:1], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(replayed.get_state(), generator.get_state())


@pytest.mark.parametrize("scheduler_class", [IPNDMScheduler, DDIMInverseScheduler])
def test_left_out_schedulers_do_not_run_in_stock(scheduler_class: type[SchedulerMixin]) -> None:
    """What has no name is what the stock inpainting pipeline cannot run below full strength."""
    assert not hasattr(scheduler_class.from_config(ddim().config), "add_noise")
