"""Schedules do what diffusers' own schedulers do in the stock pipeline's loop."""

import copy
import functools
import inspect
import itertools
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    PNDMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import retrieve_timesteps

from service.errors import ErrorCode, InpaintError
from service.worker.probe import Steps
from service.worker.sampler import MAX_HISTORY, InstancePlan, Schedule, SchedulePlanner
from service.worker.schedulers import make_scheduler, names_taking, scheduler_names, takes_eta

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # diffusers with numpy 2
    pytest.mark.filterwarnings("ignore:Should have t:UserWarning"),  # torchsde, of times rounded to float32
]

TOLERANCE = 1e-5
"""Of the largest final latent, for what differs because both sides compute in float32 in another order."""

COARSE = {name: 5e-5 for name in scheduler_names() if name.startswith(("heun", "dpm2_a"))}
"""The same for two schedulers whose own float32 steps are that far from the same steps in float64, the tables
a tenth of it: they subtract nearly equal latents and divide by small differences of noise level."""

ROUNDING = 2 * torch.finfo(torch.float32).eps
"""The same, of the largest latent on the way: with few steps from a high noise level it is what shows."""

SHAPE = (1, 4, 8, 8)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STABLE_DIFFUSION = {**BETAS, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}

NAMES = scheduler_names()
PLAIN_NAMES = tuple(name for name in NAMES if not name.endswith(("_karras", "_exponential", "_beta")))


@functools.cache
def ddim(**settings: Any) -> DDIMScheduler:
    """A checkpoint's scheduler, with the settings of Stable Diffusion 1.5 unless told otherwise."""
    return DDIMScheduler(**{**STABLE_DIFFUSION, **settings})


@pytest.fixture(scope="module")
def planner() -> SchedulePlanner:
    return SchedulePlanner(ddim())


