"""The report: one screen for people, JSON for machines."""

import dataclasses
import json
import textwrap
from collections.abc import Sequence

from service import __version__
from service.findings import Finding

_WIDTH = 100
_INDENT = 6  # "fail  "


def would_start(findings: Sequence[Finding]) -> bool:
    """Whether nothing was found that keeps `serve` from starting."""
    return all(finding.state != "fail" for finding in findings)


def as_text(findings: Sequence[Finding]) -> str:
    """A line for each finding, its hint below where there is something to do; then the verdict."""
    width = max(len(finding.topic) for finding in findings)
    lines = []
    for finding in findings:
        margin = " " * (_INDENT + width + 2)
        first = f"{finding.state:<{_INDENT}}{finding.topic:<{width}}  "
        lines += textwrap.wrap(finding.text, _WIDTH, initial_indent=first, subsequent_indent=margin) or [first.rstrip()]
        if finding.hint:
            lines += textwrap.wrap(finding.hint, _WIDTH, initial_indent=f"{margin}> ", subsequent_indent=f"{margin}  ")
    num_failures = sum(finding.state == "fail" for finding in findings)
    num_warnings = sum(finding.state == "warn" for finding in findings)
    verdict = "serve would start" if would_start(findings) else "serve would not start"
    lines += ["", f"{verdict}: {_count(num_failures, 'failure')}, {_count(num_warnings, 'warning')}"]
    printable = (letter if letter.isprintable() or letter == "\n" else "?" for letter in "\n".join(lines))
    return "".join(printable) + "\n"


def as_json(findings: Sequence[Finding]) -> str:
    """The same: `version`, `would_start` and `checks`, each of which has the members of a `Finding`."""
    report = {
        "version": __version__,
        "would_start": would_start(findings),
        "checks": [dataclasses.asdict(finding) for finding in findings],
    }
    return json.dumps(report, ensure_ascii=False, indent=2) + "\n"


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"
