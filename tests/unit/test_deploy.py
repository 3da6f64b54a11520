"""The files of a deployment agree with the code, with each other, and with what makes a container safe."""

import asyncio
import fnmatch
import http.server
import importlib.util
import json
import os
import re
import stat
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

import httpx
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from service.api.app import create_app
from service.engine.engine import Engine
from service.metrics import Metrics
from service.settings import ENVIRONMENT_PREFIX, Settings, environment_variable, load_settings

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
DEFAULTS = Settings()
SERVICES = ("inpaint", "inpaint-cpu")
PROBES = ("/healthz", "/readyz")


# --- the Dockerfile ----------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile: its keyword and the rest, continued lines joined."""

    keyword: str
    rest: str

    @property
    def exec_form(self) -> list[str]:
        """The JSON array of an instruction in exec form; fails where it is in shell form."""
        array = json.loads(self.rest[self.rest.index("[") :])
        assert all(isinstance(word, str) for word in array)
        return array


def dockerfile() -> list[Instruction]:
    """Every instruction, in order."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    joined = text.replace("\\\n", " ").splitlines()
    return [Instruction(*line.strip().split(maxsplit=1)) for line in joined if line.strip()]


def final_stage() -> list[Instruction]:
    """The instructions of the stage that ships."""
    instructions = dockerfile()
    start = max(index for index, one in enumerate(instructions) if one.keyword == "FROM")
    return instructions[start:]


def the(keyword: str, instructions: list[Instruction]) -> Instruction:
    """The only instruction of a kind."""
    (found,) = (one for one in instructions if one.keyword == keyword)
    return found


def arguments(instructions: list[Instruction]) -> dict[str, str]:
    """Each ARG and its default, as written."""
    return dict(one.rest.split("=", 1) for one in instructions if one.keyword == "ARG")


def image_environment() -> dict[str, str]:
    """The ENV of the stage that ships."""
    pairs = [pair for one in final_stage() if one.keyword == "ENV" for pair in one.rest.split()]
    return dict(pair.split("=", 1) for pair in pairs)


def test_base_images_are_pinned() -> None:
    """A rebuild gives the same base: every image has a full version tag, or is an earlier stage."""
    stages: set[str] = set()
    for one in dockerfile():
        if one.keyword == "FROM":
            image, *alias = one.rest.split()
            assert image in stages or re.search(r":\d+\.\d+\.\d+", image), image
            stages.update(alias[1:])


def test_container_runs_as_a_fixed_user_without_rights() -> None:
    """The last USER is numeric and not root, and owns the only folder that is declared writable."""
    stage = final_stage()
    users = [one.rest for one in stage if one.keyword == "USER"]
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", users[-1])
    uid, gid = users[-1].split(":")
    setup = " ".join(one.rest for one in stage if one.keyword == "RUN")
    (volume,) = the("VOLUME", stage).exec_form
    assert f"--uid {uid}" in setup
    assert f"--gid {gid}" in setup
    assert f"install --directory --owner=inpaint --group=inpaint {volume}" in setup
    assert image_environment()["HF_HOME"].startswith(f"{volume}/")


def test_container_starts_the_command_line_program() -> None:
    """ENTRYPOINT and CMD are in exec form, so that signals reach the service, and name its own program."""
    stage = final_stage()
    (program,) = the("ENTRYPOINT", stage).exec_form
    assert program in PROJECT["scripts"]
    assert the("CMD", stage).exec_form == ["serve"]
    assert the("STOPSIGNAL", stage).rest == "SIGTERM"


def test_image_holds_only_what_it_needs() -> None:
    """What ships fetches the wheel that was built before, and a C compiler, which compiling for a GPU takes."""
    for one in final_stage():
        assert one.keyword != "ADD"
        if one.keyword == "RUN":
            packages = re.findall(r"apt-get install [^&;]*", one.rest)
            assert all(
                words.split()[2:] == ["--yes", "--no-install-recommends", "${COMPILER_PACKAGES}"] for words in packages
            )
            assert not re.search(r"\b(apt(?!-get|/lists)|curl|wget|gcc|git)\b", one.rest), one.rest
            assert "pip" not in one.rest or "--no-deps" in one.rest, one.rest
    assert arguments(final_stage()) == {"COMPILER_PACKAGES": '"g++ libc6-dev"'}


def test_image_for_a_cpu_holds_no_compiler() -> None:
    """Nothing is compiled there."""
    assert COMPOSE["services"]["inpaint-cpu"]["build"]["args"]["COMPILER_PACKAGES"] == ""


def test_compiled_code_is_kept_where_it_may_be_executed() -> None:
    """In the volume, where the next start finds it: /tmp may be mounted without leave to execute."""
    cache = Path(image_environment()[environment_variable("compile_cache")])
    assert cache.is_relative_to(json.loads(the("VOLUME", final_stage()).rest)[0])


def test_image_installs_the_pinned_versions() -> None:
    """The dependencies are installed under constraints.txt, and the CPU index is the builder's to give."""
    installs = [one.rest for one in dockerfile() if one.keyword == "RUN" and "-r requirements.txt" in one.rest]
    assert len(installs) == 1
    assert "-c constraints.txt" in installs[0]
    assert arguments(dockerfile())["TORCH_INDEX_URL"] == '""'


