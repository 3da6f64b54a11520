"""Traces of a `serve` process: what is sent and under which names, and that collectors cannot hurt it."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from service.errors import StartupError
from service.settings import load_settings, traces_url
from tests.http.collector import attributes_of, collecting
from tests.http.serve_process import ROOT, process
from tests.http.serving import eventually

STAGES = {"receive", "decode", "fit", "queue", "prepare", "denoise", "vae_decode", "safety", "render", "send"}
AT_ONCE = {"OTEL_BSP_SCHEDULE_DELAY": "50"}


def closed_port() -> int:
    """A port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


# --- which collector ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "environ", "url"),
    [
        (None, {}, None),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": " "}, None),
        ("http://a:4318", {}, "http://a:4318/v1/traces"),
        ("http://a:4318/", {}, "http://a:4318/v1/traces"),
        ("https://a/otlp/v1/traces", {}, "https://a/otlp/v1/traces"),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://b/otlp/"}, "http://b/otlp/v1/traces"),
        (None, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c/here"}, "http://c/here"),
        (
            None,
            {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c/here", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://b"},
            "http://c/here",
        ),
        ("http://a", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://b"}, "http://a/v1/traces"),
        ("http://a", {"OTEL_SDK_DISABLED": "true"}, None),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://b", "OTEL_TRACES_EXPORTER": "none"}, None),
    ],
)
def test_the_setting_goes_before_the_standard_variables(
    setting: str | None, environ: dict[str, str], url: str | None
) -> None:
    """Where traces go: our setting, then the variable for traces as it is, then the one for all signals."""
    assert traces_url(load_settings({"otlp_endpoint": setting}, environ={}), environ) == url


@pytest.mark.parametrize("url", ["collector:4318", "ftp://collector", "http://", "/v1/traces", "http://[broken"])
def test_what_is_no_url_is_named_and_not_repeated(url: str) -> None:
    """A wrong endpoint is an error that names the setting or variable; it may hold a password, and is not shown."""
    with pytest.raises(StartupError, match="INPAINT_OTLP_ENDPOINT") as of_ours:
        load_settings(environ={"INPAINT_OTLP_ENDPOINT": url})
    with pytest.raises(StartupError, match="OTEL_EXPORTER_OTLP_ENDPOINT") as of_standard:
        traces_url(load_settings(environ={}), {"OTEL_EXPORTER_OTLP_ENDPOINT": url})
    assert url not in f"{of_ours.value} {of_standard.value}".replace("INPAINT_OTLP_ENDPOINT / --otlp-endpoint", "")


# --- what arrives ---------------------------------------------------------------------


def test_traces_arrive_under_the_services_name() -> None:
    """By our setting: whole traces, as protobuf, with name and version; the last ones at the end of the process."""
    with collecting() as collector:
        with process("--otlp-endpoint", collector.endpoint) as running:
            server = running.live()
            assert server.inpaint().status_code == 200
            server.client.close()
            running.process.send_signal(signal.SIGTERM)
            assert running.exit_status() == 0
        (spans,) = collector.traces().values()
        assert {span.name for span in spans} == {"POST /v1/inpaint", *STAGES}
        (request, *_) = collector.requests()
        resource = attributes_of(request.resource_spans[0].resource.attributes)
        assert resource["service.name"] == "inpaint-service"
        assert resource["service.version"]
        assert collector.paths[0] == "/v1/traces"
        assert collector.headers[0]["Content-Type"] == "application/x-protobuf"


def test_standard_variables_are_heeded() -> None:
    """Endpoint, name, resource and headers as every OpenTelemetry SDK takes them."""
    with collecting() as collector:
        standard = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint,
            "OTEL_EXPORTER_OTLP_HEADERS": "api-key=secret-of-the-collector",
            "OTEL_SERVICE_NAME": "painter",
            "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
        }
        with process(environment=standard | AT_ONCE) as running:
            assert running.live().inpaint().status_code == 200
            collector.wait_for("send")
            assert "secret-of-the-collector" not in running.output
        resource = attributes_of(collector.requests()[0].resource_spans[0].resource.attributes)
        assert resource["service.name"] == "painter"
        assert resource["deployment.environment.name"] == "test"
        assert collector.headers[0]["api-key"] == "secret-of-the-collector"


# --- collectors that are no help --------------------------------------------------------


