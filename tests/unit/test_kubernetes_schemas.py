"""The Kubernetes manifests are valid, each by itself and as kustomize renders them."""

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml

from tests.unit.kubernetes_files import (
    COMPONENTS,
    DEPLOYMENT,
    FILES,
    FOLDER,
    FOR_OTHERS,
    KEDA,
    KUSTOMIZATIONS,
    MANIFESTS,
    OVERLAYS,
    POD_MONITOR,
    Document,
    environment,
    read,
)

VERSIONS = ("1.30", "1.37")
"""The oldest that has what is used here (preStop's sleep), and the newest that there are schemas of."""

CUSTOM_KINDS = {"ScaledObject", "PodMonitor"}
"""Their schemas are not Kubernetes' own."""


# --- as files ----------------------------------------------------------------------


def test_every_file_is_used() -> None:
    """Each file is part of a kustomization, or configures something else; what a kustomization names exists."""
    named = {
        f"{folder}/{name}"
        for folder, each in KUSTOMIZATIONS.items()
        for name in [*each.get("resources", []), *(patch["path"] for patch in each.get("patches", []))]
        if name.endswith(".yaml")
    }
    assert named | FOR_OTHERS == set(FILES)
    for folder, each in KUSTOMIZATIONS.items():
        for name in each.get("components", []):
            assert (FOLDER / folder / name / "kustomization.yaml").is_file()


def validate(documents: list[Document]) -> None:
    """Fail on the first that the Kubernetes API would not take as it is: unknown fields, too, are errors."""
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed (extra: dev)")
    for document in documents:
        if document["kind"] not in CUSTOM_KINDS:
            for version in VERSIONS:
                validator.validate(document, version, strict=True)


@pytest.mark.parametrize("path", MANIFESTS)
def test_manifest_is_valid(path: str) -> None:
    """Each manifest fits the published schema of its kind, in the oldest and the newest Kubernetes."""
    validate(read(path))


def test_validation_finds_what_is_wrong() -> None:
    """A misspelt field and a wrong type are errors: what the other tests pass, they would not pass by default."""
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed (extra: dev)")
    for wrong in ({"progressDeadline": 1}, {"progressDeadlineSeconds": "1"}):
        with pytest.raises(validator.ValidationError):
            validate([{**DEPLOYMENT, "spec": {**DEPLOYMENT["spec"], **wrong}}])


def test_custom_resources_have_documented_fields() -> None:
    """Every field of what KEDA and the Prometheus Operator read is one that their reference documents."""
    assert set(KEDA) <= {
        "scaleTargetRef",
        "pollingInterval",
        "minReplicaCount",
        "maxReplicaCount",
        "triggers",
        "advanced",
    }
    assert set(KEDA["advanced"]) == {"horizontalPodAutoscalerConfig"}
    for trigger in KEDA["triggers"]:
        assert set(trigger) == {"type", "name", "metadata"}
        assert set(trigger["metadata"]) == {"serverAddress", "query", "threshold", "ignoreNullValues"}
        assert all(isinstance(value, str) for value in trigger["metadata"].values())
    assert set(POD_MONITOR) == {"jobLabel", "selector", "podMetricsEndpoints"}
    assert [set(each) for each in POD_MONITOR["podMetricsEndpoints"]] == [{"port", "path", "interval"}]


# --- as a whole --------------------------------------------------------------------


@cache
def rendered(folder: Path) -> list[Document]:
    """What `kubectl apply -k` would send."""
    program = next((path for path in (shutil.which("kustomize"), shutil.which("kubectl")) if path), None)
    if program is None:
        pytest.skip("neither kustomize nor kubectl is installed")
    verb = "build" if Path(program).name == "kustomize" else "kustomize"
    run = subprocess.run([program, verb, str(folder)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return list(yaml.safe_load_all(run.stdout))


@pytest.fixture(scope="module", params=[*OVERLAYS, *(f"cpu with {name}" for name in COMPONENTS)])
def documents(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Document]:
    """An overlay as it is, or the one for CPUs, which has no components, with one of them."""
    overlay, _, component = request.param.partition(" with ")
    if not component:
        return rendered(FOLDER / "overlays" / overlay)
    folder = tmp_path_factory.mktemp(component)
    kustomization = {
        "resources": [os.path.relpath(FOLDER / "overlays" / overlay, folder)],
        "components": [os.path.relpath(FOLDER / "components" / component, folder)],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization), encoding="utf-8")
    return rendered(folder)


def test_rendered_manifests_are_valid(documents: list[Document]) -> None:
    """What kustomize makes of bases and patches fits the schemas, too."""
    validate(documents)


def test_rendered_manifests_fit_together(documents: list[Document]) -> None:
    """All is in one namespace, refers to what is there, and each volume has one source."""
    names = {(each["kind"], each["metadata"]["name"]) for each in documents}
    assert len(names) == len(documents)
    for document in documents:
        assert document["kind"] == "Namespace" or document["metadata"]["namespace"] == "inpaint"
    (pod,) = (each["spec"]["template"]["spec"] for each in documents if each["kind"] == "Deployment")
    (container,) = pod["containers"]
    (source,) = container["envFrom"]
    assert ("ConfigMap", source["configMapRef"]["name"]) in names
    for volume in pod["volumes"]:
        assert len(volume) == 2, volume  # Its name, and one source.
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        assert claim in (None, "inpaint-models") or ("PersistentVolumeClaim", claim) in names


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_settings_are_those_that_are_tested(overlay: str) -> None:
    """What kustomize merges is what the tests of settings read from the files."""
    (data,) = (each["data"] for each in rendered(FOLDER / "overlays" / overlay) if each["kind"] == "ConfigMap")
    assert data.items() <= environment(overlay).items()
