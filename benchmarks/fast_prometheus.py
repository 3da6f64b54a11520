"""Debian's Prometheus with the configuration and the rules of `deploy/`, for which a minute is a second."""

import json
import math
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from benchmarks.servers import ROOT, ServerFailedError, free_port

CONFIGURATION = ROOT / "deploy" / "prometheus"
SCALE = 60
SCRAPE_SECONDS = 0.5
"""Where the configuration has 15 s: a quarter of a second would be the same in this time, but leaves scrapes none."""

START_SECONDS = 30.0
STOP_SECONDS = 10.0
POLL_SECONDS = 0.1

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def shortened(text: str) -> str:
    """PromQL, or a duration alone, with its ranges and offsets divided by `SCALE`."""

    def short(duration: re.Match[str]) -> str:
        milliseconds = 1000 * int(duration["number"]) * _SECONDS[duration["unit"]] // SCALE
        return f"{duration['before']}{milliseconds}ms"

    return re.sub(r"(?P<before>\[|\boffset\s+|^)(?P<number>\d+)(?P<unit>[smhd])(?=\]|\s|$)", short, text)


@dataclass(frozen=True, slots=True)
class Series:
    """One series over the run.

    Attributes:
        labels: Its labels, the name included.
        points: Moment (Unix time) and value, those that are numbers.
    """

    labels: Mapping[str, str]
    points: tuple[tuple[float, float], ...]


class Prometheus:
    """A running one.

    Args:
        base_url: Of its HTTP API.
        process: Its process.
        folder: Of its configuration.
    """

    def __init__(self, base_url: str, process: subprocess.Popen[bytes], folder: Path) -> None:
        self._client = httpx.Client(base_url=base_url, trust_env=False, timeout=20.0)
        self._process = process
        self._folder = folder

    def over(self, expr: str, start: float, end: float) -> list[Series]:
        """Every series of an expression between two moments.

        Raises:
            httpx.HTTPError: It is no valid expression.
        """
        form = {"query": expr, "start": f"{start}", "end": f"{end}", "step": f"{SCRAPE_SECONDS}"}
        answer = self._client.post("/api/v1/query_range", data=form).raise_for_status().json()
        return [
            Series(
                one["metric"],
                tuple((at, float(value)) for at, value in one["values"] if math.isfinite(float(value))),
            )
            for one in answer["data"]["result"]
        ]

    def alerts(self) -> list[dict[str, Any]]:
        """Pending and firing ones, with their annotations."""
        found: list[dict[str, Any]] = self._client.get("/api/v1/alerts").raise_for_status().json()["data"]["alerts"]
        return found

    def firing(self) -> set[str]:
        """Names of the alerts that fire now."""
        return {one["labels"]["alertname"] for one in self.alerts() if one["state"] == "firing"}

    def wait_for_target(self) -> None:
        """Until the service was scraped; Prometheus takes some seconds to look for its targets.

        Raises:
            ServerFailedError: It does not find it.
        """
        give_up_at = time.monotonic() + START_SECONDS
        while not self._client.get("/api/v1/query", params={"query": "up == 1"}).json()["data"]["result"]:
            if time.monotonic() > give_up_at:
                raise ServerFailedError("Prometheus does not scrape the service")
            time.sleep(POLL_SECONDS)

    def forget_targets(self) -> None:
        """Read a configuration without anything to scrape."""
        _write(self._folder, ())
        self._process.send_signal(signal.SIGHUP)


@contextmanager
def prometheus(binary: str, folder: Path, target: str, bounds: Mapping[str, tuple[str, str]]) -> Iterator[Prometheus]:
    """Run one until the block ends.

    Args:
        binary: Of Prometheus 2 or 3.
        folder: For its configuration and data.
        target: Host and port to scrape.
        bounds: Alert -> what in its expression is replaced by what, where a bound depends on what is served.

    Raises:
        ServerFailedError: It did not start.
    """
    for name in ("recording.yml", "alerts.yml"):
        (folder / name).write_text(_rules(CONFIGURATION / name, bounds), encoding="utf-8")
    _write(folder, (target,))
    port = free_port()
    command = [binary, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--query.lookback-delta=5s", "--log.level=warn"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            _wait_until_ready(process, f"http://127.0.0.1:{port}/-/ready", folder / "prometheus.log")
            running = Prometheus(f"http://127.0.0.1:{port}", process, folder)
            running.wait_for_target()
            yield running
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def find_binary() -> str | None:
    """Where Prometheus is, None where it is not installed."""
    return shutil.which("prometheus")


def _write(folder: Path, targets: Sequence[str]) -> None:
    configuration = yaml.safe_load((CONFIGURATION / "prometheus.yml").read_text(encoding="utf-8"))
    for name in configuration["global"]:
        configuration["global"][name] = f"{1000 * SCRAPE_SECONDS:g}ms"
    (job,) = configuration["scrape_configs"]
    if targets:
        job["static_configs"] = [{"targets": list(targets)}]
    else:
        configuration["scrape_configs"] = []
    (folder / "prometheus.yml").write_text(json.dumps(configuration), encoding="utf-8")  # JSON is YAML.


def _rules(path: Path, bounds: Mapping[str, tuple[str, str]]) -> str:
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    for group in document["groups"]:
        for rule in group["rules"]:
            rule["expr"] = shortened(rule["expr"])
            if "for" in rule:
                rule["for"] = shortened(rule["for"])
            if (bound := bounds.get(rule.get("alert", ""))) is not None:
                if bound[0] not in rule["expr"]:
                    raise ValueError(f"{rule['alert']} has no bound {bound[0]!r}")
                rule["expr"] = rule["expr"].replace(*bound)
    return json.dumps(document)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    give_up_at = time.monotonic() + START_SECONDS
    with httpx.Client(trust_env=False, timeout=5.0) as client:
        while process.poll() is None and time.monotonic() < give_up_at:
            try:
                if client.get(url).status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                pass  # The port is not open yet.
            time.sleep(POLL_SECONDS)
    raise ServerFailedError(f"Prometheus did not start:\n{log.read_text(encoding='utf-8', errors='replace')[-2000:]}")
