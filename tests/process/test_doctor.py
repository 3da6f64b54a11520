"""`inpaint-service doctor`: one screen, exit status 0 exactly if `serve` would start, and no secrets."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from service import __version__
from service.doctor import machine
from service.doctor.command import examine
from tests.process.real_service import ROOT

pytestmark = pytest.mark.timeout(180)

FINE = "tests.process.fake_survey:fine"

Report = dict[str, Any]


@pytest.fixture
def doctor(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    """Examine with these settings, on a worker that finds all well; the report holds the exit status, too."""
    for name in [name for name in os.environ if name.startswith("INPAINT_")]:
        monkeypatch.delenv(name)

    def examined(survey_target: str = FINE, **settings: Any) -> Report:
        overrides = {"port": 0, "devices": "cpu", **settings}
        status = examine(overrides, as_json=True, survey_target=survey_target)
        return {**json.loads(capfd.readouterr().out), "status": status}

    return examined


def check(report: Report, topic: str) -> Mapping[str, Any]:
    """The only finding on a topic."""
    (found,) = [finding for finding in report["checks"] if finding["topic"] == topic]
    return found


def run(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The real command."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("INPAINT_")}
    command = [sys.executable, "-m", "service", "doctor", *flags]
    return subprocess.run(
        command, cwd=ROOT, env=others | environment, capture_output=True, text=True, timeout=150, check=False
    )


# --- the real command -----------------------------------------------------------------


def test_this_machine_would_serve_the_demo(tmp_path: Path) -> None:
    """On a machine where tests run, `serve` would start, on a CPU: status 0, every check in the JSON, and no key."""
    (tmp_path / "keys").write_text("shop=sesame-of-the-shop\n")
    flags = ("--json", "--port", "0", "--devices", "cpu", "--api-keys", "sesame-in-a-flag")
    finished = run(*flags, "--api-keys-file", str(tmp_path / "keys"), INPAINT_ADMIN_KEYS="sesame-in-the-environment")
    assert finished.returncode == 0, finished.stdout
    report = json.loads(finished.stdout)
    assert set(report) == {"version", "would_start", "checks"}
    assert (report["version"], report["would_start"]) == (__version__, True)
    for finding in report["checks"]:
        assert set(finding) == {"topic", "state", "text", "hint", "facts"}
        assert finding["state"] in ("ok", "warn")
    topics = {finding["topic"] for finding in report["checks"]}
    assert topics >= {"versions", "packages", "CPU", "memory", "descriptors", "temporary files", "environment"}
    assert topics >= {"model", "safety checker", "device cpu", "address", "API keys", "LoRAs"}
    assert check(report, "API keys")["facts"] == {"num_clients": 2, "num_admins": 1}
    assert check(report, "model")["facts"]["bytes"] > 20_000_000
    assert check(report, "environment")["text"] == "INPAINT_ADMIN_KEYS"
    assert "sesame" not in finished.stdout + finished.stderr


def test_model_that_is_missing_is_status_1_and_one_screen() -> None:
    """The text has a line for each check with its hint, and the verdict; the status is 1."""
    finished = run("--model", "/nowhere/model", "--port", "0", "--devices", "cpu")
    assert finished.returncode == 1
    lines = finished.stdout.splitlines()
    assert any(line.startswith("fail  model ") and "'/nowhere/model' does not exist" in line for line in lines)
    assert lines[-1].startswith("serve would not start: 1 failure, ")
    assert len(lines) < 40
    assert max(map(len, lines)) <= 100
    assert finished.stderr == ""


# --- settings ---------------------------------------------------------------------------


def test_taken_ports_fail(doctor: Callable[..., Report]) -> None:
    """The address is tried as `serve` would; a metrics port that is the same one fails, too."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        report = doctor(port=port)
        assert (report["status"], report["would_start"]) == (1, False)
        assert check(report, "address")["state"] == "fail"
        assert f"127.0.0.1:{port}" in check(report, "address")["text"]
    assert check(doctor(port=port), "address")["state"] == "ok"
    assert check(doctor(port=port, metrics_port=port), "address")["state"] == "fail"


def test_keys_that_cannot_be_read_fail(doctor: Callable[..., Report], tmp_path: Path) -> None:
    """A file that is not there or holds no key, and an entry that is none, fail; nothing of a key is shown."""
    assert str(tmp_path / "keys") in check(doctor(api_keys_file=tmp_path / "keys"), "API keys")["text"]
    (tmp_path / "keys").write_text("# nothing\n")
    assert "no key" in check(doctor(api_keys_file=tmp_path / "keys"), "API keys")["text"]
    report = doctor(api_keys="open,sha256:sesame")
    assert (report["status"], check(report, "API keys")["state"]) == (1, "fail")
    assert "sesame" not in json.dumps(report)


