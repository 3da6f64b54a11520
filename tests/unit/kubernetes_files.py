"""Reads the Kubernetes manifests for the tests of them."""

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
OVERLAYS = ("gpu", "cpu", "offline")
COMPONENTS = tuple(sorted(path.name for path in (FOLDER / "components").iterdir()))
FOR_OTHERS = {"prometheus.yml", "components/hpa/adapter-rules.yaml"}
"""No manifests: configuration of Prometheus and of prometheus-adapter."""

Document = dict[str, Any]


def read(path: str) -> list[Document]:
    """The documents of a file, named from the folder of the manifests."""
    return list(yaml.safe_load_all((FOLDER / path).read_text(encoding="utf-8")))


def one(path: str, kind: str, name: str = "inpaint") -> Document:
    """The document of a kind and name in a file."""
    (found,) = (each for each in read(path) if each["kind"] == kind and each["metadata"]["name"] == name)
    return found


KUSTOMIZATIONS = {
    str(path.parent.relative_to(FOLDER)): yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in sorted(FOLDER.rglob("kustomization.yaml"))
}
FILES = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.y*ml") if path.name != "kustomization.yaml")
PATCHES = {f"{folder}/{patch['path']}" for folder, each in KUSTOMIZATIONS.items() for patch in each.get("patches", [])}
MANIFESTS = [path for path in FILES if path not in PATCHES | FOR_OTHERS]

DEPLOYMENT = one("base/deployment.yaml", "Deployment")
POD = DEPLOYMENT["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
PORTS = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
INGRESS = one("components/ingress/ingress.yaml", "Ingress")
HPA = one("components/hpa/hpa.yaml", "HorizontalPodAutoscaler")["spec"]
KEDA = one("components/keda/scaledobject.yaml", "ScaledObject")["spec"]
POD_MONITOR = one("components/podmonitor/podmonitor.yaml", "PodMonitor")["spec"]
(ADAPTER,) = read("components/hpa/adapter-rules.yaml")
(PROMETHEUS,) = read("prometheus.yml")


def literals(folder: str) -> dict[str, str]:
    """The settings that a kustomization itself gives."""
    lines = [line for each in KUSTOMIZATIONS[folder].get("configMapGenerator", []) for line in each["literals"]]
    return dict(line.split("=", 1) for line in lines)


def environment(overlay: str) -> dict[str, str]:
    """Our variables in a container of an overlay, with those of the components that anybody may add."""
    found = literals("base")
    for component in COMPONENTS:
        is_chosen = f"../../components/{component}" in KUSTOMIZATIONS[f"overlays/{overlay}"].get("components", [])
        if is_chosen or component in ("ingress", "shared-cache"):
            found |= literals(f"components/{component}")
    found |= literals(f"overlays/{overlay}")
    found |= {each["name"]: each["value"] for each in CONTAINER["env"]}
    return {name: value for name, value in found.items() if name.startswith("INPAINT_")}
