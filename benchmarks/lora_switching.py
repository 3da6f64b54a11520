"""What it costs when requests with different LoRAs take turns.

    python -m benchmarks.lora_switching [--model M] [--device D] [--full-size] [--rank R] [--output FILE]

Two LoRAs, of all attention layers and of the residual blocks' convolutions as well,
are merged into the UNet by turns, as the running batch does when requests with the
one and the other take a step each: the median time of a switch beside that of a
step of 8 rows. At the end the weights are compared, bit for bit, with those before.
"""

import argparse
import json
import shlex
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from benchmarks.report import num_cores
from benchmarks.switches import NUM_ROWS, Models, from_checkpoint, full_size, measure, median_seconds
from service.request import LoraUse
from service.settings import BUNDLED_MODEL, Settings
from service.worker.adapters import Adapters
from service.worker.runtime import open_device

ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")
CONVOLUTIONS = (".conv1", ".conv2")


@dataclass(frozen=True, slots=True)
class Switching:
    """What was measured of one kind of LoRA.

    Attributes:
        layers: Layers that each LoRA changes.
        file_mib: Size of its file.
        step_seconds: Median of a step without any.
        switch_seconds: Median of a switch from one LoRA to another.
        is_restored: Whether the weights are bit for bit what they were.
    """

    layers: int
    file_mib: float
    step_seconds: float
    switch_seconds: float
    is_restored: bool


def make_lora(path: Path, unet: UNet2DConditionModel, suffixes: tuple[str, ...], rank: int, seed: int) -> LoraUse:
    """Write a random LoRA in half precision; returns it as a request would use it."""
    draw = torch.Generator().manual_seed(seed)
    state = {}
    for name, module in unet.named_modules():
        if name.endswith(suffixes) and hasattr(module, "weight"):
            out_channels, *inputs = module.weight.shape
            ones = [1] * (len(inputs) - 1)
            state[f"unet.{name}.lora_A.weight"] = (0.01 * torch.randn(rank, *inputs, generator=draw)).half()
            state[f"unet.{name}.lora_B.weight"] = (0.01 * torch.randn(out_channels, rank, *ones, generator=draw)).half()
    save_file(state, path)
    stat = path.stat()
    version = f"{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ino}"
    return LoraUse(path.stem, str(path), version, unet_scale=0.8, text_encoder_scale=0.8)


def measure_switching(models: Models, suffixes: tuple[str, ...], rank: int, repeats: int, folder: Path) -> Switching:
    """Take turns between two LoRAs."""
    unet, device = models.unet, models.unet.device
    costs = measure(models, None, repeats)
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    adapters = Adapters(unet, models.text_encoder)
    first, second = (
        make_lora(folder / f"{seed}-{len(suffixes)}.safetensors", unet, suffixes, rank, seed) for seed in (1, 2)
    )
    held = adapters.load((first, second))
    turns = [((first,), held[:1]), ((second,), held[1:])] * (repeats + 2)
    with torch.inference_mode():
        switch_seconds = median_seconds(lambda: adapters.apply_unet(*turns.pop()), device, repeats)
        adapters.apply_unet((), ())
    after = unet.state_dict()
    return Switching(
        layers=len(held[0].layers["unet"]),
        file_mib=Path(first.path).stat().st_size / 2**20,
        step_seconds=costs.step_seconds,
        switch_seconds=switch_seconds,
        is_restored=all(torch.equal(after[name], weight) for name, weight in before.items()),
    )


def main() -> None:
    """Measure and report."""
    arguments = _arguments()
    device = open_device(arguments.device, arguments.threads)
    settings = Settings(model=arguments.model)
    models = (full_size if arguments.full_size else from_checkpoint)(settings, device)
    with tempfile.TemporaryDirectory() as folder:
        found = {
            kind: measure_switching(models, suffixes, arguments.rank, arguments.repeats, Path(folder))
            for kind, suffixes in {"attention": ATTENTION, "and convolutions": (*ATTENTION, *CONVOLUTIONS)}.items()
        }
    print(f"| LoRA of rank {arguments.rank} | layers | file, MiB | step of {NUM_ROWS} rows, ms | switch, ms |")
    print("|---|---:|---:|---:|---:|")
    for kind, one in found.items():
        times = (one.step_seconds, one.switch_seconds)
        cells = " | ".join(f"{1000 * seconds:.1f}" for seconds in times)
        print(f"| {kind} | {one.layers} | {one.file_mib:.1f} | {cells} |")
    command = shlex.join(["python", "-m", "benchmarks.lora_switching", *sys.argv[1:]])
    restored = all(one.is_restored for one in found.values())
    print(f"\n- weights afterwards bit-identical: {restored}\n- device: {_device_name(device)}\n- command: {command}")
    if arguments.output is not None:
        document = {kind: asdict(one) for kind, one in found.items()}
        arguments.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What it costs when requests with different LoRAs take turns.")
    parser.add_argument("--model", default=BUNDLED_MODEL, help="'demo', a hub id or a folder in diffusers format")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--full-size", action="store_true", help="random weights of SD 1.5 inpainting architecture")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=num_cores(), help="threads of torch on a CPU")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
