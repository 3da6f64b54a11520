"""Metrics, alerts and panels agree; alerts fire on what they watch for, and on nothing else."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.unit.promql import grouping_labels, result_labels, selectors
from tests.unit.test_metrics import busy_metrics, samples

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
GRAFANA = ROOT / "deploy" / "grafana"
DASHBOARD = json.loads((GRAFANA / "dashboards" / "inpaint.json").read_text(encoding="utf-8"))

TARGET_LABELS = {"job", "instance"}

NOT_SHOWN = {
    "process_virtual_memory_bytes": "address space, most of it never touched; the resident memory is shown",
}
"""Exported, and on no panel: why."""


def rules(file: str, kind: str) -> list[dict[str, Any]]:
    """The rules of a kind, "record" or "alert"."""
    groups = yaml.safe_load((PROMETHEUS / file).read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


RECORDINGS = rules("recording.yml", "record")
ALERTS = rules("alerts.yml", "alert")


@dataclass(frozen=True)
class Use:
    """An expression of a rule or a panel, and the labels that the text beside it mentions."""

    where: str
    expr: str
    mentioned: frozenset[str]


def panels() -> list[dict[str, Any]]:
    """Every panel but the rows' titles."""
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def uses() -> Iterator[Use]:
    """Everything that asks for metrics."""
    for rule in RECORDINGS:
        yield Use(rule["record"], rule["expr"], frozenset())
    for rule in ALERTS:
        text = " ".join(rule["annotations"].values())
        yield Use(rule["alert"], rule["expr"], frozenset(re.findall(r"\$labels\.(\w+)", text)))
    for panel in panels():
        for target in panel["targets"]:
            mentioned = frozenset(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            yield Use(f"panel {panel['title']!r}", target["expr"], mentioned)


USES = list(uses())


def exported() -> dict[str, set[str]]:
    """The labels of every sample that `/metrics` may have."""
    found = samples(busy_metrics())
    return {
        name: {pair.split("=")[0] for labels in series for pair in labels.split(",") if pair}
        for name, series in found.items()
        if not name.endswith("_created")  # When a counter began: of no use to anybody yet.
    }


def known() -> dict[str, set[str]]:
    """The labels of everything that Prometheus knows, recorded and its own included."""
    labels = {name: own | TARGET_LABELS for name, own in exported().items()}
    labels |= {"up": set(TARGET_LABELS), "ALERTS": {"alertname", "alertstate", "severity"} | TARGET_LABELS}
    for rule in RECORDINGS:
        labels[rule["record"]] = result_labels(rule["expr"], labels)
    return labels


def family(sample: str) -> str:
    """The metric that a sample is of."""
    return re.sub(r"(?<=.)_(bucket|sum|count)$", "", sample)


# --- they agree --------------------------------------------------------------------


def test_expressions_are_read() -> None:
    """What the other tests read of expressions is what stands there."""
    expr = 'sum by (a, le) (rate(x_total{b="}y{", c!~"z"}[5m] offset 1d)) / on (a) group_left (d) (n:x:rate > bool 0)'
    assert [(one.name, sorted(one.labels)) for one in selectors(expr)] == [("x_total", ["b", "c"]), ("n:x:rate", [])]
    assert grouping_labels(expr) == {"a", "le", "d"}
    assert result_labels(expr, {}) == {"a", "le"}
    assert result_labels("histogram_quantile(0.5, sum by (le, a) (x))", {}) == {"a"}
    assert result_labels("sum(x)", {}) == set()
    assert result_labels("1000 * x", {"x": {"b"}}) == {"b"}


@pytest.mark.parametrize("use", USES, ids=lambda use: use.where)
def test_what_is_asked_for_is_exported(use: Use) -> None:
    """Every metric that a rule or a panel names is exported, with the labels that it is asked by."""
    labels_of = known()
    asked = selectors(use.expr)
    assert asked
    for selector in asked:
        assert selector.name in labels_of, f"{use.where}: {selector.name}"
        assert selector.labels <= labels_of[selector.name], f"{use.where}: {selector}"
    assert grouping_labels(use.expr) <= set().union(*(labels_of[one.name] for one in asked)), use.where
    if not use.expr.startswith("absent("):
        assert use.mentioned <= result_labels(use.expr, labels_of), use.where


def test_every_metric_is_shown() -> None:
    """Each exported metric is on a panel, or listed here with the reason why it is not."""
    recorded = {rule["record"]: rule["expr"] for rule in RECORDINGS}
    shown = {selector.name for panel in panels() for one in panel["targets"] for selector in selectors(one["expr"])}
    shown |= {one.name for name in shown & set(recorded) for one in selectors(recorded[name])}
    assert {family(name) for name in exported()} - {family(name) for name in shown} == set(NOT_SHOWN)


def test_every_recording_is_used() -> None:
    """What is recorded is asked for by an alert or a panel, and is named after the labels that it has."""
    asked = {selector.name for use in USES for selector in selectors(use.expr)}
    for rule in RECORDINGS:
        assert rule["record"] in asked
        assert set(rule["record"].split(":")[0].split("_")) == known()[rule["record"]]


def test_readme_lists_every_metric() -> None:
    """Operators find each metric's name in the README."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^\*\*Metrics\*\* begin with .*?\n\n", readme, re.DOTALL | re.MULTILINE)
    names = {re.sub(r"\{.*", "", name) for name in re.findall(r"`([^`]+)`", listed)} - {"inpaint_"}
    assert names == {family(name).removeprefix("inpaint_") for name in exported() if name.startswith("inpaint_")}


# --- alerts ------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_alert_says_what_to_do(rule: dict[str, Any]) -> None:
    """Whoever is woken learns how bad it is, what is wrong, what is known, and what to do first."""
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    for text in rule["annotations"].values():
        assert text.endswith((".", "?", ")"))


def test_readme_lists_every_alert() -> None:
    """The README's table has each alert with its severity."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(Inpaint\w+)` \| (critical|warning) \|", readme, re.MULTILINE)
    assert sorted(listed) == sorted((rule["alert"], rule["labels"]["severity"]) for rule in ALERTS)


def test_every_alert_is_tested() -> None:
    """Each alert has a case in which it comes to fire, having been silent before."""
    cases = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text(encoding="utf-8"))["tests"]
    come = set()
    for case in cases:
        fired = [
            {label for one in look["exp_samples"] for label in re.findall(r'alertname="(\w+)"', one["labels"])}
            for look in case["promql_expr_test"]
            if "ALERTS" in look["expr"]
        ]
        come |= set().union(*fired) - set().union(*fired[:1])
    assert come == {rule["alert"] for rule in ALERTS}


