"""What each switch of the model's parts costs and saves: step time, decode time, memory.

    python -m benchmarks.switches [--model M] [--device D] [--full-size] [--size S] [--output FILE]

Every variant runs in a process of its own, on the models as the service loads them:
the median time of a UNet call of 8 rows, that of decoding 4 pictures, and the peak
of memory. `--full-size` measures the architecture of Stable Diffusion 1.5 inpainting
with random weights, made in memory: neither time nor memory depends on what the
weights are. Tiles are as large as the model's native size, so that only a larger
`--size` has any. Prints Markdown with ratios to the default; a variant that the
service would refuse to start with says why.
"""

import argparse
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.report import num_cores
from benchmarks.synthetic import FULL_SIZE
from service.errors import StartupError
from service.settings import BUNDLED_MODEL, Settings
from service.worker.attention import AttentionContext
from service.worker.checkpoint import load
from service.worker.runtime import open_device
from service.worker.switches import apply_switches

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "vae_slicing": {"vae_slicing": True},
    "vae_tiling": {"vae_tiling": True},
    "attention_slicing=auto": {"attention_slicing": "auto"},
    "attention_slicing=max": {"attention_slicing": "max"},
    "attention_backend=math": {"attention_backend": "math"},
    "attention_backend=flash": {"attention_backend": "flash"},
    "attention_backend=efficient": {"attention_backend": "efficient"},
    "attention_backend=cudnn": {"attention_backend": "cudnn"},
    "attention_backend=xformers": {"attention_backend": "xformers"},
}
"""The settings of each line of the table; the first is what the others are compared with."""

NUM_ROWS = 8
NUM_PICTURES = 4
NUM_TOKENS = 77
MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Costs:
    """What one variant costs.

    Attributes:
        step_seconds: Median of the UNet's calls.
        decode_seconds: Median of the decodings.
        step_mib: Peak of memory up to the end of the steps.
        peak_mib: Peak of memory up to the end.
    """

    step_seconds: float
    decode_seconds: float
    step_mib: float
    peak_mib: float


Outcome = Costs | str
"""What was measured, or why the service does not start so."""


@dataclass(frozen=True, slots=True)
class Models:
    """What is measured."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    attention: AttentionContext


def markdown(outcomes: Mapping[str, Outcome], facts: Mapping[str, Any]) -> str:
    """The table, with ratios to the first variant in brackets, and what one needs to know to read it."""
    base = next(iter(outcomes.values()))
    columns = (
        "variant",
        f"step of {NUM_ROWS} rows, ms",
        f"decoding {NUM_PICTURES} pictures, ms",
        "peak memory of steps, MiB",
        "peak memory, MiB",
    )
    lines = [f"| {' | '.join(columns)} |", "|---|---:|---:|---:|---:|"]
    for name, outcome in outcomes.items():
        if isinstance(outcome, str):
            lines.append(f"| {name} | {outcome} | | | |")
            continue
        values = asdict(outcome)
        cells = []
        for column, value in values.items():
            shown = f"{1000 * value:.1f}" if column.endswith("_seconds") else f"{value:.0f}"
            ratio = f" ({value / getattr(base, column):.2f})" if isinstance(base, Costs) else ""
            cells.append(shown + ratio)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", *(f"- {name}: {value}" for name, value in facts.items())]
    return "\n".join(lines) + "\n"


def document(outcomes: Mapping[str, Outcome], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The same for `json.dump`."""
    variants = {
        name: {"refused": outcome} if isinstance(outcome, str) else asdict(outcome)
        for name, outcome in outcomes.items()
    }
    return {"facts": dict(facts), "variants": variants}


def outcome_of(kept: Mapping[str, Any]) -> Outcome:
    """A variant of `document`, read back."""
    return str(kept["refused"]) if "refused" in kept else Costs(**kept)


def full_size(settings: Settings, device: torch.device) -> Models:
    """Random weights of true architecture."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    with device:
        models: list[Any] = [
            model.to(dtype).eval().requires_grad_(requires_grad=False)
            for model in (
                UNet2DConditionModel(**FULL_SIZE.unet),
                AutoencoderKL(**FULL_SIZE.vae),
                CLIPTextModel(CLIPTextConfig(**FULL_SIZE.text_encoder)),
            )
        ]
    unet, vae, text_encoder = models
    return Models(unet, vae, text_encoder, apply_switches(unet, vae, settings))


def from_checkpoint(settings: Settings, device: torch.device) -> Models:
    """The service's own loading."""
    components = load(settings, device)
    return Models(components.unet, components.vae, components.text_encoder, components.attention)


