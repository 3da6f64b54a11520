"""What the machine has: packages, cores, memory, descriptors, room on disks. Whatever the settings are."""

import os
import platform
import re
import resource
import shutil
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from service import __version__
from service.engine.devices import CPU_QUOTA_FILE, usable_cores
from service.findings import Fact, Finding, shown_bytes

MEMORY_FILE = Path("/proc/meminfo")
MEMORY_LIMIT_FILE = Path("/sys/fs/cgroup/memory.max")
MEMORY_USED_FILE = Path("/sys/fs/cgroup/memory.current")

_DISTRIBUTION = "inpaint-service"
_SHOWN = ("torch", "diffusers", "transformers")

# A worker of the bundled model; checkpoints of Stable Diffusion 1.x take several times as much.
_LITTLE_MEMORY_BYTES = 2 * 2**30
_LITTLE_ROOM_BYTES = 2**30
_FEW_DESCRIPTORS = 256


def survey_machine() -> Iterator[Finding]:
    """One finding after the other."""
    yield _software()
    yield _requirements()
    yield _cores()
    yield _memory()
    yield _descriptors()
    yield check_folder("temporary files", Path(tempfile.gettempdir()))


def _software() -> Finding:
    versions = {name: _version(name) for name in _SHOWN}
    libraries = ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())
    text = f"inpaint-service {__version__}, Python {platform.python_version()}, {libraries}"
    return Finding("versions", "ok", text, "", {"python": platform.python_version(), **versions})


def _requirements() -> Finding:
    """What is installed, beside what the package asks for."""
    try:
        lines = metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return Finding("packages", "warn", "not installed as a package, so that what it needs is not known")
    unmet = [fault for line in lines if (fault := _fault(line)) is not None]
    if unmet:
        hint = "pip install -c constraints.txt -e ."
        is_missing = any("is missing" in fault for fault in unmet)
        return Finding("packages", "fail" if is_missing else "warn", "; ".join(unmet), hint)
    return Finding("packages", "ok", "those that the service asks for")


def _fault(line: str) -> str | None:
    try:
        requirement = Requirement(line)
    except InvalidRequirement:
        return None
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        return None
    version = _version(requirement.name)
    if version is None:
        return f"{requirement.name} is missing"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} {version} is not {requirement.specifier}"
    return None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cores() -> Finding:
    usable, all_cores = usable_cores(CPU_QUOTA_FILE), os.cpu_count() or 1
    quota = _text(CPU_QUOTA_FILE).split()
    limits = "" if usable == all_cores else f" of {all_cores}"
    if quota and quota[0].isdigit():
        limits += f", quota {int(quota[0]) / int(quota[1]):g}"
    return Finding("CPU", "ok", f"{usable} cores usable{limits}", "", {"usable": usable, "cores": all_cores})


def _memory() -> Finding:
    found = {name: int(kib) * 1024 for name, kib in re.findall(r"(\w+):\s+(\d+) kB", _text(MEMORY_FILE))}
    if "MemTotal" not in found:
        return Finding("memory", "warn", f"unknown: this {platform.system()} does not say")
    total, available = found["MemTotal"], found.get("MemAvailable", found["MemTotal"])
    limit = _text(MEMORY_LIMIT_FILE).strip()
    if limit.isdigit() and int(limit) < total:
        total = int(limit)
        used = _text(MEMORY_USED_FILE).strip()
        available = min(available, total - int(used) if used.isdigit() else total)
    text = f"{shown_bytes(available)} of {shown_bytes(total)} available"
    facts = {"total_bytes": total, "available_bytes": available}
    if available < _LITTLE_MEMORY_BYTES:
        return Finding("memory", "warn", text, "that is little for a worker: it may be killed while it loads", facts)
    return Finding("memory", "ok", text, "", facts)


def _descriptors() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_unlimited = soft == resource.RLIM_INFINITY
    text = "no limit" if is_unlimited else f"at most {soft}"
    facts = {"soft_limit": None if is_unlimited else soft}
    if not is_unlimited and soft < _FEW_DESCRIPTORS:
        return Finding("descriptors", "warn", text, "each connection takes one: raise it with ulimit -n", facts)
    return Finding("descriptors", "ok", text, "", facts)


def check_folder(topic: str, folder: Path, *, is_needed: bool = False) -> Finding:
    """Whether a folder, or the one that it would be made in, can be written to; and what room there is.

    Something is written, and removed again: permissions alone say little in containers.

    Args:
        topic: What it is for.
        folder: Need not exist.
        is_needed: Whether `serve` would not start without.
    """
    existing = next((path for path in (folder, *folder.parents) if path.exists()), Path("/"))
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".inpaint-doctor-") as file:
            file.write(b"0")
            file.flush()
        free = shutil.disk_usage(existing).free
    except OSError as error:
        text = f"{folder} cannot be written to: {error.strerror or error}"
        return Finding(topic, "fail" if is_needed else "warn", text, "make it writable for the user that serves")
    state = "" if existing == folder else ", will be made"
    text = f"{folder}, {shown_bytes(free)} free{state}"
    facts: dict[str, Fact] = {"path": str(folder), "free_bytes": free}
    if free < _LITTLE_ROOM_BYTES:
        return Finding(topic, "warn", text, "there is little room left", facts)
    return Finding(topic, "ok", text, "", facts)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
