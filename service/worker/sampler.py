"""Schedules: what the denoising loop needs to know of a noise scheduler.

A linear scheduler becomes a table of small matrices, so that images with
different schedulers, steps and positions advance together in one product. The
others (clipping, thresholding, noise of their own) run as one real scheduler
per image, through the same protocol.
"""

import copy
import functools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import SchedulerMixin

from service.errors import ErrorCode, InpaintError
from service.worker.probe import Steps, probe, start_schedule, step_kwargs
from service.worker.schedulers import make_scheduler, takes_eta

MAX_HISTORY = 3
"""Largest number of tensors that a supported scheduler carries from step to step; tables are padded to it."""

MAX_PLANS = 256
"""Schedules that a planner keeps; the largest are some 30 kB."""


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """One schedule: everything the denoising loop needs to know of (scheduler, steps, strength, η).

    Attributes:
        timesteps: (calls,) float32, what the UNet is given at each call, after `strength`.
        input_scale: (calls,) float32 κ: the UNet is given κ x.
        transition: (calls, 1 + K, K + 3) float32 with K = `MAX_HISTORY`; columns
            (x, h1..hK, ε, z), rows (x', h1'..hK').
        draws_noise: Whether stock draws z from the generator at that call, also where it is not used.
        initial: (a, b): the first latents are a * image latents + b * noise.
        init_noise_sigma: Factor of latents that the client gives, which are noise alone whatever `strength` is.
        renoise: (calls, 2) float32: after a call, the known region of a 4-channel UNet
            is a * image latents + b * noise; (1, 0) after the last.
        num_inference_steps: Steps as the user counts them, after `strength`.
    """

    timesteps: torch.Tensor
    input_scale: torch.Tensor
    transition: torch.Tensor
    draws_noise: tuple[bool, ...]
    initial: tuple[float, float]
    init_noise_sigma: float
    renoise: torch.Tensor
    num_inference_steps: int


