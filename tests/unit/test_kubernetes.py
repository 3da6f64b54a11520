"""The Kubernetes manifests agree with the image, the settings, the metrics and each other."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from service.api.answers import EVENT_STREAM_HEADERS
from service.settings import Settings, environment_variable, given_variables, load_settings
from tests.unit.kubernetes_files import (
    ADAPTER,
    CONTAINER,
    DEPLOYMENT,
    FOLDER,
    HPA,
    INGRESS,
    KEDA,
    KUSTOMIZATIONS,
    MANIFESTS,
    OVERLAYS,
    POD,
    POD_MONITOR,
    PORTS,
    PROMETHEUS,
    ROOT,
    environment,
    one,
    read,
)
from tests.unit.promql import grouping_labels, selectors
from tests.unit.test_deploy import COMPOSE, PROBES, final_stage, the
from tests.unit.test_monitoring import exported

BASE_SETTINGS = load_settings(environ=environment("gpu"))


def test_no_secret_is_in_the_files() -> None:
    """Keys and tokens come from Secrets that the operator makes, as files; no manifest holds one, or asks for none."""
    assert all(document["kind"] != "Secret" for path in MANIFESTS for document in read(path))
    assert all("secretGenerator" not in each for each in KUSTOMIZATIONS.values())
    for overlay in OVERLAYS:
        settings = load_settings(environ=environment(overlay))
        assert settings.api_keys == settings.admin_keys == ()
    folders = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    (keys,) = (volume["secret"] for volume in POD["volumes"] if volume["name"] == "keys")
    assert "optional" not in keys  # Without it there is no pod.
    assert str(BASE_SETTINGS.api_keys_file) == f"{folders['keys']}/api_keys"


# --- the pod and the image ---------------------------------------------------------


def test_pod_is_hardened() -> None:
    """The image's user, no rights, nothing of its own to write to, no token for the cluster's API."""
    uid, gid = map(int, [each.rest for each in final_stage() if each.keyword == "USER"][-1].split(":"))
    pod, container = POD["securityContext"], CONTAINER["securityContext"]
    assert (pod["runAsUser"], pod["runAsGroup"], pod["fsGroup"], pod["runAsNonRoot"]) == (uid, gid, gid, True)
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["allowPrivilegeEscalation"] is False
    assert container["readOnlyRootFilesystem"] is True
    assert container["capabilities"] == {"drop": ["ALL"]}
    assert POD["automountServiceAccountToken"] is False
    (namespace,) = read("base/namespace.yaml")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_pod_can_write_where_the_image_does() -> None:
    """On a read-only file system /tmp and the image's volume are writable, /tmp in bounded memory."""
    writable = {mount["mountPath"]: mount["name"] for mount in CONTAINER["volumeMounts"] if not mount.get("readOnly")}
    assert set(writable) == {"/tmp", *the("VOLUME", final_stage()).exec_form}  # noqa: S108
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    assert volumes[writable["/tmp"]]["emptyDir"] == {"medium": "Memory", "sizeLimit": "512Mi"}  # noqa: S108


@pytest.mark.parametrize(("overlay", "service"), [("gpu", "inpaint"), ("offline", "inpaint"), ("cpu", "inpaint-cpu")])
def test_image_is_the_one_that_compose_builds(overlay: str, service: str) -> None:
    """Overlays name the image as `docker compose build` does, for the same device."""
    (image,) = KUSTOMIZATIONS[f"overlays/{overlay}"]["images"]
    assert image["name"] == CONTAINER["image"]
    assert f"{image['name']}:{image['newTag']}" == COMPOSE["services"][service]["image"]