def test_a_collector_that_is_down_is_mentioned_once() -> None:
    """Requests are answered as ever, one line says what is lost, no password is logged, and the process ends."""
    endpoint = f"http://user:secret-password@127.0.0.1:{closed_port()}"
    impatient = AT_ONCE | {"OTEL_EXPORTER_OTLP_TIMEOUT": "0.2", "INPAINT_OTLP_ENDPOINT": endpoint}
    with process("--drain-timeout", "3", "--log-level", "debug", environment=impatient) as running:
        server = running.live()
        for _ in range(3):
            assert server.inpaint().status_code == 200
        eventually(lambda: "the collector at 127.0.0.1 did not answer" in running.output)
        assert [server.inpaint().status_code for _ in range(3)] == [200] * 3
        server.client.close()
        running.process.send_signal(signal.SIGTERM)
        assert running.exit_status() == 0
        assert running.output.count("spans were lost") == 1
        assert "secret-password" not in running.output


def test_a_collector_that_refuses_is_quoted_by_its_status() -> None:
    """Who reads the log learns how the collector answers."""
    with (
        collecting(status=401) as collector,
        process("--otlp-endpoint", collector.endpoint, environment=AT_ONCE) as running,
    ):
        assert running.live().inpaint().status_code == 200
        eventually(lambda: "the collector at 127.0.0.1 answered 401" in running.output)


def test_a_collector_that_hangs_does_not_hold_up_the_end() -> None:
    """The process ends within its drain time though a collector never answers."""
    with (
        collecting(hangs=True) as collector,
        process("--otlp-endpoint", collector.endpoint, "--drain-timeout", "2") as running,
    ):
        server = running.live()
        assert server.inpaint().status_code == 200
        server.client.close()
        running.process.send_signal(signal.SIGTERM)
        assert running.exit_status() == 0
        assert "the last spans could not be sent in time" in running.output


def test_a_full_queue_drops_spans_and_no_requests() -> None:
    """Spans that a slow collector leaves no room for are dropped by the SDK, which says so; requests are answered."""
    tiny = {"OTEL_BSP_MAX_QUEUE_SIZE": "8", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "4"}
    with (
        collecting(hangs=True) as collector,
        process("--otlp-endpoint", collector.endpoint, environment=tiny) as running,
    ):
        server = running.live()
        assert [server.inpaint().status_code for _ in range(4)] == [200] * 4
        eventually(lambda: "Queue full, dropping Span." in running.output)


# --- without --------------------------------------------------------------------------


def run_python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter's end."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | variables,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("missing", ["opentelemetry.sdk", "opentelemetry.exporter", "requests"])
def test_missing_packages_are_one_line_that_names_the_extra(missing: str) -> None:
    """An endpoint without the packages ends the start, with what to install."""
    code = f"import sys; sys.modules[{missing!r}] = None; from service.cli import main; sys.exit(main(['serve']))"
    ended = run_python(code, INPAINT_OTLP_ENDPOINT="http://127.0.0.1:4318", INPAINT_PORT="0")
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert "inpaint-service[tracing]" in line


def test_wrong_standard_variables_are_one_line() -> None:
    """A queue that is smaller than its batches ends the start, and the line says where to look."""
    code = "import sys; from service.cli import main; sys.exit(main(['serve']))"
    variables = {"OTEL_BSP_MAX_QUEUE_SIZE": "1", "INPAINT_OTLP_ENDPOINT": "http://127.0.0.1:4318", "INPAINT_PORT": "0"}
    ended = run_python(code, **variables)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert "OTEL_" in line


def test_off_the_sdk_is_not_loaded(tmp_path: Path) -> None:
    """Without an endpoint neither the SDK nor an exporter is imported, whatever is asked of the service.

    The API package alone is there: FastAPI imports it.
    """
    script = tmp_path / "serve_and_tell.py"
    script.write_text(
        "import sys\n"
        "sys.path.insert(0, '')\n"
        "from tests.http.serving import serving\n"
        "if __name__ == '__main__':\n"
        "    with serving() as server:\n"
        "        assert server.inpaint().status_code == 200\n"
        "        assert server.inpaint(prompt='fail').status_code == 500\n"
        "    print('MODULES', *sys.modules)\n"
    )
    ended = subprocess.run(
        [sys.executable, str(script)], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60
    )
    modules = ended.stdout.partition("MODULES")[2].split()
    assert "service.api.painting" in modules
    assert not [
        name
        for name in modules
        if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter", "opentelemetry.proto", "service.tracing"))
        or name.partition(".")[0] in ("requests", "google")
    ]