@dataclass(frozen=True, slots=True, eq=False)
class InstancePlan:
    """A schedule that is no table: each image gets a scheduler of its own.

    Attributes:
        timesteps: As in `Schedule`.
        initial: As in `Schedule`.
        init_noise_sigma: As in `Schedule`.
        renoise: As in `Schedule`.
        num_inference_steps: As in `Schedule`.
        recipe: How to make the scheduler.
    """

    timesteps: torch.Tensor
    initial: tuple[float, float]
    init_noise_sigma: float
    renoise: torch.Tensor
    num_inference_steps: int
    recipe: "Recipe"

    def start(self) -> "InstanceState":
        """A scheduler for one image, at its first call."""
        return InstanceState(self.recipe)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A request's choice of scheduler, and the image's seed."""

    name: str
    base_config: Mapping[str, Any]
    steps: Steps
    eta: float
    seed: int


class InstanceState:
    """One image's own scheduler. Calls are made once each, in order.

    Args:
        recipe: How to make it.
    """

    def __init__(self, recipe: Recipe) -> None:
        scheduler = make_scheduler(recipe.name, recipe.base_config, seed=recipe.seed)
        schedule = start_schedule(scheduler, recipe.steps)
        self._scheduler = scheduler
        self._timesteps = schedule.timesteps
        self._eta = recipe.eta

    def scale(self, x: torch.Tensor, call: int) -> torch.Tensor:
        """What the UNet is given for latents `x`, (1, C, h, w)."""
        scaled: torch.Tensor = self._scheduler.scale_model_input(x, self._timesteps[call])
        return scaled

    def step(self, eps: torch.Tensor, x: torch.Tensor, call: int, generator: torch.Generator) -> torch.Tensor:
        """The latents after the UNet gave `eps` for `x`; all (1, C, h, w). Draws from `generator` as stock."""
        kwargs = step_kwargs(self._scheduler, self._eta, generator)
        stepped = self._scheduler.step(eps, self._timesteps[call], x, **kwargs, return_dict=False)
        latents: torch.Tensor = stepped[0]
        return latents


class SchedulePlanner:
    """Makes schedules for one checkpoint, and keeps the latest.

    Args:
        base_scheduler: The checkpoint's own scheduler; only its configuration is used.
    """

    def __init__(self, base_scheduler: SchedulerMixin) -> None:
        self._base_config = {**base_scheduler.config, "_class_name": type(base_scheduler).__name__}
        self._unused: dict[str, SchedulerMixin] = {}
        self._cached = functools.lru_cache(maxsize=MAX_PLANS)(self._make)

    def plan(self, name: str, steps: Steps, *, eta: float, seed: int) -> Schedule | InstancePlan:
        """The schedule of one image.

        Args:
            name: One of `scheduler_names()`.
            steps: Which steps to take.
            eta: η, for the schedulers that stock gives it to.
            seed: The image's, for schedulers with noise of their own.

        Raises:
            InpaintError: `UNKNOWN_SCHEDULER`; `OUT_OF_RANGE` where no step is left to run
                or the scheduler cannot take these.
        """
        plan = self._cached(name, steps, eta if takes_eta(name) else 0.0)
        if isinstance(plan, InstancePlan):
            return replace(plan, recipe=replace(plan.recipe, seed=seed))
        return plan

    def _make(self, name: str, steps: Steps, eta: float) -> Schedule | InstancePlan:
        with warnings.catch_warnings():  # diffusers and torchsde have their own, about what is stock's doing
            warnings.simplefilter("ignore")
            try:
                schedule = start_schedule(self._new_scheduler(name), steps)
            except (ValueError, IndexError, AssertionError) as error:
                raise _refused_steps(steps) from error
            try:
                found = probe(schedule, is_pure_noise=steps.strength == 1.0, eta=eta, max_history=MAX_HISTORY)
            except (ValueError, NotImplementedError) as error:  # it cannot read what this UNet predicts
                raise InpaintError(
                    ErrorCode.UNKNOWN_SCHEDULER, "This scheduler does not work with this model.", field="scheduler"
                ) from error
        timesteps = schedule.timesteps.float()
        if found.recurrence is None:
            return InstancePlan(
                timesteps=timesteps,
                initial=found.initial,
                init_noise_sigma=found.init_noise_sigma,
                renoise=found.renoise,
                num_inference_steps=schedule.num_inference_steps,
                recipe=Recipe(name, self._base_config, steps, eta, seed=0),
            )
        return Schedule(
            timesteps=timesteps,
            input_scale=found.recurrence.input_scale.float(),
            transition=found.recurrence.transition.float(),
            draws_noise=found.recurrence.draws_noise,
            initial=found.initial,
            init_noise_sigma=found.init_noise_sigma,
            renoise=found.renoise,
            num_inference_steps=schedule.num_inference_steps,
        )

    def _new_scheduler(self, name: str) -> SchedulerMixin:
        """A scheduler to use up: copied, as some take 0.2 s to construct, from one that never took a step."""
        if name not in self._unused:
            self._unused[name] = make_scheduler(name, self._base_config, seed=0)
        return copy.deepcopy(self._unused[name])


def _refused_steps(steps: Steps) -> InpaintError:
    """Why a scheduler did not take them, as far as a client can tell."""
    for field, values in (("timesteps", steps.timesteps), ("sigmas", steps.sigmas)):
        if values is not None:
            return InpaintError(ErrorCode.OUT_OF_RANGE, f"This scheduler cannot take these {field}.", field=field)
    if int(steps.num_inference_steps * steps.strength) < 1:
        message = "num_inference_steps times strength must be at least 1."
        return InpaintError(ErrorCode.OUT_OF_RANGE, message, field="strength")
    return InpaintError(
        ErrorCode.OUT_OF_RANGE, "This scheduler cannot run this many steps.", field="num_inference_steps"
    )
