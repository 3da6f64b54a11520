"""Faults are for tests alone: no operator and no client can ask the service for one. And every promise has tests."""

import ast
import re
from pathlib import Path

import pytest
from setuptools import find_packages

from service import cli
from service.api import server
from service.engine import engine
from service.settings import Settings, environment_variable, load_settings

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "service").rglob("*.py"))


def names_in(path: Path) -> set[str]:
    """Every name that a module imports from somewhere else."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_the_package_holds_no_test() -> None:
    """What is installed is the service alone, and nothing of it imports from tests."""
    packages = find_packages(str(ROOT), include=["service*"])
    assert "service.worker" in packages
    assert all(package.split(".")[0] == "service" for package in packages)
    assert len(SOURCES) > 80
    for source in SOURCES:
        assert not [name for name in names_in(source) if name.split(".")[0] == "tests"], source


@pytest.mark.parametrize("word", ["worker_target", "target", "fake", "fault", "fail", "inject", "test"])
def test_no_setting_names_a_worker_or_a_fault(word: str) -> None:
    """What runs in a worker process is no setting, so neither a flag nor an environment variable."""
    assert not [name for name in Settings.model_fields if word in name.split("_")]
    variable = environment_variable(word)
    assert load_settings(environ={variable: "tests.fake_worker:run"}) == load_settings(environ={})
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", f"--{word.replace('_', '-')}", "tests.fake_worker:run"])
    assert ended.value.code == 2


def test_the_command_starts_the_real_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is in the environment, `serve` runs the worker that ships, as its default."""
    started: list[str] = []

    class Stopped(Exception):  # noqa: N818 - ends the start
        """Nothing is served here."""

    def note(_settings: Settings, _metrics: object, *, worker_target: str) -> None:
        started.append(worker_target)
        raise Stopped

    monkeypatch.setattr(server, "Engine", note)
    for variable in ("INPAINT_WORKER_TARGET", "INPAINT_TARGET", "WORKER_TARGET"):
        monkeypatch.setenv(variable, "tests.fake_worker:run")
    with pytest.raises(Stopped):
        cli.main(["serve", "--port", "0", "--log-level", "error"])
    assert started == [engine.WORKER_TARGET] == ["service.worker.process:run"]


def test_every_promise_has_tests() -> None:
    """Each row of the README's table of promises names tests that there are."""
    section = (ROOT / "README.md").read_text().partition("\n## Promises\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    for happening, _, tests in rows:
        files = re.findall(r"`([^`]+)`", tests)
        assert files, happening
        assert [name for name in files if not (ROOT / "tests" / name).is_file()] == [], happening
