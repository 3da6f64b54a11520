"""What `inpaint-service doctor` finds of models and devices, by the rules that loading has."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from service.findings import Finding
from service.settings import load_settings
from service.worker.survey.devices import survey_devices
from service.worker.survey.model import survey_model
from tests.model.checkpoints import make_checkpoint


def survey(**settings: Any) -> dict[str, Finding]:
    """Findings by topic."""
    return {finding.topic: finding for finding in survey_model(load_settings(settings, environ={}))}


def of_devices(*names: str, **settings: Any) -> list[Finding]:
    return list(survey_devices(load_settings(settings, environ={}), names))


def test_bundled_model() -> None:
    """The demo is complete, and has its checker."""
    found = survey()
    assert (found["model"].state, found["safety checker"].state) == ("ok", "ok")
    assert found["model"].facts["needs_download"] is False


def test_folder_that_is_complete_or_not(inpainting_checkpoint: Path, tmp_path: Path) -> None:
    """Each part's weights are looked at by their headers: a cut, a missing and a pickled file are named."""
    assert survey(model=str(inpainting_checkpoint))["model"].state == "ok"
    folder = shutil.copytree(inpainting_checkpoint, tmp_path / "cut")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    for data, word in ((whole[:-1000], "truncated"), (b"\x80\x02" + whole, "pickle")):
        weights.write_bytes(data)
        found = survey(model=str(folder))["model"]
        assert found.state == "fail"
        assert "unet" in found.text
        assert word in found.text
    weights.rename(weights.with_suffix(".bin"))
    assert "pickles are not loaded" in survey(model=str(folder))["model"].text
    (folder / "model_index.json").unlink()
    assert "no model_index.json" in survey(model=str(folder))["model"].text


def test_variant_that_is_not_there(inpainting_checkpoint: Path) -> None:
    """The variant that is asked for has to be there, as in loading."""
    found = survey(model=str(inpainting_checkpoint), variant="fp16")["model"]
    assert (found.state, "no variant 'fp16'" in found.text) == ("fail", True)


def test_single_file_that_is_none(tmp_path: Path) -> None:
    """One file is told by its header: what is no checkpoint says what it is."""
    (tmp_path / "a.safetensors").write_bytes(b"PK\x03\x04")
    assert "pickle" in survey(model=str(tmp_path / "a.safetensors"))["model"].text


def test_model_that_is_nowhere_or_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A path that is none fails; a hub's model that is not in the cache has to be fetched, which offline fails."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert survey(model="/nowhere")["model"].state == "fail"
    found = survey(model="nobody/no-such-model-as-this")["model"]
    assert (found.state, found.facts["needs_download"]) == ("warn", True)
    assert survey(model="nobody/no-such-model-as-this", offline=True)["model"].state == "fail"


def test_safety_checker(inpainting_checkpoint: Path, tmp_path: Path) -> None:
    """None is a failure unless it is allowed; one of the settings is looked at."""
    bare = str(make_checkpoint(tmp_path / "bare", has_safety_checker=False))
    states = {
        "none": survey(model=bare),
        "allowed": survey(model=bare, allow_unchecked=True),
        "named": survey(model=bare, safety_checker=str(inpainting_checkpoint)),
        "wrong": survey(model=bare, safety_checker=str(tmp_path)),
    }
    assert {name: found["safety checker"].state for name, found in states.items()} == {
        "none": "fail",
        "allowed": "warn",
        "named": "ok",
        "wrong": "fail",
    }


def test_textual_inversions_and_ip_adapters(tmp_path: Path) -> None:
    """Folders and files that loading would end at fail; pickles among embeddings are a warning."""
    folder = tmp_path / "embeddings"
    assert survey(embeddings_dir=folder)["textual inversions"].state == "fail"
    folder.mkdir()
    assert survey(embeddings_dir=folder)["textual inversions"].state == "ok"
    (folder / "old.pt").touch()
    assert survey(embeddings_dir=folder)["textual inversions"].state == "warn"
    (folder / "cut.safetensors").write_bytes(b"cut")
    assert "cut.safetensors is truncated" in survey(embeddings_dir=folder)["textual inversions"].text
    assert survey(ip_adapter=tmp_path / "none.safetensors")["IP-Adapter"].state == "fail"
    assert survey(ip_adapter_image_encoder=tmp_path)["IP-Adapter"].state == "fail"


def test_devices_that_are_there_or_not() -> None:
    """A device that is not there is a failure only where no other is; so does a start fail."""
    (cpu,) = [finding for finding in of_devices("cpu") if finding.topic == "device cpu"]
    assert (cpu.state, "bfloat16" in cpu.text) == ("ok", True)
    missing = f"cuda:{torch.cuda.device_count()}"
    assert [finding.state for finding in of_devices(missing, compile="off")][:1] == ["fail"]
    first, second = of_devices("cpu", missing, compile="off")[:2]
    assert (first.state, second.state) == ("ok", "warn")
    assert "its worker would not start" in second.text
    assert of_devices("toaster")[0].state == "fail"


def test_settings_that_do_not_suit_a_cpu() -> None:
    """Half precision on a CPU is slow; compiling for one is no start."""
    assert of_devices("cpu", dtype="float16")[0].state == "warn"
    assert of_devices("cpu", compile="on")[0].state == "fail"
