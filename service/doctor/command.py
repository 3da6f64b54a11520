"""`inpaint-service doctor`: look at everything, report, and say whether `serve` would start."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from service.doctor.configuration import survey_configuration, survey_environment, survey_hub_cache
from service.doctor.machine import survey_machine
from service.doctor.report import as_json as report_json
from service.doctor.report import as_text, would_start
from service.doctor.survey import SURVEY_TARGET, survey_worker
from service.errors import StartupError
from service.findings import Finding
from service.settings import load_settings

EXIT_WOULD_START = 0
EXIT_WOULD_NOT_START = 1


def examine(overrides: Mapping[str, Any], *, as_json: bool, survey_target: str = SURVEY_TARGET) -> int:
    """Print the report.

    Args:
        overrides: Settings by name, as `load_settings` takes them.
        as_json: For machines.
        survey_target: Dotted name of what runs in the child.

    Returns:
        The exit status: 0 if `serve` would start, else 1.
    """
    findings = list(_survey(overrides, survey_target))
    sys.stdout.write(report_json(findings) if as_json else as_text(findings))
    return EXIT_WOULD_START if would_start(findings) else EXIT_WOULD_NOT_START


def _survey(overrides: Mapping[str, Any], survey_target: str) -> Iterator[Finding]:
    yield from survey_machine()
    yield from survey_environment()
    try:
        settings = load_settings(overrides)
    except StartupError as error:
        yield Finding("settings", "fail", str(error), "serve --help lists them; the rest was not looked at")
        return
    of_worker = list(survey_worker(settings, survey_target))
    yield from of_worker
    if any(finding.facts.get("needs_download") for finding in of_worker):
        yield survey_hub_cache()
    yield from survey_configuration(settings)
