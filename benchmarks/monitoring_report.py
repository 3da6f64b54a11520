"""What alerts and panels made of a run: tables, and whether all did their work."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from benchmarks.fast_prometheus import CONFIGURATION, SCALE, SCRAPE_SECONDS, Prometheus, shortened
from benchmarks.servers import ROOT
from benchmarks.tables import NOTHING, table
from benchmarks.verdicts import Verdict, equals, verdict_table

DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "inpaint.json"
RATE_INTERVAL = f"{4000 * SCRAPE_SECONDS:g}ms"
"""As Grafana chooses it: four scrapes."""


@dataclass(frozen=True, slots=True)
class Phase:
    """One fault.

    Attributes:
        fault: In words.
        expected: Alerts that watch for it.
        before: Alerts that fired already.
        fired: Alerts that fired meanwhile, and seconds from the fault until they were seen to.
    """

    fault: str
    expected: tuple[str, ...]
    before: tuple[str, ...]
    fired: Mapping[str, float]

    @property
    def proven(self) -> set[str]:
        """Alerts that watch for it, were silent before, and fired."""
        return set(self.expected) & set(self.fired) - set(self.before)


@dataclass(frozen=True, slots=True)
class PanelData:
    """What one query of a panel gave.

    Attributes:
        panel: The panel's title.
        legend: The query's.
        num_series: Series with numbers.
        num_samples: Numbers.
        largest: Of these; None without any.
    """

    panel: str
    legend: str
    num_series: int
    num_samples: int
    largest: float | None


@dataclass(frozen=True, slots=True)
class Found:
    """One run.

    Attributes:
        phases: In order; the first is without a fault.
        panels: Every query of every panel.
        annotations: Of each alert, as it fired first.
        statuses: How often clients got which answer.
    """

    phases: tuple[Phase, ...]
    panels: tuple[PanelData, ...]
    annotations: Mapping[str, Mapping[str, str]]
    statuses: Mapping[int | None, int]


def panels_of(watcher: Prometheus, start: float, end: float) -> Iterator[PanelData]:
    """Ask every query of the dashboard, as Grafana would for that time."""
    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        for target in panel.get("targets", ()):
            expr = target["expr"].replace("$instance", ".*").replace("[$__rate_interval]", "[RATE]")
            series = [one for one in watcher.over(_ranged(expr), start, end) if one.points]
            values = [value for one in series for _, value in one.points]
            yield PanelData(panel["title"], target["legendFormat"], len(series), len(values), max(values, default=None))


def _ranged(expr: str) -> str:
    return shortened(expr).replace("[RATE]", f"[{RATE_INTERVAL}]")


def alert_names() -> list[str]:
    """Every alert that there is."""
    document = yaml.safe_load((CONFIGURATION / "alerts.yml").read_text(encoding="utf-8"))
    return [rule["alert"] for group in document["groups"] for rule in group["rules"]]


def verdicts(found: Found) -> list[Verdict]:
    """Whether alerts and panels did their work."""
    quiet, *faults = found.phases
    proven = {name for phase in faults for name in phase.proven}
    unfilled = {
        name
        for name, annotations in found.annotations.items()
        if re.search(r"\{\{|<no value>|<error|%!", " ".join(annotations.values()))
    }
    empty = [one for one in found.panels if not one.largest]
    return [
        equals("alerts that fired without a fault", len(quiet.fired), 0),
        equals("alerts that fired on the fault that they watch for", len(proven), len(alert_names())),
        equals("alerts whose texts were not filled in", len(unfilled), 0),
        equals("queries of panels without data above 0", len(empty), 0),
    ]


def report(found: Found, facts: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    lines += [f"- a minute of the rules: {60 / SCALE:g} s", f"- answers: {_counts(found.statuses)}"]
    return "\n\n".join(
        ["\n".join(lines), verdict_table(verdicts(found)), _alert_table(found.phases), _panel_table(found.panels)]
    )


def _counts(statuses: Mapping[int | None, int]) -> str:
    return ", ".join(f"{count} x {status or 'none'}" for status, count in sorted(statuses.items(), key=str))


def _alert_table(phases: Sequence[Phase]) -> str:
    rows = []
    for phase in phases:
        others = ", ".join(sorted(set(phase.fired) - set(phase.expected) - set(phase.before))) or NOTHING
        for name in phase.expected:
            after = f"{phase.fired[name]:.1f}" if name in phase.proven else "**fired before**"
            rows.append([phase.fault, name, others, after if name in phase.fired else "**not fired**"])
        if not phase.expected:
            rows.append([phase.fault, NOTHING, others, NOTHING])
    return table(("fault", "alert", "also began to fire", "fired after, s"), rows, num_texts=3)


def _panel_table(panels: Sequence[PanelData]) -> str:
    rows = [
        [
            one.panel,
            one.legend,
            str(one.num_series),
            str(one.num_samples),
            "**none**" if one.largest is None else f"{one.largest:.4g}",
        ]
        for one in panels
    ]
    return table(("panel", "query", "series", "samples", "largest"), rows, num_texts=2)
