# ruff: noqa: INP001 - a script of its own, no module of the package
"""Write `dashboards/inpaint.json`, the dashboard that Grafana is provisioned with.

Usage: python deploy/grafana/generate.py

What is shown stands in `rows.py`, beside this file. Standard library only. A test holds that the JSON is what
this writes; another, where `grafana-foundation-sdk` is installed, that Grafana's own types read every part of it.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from panels import Panel, Query
from rows import ROWS

OUTPUT = Path(__file__).parent / "dashboards" / "inpaint.json"
GRID_WIDTH = 24
SCHEMA_VERSION = 41

# The variable, so that the file can also be imported where the data source has another name.
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def dashboard() -> dict[str, Any]:
    """The dashboard in Grafana's JSON model, without an id: each Grafana gives its own."""
    return {
        "uid": "inpaint-service",
        "title": "inpaint-service",
        "description": "Traffic, latency, batches, workers and failures of inpaint-service.",
        "tags": ["inpaint-service"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,  # One crosshair over all panels: what happened at the same moment belongs together.
        "timezone": "browser",
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables()},
        "annotations": {"list": [_firing_alerts()]},
        "panels": list(_laid_out()),
    }


def _variables() -> list[dict[str, Any]]:
    return [
        {
            "name": "datasource",
            "type": "datasource",
            "label": "Prometheus",
            "query": "prometheus",
            "current": {"text": "Prometheus", "value": "prometheus"},
        },
        {
            "name": "instance",
            "type": "query",
            "label": "Instance",
            "datasource": DATASOURCE,
            "query": {"query": "label_values(inpaint_worker_up, instance)", "refId": "instance"},
            "refresh": 2,  # Whenever the time range changes.
            "sort": 1,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": ["All"], "value": ["$__all"]},
        },
    ]


def _firing_alerts() -> dict[str, Any]:
    return {
        "name": "Firing alerts",
        "datasource": DATASOURCE,
        "enable": True,
        "iconColor": "red",
        "expr": 'ALERTS{alertname=~"Inpaint.*", alertstate="firing"}',
        "titleFormat": "{{alertname}}",
        "textFormat": "{{instance}} {{worker}}",
        "step": "30s",
    }


def _laid_out() -> Iterator[dict[str, Any]]:
    """Rows from the top, their panels from the left; a row of panels is as high as its first."""
    number, top = 0, 0
    for row in ROWS:
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": row.title,
            "collapsed": False,
            "gridPos": {"x": 0, "y": top, "w": GRID_WIDTH, "h": 1},
            "panels": [],
        }
        top += 1
        left = 0
        for panel in row.panels:
            number += 1
            if left + panel.width > GRID_WIDTH:
                left, top = 0, top + panel.height
            place = {"x": left, "y": top, "w": panel.width, "h": panel.height}
            yield _panel(panel, number, place)
            left += panel.width
        top += row.panels[-1].height


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": place,
        "targets": [_target(query, ref, panel.kind) for query, ref in zip(panel.queries, "ABCDEFGH", strict=False)],
        "fieldConfig": {"defaults": _field(panel), "overrides": list(_dashes(panel))},
        "options": _OPTIONS[panel.kind],
    }


def _target(query: Query, ref: str, kind: str) -> dict[str, Any]:
    is_now = kind == "stat"
    return {
        "refId": ref,
        "datasource": DATASOURCE,
        "expr": query.expr,
        "legendFormat": query.legend,
        "format": "heatmap" if kind == "heatmap" else "time_series",
        "editorMode": "code",
        "instant": is_now,
        "range": not is_now,
    }


def _field(panel: Panel) -> dict[str, Any]:
    field: dict[str, Any] = {"unit": panel.unit}
    if panel.kind == "heatmap":
        return field
    steps: list[dict[str, Any]] = [{"color": panel.colour, "value": None}]
    steps += [{"color": "red", "value": panel.red_from}] if panel.red_from is not None else []
    field["thresholds"] = {"mode": "absolute", "steps": steps}
    if panel.kind == "timeseries":
        field["min"] = 0
        field["color"] = {"mode": "palette-classic"}
        field["custom"] = {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 25 if panel.is_stacked else 5,
            "stacking": {"mode": "normal" if panel.is_stacked else "none", "group": "A"},
            "showPoints": "never",
            "thresholdsStyle": {"mode": "off" if panel.red_from is None else "line"},
        }
    return field


def _dashes(panel: Panel) -> Iterator[dict[str, Any]]:
    """What a query is to be compared with is drawn dashed."""
    for query, ref in zip(panel.queries, "ABCDEFGH", strict=False):
        if query.is_dashed:
            yield {
                "matcher": {"id": "byFrameRefID", "options": ref},
                "properties": [{"id": "custom.lineStyle", "value": {"fill": "dash", "dash": [6, 6]}}],
            }


_OPTIONS: dict[str, dict[str, Any]] = {
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": "value",
        "graphMode": "none",
        "justifyMode": "auto",
        "orientation": "auto",
        "textMode": "auto",
        "wideLayout": True,
    },
    "heatmap": {
        "calculate": False,
        "cellGap": 1,
        "cellValues": {"unit": "short"},
        "color": {
            "mode": "scheme",
            "scheme": "Oranges",
            "fill": "dark-orange",
            "exponent": 0.5,
            "steps": 64,
            "reverse": False,
        },
        "exemplars": {"color": "rgba(255,0,255,0.7)"},
        "filterValues": {"le": 1e-9},
        "legend": {"show": True},
        "rowsFrame": {"layout": "le"},
        "showValue": "never",
        "tooltip": {"mode": "single", "yHistogram": True, "showColorScale": False},
        "yAxis": {"axisPlacement": "left", "reverse": False, "unit": "short"},
    },
}


def text() -> str:
    """The file's content."""
    return json.dumps(dashboard(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(text(), encoding="utf-8")