def test_image_has_what_its_settings_need() -> None:
    """The image can send traces, which a setting asks for: nothing can be installed into it later."""
    (install,) = (one.rest for one in dockerfile() if one.keyword == "RUN" and "-r requirements.txt" in one.rest)
    code = re.search(r"python -c '([^']+)'", install)[1]
    listed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert {*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["tracing"]} == set(listed.splitlines())


def test_image_listens_where_it_says() -> None:
    """The service listens on every interface of the container, on the port that the image exposes."""
    settings = load_settings(environ=image_environment())
    assert settings.host == "0.0.0.0"  # noqa: S104 - inside a container; publishing the port is the operator's choice
    assert the("EXPOSE", final_stage()).rest == str(settings.port)


def test_build_context_holds_what_is_copied_and_nothing_secret() -> None:
    """The context admits each file that is copied, and keeps out the repository's history and local settings."""
    patterns = [
        line
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]

    def is_admitted(path: str) -> bool:
        admitted = True
        for pattern in patterns:
            name = pattern.removeprefix("!")
            if fnmatch.fnmatch(path, name) or path.startswith(f"{name}/"):
                admitted = pattern.startswith("!")
        return admitted

    for one in dockerfile():
        if one.keyword == "COPY" and not one.rest.startswith("--from"):
            for source in one.rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert is_admitted(source), source
    for path in (
        ".git/config",
        ".env",
        "two_cores.json",
        "deploy/prometheus/prometheus.yml",
        "tests/unit/test_deploy.py",
    ):
        assert not is_admitted(path), path


