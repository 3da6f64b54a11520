"""The noise schedulers that requests may name, and how each is made from a checkpoint's configuration.

A name stands for a diffusers class and the settings that tell it from its
siblings. Everything else (betas, prediction type, timestep spacing, ...) comes
from the checkpoint, through `Class.from_config(config, **settings)`, the way a
user of the stock pipeline switches schedulers.

    name           class                            settings
    ddim           DDIMScheduler
    ddpm           DDPMScheduler
    pndm           PNDMScheduler                    skip_prk_steps=True, which the stock pipeline insists on
    lms          * LMSDiscreteScheduler
    euler        * EulerDiscreteScheduler
    euler_a        EulerAncestralDiscreteScheduler
    heun         * HeunDiscreteScheduler
    dpm2         * KDPM2DiscreteScheduler
    dpm2_a       * KDPM2AncestralDiscreteScheduler
    dpmpp_2m     * DPMSolverMultistepScheduler      algorithm_type="dpmsolver++", solver_order=2
    dpmpp_2m_sde * DPMSolverMultistepScheduler      algorithm_type="sde-dpmsolver++", solver_order=2
    dpmpp_2s     * DPMSolverSinglestepScheduler     algorithm_type="dpmsolver++", solver_order=2,
                                                    lower_order_final=True, which it otherwise turns on with a warning
    dpmpp_sde    * DPMSolverSDEScheduler            noise_sampler_seed=the image's seed: it takes no generator
    unipc        * UniPCMultistepScheduler
    deis         * DEISMultistepScheduler           algorithm_type="deis"
    sa_solver    * SASolverScheduler                algorithm_type="data_prediction"
    lcm            LCMScheduler
    tcd            TCDScheduler

Each * has variants with another spacing of the noise levels: `_karras`,
`_exponential` and `_beta` set `use_karras_sigmas`, `use_exponential_sigmas` or
`use_beta_sigmas`; the plain name sets all three to False.

The checkpoint's own scheduler keeps its every setting under its own name.

Left out: IPNDM and DDIMInverse, which have no `add_noise` and so do not run in
the stock inpainting pipeline; the EDM and consistency-model schedulers, which
ignore the checkpoint's betas and so paint noise with a Stable Diffusion UNet;
the "parallel" twins of DDIM and DDPM, which step the same.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSDEScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    SchedulerMixin,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from diffusers.utils import is_scipy_available, is_torchsde_available

from service.errors import ErrorCode, InpaintError, StartupError


@dataclass(frozen=True, slots=True)
class _Kind:
    """A diffusers class and the settings that a name pins."""

    scheduler_class: type[SchedulerMixin]
    settings: Mapping[str, Any] = field(default_factory=dict)


_SIGMA_SPACINGS = MappingProxyType(
    {"karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas", "beta": "use_beta_sigmas"}
)

_PLAIN_KINDS = MappingProxyType(
    {
        "ddim": _Kind(DDIMScheduler),
        "ddpm": _Kind(DDPMScheduler),
        "pndm": _Kind(PNDMScheduler, {"skip_prk_steps": True}),
        "lms": _Kind(LMSDiscreteScheduler),
        "euler": _Kind(EulerDiscreteScheduler),
        "euler_a": _Kind(EulerAncestralDiscreteScheduler),
        "heun": _Kind(HeunDiscreteScheduler),
        "dpm2": _Kind(KDPM2DiscreteScheduler),
        "dpm2_a": _Kind(KDPM2AncestralDiscreteScheduler),
        "dpmpp_2m": _Kind(DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
        "dpmpp_2m_sde": _Kind(DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
        "dpmpp_2s": _Kind(
            DPMSolverSinglestepScheduler,
            {"algorithm_type": "dpmsolver++", "solver_order": 2, "lower_order_final": True},
        ),
        "dpmpp_sde": _Kind(DPMSolverSDEScheduler),
        "unipc": _Kind(UniPCMultistepScheduler),
        "deis": _Kind(DEISMultistepScheduler, {"algorithm_type": "deis"}),
        "sa_solver": _Kind(SASolverScheduler, {"algorithm_type": "data_prediction"}),
        "lcm": _Kind(LCMScheduler),
        "tcd": _Kind(TCDScheduler),
    }
)

_NEEDS_SCIPY = frozenset({"lms"})
_NEEDS_TORCHSDE = frozenset({"dpmpp_sde"})


def _available_kinds() -> Iterator[tuple[str, _Kind]]:
    """Names and kinds, each plain one followed by its variants, less those whose extra dependency is missing."""
    for name, kind in _PLAIN_KINDS.items():
        if name in _NEEDS_SCIPY and not is_scipy_available():
            continue
        if name in _NEEDS_TORCHSDE and not is_torchsde_available():
            continue
        if "use_karras_sigmas" not in inspect.signature(kind.scheduler_class.__init__).parameters:
            yield name, kind
            continue
        unset = dict.fromkeys(_SIGMA_SPACINGS.values(), False)
        yield name, _Kind(kind.scheduler_class, {**kind.settings, **unset})
        for spacing, flag in _SIGMA_SPACINGS.items():
            if spacing == "beta" and not is_scipy_available():
                continue
            yield f"{name}_{spacing}", _Kind(kind.scheduler_class, {**kind.settings, **unset, flag: True})


_KINDS: Mapping[str, _Kind] = MappingProxyType(dict(_available_kinds()))


def scheduler_names() -> tuple[str, ...]:
    """Every name that can be asked for here, in the order of the table above."""
    return tuple(_KINDS)


def short_name(scheduler: SchedulerMixin) -> str:
    """The name of a checkpoint's own scheduler.

    Raises:
        StartupError: Its class is none of the table's.
    """
    class_name = type(scheduler).__name__
    name = _name_of(class_name, scheduler.config)
    if name is None:
        raise StartupError(f"the checkpoint's noise scheduler is a {class_name}, which is not supported")
    return name


def make_scheduler(name: str, base_config: Mapping[str, Any], *, seed: int) -> SchedulerMixin:
    """A new scheduler, as if the stock pipeline's had been switched to it.

    Args:
        name: One of `scheduler_names()`.
        base_config: Configuration of the checkpoint's own scheduler.
        seed: For schedulers that draw noise from a source of their own.

    Raises:
        InpaintError: `UNKNOWN_SCHEDULER`.
    """
    kind = _kind(name)
    settings = dict(kind.settings)
    config = dict(base_config)
    class_name = config.get("_class_name")
    if isinstance(class_name, str) and _name_of(class_name, config) == name:
        settings.clear()
        # What the stock pipeline's constructor corrected (steps_offset) is still listed as a default to be dropped.
        config.pop("_use_default_values", None)
    if "noise_sampler_seed" in inspect.signature(kind.scheduler_class.__init__).parameters:
        settings["noise_sampler_seed"] = seed
    return kind.scheduler_class.from_config(config, **settings)


def names_taking(argument: str, values: Sequence[float], base_config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names whose scheduler takes a list in the place of its own schedule, found out by giving it one.

    Args:
        argument: "timesteps" or "sigmas", of `set_timesteps`.
        values: A list that suits any scheduler.
        base_config: Configuration of the checkpoint's own scheduler.
    """
    return tuple(name for name in _KINDS if _takes(name, argument, values, base_config))


