"""What operators set: the configuration file, arguments, metrics of several replicas on one machine."""

import httpx
import pytest
import yaml

from service.errors import StartupError
from tests.ray.cluster import ROOT, RayNodes, deployed, free_port, sample, serve

from ray.serve.schema import ServeDeploySchema  # isort: skip - see tests.ray.cluster

from service.ray_app import DEPLOYMENT, application, proxy_middlewares, replica_settings

pytestmark = pytest.mark.ray

CONFIGURATION = yaml.safe_load((ROOT / "deploy" / "ray" / "serve.yaml").read_text(encoding="utf-8"))


def test_configuration_file_is_ray_s_and_ours() -> None:
    """`deploy/ray/serve.yaml` is what Ray's schema allows, and names our application, deployment and settings."""
    schema = ServeDeploySchema.model_validate(CONFIGURATION)
    (app,) = schema.applications
    assert app.import_path == "service.ray_app:build"
    assert [one.name for one in app.deployments] == [DEPLOYMENT]
    assert replica_settings(app.args).metrics_port is not None
    assert schema.logging_config is not None
    assert not schema.logging_config.enable_access_log


def test_proxies_know_what_stands_in_them() -> None:
    """What the environment of `ray start` names is there, and is a list of middlewares as Ray wants it."""
    assert [one.cls.__name__ for one in proxy_middlewares()] == ["Front"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"api_keys": "secret"}, "api_keys_file"),
        ({"admin_keys": ["secret"]}, "admin_keys_file"),
        ({"quue_size": 3}, "quue_size"),
        ({"queue_size": 0}, "INPAINT_QUEUE_SIZE"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    """Arguments that are no settings, or would show keys in Ray's dashboard, are refused with a line that says so."""
    with pytest.raises(StartupError, match=message) as caught:
        application(arguments)
    assert "secret" not in str(caught.value)


def test_metrics_are_off_behind_the_proxies() -> None:
    """`/metrics` through a proxy would be that of any replica, so without a port there is none."""
    assert replica_settings({}).metrics_access == "off"
    assert replica_settings({"metrics_port": 9600}).metrics_access == "clients"


def test_each_replica_has_metrics_of_its_own(nodes: RayNodes) -> None:
    """Replicas on one machine take one port after the other, and the sum of all is what was painted."""
    first = free_port()
    with deployed(nodes, {"metrics_port": first}, num_replicas=2) as app:
        ports = [port for port in range(first, first + 8) if _answers(port)]
        assert len(ports) == 2
        for seed in range(12):
            assert app.inpaint(seed=str(seed)).status_code == 200
        assert sample(ports, "inpaint_images_total") == 12


def test_what_cannot_start_says_why(nodes: RayNodes) -> None:
    """A model that is not there ends the deployment with our one line in `serve status`."""
    with pytest.raises(RuntimeError), deployed(nodes, {"model": "fake?cannot_start=there+is+no+model+here"}):
        pass
    deployments = serve.status().applications["inpaint"].deployments
    assert "there is no model here" in deployments[DEPLOYMENT].message
    serve.delete("inpaint")


def _answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
