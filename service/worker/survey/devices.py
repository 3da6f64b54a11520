"""What torch sees of the devices that workers would be started on."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from service.errors import StartupError, first_line
from service.findings import Fact, Finding, shown_bytes
from service.settings import Settings
from service.worker.runtime import open_device

# Stable Diffusion 1.x in half precision, its activations and a batch of a few pictures.
_SMALL_MEMORY_BYTES = 4 * 2**30

_PROBE_SIDE = 64


def survey_devices(settings: Settings, devices: Sequence[str]) -> Iterator[Finding]:
    """One finding for each device that would be used, then for each CUDA device that would not.

    A service starts as long as one of its workers does: only when no device can be used is that a failure.
    """
    findings = [_device(name, settings) for name in dict.fromkeys(devices)]
    is_hopeless = all(finding.state == "fail" for finding in findings)
    for finding in findings:
        if finding.state == "fail" and not is_hopeless:
            yield Finding(finding.topic, "warn", f"{finding.text}; its worker would not start", finding.hint)
        else:
            yield finding
    for index in range(torch.cuda.device_count()):
        if f"cuda:{index}" not in devices and (index or "cuda" not in devices):
            text, facts = _cuda_text(torch.device("cuda", index))
            yield Finding(f"device cuda:{index}", "ok", f"{text}; not used", "", facts)
    if any(name.startswith("cuda") for name in devices) and settings.compile != "off":
        yield _compiler(settings)


def _device(name: str, settings: Settings) -> Finding:
    topic = f"device {name}"
    try:
        device = open_device(name, torch.get_num_threads())
        if device.type == "cpu":
            return _cpu(topic, settings)
        _multiply(device)
        text, facts = _cuda_text(device)
    except StartupError as error:
        return Finding(topic, "fail", str(error), "INPAINT_DEVICES names the devices; auto takes those that there are")
    except RuntimeError as error:
        # A driver that is too old, an architecture that this torch was not built for, no memory at all.
        return Finding(topic, "fail", f"does not compute: {first_line(error)}", _cuda_hint())
    free = facts["free_bytes"]
    if isinstance(free, int) and free < _SMALL_MEMORY_BYTES:
        return Finding(topic, "warn", text, "little memory is free; see who uses it with nvidia-smi", facts)
    if settings.dtype == "bfloat16" and not facts["has_bfloat16"]:
        return Finding(topic, "warn", text, "bfloat16 is emulated on this device, which is slow: use float16", facts)
    return Finding(topic, "ok", text, "", facts)


def _cpu(topic: str, settings: Settings) -> Finding:
    # Not in the oldest torch that is served with.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    has_bfloat16 = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    level = torch.backends.cpu.get_cpu_capability()
    name = str(capabilities.get("cpu_name") or "CPU").strip()
    text = f"{name}, {level}, {'multiplies' if has_bfloat16 else 'does not multiply'} in bfloat16"
    facts: dict[str, Fact] = {"name": name, "capability": level, "has_bfloat16": has_bfloat16}
    is_half = settings.dtype == "float16" or (settings.dtype == "bfloat16" and not has_bfloat16)
    if is_half:
        return Finding(topic, "warn", text, f"{settings.dtype} is slow on this device: use float32", facts)
    if settings.compile == "on":
        return Finding(topic, "fail", text, "INPAINT_COMPILE=on needs CUDA; auto compiles where it can", facts)
    return Finding(topic, "ok", text, "", facts)


def _multiply(device: torch.device) -> None:
    """Have the device compute; a driver that only counts devices is of no use.

    Raises:
        RuntimeError: It does not, or not correctly.
    """
    ones = torch.ones(_PROBE_SIDE, _PROBE_SIDE, dtype=torch.float16, device=device)
    if not bool(((ones @ ones) == _PROBE_SIDE).all()):
        raise RuntimeError("a product of two matrices is wrong")


def _cuda_text(device: torch.device) -> tuple[str, dict[str, Fact]]:
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    has_bfloat16 = properties.major >= 8  # noqa: PLR2004 - Ampere and later multiply in bfloat16
    text = (
        f"{properties.name}, {shown_bytes(free)} of {shown_bytes(total)} free, compute capability "
        f"{properties.major}.{properties.minor}, fp16{', bf16' if has_bfloat16 else ''}"
    )
    return text, {
        "name": properties.name,
        "free_bytes": free,
        "total_bytes": total,
        "capability": f"{properties.major}.{properties.minor}",
        "has_float16": True,
        "has_bfloat16": has_bfloat16,
    }


def _cuda_hint() -> str:
    if torch.version.cuda is None:
        return "this torch was built without CUDA: install one of the CUDA builds"
    return f"this torch was built for CUDA {torch.version.cuda}; nvidia-smi shows what the driver supports"


def _compiler(settings: Settings) -> Finding:
    """Triton, which compiles the model, calls a C compiler."""
    compilers = [shutil.which(name) for name in (os.environ.get("CC"), "gcc", "clang") if name]
    compiler = next((path for path in compilers if path is not None), None)
    if compiler is not None:
        return Finding("compiler", "ok", compiler)
    hint = "install gcc, or set INPAINT_COMPILE=off"
    if settings.compile == "on":
        return Finding("compiler", "fail", "no C compiler", hint)
    return Finding("compiler", "warn", "no C compiler: the model is served uncompiled, which is slower", hint)
