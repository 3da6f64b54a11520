# ruff: noqa: INP001 - read by generate.py, no module of the package
"""The words in which `rows.py` says what the dashboard shows.

Expressions are PromQL in which `{*` stands for the selector of the chosen instances, and `[*]` for a range of the
width that Grafana finds right for the resolution. Those that alerts use too are recorded in
`deploy/prometheus/recording.yml`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Query:
    """One expression.

    Attributes:
        source: In the short form above.
        legend: Of its series; `{{label}}` stands for a label's value.
        is_dashed: Whether it is there for comparison.
    """

    source: str
    legend: str
    is_dashed: bool = False

    @property
    def expr(self) -> str:
        """The expression as Grafana takes it."""
        return self.source.replace("{*", '{instance=~"$instance"').replace("[*]", "[$__rate_interval]")


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title: A few words.
        description: How to read it.
        unit: Grafana's id of the unit.
        queries: What is drawn.
        kind: "timeseries", "stat" or "heatmap".
        width: In 24ths of the page.
        height: In steps of the grid.
        red_from: Where it turns red, or a red line is drawn.
        colour: Below that, of a stat.
        is_stacked: Whether series are drawn on top of each other.
    """

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    red_from: float | None = None
    colour: str = "green"
    is_stacked: bool = False


@dataclass(frozen=True)
class Row:
    """Panels that belong together."""

    title: str
    panels: tuple[Panel, ...]