@pytest.mark.parametrize(
    "command",
    [["check", "config", "prometheus.yml"], ["test", "rules", "alerts_test.yml"]],
    ids=["configuration and rules", "alerts"],
)
def test_promtool_agrees(command: list[str]) -> None:
    """Prometheus takes configuration and rules, and alerts fire in the cases of alerts_test.yml and in no others."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed; Debian's package prometheus has it")
    run = subprocess.run([promtool, *command], cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "SUCCESS" in run.stdout


# --- the dashboard -----------------------------------------------------------------


@pytest.fixture(scope="module")
def generate() -> Iterator[ModuleType]:
    """The script that writes the dashboard."""
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location("generate", GRAFANA / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    for name in ("panels", "rows"):
        del sys.modules[name]


def test_dashboard_is_what_the_script_writes(generate: ModuleType) -> None:
    """The JSON in the repository was written by the script as it is."""
    assert (GRAFANA / "dashboards" / "inpaint.json").read_text(encoding="utf-8") == generate.text()


def test_panels_have_places_of_their_own() -> None:
    """No two panels overlap, none reaches over the edge, and each says how it is to be read."""
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert all(panel["description"] for panel in panels())


# Of annotations Grafana's core knows only what all data sources have; these are read by the one for Prometheus.
FIELDS_OF_THE_DATA_SOURCE = {f".annotations.list[0].{name}" for name in ("titleFormat", "textFormat", "step")}


def lost(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Where something of `before` is missing in `after`, or is something else."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key, value in before.items():
            if key in after:
                yield from lost(value, after[key], f"{path}.{key}")
            else:
                yield f"{path}.{key}"
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from lost(one, other, f"{path}[{index}]")
    elif before != after:
        yield path


def test_grafana_s_types_read_the_dashboard() -> None:
    """Grafana's published types know every field of the dashboard: read by them and written again, nothing is lost."""
    pytest.importorskip("grafana_foundation_sdk", reason="grafana-foundation-sdk is not installed (extra: dev)")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder  # noqa: PLC0415 - where it is installed
    from grafana_foundation_sdk.cog.plugins import register_default_plugins  # noqa: PLC0415
    from grafana_foundation_sdk.models.dashboard import Dashboard  # noqa: PLC0415

    register_default_plugins()

    def read(document: dict[str, Any]) -> Any:
        return json.loads(JSONEncoder().encode(Dashboard.from_json(document)))

    assert set(lost(DASHBOARD, read(DASHBOARD))) == FIELDS_OF_THE_DATA_SOURCE
    heatmap = next(panel for panel in panels() if panel["type"] == "heatmap")
    wrong = {**DASHBOARD, "panels": [{**heatmap, "options": {**heatmap["options"], "colour": "red"}}]}
    assert ".panels[0].options.colour" in set(lost(wrong, read(wrong)))
