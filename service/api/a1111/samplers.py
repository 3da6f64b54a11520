"""The web UI's names of samplers and schedule types, and the noise schedulers here that they stand for.

Source of names, aliases and automatic schedules: `samplers_k_diffusion` and `samplers_timesteps` in the web UI's
modules/sd_samplers_*.py, and `schedulers` in its modules/sd_schedulers.py (version 1.10).

A sampler that the web UI has and diffusers has not in the same form ("DPM++ 2S a", which is ancestral, "DPM++ 3M SDE",
"DPM++ 2M SDE Heun", "DPM fast", "DPM adaptive", "Restart", "DDIM CFG++") is not found here, rather than replaced.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from service.errors import ErrorCode, InpaintError

SAMPLER_NOT_FOUND = "Sampler not found"

AUTOMATIC = "automatic"
_UNIFORM = "uniform"


@dataclass(frozen=True, slots=True)
class Sampler:
    """A sampler of the web UI.

    Attributes:
        name: The web UI's.
        scheduler: The noise scheduler's short name, without a schedule.
        aliases: What else the web UI calls it.
        automatic: The schedule that the web UI uses with it where none is named.
        has_schedules: Whether the web UI takes notice of a schedule: it does not for samplers that go by timesteps.
        is_ancestral: Whether the web UI's `eta` and `s_noise` scale the noise that it adds; here both are 1.
    """

    name: str
    scheduler: str
    aliases: tuple[str, ...] = ()
    automatic: str = _UNIFORM
    has_schedules: bool = True
    is_ancestral: bool = False

    def with_schedule(self, schedule: str) -> str:
        """The noise scheduler's short name with a schedule, be there such a one or not."""
        return self.scheduler if schedule == _UNIFORM else f"{self.scheduler}_{schedule}"


@dataclass(frozen=True, slots=True)
class ScheduleType:
    """A schedule type of the web UI.

    Attributes:
        name: As the API says it.
        label: As the page says it.
    """

    name: str
    label: str


SAMPLERS = (
    Sampler("DPM++ 2M", "dpmpp_2m", ("k_dpmpp_2m",), "karras"),
    Sampler("DPM++ SDE", "dpmpp_sde", ("k_dpmpp_sde",), "karras", is_ancestral=True),
    Sampler("DPM++ 2M SDE", "dpmpp_2m_sde", ("k_dpmpp_2m_sde",), "exponential", is_ancestral=True),
    Sampler("Euler a", "euler_a", ("k_euler_a", "k_euler_ancestral"), is_ancestral=True),
    Sampler("Euler", "euler", ("k_euler",)),
    Sampler("LMS", "lms", ("k_lms",)),
    Sampler("Heun", "heun", ("k_heun",)),
    Sampler("DPM2", "dpm2", ("k_dpm_2",), "karras"),
    Sampler("DPM2 a", "dpm2_a", ("k_dpm_2_a",), "karras", is_ancestral=True),
    Sampler("LCM", "lcm", ("k_lcm",)),
    Sampler("DDIM", "ddim", ("ddim",), has_schedules=False),
    Sampler("PLMS", "pndm", ("plms",), has_schedules=False),
    Sampler("UniPC", "unipc", ("unipc",), has_schedules=False),
)

SCHEDULE_TYPES = (
    ScheduleType(AUTOMATIC, "Automatic"),
    ScheduleType(_UNIFORM, "Uniform"),
    ScheduleType("karras", "Karras"),
    ScheduleType("exponential", "Exponential"),
    ScheduleType("beta", "Beta"),
)


@dataclass(frozen=True, slots=True)
class Choice:
    """What a request asked for.

    Attributes:
        sampler: The sampler.
        schedule_type: The schedule type, as it was chosen: `AUTOMATIC` stays automatic.
        scheduler: The noise scheduler's short name.
    """

    sampler: Sampler
    schedule_type: ScheduleType
    scheduler: str


def available_samplers(schedulers: Sequence[str]) -> list[Sampler]:
    """The samplers that a model can be run with.

    Args:
        schedulers: Short names of its noise schedulers.
    """
    return [sampler for sampler in SAMPLERS if _automatic(sampler) in schedulers]


def choose(sampler_name: str, schedule_name: str, schedulers: Sequence[str]) -> Choice:
    """The noise scheduler for a sampler and a schedule type, in the new spelling or the old one.

    "DPM++ 2M" with "Karras" and "DPM++ 2M Karras" are the same; in the latter the sampler's name says it.

    Args:
        sampler_name: As a client sent it: anything.
        schedule_name: Likewise; empty where it named none.
        schedulers: Short names of the model's noise schedulers.

    Raises:
        InpaintError: `UNKNOWN_SCHEDULER` in the field `sampler_name` or `scheduler`.
    """
    schedule_type, name = _schedule_type(schedule_name), sampler_name.strip().lower()
    for suffix in SCHEDULE_TYPES:
        if name.endswith(f" {suffix.name}"):
            schedule_type, name = suffix, name.removesuffix(f" {suffix.name}")
            break
    known = available_samplers(schedulers)
    sampler = next((one for one in known if name in (one.name.lower(), *one.aliases)), None)
    if sampler is None:
        raise InpaintError(ErrorCode.UNKNOWN_SCHEDULER, SAMPLER_NOT_FOUND, field="sampler_name")
    if schedule_type is None:
        labels = ", ".join(one.label for one in SCHEDULE_TYPES)
        raise InpaintError(
            ErrorCode.UNKNOWN_SCHEDULER, f"scheduler: Input should be one of: {labels}.", field="scheduler"
        )
    if schedule_type.name == AUTOMATIC or not sampler.has_schedules:
        return Choice(sampler, schedule_type, _automatic(sampler))
    scheduler = sampler.with_schedule(schedule_type.name)
    if scheduler not in schedulers:
        message = f"scheduler: {schedule_type.label} is not available with {sampler.name}."
        raise InpaintError(ErrorCode.UNKNOWN_SCHEDULER, message, field="scheduler")
    return Choice(sampler, schedule_type, scheduler)


def _schedule_type(name: str) -> ScheduleType | None:
    wanted = name.strip().lower() or AUTOMATIC
    return next((one for one in SCHEDULE_TYPES if wanted in (one.name, one.label.lower())), None)


def _automatic(sampler: Sampler) -> str:
    return sampler.with_schedule(sampler.automatic)