def test_traces(doctor: Callable[..., Report], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they would go is said without the password; without packages or a URL `serve` would not start."""
    assert not [finding for finding in doctor()["checks"] if finding["topic"] == "traces"]
    report = doctor(otlp_endpoint="http://me:sesame@collector:4318")
    assert check(report, "traces") == {
        "topic": "traces",
        "state": "ok",
        "text": "sent to collector",
        "hint": "",
        "facts": {},
    }
    monkeypatch.setitem(sys.modules, "service.tracing", None)
    report = doctor(otlp_endpoint="http://collector:4318")
    assert (report["status"], check(report, "traces")["state"]) == (1, "fail")
    assert "inpaint-service[tracing]" in check(report, "traces")["text"]
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "collector")
    assert check(doctor(), "traces")["state"] == "fail"


def test_open_service_is_a_warning(doctor: Callable[..., Report]) -> None:
    """Without keys on an address that others can reach: said, but no failure; on loopback all is well."""
    report = doctor(host="0.0.0.0")  # noqa: S104 - nothing is served
    assert (report["status"], check(report, "API keys")["state"]) == (0, "warn")
    assert check(doctor(host="localhost"), "API keys")["state"] == "ok"


def test_settings_that_do_not_fit_fail(doctor: Callable[..., Report]) -> None:
    """A wrong setting is named; what does not depend on settings is looked at all the same."""
    report = doctor(queue_size="many")
    assert report["status"] == 1
    assert "--queue-size" in check(report, "settings")["text"]
    assert check(report, "memory")


def test_variables_that_mean_nothing_are_named(doctor: Callable[..., Report], monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt variable is a warning; those of the client are none of the doctor's business; values are not shown."""
    monkeypatch.setenv("INPAINT_MODLE", "sesame")
    monkeypatch.setenv("INPAINT_API_KEY", "sesame")
    monkeypatch.setenv("INPAINT_QUEUE_SIZE", "7")
    report = doctor()
    texts = [(one["state"], one["text"]) for one in report["checks"] if one["topic"] == "environment"]
    assert texts == [("ok", "INPAINT_QUEUE_SIZE"), ("warn", "no settings: INPAINT_MODLE")]
    assert "sesame" not in json.dumps(report)


# --- folders ----------------------------------------------------------------------------


def test_folder_of_loras(doctor: Callable[..., Report], tmp_path: Path) -> None:
    """Those that can be used are counted, the others named; a folder that cannot be is a failure, as for `serve`."""
    folder = tmp_path / "loras"
    assert "will be made" in check(doctor(lora_dir=folder), "LoRAs")["text"]
    assert not folder.exists()
    folder.mkdir()
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (folder / "good.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"0000")
    (folder / "broken.safetensors").write_bytes(b"\x80\x02pickle")
    (folder / "old.ckpt").touch()
    found = check(doctor(lora_dir=folder, model="other"), "LoRAs")
    assert (found["state"], found["facts"]) == ("warn", {"count": 1, "num_refused": 2})
    assert "'broken', 'old.ckpt'" in found["text"]
    (tmp_path / "file").touch()
    report = doctor(lora_dir=tmp_path / "file")
    assert (report["status"], check(report, "LoRAs")["state"]) == (1, "fail")


def test_folder_of_compiled_code(doctor: Callable[..., Report], tmp_path: Path) -> None:
    """One that cannot be made ends the start where something would be compiled, and not on a CPU."""
    (tmp_path / "file").touch()
    settings = {"compile_cache": tmp_path / "file" / "cache"}
    assert check(doctor(**settings), "compiled code")["state"] == "warn"
    assert check(doctor(**settings, devices="cuda:0"), "compiled code")["state"] == "fail"
    found = check(doctor(compile_cache=tmp_path / "new" / "cache"), "compiled code")
    assert (found["state"], "will be made" in found["text"]) == ("ok", True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# --- the machine ------------------------------------------------------------------------


def test_little_memory_few_descriptors_and_a_quota_are_said(
    doctor: Callable[..., Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a container allows counts, not what the machine has."""
    files = {"cpu": "150000 100000\n", "limit": str(2**30), "used": str(2**29)}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "CPU_QUOTA_FILE", tmp_path / "cpu")
    monkeypatch.setattr(machine, "MEMORY_LIMIT_FILE", tmp_path / "limit")
    monkeypatch.setattr(machine, "MEMORY_USED_FILE", tmp_path / "used")
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _which: (64, 64))
    report = doctor()
    assert check(report, "CPU")["text"].endswith("quota 1.5")
    memory = check(report, "memory")
    assert (memory["state"], memory["text"]) == ("warn", "512 MiB of 1.0 GiB available")
    assert check(report, "descriptors")["state"] == "warn"
    assert report["status"] == 0


def test_packages_that_do_not_fit(doctor: Callable[..., Report], monkeypatch: pytest.MonkeyPatch) -> None:
    """A requirement that is missing fails, one of another version is a warning; those of extras are no matter."""
    requirements = ["numpy<1", "torch>=2"]
    monkeypatch.setattr(machine.metadata, "requires", lambda _name: requirements)
    found = check(doctor(), "packages")
    assert (found["state"], found["text"].startswith("numpy ")) == ("warn", True)
    requirements[:] = ["no-such-package-as-this", 'another-one; extra == "bench"', "torch>=2"]
    found = check(doctor(), "packages")
    assert (found["state"], found["text"]) == ("fail", "no-such-package-as-this is missing")


# --- the child --------------------------------------------------------------------------


def test_driver_that_crashes_is_a_warning(doctor: Callable[..., Report]) -> None:
    """Where the devices that would be used are well, a crash of the child is said; its last words spoil no JSON."""
    report = doctor("tests.process.fake_survey:driver_crashes")
    assert (report["status"], report["would_start"]) == (0, True)
    found = check(report, "driver")
    assert (found["state"], found["text"]) == ("warn", "asking torch for devices crashed (SIGSEGV)")


def test_device_that_crashes_fails(doctor: Callable[..., Report]) -> None:
    """Where no device was found well before, a worker would crash, too."""
    report = doctor("tests.process.fake_survey:device_crashes", devices="cuda:0")
    assert report["status"] == 1
    assert check(report, "driver")["text"] == "asking torch for devices crashed (SIGABRT)"
    assert check(report, "model")["state"] == "ok"


def test_survey_that_cannot_be_imported_fails(doctor: Callable[..., Report]) -> None:
    """A child that ends with an exception is said in one line."""
    report = doctor("tests.process.fake_survey:no_such_function")
    assert check(report, "driver")["text"] == "asking torch for devices ended with status 1"
