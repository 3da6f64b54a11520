"""The benchmark of alerts and panels: how it shortens time, and that it notices what did not work."""

import dataclasses
from pathlib import Path

from benchmarks.demand import Demand
from benchmarks.fast_prometheus import shortened
from benchmarks.monitoring_report import Found, PanelData, Phase, alert_names, report, verdicts
from benchmarks.verdicts import all_hold

QUIET = Phase("none", (), (), {})
PANEL = PanelData("Queue", "waiting", 1, 20, 3.0)


def found(**changes: object) -> Found:
    """A run in which everything worked, but for `changes`."""
    names = tuple(alert_names())
    fault = Phase("everything at once", names, (), dict.fromkeys(names, 1.0))
    texts = {name: {"summary": "Worker 0 of a:1 is down."} for name in names}
    return dataclasses.replace(Found((QUIET, fault), (PANEL,), texts, {200: 3, None: 1}), **changes)


def test_a_minute_is_a_second() -> None:
    """Ranges, offsets and waits become a sixtieth; other numbers, and the names of series, stay."""
    assert shortened("5m") == "5000ms"
    assert shortened("15s") == "250ms"
    expr = 'n:x:rate5m > 30 and x{a="5m"} <= 2 * y:ratio1d offset 30m and rate(z_total[5m]) >= 20'
    short = 'n:x:rate5m > 30 and x{a="5m"} <= 2 * y:ratio1d offset 30000ms and rate(z_total[5000ms]) >= 20'
    assert shortened(expr) == short


def test_run_in_which_all_worked_holds() -> None:
    """Every alert fired on its fault, none without one, and every panel has data."""
    assert all_hold(verdicts(found()))
    assert "**NO**" not in report(found(), {"machine": "this"})


def test_what_did_not_work_is_noticed() -> None:
    """An alert that stays silent, fires without a fault, fired already or has a broken text; a panel without data."""
    names = tuple(alert_names())
    quiet, fault = found().phases
    silent = dataclasses.replace(fault, fired=dict.fromkeys(names[1:], 1.0))
    already = dataclasses.replace(fault, before=names[:1])
    nervous = dataclasses.replace(quiet, fired={names[0]: 2.0})
    assert not all_hold(verdicts(found(phases=(quiet, silent))))
    assert not all_hold(verdicts(found(phases=(quiet, already))))
    assert not all_hold(verdicts(found(phases=(nervous, fault))))
    assert not all_hold(verdicts(found(annotations={names[0]: {"summary": "Worker <no value> is down."}})))
    assert not all_hold(verdicts(found(panels=(PANEL, PanelData("Queue", "in workers", 0, 0, None)))))
    assert not all_hold(verdicts(found(panels=(PANEL, PanelData("Queue", "in workers", 1, 9, 0.0)))))
    assert "**not fired**" in report(found(phases=(quiet, silent)), {})
    assert "**fired before**" in report(found(phases=(quiet, already)), {})


def test_faults_end_with_the_block(tmp_path: Path) -> None:
    """Workers fail while they are asked to, and not afterwards."""
    demand = Demand(tmp_path)
    assert (demand.is_not_a_number, demand.max_images) == (False, None)
    with demand.not_a_number(), demand.little_memory():
        assert (demand.is_not_a_number, demand.max_images) == (True, 1)
        with demand.no_memory():
            assert demand.max_images == 0
    assert (demand.is_not_a_number, demand.max_images) == (False, None)
    assert list(tmp_path.iterdir()) == []