@dataclass(frozen=True)
class Case:
    """One image to denoise, without a UNet."""

    name: str
    steps: int = 5
    strength: float = 1.0
    eta: float = 0.0
    seed: int = 3
    is_plain_unet: bool = False
    timesteps: tuple[int, ...] | None = None
    sigmas: tuple[float, ...] | None = None

    @property
    def start(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Image latents, noise and mask."""
        generator = torch.Generator().manual_seed(self.seed)
        image, noise, mask = (torch.randn(SHAPE, generator=generator) for _ in range(3))
        return 0.9 * image, noise, (mask > 0).float()


def fake_unet(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Some nonlinear function of what a UNet is given, cheap and of a UNet's magnitude."""
    return torch.tanh(1.5 * x) + 0.3 * torch.cos(3 * x + timestep.float() / 300)


@functools.lru_cache
def _unused_scheduler(name: str, base: SchedulerMixin) -> SchedulerMixin:
    """To copy: some take long to construct."""
    return make_scheduler(name, {**base.config, "_class_name": type(base).__name__}, seed=Case.seed)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a loop ends with: latents, the largest on the way, and the generator's state."""

    latents: torch.Tensor
    largest: float
    generator: torch.Tensor


def run_stock(case: Case, base: SchedulerMixin) -> Outcome:
    """The loop of `StableDiffusionInpaintPipeline.__call__`."""
    scheduler = copy.deepcopy(_unused_scheduler(case.name, base))
    image, noise, mask = case.start
    generator = torch.Generator().manual_seed(case.seed)
    _, num_steps = retrieve_timesteps(scheduler, case.steps, "cpu", case.timesteps, case.sigmas)
    num_left = min(int(num_steps * case.strength), num_steps)
    begin = (num_steps - num_left) * scheduler.order
    timesteps = scheduler.timesteps[begin:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    if case.strength == 1.0:
        latents = noise * scheduler.init_noise_sigma
    else:
        latents = scheduler.add_noise(image, noise, timesteps[:1])
    largest = float(latents.abs().max())
    accepted = inspect.signature(scheduler.step).parameters
    kwargs: dict[str, Any] = {"eta": case.eta, "generator": generator}
    kwargs = {key: value for key, value in kwargs.items() if key in accepted}
    for i, t in enumerate(timesteps):
        noise_pred = fake_unet(scheduler.scale_model_input(latents, t), t)
        latents = scheduler.step(noise_pred, t, latents, **kwargs, return_dict=False)[0]
        if case.is_plain_unet:
            known = image
            if i < len(timesteps) - 1:
                known = scheduler.add_noise(image, noise, torch.tensor([timesteps[i + 1]]))
            latents = (1 - mask) * known + mask * latents
        largest = max(largest, float(latents.abs().max()))
    return Outcome(latents, largest, generator.get_state())


def run_plan(case: Case, plan: Schedule | InstancePlan) -> Outcome:
    """The same, by the schedule."""
    image, noise, mask = case.start
    generator = torch.Generator().manual_seed(case.seed)
    state = torch.zeros(1 + MAX_HISTORY, *SHAPE[1:])
    state[0] = (plan.initial[0] * image + plan.initial[1] * noise)[0]
    instance = plan.start() if isinstance(plan, InstancePlan) else None
    for call, timestep in enumerate(plan.timesteps):
        x = state[:1]
        if isinstance(plan, Schedule):
            noise_pred = fake_unet(plan.input_scale[call] * x, timestep)
            drawn = torch.randn(SHAPE, generator=generator) if plan.draws_noise[call] else torch.zeros(SHAPE)
            inputs = torch.cat([state, noise_pred, drawn])
            state = (plan.transition[call] @ inputs.flatten(1)).view_as(state)
        else:
            assert instance is not None
            noise_pred = fake_unet(instance.scale(x, call), timestep)
            state = torch.cat([instance.step(noise_pred, x, call, generator), state[1:]])
        if case.is_plain_unet:
            known = plan.renoise[call, 0] * image + plan.renoise[call, 1] * noise
            state = torch.cat([(1 - mask) * known + mask * state[:1], state[1:]])
    return Outcome(state[:1], float("nan"), generator.get_state())


def plan_of(planner: SchedulePlanner, case: Case) -> Schedule | InstancePlan:
    steps = Steps(case.steps, case.strength, case.timesteps, case.sigmas)
    return planner.plan(case.name, steps, eta=case.eta, seed=case.seed)


def assert_equals_stock(case: Case, planner: SchedulePlanner, base: SchedulerMixin, *, is_exact: bool = False) -> None:
    """Latents within the tolerance, or the same to the last bit, and the same draws from the generator."""
    expected, actual = run_stock(case, base), run_plan(case, plan_of(planner, case))
    assert expected.latents.isfinite().all()
    assert torch.equal(actual.generator, expected.generator), f"{case}: other draws than stock"
    difference = float((actual.latents - expected.latents).abs().max())
    tolerance = COARSE.get(case.name, TOLERANCE)
    allowed = tolerance * float(expected.latents.abs().max()) + ROUNDING * expected.largest
    assert difference <= (0.0 if is_exact else allowed), case


def etas(name: str) -> tuple[float, ...]:
    return (0.0, 0.7) if takes_eta(name) else (0.0,)


# --- equal to stock ----------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_schedule_equals_stock(name: str, planner: SchedulePlanner) -> None:
    """Every scheduler, at any number of steps, strength and η, gives stock's latents and draws stock's noise."""
    for steps, strength, eta in itertools.product((1, 2, 5, 20), (1.0, 0.6, 0.3), etas(name)):
        if int(steps * strength) >= 1:
            assert_equals_stock(Case(name, steps, strength, eta), planner, ddim())


@pytest.mark.parametrize("name", NAMES)
def test_v_prediction_equals_stock(name: str) -> None:
    """Every scheduler leads through stock's latents where the UNet predicts v; one that cannot read it says so."""
    base = ddim(prediction_type="v_prediction")
    planner = SchedulePlanner(base)
    for strength in (1.0, 0.6):
        case = Case(name, steps=6, strength=strength)
        try:
            run_stock(case, base)
        except (ValueError, NotImplementedError):
            with pytest.raises(InpaintError) as refusal:
                plan_of(planner, case)
            assert refusal.value.field == "scheduler"
        else:
            assert_equals_stock(case, planner, base)


@pytest.mark.parametrize("name", PLAIN_NAMES)
def test_known_region_is_noised_as_stock_does(name: str, planner: SchedulePlanner) -> None:
    """With a 4-channel UNet, the region to keep is put back after each step at stock's noise level."""
    for strength in (1.0, 0.6):
        case = Case(name, steps=7, strength=strength, is_plain_unet=True)
        assert_equals_stock(case, planner, ddim())
        assert plan_of(planner, case).renoise[-1].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    "settings",
    [
        {"prediction_type": "v_prediction"},
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
    ],
    ids=["v_prediction", "linear_betas", "zero_snr"],
)
def test_schedule_equals_stock_for_other_checkpoints(settings: Mapping[str, Any]) -> None:
    """What the checkpoint's scheduler configuration says is kept when a request names another scheduler."""
    base = ddim(**settings)
    planner = SchedulePlanner(base)
    for name, strength in itertools.product(PLAIN_NAMES, (1.0, 0.6)):
        assert_equals_stock(Case(name, strength=strength), planner, base)


def test_sample_prediction_equals_stock_or_is_refused_with_it() -> None:
    """With a UNet that predicts the sample, schedulers that stock runs are equal, the others are a client's error."""
    base = ddim(prediction_type="sample")
    planner = SchedulePlanner(base)
    refused = []
    for name in PLAIN_NAMES:
        try:
            run_stock(Case(name), base)
        except (NotImplementedError, ValueError):
            with pytest.raises(InpaintError) as refusal:
                plan_of(planner, Case(name))
            assert refusal.value.code is ErrorCode.UNKNOWN_SCHEDULER
            refused.append(name)
        else:
            assert_equals_stock(Case(name), planner, base)
    assert "ddim" not in refused
    assert refused


# --- tables ------------------------------------------------------------------


def test_linear_schedulers_are_tables(planner: SchedulePlanner) -> None:
    """Only the scheduler that has noise of its own needs an instance per image."""
    instances = {name for name in NAMES if isinstance(plan_of(planner, Case(name)), InstancePlan)}
    assert instances == {name for name in NAMES if name.startswith("dpmpp_sde")}


def test_tables_use_all_the_history_they_have_room_for(planner: SchedulePlanner) -> None:
    """`MAX_HISTORY` is what the schedulers need and no more, and tables stack whatever the scheduler."""
    plans = [plan for name in NAMES if isinstance(plan := plan_of(planner, Case(name)), Schedule)]
    assert {plan.transition.shape[1:] for plan in plans} == {(1 + MAX_HISTORY, MAX_HISTORY + 3)}
    assert any(plan.transition[:, :, MAX_HISTORY].any() for plan in plans)
    for plan in plans:
        tensors = (plan.timesteps, plan.input_scale, plan.transition, plan.renoise)
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
        assert {len(tensor) for tensor in tensors} == {len(plan.draws_noise)}


def test_batch_of_different_schedules_equals_one_at_a_time(planner: SchedulePlanner) -> None:
    """Images at different places of different schedules advance together by one product as they do alone."""
    cases = [Case(name, steps=steps) for name, steps in zip(PLAIN_NAMES, itertools.cycle((4, 7, 9)), strict=False)]
    plans = [(case, plan) for case in cases if isinstance(plan := plan_of(planner, case), Schedule)]
    generators = [torch.Generator().manual_seed(case.seed) for case, _ in plans]
    states = torch.zeros(len(plans), 1 + MAX_HISTORY, *SHAPE[1:])
    for state, (case, plan) in zip(states, plans, strict=True):
        state[0] = plan.initial[1] * case.start[1][0]
    calls = [0] * len(plans)
    for tick in itertools.count():
        # One image joins at each tick.
        running = [i for i, (_, plan) in enumerate(plans) if i <= tick and calls[i] < len(plan.timesteps)]
        if not running:
            break
        here = [(plans[i][1], calls[i]) for i in running]
        noise_pred = [
            fake_unet(plan.input_scale[call] * states[i, 0], plan.timesteps[call])
            for i, (plan, call) in zip(running, here, strict=True)
        ]
        drawn = [
            torch.randn(SHAPE, generator=generators[i])[0] if plan.draws_noise[call] else torch.zeros(SHAPE[1:])
            for i, (plan, call) in zip(running, here, strict=True)
        ]
        inputs = torch.cat([states[running], torch.stack(noise_pred)[:, None], torch.stack(drawn)[:, None]], dim=1)
        tables = torch.stack([plan.transition[call] for plan, call in here])
        states[running] = torch.bmm(tables, inputs.flatten(2)).view_as(states[running])
        for i in running:
            calls[i] += 1
    assert tick > len(plans)
    for state, (case, plan) in zip(states, plans, strict=True):
        torch.testing.assert_close(state[:1], run_plan(case, plan).latents, rtol=1e-5, atol=1e-5, msg=case.name)


# --- what is no table --------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "names"),
    [
        (ddim(clip_sample=True, clip_sample_range=1.0), ("ddim", "ddpm", "heun", "lcm")),
        (ddim(clip_sample=True, clip_sample_range=40.0), ("ddim", "ddpm")),
        (ddim(thresholding=True), ("ddim", "ddpm", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s", "unipc", "deis", "lcm")),
    ],
    ids=["clip", "wide_clip", "thresholding"],
)
def test_clipping_and_thresholding_are_exact(base: SchedulerMixin, names: Sequence[str]) -> None:
    """A scheduler that is not linear is noticed, run as it is, and its latents are stock's to the last bit."""
    planner = SchedulePlanner(base)
    for name, strength, eta in itertools.product(names, (1.0, 0.6), (0.0, 0.7)):
        case = Case(name, strength=strength, eta=eta)
        assert isinstance(plan_of(planner, case), InstancePlan), name
        assert_equals_stock(case, planner, base, is_exact=True)


def test_more_history_than_tables_hold_is_exact() -> None:
    """A checkpoint's own scheduler of unusually high order is run as it is."""
    base = UniPCMultistepScheduler(**BETAS, solver_order=4)
    planner = SchedulePlanner(base)
    case = Case("unipc", steps=9)
    assert isinstance(plan_of(planner, case), InstancePlan)
    assert_equals_stock(case, planner, base, is_exact=True)


def test_noise_of_its_own_follows_the_seed(planner: SchedulePlanner) -> None:
    """A scheduler that ignores the generator is seeded by the image's seed: same seed, same latents."""
    case = Case("dpmpp_sde")
    plans = [planner.plan("dpmpp_sde", Steps(5, 1.0), eta=0.0, seed=seed) for seed in (7, 8, 7)]
    first, second, third = (run_plan(case, plan).latents for plan in plans)
    assert torch.equal(first, third)
    assert not torch.allclose(first, second)


def test_instances_do_not_share_state(planner: SchedulePlanner) -> None:
    """Two images of one plan, stepped in turns, do not disturb each other."""
    case = Case("dpmpp_sde")
    plan = plan_of(planner, case)
    assert isinstance(plan, InstancePlan)
    expected = run_plan(case, plan).latents
    instances = [plan.start(), plan.start()]
    latents = [plan.initial[1] * case.start[1]] * 2
    for call, timestep in enumerate(plan.timesteps):
        for image, instance in enumerate(instances):
            noise_pred = fake_unet(instance.scale(latents[image], call), timestep)
            latents[image] = instance.step(noise_pred, latents[image], call, torch.Generator())
    assert torch.equal(latents[0], expected)
    assert torch.equal(latents[1], expected)


# --- planning ----------------------------------------------------------------


def test_planning_leaves_the_global_random_state_alone() -> None:
    """Planning neither uses nor moves the process's random state."""
    plans = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        planner = SchedulePlanner(ddim())
        plans.append([plan_of(planner, Case(name, eta=0.7)) for name in PLAIN_NAMES])
        assert torch.equal(torch.get_rng_state(), before)
    for one, other in zip(*plans, strict=True):
        assert type(one) is type(other)
        if isinstance(one, Schedule) and isinstance(other, Schedule):
            assert torch.equal(one.transition, other.transition)


@pytest.mark.parametrize(
    "base",
    [
        ddim(),
        PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
        DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True),
    ],
    ids=["ddim", "pndm", "dpmpp_2m_karras"],
)
def test_planning_is_silent(base: SchedulerMixin) -> None:
    """No warning and no log line for doing what a request may ask for."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("diffusers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            planner = SchedulePlanner(base)
            for name in PLAIN_NAMES:
                plan_of(planner, Case(name))
    finally:
        logger.removeHandler(handler)
    assert lines == []
    assert [str(warning.message) for warning in caught] == []


def test_plans_are_kept(planner: SchedulePlanner) -> None:
    """A schedule is worked out once for all seeds, and once for all η where the scheduler takes none."""
    first = planner.plan("unipc", Steps(6, 1.0), eta=0.0, seed=1)
    assert planner.plan("unipc", Steps(6, 1.0), eta=0.5, seed=2) is first
    assert planner.plan("unipc", Steps(6, 0.9), eta=0.0, seed=1) is not first
    ddim_plan = planner.plan("ddim", Steps(6, 1.0), eta=0.0, seed=1)
    assert planner.plan("ddim", Steps(6, 1.0), eta=0.5, seed=1) is not ddim_plan


def test_plan_does_not_depend_on_earlier_plans() -> None:
    """Schedulers that change their own configuration leave no trace in later schedules."""
    used = SchedulePlanner(ddim())
    for steps in (3, 8, 5):
        plan_of(used, Case("dpmpp_2s", steps=steps))
    for steps in (4, 7):
        fresh = plan_of(SchedulePlanner(ddim()), Case("dpmpp_2s", steps=steps))
        plan = plan_of(used, Case("dpmpp_2s", steps=steps))
        assert isinstance(plan, Schedule)
        assert isinstance(fresh, Schedule)
        assert torch.equal(plan.transition, fresh.transition)


@pytest.mark.parametrize(
    ("case", "code"),
    [
        (Case("ddim", steps=2, strength=0.4), ErrorCode.OUT_OF_RANGE),
        (Case("ddim", steps=1, strength=0.99), ErrorCode.OUT_OF_RANGE),
        (Case("lcm", steps=LCMScheduler().config.original_inference_steps + 1), ErrorCode.OUT_OF_RANGE),
        (Case("ddim", steps=1001), ErrorCode.OUT_OF_RANGE),
        (Case("nonesuch"), ErrorCode.UNKNOWN_SCHEDULER),
    ],
    ids=["no_step_left", "one_step_less_than_whole", "lcm_steps", "train_steps", "unknown"],
)
def test_what_cannot_run_is_the_clients_error(case: Case, code: ErrorCode, planner: SchedulePlanner) -> None:
    """A schedule without a step, or one that the scheduler refuses, is told with its code."""
    with pytest.raises(InpaintError) as refusal:
        plan_of(planner, case)
    assert refusal.value.code is code


TIMESTEPS = (981, 800, 633, 400, 250, 100, 21)
SIGMAS = (14.0, 8.5, 4.2, 2.0, 1.1, 0.4, 0.05)


@pytest.mark.parametrize(("argument", "values"), [("timesteps", TIMESTEPS), ("sigmas", SIGMAS)])
def test_given_lists_replace_the_schedule(argument: str, values: tuple[Any, ...], planner: SchedulePlanner) -> None:
    """`timesteps` and `sigmas` lead through stock's latents, at any strength, where a scheduler takes them."""
    base = ddim()
    names = names_taking(argument, values, {**base.config, "_class_name": "DDIMScheduler"})
    assert {"timesteps": {"euler", "heun", "ddpm", "dpmpp_2m", "lcm"}, "sigmas": {"euler"}}[argument] <= set(names)
    for name in names:
        for strength in (1.0, 0.8):
            assert_equals_stock(Case(name, strength=strength, **{argument: values}), planner, base)


@pytest.mark.parametrize(
    ("name", "argument"),
    [("ddim", "timesteps"), ("euler_karras", "timesteps"), ("ddim", "sigmas"), ("unipc", "sigmas")],
)
def test_lists_that_a_scheduler_does_not_take(name: str, argument: str, planner: SchedulePlanner) -> None:
    """They are the client's error, and the field at fault is named."""
    base = ddim()
    assert name not in names_taking(argument, TIMESTEPS, {**base.config, "_class_name": "DDIMScheduler"})
    with pytest.raises(InpaintError) as refusal:
        plan_of(planner, Case(name, **{argument: TIMESTEPS}))
    assert (refusal.value.code, refusal.value.field) == (ErrorCode.OUT_OF_RANGE, argument)


def test_number_of_steps_is_counted_as_users_do(planner: SchedulePlanner) -> None:
    """Steps after `strength` are reported, whatever number of model calls a scheduler makes of them."""
    for name, calls in (("ddim", 6), ("pndm", 7), ("heun", 11), ("dpm2", 11)):
        plan = plan_of(planner, Case(name, steps=10, strength=0.6))
        assert plan.num_inference_steps == 6
        assert len(plan.timesteps) == calls