def test_gpu_pod_has_one_gpu_and_no_other_device() -> None:
    """A pod is a replica is a GPU; without its GPU the service does not start, and never serves from a CPU instead."""
    (container,) = read("components/gpu/gpu.yaml")[0]["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    for overlay in ("gpu", "offline"):
        assert load_settings(environ=environment(overlay)).devices == ("cuda:0",)


def test_cpu_pod_may_use_what_it_asks_for() -> None:
    """Threads follow from the limit: it is there, and is what the scheduler has reserved."""
    (container,) = read("overlays/cpu/cpu.yaml")[0]["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["cpu"] == CONTAINER["resources"]["requests"]["cpu"]
    assert load_settings(environ=environment("cpu")).devices == ("cpu",)


# --- settings ----------------------------------------------------------------------


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_settings_are_taken(overlay: str) -> None:
    """Every variable is one that the service reads, and every value one that it takes."""
    given = environment(overlay)
    assert given_variables(given)[1] == []
    load_settings(environ=given)


def test_every_variable_named_is_a_setting() -> None:
    """Comments, too, name only what the service reads."""
    known = {environment_variable(name) for name in Settings.model_fields}
    for path in FOLDER.rglob("*.y*ml"):
        named = set(re.findall(r"\bINPAINT_[A-Z_]*[A-Z]\b", path.read_text(encoding="utf-8")))
        assert named <= known, path


def test_cluster_sets_no_setting() -> None:
    """Kubernetes' own variables for Services have names of ours, such as INPAINT_PORT: they are switched off."""
    services = [each["metadata"]["name"] for each in read("base/services.yaml")]
    links = {f"{name.upper().replace('-', '_')}_PORT" for name in services}
    assert links & {environment_variable(name) for name in Settings.model_fields}
    assert POD["enableServiceLinks"] is False


def test_ports_are_the_service_s() -> None:
    """The service listens on every address, on the ports that containers, Services, policies and Ingress name."""
    assert BASE_SETTINGS.host == "0.0.0.0"  # noqa: S104 - in a pod; a policy says who may reach it
    assert {"http": BASE_SETTINGS.port, "metrics": BASE_SETTINGS.metrics_port} == PORTS
    services = {each["metadata"]["name"]: each["spec"] for each in read("base/services.yaml")}
    assert {port["targetPort"] for spec in services.values() for port in spec["ports"]} == set(PORTS)
    (policy,) = read("base/network.yaml")
    assert {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]} == set(PORTS)
    (path,) = INGRESS["spec"]["rules"][0]["http"]["paths"]
    backend = path["backend"]["service"]
    assert backend["port"]["name"] in {port["name"] for port in services[backend["name"]]["ports"]}
    assert POD_MONITOR["podMetricsEndpoints"][0]["port"] == "metrics"
    (target,) = PROMETHEUS["scrape_configs"][0]["dns_sd_configs"]
    assert target["port"] == PORTS["metrics"]
    assert services[target["names"][0].split(".")[0]]["clusterIP"] == "None"


def test_every_selector_finds_the_pods() -> None:
    """Services, budget, policies, monitor and spreading select by the labels that the pods have."""
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    chosen = [DEPLOYMENT["spec"]["selector"], POD_MONITOR["selector"]]
    chosen += [each["labelSelector"] for each in POD["topologySpreadConstraints"]]
    chosen += [one("base/disruption.yaml", "PodDisruptionBudget")["spec"]["selector"]]
    chosen += [{"matchLabels": each["spec"]["selector"]} for each in read("base/services.yaml")]
    for path in ("base/network.yaml", "components/model-hub/network.yaml"):
        chosen += [each["spec"]["podSelector"] for each in read(path)]
    assert len(chosen) == 9
    assert all(each == {"matchLabels": labels} for each in chosen)


# --- times -------------------------------------------------------------------------


def test_probes_ask_for_the_right_thing() -> None:
    """Requests come when a worker is warm; only a process that does not answer is restarted."""
    probes = {kind: CONTAINER[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")}
    assert {kind: get["path"] for kind, get in probes.items()} == {
        "startup": "/readyz",
        "readiness": "/readyz",
        "liveness": "/healthz",
    }
    assert {get["path"] for get in probes.values()} == set(PROBES)
    assert {get["port"] for get in probes.values()} == {"http"}


def test_service_gives_up_loading_before_the_kubelet_does() -> None:
    """A first download takes as long as the service allows; a rollout is not called failed before that."""
    probe = CONTAINER["startupProbe"]
    allowed = probe["periodSeconds"] * probe["failureThreshold"]
    for overlay in OVERLAYS:
        assert allowed > load_settings(environ=environment(overlay)).load_timeout
    assert DEPLOYMENT["spec"]["progressDeadlineSeconds"] > allowed


def test_accepted_requests_are_answered_before_the_end() -> None:
    """The pause before SIGTERM and the whole drain time fit into the grace period."""
    pause = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    for overlay in OVERLAYS:
        drain = load_settings(environ=environment(overlay)).drain_timeout
        assert POD["terminationGracePeriodSeconds"] >= pause + drain + 10


def test_rollout_costs_no_capacity() -> None:
    """A new pod is ready before an old one goes, and one at a time is evicted, also when it is the only one."""
    assert DEPLOYMENT["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert one("base/disruption.yaml", "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1
    assert "replicas" not in DEPLOYMENT["spec"]  # An autoscaler's, or the operator's by `kubectl scale`.


def test_ingress_lets_through_what_the_service_does() -> None:
    """Bodies up to the service's limit, answers up to its deadline, event streams as they come; one name everywhere."""
    notes = INGRESS["metadata"]["annotations"]
    bodies = [notes["nginx.org/client-max-body-size"], notes["nginx.ingress.kubernetes.io/proxy-body-size"]]
    reads = [notes["nginx.org/proxy-read-timeout"], notes["nginx.ingress.kubernetes.io/proxy-read-timeout"]]
    assert all(int(body.removesuffix("m")) > BASE_SETTINGS.max_body_mib for body in bodies)
    assert all(int(seconds.removesuffix("s")) > BASE_SETTINGS.timeout for seconds in reads)
    assert EVENT_STREAM_HEADERS["X-Accel-Buffering"] == "no"
    hosts = {INGRESS["spec"]["rules"][0]["host"], *INGRESS["spec"]["tls"][0]["hosts"]}
    assert hosts == set(BASE_SETTINGS.allowed_hosts)


def test_only_what_downloads_reaches_the_internet() -> None:
    """Pods may open no connection, but with the component for the hub, which the offline overlay does not have."""
    (policy,) = read("base/network.yaml")
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert "egress" not in policy["spec"]
    users = {name for name in OVERLAYS if "model-hub" in str(KUSTOMIZATIONS[f"overlays/{name}"].get("components"))}
    assert users == {"gpu"}
    assert load_settings(environ=environment("offline")).offline
    assert load_settings(environ=environment("cpu")).is_bundled_model


# --- metrics -----------------------------------------------------------------------

TARGET_LABELS = {"job", "instance", "namespace", "pod"}


def queries() -> dict[str, str]:
    """Every query of an autoscaler, the adapter's templates filled in."""
    found = {trigger["name"]: trigger["metadata"]["query"] for trigger in KEDA["triggers"]}
    for rule in ADAPTER["rules"]:
        query = rule["metricsQuery"].replace("<<.GroupBy>>", "namespace, pod")
        found[rule["name"]["as"]] = query.replace("<<.LabelMatchers>>", 'namespace="inpaint"')
        found[f"{rule['name']['as']} is there"] = rule["seriesQuery"]
    return found


@pytest.mark.parametrize(("name", "query"), queries().items(), ids=queries())
def test_autoscalers_ask_for_what_is_exported(name: str, query: str) -> None:
    """Every metric that an autoscaler's query names is exported, with the labels that it is asked by."""
    labels_of = {metric: labels | TARGET_LABELS for metric, labels in exported().items()}
    assert selectors(query), name
    for selector in selectors(query):
        assert selector.labels <= labels_of[selector.name]
        assert grouping_labels(query) <= labels_of[selector.name]


def test_autoscalers_agree() -> None:
    """Both scale the Deployment between the same bounds, at the same thresholds, at the same pace."""
    targets = {each["pods"]["metric"]["name"]: each["pods"]["target"] for each in HPA["metrics"]}
    assert set(targets) == {rule["name"]["as"] for rule in ADAPTER["rules"]}
    thresholds = [float(trigger["metadata"]["threshold"]) for trigger in KEDA["triggers"]]
    values = [target["averageValue"] for target in targets.values()]
    assert [float(re.sub(r"(\d+)m$", r"\1e-3", value)) for value in values] == thresholds
    assert (HPA["minReplicas"], HPA["maxReplicas"]) == (KEDA["minReplicaCount"], KEDA["maxReplicaCount"])
    assert KEDA["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == HPA["behavior"]
    assert KEDA["scaleTargetRef"]["name"] == HPA["scaleTargetRef"]["name"] == DEPLOYMENT["metadata"]["name"]


def test_job_is_called_as_the_rules_expect() -> None:
    """However Prometheus finds the pods, the job has the name that rules, alerts and autoscalers ask for."""
    composed = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
    (job,) = {each["job_name"] for each in composed["scrape_configs"]}
    assert PROMETHEUS["scrape_configs"][0]["job_name"] == job
    assert DEPLOYMENT["spec"]["template"]["metadata"]["labels"][POD_MONITOR["jobLabel"]] == job
    for trigger in KEDA["triggers"]:
        assert set(re.findall(r'job="(\w+)"', trigger["metadata"]["query"])) == {job}
    assert {key for key in composed if composed[key] != PROMETHEUS[key]} == {"scrape_configs"}
    assert set(composed) == set(PROMETHEUS)


def test_prometheus_takes_the_configuration(tmp_path: Path) -> None:
    """Prometheus reads it, with the rules beside it."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed; Debian's package prometheus has it")
    for path in (
        FOLDER / "prometheus.yml",
        *(ROOT / "deploy" / "prometheus" / name for name in PROMETHEUS["rule_files"]),
    ):
        shutil.copy(path, tmp_path)
    command = [promtool, "check", "config", "prometheus.yml"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