def measure(models: Models, size: int | None, repeats: int) -> Costs:
    """Median times and peaks of memory; the first calls warm up and do not count.

    Args:
        models: What is measured.
        size: Side of the pictures in pixels; None is the native size.
        repeats: Calls of each kind that count.
    """
    unet, vae = models.unet, models.vae
    device, dtype = unet.device, unet.dtype
    side = unet.config.sample_size if size is None else size // 2 ** (len(vae.config.block_out_channels) - 1)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    latents = torch.randn(NUM_ROWS, unet.config.in_channels, side, side, device=device, dtype=dtype)
    finished = torch.randn(NUM_PICTURES, vae.config.latent_channels, side, side, device=device, dtype=dtype)
    timesteps = torch.full((NUM_ROWS,), 500, device=device)
    with torch.inference_mode(), models.attention.active():
        tokens = torch.zeros(NUM_ROWS, NUM_TOKENS, dtype=torch.long, device=device)
        embeds = models.text_encoder(tokens)[0]
        step_seconds = median_seconds(lambda: unet(latents, timesteps, embeds), device, repeats)
        step_mib = _peak_mib(device)
        decode_seconds = median_seconds(lambda: vae.decode(finished), device, repeats)
    return Costs(step_seconds, decode_seconds, step_mib, _peak_mib(device))


def median_seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median of the calls' seconds, the device's work included; two further calls warm up."""
    seconds = []
    for _ in range(2 + repeats):
        started_at = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started_at)
    return statistics.median(seconds[2:])


def _peak_mib(device: torch.device) -> float:
    """Peak of the allocator on CUDA, of the process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024  # macOS counts bytes, others KiB.


def _measure_here(arguments: argparse.Namespace) -> Outcome:
    """One variant, in this process."""
    settings = Settings(model=arguments.model, allow_unchecked=True, **VARIANTS[arguments.variant])
    try:
        device = open_device(arguments.device, arguments.threads)
        models = (full_size if arguments.full_size else from_checkpoint)(settings, device)
    except StartupError as error:
        return str(error)
    return measure(models, arguments.size, arguments.repeats)


def _measure_in_process(variant: str) -> Outcome:
    command = [sys.executable, "-m", "benchmarks.switches", *sys.argv[1:], "--variant", variant]
    _say(f"{variant} …")
    environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return outcome_of(json.loads(done.stdout)["variants"][variant])


def main() -> None:
    """Measure every variant and report, or the one that is named."""
    arguments = _arguments()
    if arguments.variant is not None:
        print(json.dumps(document({arguments.variant: _measure_here(arguments)}, {})))
        return
    facts = {
        "model": "Stable Diffusion 1.5 inpainting, random weights" if arguments.full_size else arguments.model,
        "device": torch.cuda.get_device_name(arguments.device)
        if arguments.device.startswith("cuda")
        else f"{arguments.device}, {arguments.threads} threads",
        "torch": torch.__version__,
        "command": shlex.join(["python", "-m", "benchmarks.switches", *sys.argv[1:]]),
    }
    outcomes = {variant: _measure_in_process(variant) for variant in VARIANTS}
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(document(outcomes, facts), indent=1) + "\n", encoding="utf-8")
    print(markdown(outcomes, facts))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What each switch costs in time and saves in memory.")
    parser.add_argument("--model", default=BUNDLED_MODEL, help="'demo', a hub id or a folder in diffusers format")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--full-size", action="store_true", help="random weights of SD 1.5 inpainting architecture")
    parser.add_argument("--size", type=int, help="side of the pictures in pixels; by default the model's native size")
    parser.add_argument("--repeats", type=int, default=10, help="calls of each kind that count")
    parser.add_argument("--threads", type=int, default=num_cores(), help="threads of torch on a CPU")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON to this file")
    parser.add_argument("--variant", choices=list(VARIANTS), help="measure only this one, here, and print JSON")
    return parser.parse_args()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