# --- health ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def healthcheck() -> ModuleType:
    """The image's health check, loaded from its file."""
    spec = importlib.util.spec_from_file_location("healthcheck", ROOT / "deploy" / "healthcheck.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def answering(status: int) -> Iterator[tuple[int, list[str]]]:
    """A server on loopback that answers everything with `status`: its port, and the paths asked for."""
    paths: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Keep the test's output clean."""

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_address[1], paths
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(("status", "exit_status"), [(200, 0), (503, 1), (500, 1), (404, 1), (204, 1)])
def test_healthcheck_reports_the_answer(healthcheck: ModuleType, status: int, exit_status: int) -> None:
    """The container is healthy when the probe answers 200, and unhealthy for anything else."""
    with answering(status) as (port, paths):
        assert healthcheck.check("/readyz", port) == exit_status
    assert paths == ["/readyz"]


def test_healthcheck_reports_a_dead_service(healthcheck: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """A port that nobody listens on is unhealthy, in one line and without a traceback."""
    with answering(200) as (port, _):
        pass
    assert healthcheck.check("/healthz", port) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_healthcheck_ignores_proxies(healthcheck: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy in the environment, which downloads may need, does not stand between a container and itself."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    with answering(200) as (port, _):
        assert healthcheck.check("/healthz", port) == 0


@pytest.mark.parametrize("path", PROBES)
def test_probed_paths_exist(path: str) -> None:
    """Both probes are routes of the application, and need no API key."""
    settings, metrics = load_settings({"api_keys": "secret"}, environ={}), Metrics()
    app = create_app(settings, Engine(settings, metrics), metrics)

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            return await client.get(path)

    assert asyncio.run(ask()).status_code == {"/healthz": 200, "/readyz": 503}[path]


def test_image_is_probed_for_liveness() -> None:
    """The image's own check asks for liveness: to be replaced while a checkpoint loads would never end."""
    program, script, path = the("HEALTHCHECK", final_stage()).exec_form
    copied = [one.rest.split() for one in final_stage() if one.keyword == "COPY"]
    assert program == "python"
    assert ["deploy/healthcheck.py", script] in copied
    assert path == "/healthz"


@pytest.mark.parametrize("service", SERVICES)
def test_compose_probes_for_readiness(service: str) -> None:
    """`docker compose up --wait` returns when requests can be answered, by the script that the image holds."""
    kind, *command = COMPOSE["services"][service]["healthcheck"]["test"]
    assert kind == "CMD"
    assert command == [*the("HEALTHCHECK", final_stage()).exec_form[:2], "/readyz"]


# --- docker-compose.yml ------------------------------------------------------------


def seconds(duration: str) -> float:
    """A Compose duration such as 1m30s, with a variable's default in place of the variable."""
    text = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", duration)
    parts = re.findall(r"(\d+)(h|m|s)", text)
    assert "".join(number + unit for number, unit in parts) == text, text
    return sum(int(number) * {"h": 3600, "m": 60, "s": 1}[unit] for number, unit in parts)


def test_default_service_reserves_the_gpus() -> None:
    """`docker compose up` starts the one service without a profile, with every NVIDIA GPU."""
    assert [name for name, one in COMPOSE["services"].items() if "profiles" not in one] == ["inpaint"]
    devices = COMPOSE["services"]["inpaint"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]


def test_cpu_profile_needs_no_gpu() -> None:
    """The CPU service reserves nothing, names the CPU, and is built with PyTorch's CPU wheels."""
    service = COMPOSE["services"]["inpaint-cpu"]
    assert service["profiles"] == ["cpu"]
    assert "reservations" not in service["deploy"]["resources"]
    assert service["environment"]["INPAINT_DEVICES"] == "${INPAINT_DEVICES:-cpu}"
    assert service["build"]["args"]["TORCH_INDEX_URL"].startswith("${TORCH_INDEX_URL:-https://download.pytorch.org/")
    assert service["image"] != COMPOSE["services"]["inpaint"]["image"]


@pytest.mark.parametrize("service", SERVICES)
def test_grace_period_exceeds_the_drain(service: str) -> None:
    """On `docker stop` accepted requests get their whole drain time before the container is killed."""
    assert seconds(COMPOSE["services"][service]["stop_grace_period"]) >= DEFAULTS.drain_timeout + 10


@pytest.mark.parametrize("service", SERVICES)
def test_every_setting_can_be_passed(service: str) -> None:
    """Each setting reaches the container under its own name, but for those that the ports here fix; none is unknown."""
    environment = COMPOSE["services"][service]["environment"]
    named = {name for name in environment if name.startswith(ENVIRONMENT_PREFIX)}
    fixed = {environment_variable(name) for name in ("host", "port")}
    assert named == {environment_variable(name) for name in Settings.model_fields} - fixed
    assert {name for name in named if environment[name] is not None} <= {"INPAINT_METRICS_PORT", "INPAINT_DEVICES"}


@pytest.mark.parametrize(
    "path",
    [
        "Dockerfile",
        "docker-compose.yml",
        "deploy/healthcheck.py",
        "deploy/prometheus/prometheus.yml",
        "deploy/prometheus/alerts.yml",
    ],
)
def test_every_variable_named_is_a_setting(path: str) -> None:
    """A variable that a deployment file names is one that the service reads."""
    known = {environment_variable(name) for name in Settings.model_fields}
    named = set(re.findall(r"\bINPAINT_[A-Z_]+\b", (ROOT / path).read_text(encoding="utf-8")))
    assert named <= known


@pytest.mark.parametrize("service", COMPOSE["services"])
def test_containers_are_hardened(service: str) -> None:
    """No container writes to its image, keeps a capability, gains rights, or takes all memory or processes."""
    one = COMPOSE["services"][service]
    assert one["read_only"] is True
    assert one["cap_drop"] == ["ALL"]
    assert one["security_opt"] == ["no-new-privileges:true"]
    assert one["restart"] == "unless-stopped"
    assert {"memory", "pids"} <= set(one["deploy"]["resources"]["limits"])
    assert not {"privileged", "cap_add", "network_mode", "pid", "ipc"} & set(one)


@pytest.mark.parametrize("service", SERVICES)
def test_downloads_outlive_the_container(service: str) -> None:
    """Checkpoints go to a named volume, and temporary files to memory."""
    (volume,) = the("VOLUME", final_stage()).exec_form
    assert COMPOSE["services"][service]["volumes"] == [f"model-cache:{volume}"]
    assert "model-cache" in COMPOSE["volumes"]
    assert [mount.split(":")[0] for mount in COMPOSE["services"][service]["tmpfs"]] == ["/tmp"]  # noqa: S108


@pytest.mark.parametrize("service", COMPOSE["services"])
def test_ports_are_published_on_loopback(service: str) -> None:
    """Nothing is reachable from another machine unless the operator says so."""
    for port in COMPOSE["services"][service]["ports"]:
        assert re.match(r"(127\.0\.0\.1|\$\{BIND_ADDRESS:-127\.0\.0\.1\}):", port), port


@pytest.mark.parametrize("service", SERVICES)
def test_published_port_is_the_service_s(service: str) -> None:
    """The container's side of the published port is the one that the service listens on."""
    (port,) = COMPOSE["services"][service]["ports"]
    assert port.rsplit(":", 1)[1] == str(DEFAULTS.port)


def test_images_of_others_are_pinned() -> None:
    """An image that is not built here has a full version."""
    for service in COMPOSE["services"].values():
        assert "build" in service or re.search(r":v?\d+\.\d+\.\d+$", service["image"]), service["image"]


# --- Prometheus --------------------------------------------------------------------


def test_prometheus_scrapes_the_service_under_either_profile() -> None:
    """The one target is a host name that both services have, on the port of metrics alone, which is not published."""
    config = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
    (job,) = config["scrape_configs"]
    (target,) = (target for group in job["static_configs"] for target in group["targets"])
    host, port = target.split(":")
    assert job["metrics_path"] == "/metrics"
    assert host in COMPOSE["services"]
    assert host in COMPOSE["services"]["inpaint-cpu"]["networks"]["default"]["aliases"]
    for service in SERVICES:
        assert port == str(COMPOSE["services"][service]["environment"]["INPAINT_METRICS_PORT"])
        assert all(port not in published for published in COMPOSE["services"][service]["ports"])


def test_prometheus_reads_the_files_that_are_here() -> None:
    """The mounted configuration and the rules that it names exist, read-only; the data goes to a named volume."""
    config, data = COMPOSE["services"]["prometheus"]["volumes"]
    source, target, mode = config.split(":")
    assert (target, mode) == ("/etc/prometheus", "ro")  # Where the image looks for prometheus.yml.
    rule_files = yaml.safe_load((ROOT / source / "prometheus.yml").read_text(encoding="utf-8"))["rule_files"]
    assert len(rule_files) == 2
    assert all((ROOT / source / name).is_file() for name in rule_files)
    assert data.split(":")[0] in COMPOSE["volumes"]


# --- Grafana -----------------------------------------------------------------------


def test_grafana_is_provisioned_from_the_files_that_are_here() -> None:
    """Data source, provider and dashboard are mounted read-only, where Grafana and the provider look for them."""
    mounts = [mount.split(":") for mount in COMPOSE["services"]["grafana"]["volumes"]]
    folders = {target: ROOT / source for source, target, *mode in mounts if mode == ["ro"]}
    provisioning = "/etc/grafana/provisioning"
    providers = folders[f"{provisioning}/dashboards"] / "inpaint.yml"
    (provider,) = yaml.safe_load(providers.read_text(encoding="utf-8"))["providers"]
    assert list(folders[provider["options"]["path"]].glob("*.json"))
    environment = COMPOSE["services"]["grafana"]["environment"]
    home = Path(environment["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (folders[str(home.parent)] / home.name).is_file()
    sources = folders[f"{provisioning}/datasources"] / "prometheus.yml"
    (source,) = yaml.safe_load(sources.read_text(encoding="utf-8"))["datasources"]
    host, port = source["url"].removeprefix("http://").split(":")
    assert any(published.endswith(f":{port}") for published in COMPOSE["services"][host]["ports"])
    config = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]


def test_grafana_has_no_password_to_guess() -> None:
    """Visitors may look; there is no administrator, no form to log in with and nothing to sign up for."""
    environment = COMPOSE["services"]["grafana"]["environment"]
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert environment["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert environment["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"
    assert environment["GF_AUTH_BASIC_ENABLED"] == "false"
    assert environment["GF_USERS_ALLOW_SIGN_UP"] == "false"


# --- constraints.txt and the CI script ---------------------------------------------


def pins() -> dict[str, Requirement]:
    """Every line of constraints.txt, by canonical name."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert len({canonicalize_name(one.name) for one in found}) == len(found)
    return {canonicalize_name(one.name): one for one in found}


def test_constraints_are_exact() -> None:
    """Each line is `name==version` without extras or markers, as a constraints file must be."""
    for one in pins().values():
        (specifier,) = one.specifier
        assert specifier.operator == "=="
        assert "*" not in specifier.version
        assert not one.extras
        assert one.marker is None


def test_constraints_cover_and_fit_the_requirements() -> None:
    """Every requirement of the project and of its extras has a pin within its range."""
    declared = [
        *PROJECT["dependencies"],
        *(line for lines in PROJECT["optional-dependencies"].values() for line in lines),
    ]
    for requirement in map(Requirement, declared):
        if requirement.name != PROJECT["name"]:
            (pin,) = pins()[canonicalize_name(requirement.name)].specifier
            assert pin.version in requirement.specifier, requirement


def test_what_requirements_bring_along_is_pinned() -> None:
    """Every package that is installed for the project and its extras, however indirectly, has a pin."""
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    todo = [Requirement(line) for line in [*PROJECT["dependencies"], *extras]]
    seen: set[tuple[str, str]] = set()
    unpinned: set[str] = set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen or name == PROJECT["name"]:
                continue
            seen.add((name, extra))
            try:
                further = map(Requirement, metadata.requires(name) or [])
            except metadata.PackageNotFoundError:
                continue  # Of an extra that is not installed here.
            if name not in pins():
                unpinned.add(name)
            todo += [one for one in further if one.marker is None or one.marker.evaluate({"extra": extra})]
    assert len(seen) > 40
    assert unpinned == set()


def test_torch_may_come_from_any_index() -> None:
    """Torch's pin has no local version: the CUDA wheel and the CPU wheel both satisfy it."""
    (pin,) = pins()["torch"].specifier
    assert re.fullmatch(r"\d+\.\d+\.\d+", pin.version)


def test_ci_runs_the_readme_s_test_command() -> None:
    """CI takes its test command from the README, where exactly one bash block is marked for it."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    marked = re.findall(r"^<!-- test-command -->\n```bash\n(.+?)\n```$", readme, re.MULTILINE | re.DOTALL)
    assert len(marked) == readme.count("<!-- test-command -->") == 1
    assert "-c constraints.txt" in marked[0]
    script = ROOT / ".ci" / "run"
    assert "<!-- test-command -->" in script.read_text(encoding="utf-8")
    assert script.stat().st_mode & stat.S_IXUSR
    assert os.access(script, os.X_OK)
