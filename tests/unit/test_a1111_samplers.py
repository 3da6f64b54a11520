"""The web UI's samplers and schedule types, against its own tables."""

import json
from pathlib import Path

import pytest

from service.api.a1111.samplers import SAMPLERS, SCHEDULE_TYPES, available_samplers, choose
from service.errors import ErrorCode, InpaintError
from service.worker.schedulers import scheduler_names

FACTS = json.loads((Path(__file__).parents[1] / "http" / "recorded" / "a1111" / "samplers.json").read_text())
NAMES = scheduler_names()

EXPECTED = {
    ("Euler a", ""): "euler_a",
    ("Euler", ""): "euler",
    ("Euler", "Karras"): "euler_karras",
    ("Euler", "Beta"): "euler_beta",
    ("LMS", "automatic"): "lms",
    ("LMS Karras", ""): "lms_karras",
    ("Heun", "Uniform"): "heun",
    ("DPM2", ""): "dpm2_karras",
    ("DPM2 a Karras", ""): "dpm2_a_karras",
    ("DPM++ 2M", ""): "dpmpp_2m_karras",
    ("DPM++ 2M", "Automatic"): "dpmpp_2m_karras",
    ("DPM++ 2M", "uniform"): "dpmpp_2m",
    ("DPM++ 2M Karras", ""): "dpmpp_2m_karras",
    ("DPM++ 2M Karras", "Automatic"): "dpmpp_2m_karras",
    ("DPM++ 2M Karras", "Exponential"): "dpmpp_2m_karras",  # The name says it.
    ("DPM++ SDE", "karras"): "dpmpp_sde_karras",
    ("DPM++ SDE Karras", ""): "dpmpp_sde_karras",
    ("DPM++ 2M SDE", ""): "dpmpp_2m_sde_exponential",
    ("DPM++ 2M SDE Karras", ""): "dpmpp_2m_sde_karras",
    ("k_dpmpp_2m", ""): "dpmpp_2m_karras",
    ("ddim", ""): "ddim",
    ("DDIM", "Karras"): "ddim",  # Goes by timesteps, whatever the schedule is.
    ("PLMS", ""): "pndm",
    ("UniPC", "Automatic"): "unipc",
    ("LCM", ""): "lcm",
}


@pytest.mark.parametrize(("asked", "scheduler"), EXPECTED.items())
def test_names_stand_for_schedulers(asked: tuple[str, str], scheduler: str) -> None:
    """The old names and the new pairs, automatic schedules included, give the scheduler that they mean."""
    assert choose(*asked, NAMES).scheduler == scheduler


def test_aliases_and_automatic_schedules_are_the_web_uis() -> None:
    """What a sampler here is called, and which schedule is automatic, is what the recorded table says."""
    table = {name: (alias, automatic or "uniform") for name, alias, automatic in FACTS["samplers"]}
    for sampler in SAMPLERS:
        if sampler.name == "LCM":  # Of a module of its own.
            continue
        alias, automatic = table[sampler.name]
        assert alias in sampler.aliases
        assert sampler.automatic == automatic
    labels = dict(FACTS["schedule_types"])
    assert all(labels[one.name] == one.label for one in SCHEDULE_TYPES)


def test_every_recorded_sampler_is_served_or_not_found() -> None:
    """A sampler that there is not is never replaced by another one."""
    served = {sampler.name for sampler in available_samplers(NAMES)}
    for name, alias, _ in FACTS["samplers"]:
        for spelling in (name, alias):
            if name in served:
                assert choose(spelling, "", NAMES).sampler.name == name
            else:
                with pytest.raises(InpaintError, match="Sampler not found") as caught:
                    choose(spelling, "", NAMES)
                assert (caught.value.code, caught.value.field) == (ErrorCode.UNKNOWN_SCHEDULER, "sampler_name")


def test_every_old_name_is_served_but_the_ancestral_one() -> None:
    """Of the names with a schedule in them, only "DPM++ 2S a Karras" has nothing to stand for."""
    for name in FACTS["old_names"]:
        if name == "DPM++ 2S a Karras":
            continue
        scheduler = choose(name, "", NAMES).scheduler
        assert scheduler.endswith(("_karras", "_exponential"))


@pytest.mark.parametrize(
    ("sampler", "schedule"),
    [
        ("Euler", "SGM Uniform"),
        ("Euler a", "Karras"),
        ("LCM", "Beta"),
        ("Euler a Karras", ""),
        ("Euler", "x"),
    ],
)
def test_schedules_that_there_are_not_are_refused(sampler: str, schedule: str) -> None:
    """A schedule type that is not served, or not with this sampler, is named as the fault."""
    with pytest.raises(InpaintError) as caught:
        choose(sampler, schedule, NAMES)
    assert (caught.value.code, caught.value.field) == (ErrorCode.UNKNOWN_SCHEDULER, "scheduler")


@pytest.mark.parametrize("name", ["", " ", "Karras", " karras", "euler\0", "Euler b", "16", "x" * 10_000])
def test_any_other_name_is_not_found(name: str) -> None:
    """Whatever a client sends as a name."""
    with pytest.raises(InpaintError, match="Sampler not found"):
        choose(name, "", NAMES)


def test_only_what_the_model_has_is_available() -> None:
    """A model without a scheduler has no sampler of it."""
    assert [sampler.name for sampler in available_samplers(("ddim", "euler"))] == ["Euler", "DDIM"]
    with pytest.raises(InpaintError, match="Sampler not found"):
        choose("Heun", "", ("ddim", "euler"))