def _takes(name: str, argument: str, values: Sequence[float], base_config: Mapping[str, Any]) -> bool:
    if argument not in inspect.signature(_KINDS[name].scheduler_class.set_timesteps).parameters:
        return False
    try:
        make_scheduler(name, base_config, seed=0).set_timesteps(**{argument: list(values)}, device="cpu")
    except ValueError:  # e.g. timesteps together with Karras' spacing
        return False
    return True


def takes_eta(name: str) -> bool:
    """Whether the stock pipeline hands its `eta` to this scheduler.

    Raises:
        InpaintError: `UNKNOWN_SCHEDULER`.
    """
    return "eta" in inspect.signature(_kind(name).scheduler_class.step).parameters


def _kind(name: str) -> _Kind:
    if name not in _KINDS:
        raise InpaintError(ErrorCode.UNKNOWN_SCHEDULER, "This scheduler is not available.", field="scheduler")
    return _KINDS[name]


def _name_of(class_name: str, config: Mapping[str, Any]) -> str | None:
    """The name that comes closest to a class and its configuration, None where the class is not in the table."""
    names = [name for name, kind in _KINDS.items() if kind.scheduler_class.__name__ == class_name]

    def num_differences(name: str) -> int:
        return sum((config.get(key) or False) != value for key, value in _KINDS[name].settings.items())

    return min(names, key=num_differences, default=None)
