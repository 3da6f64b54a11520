"""The options that all peers have."""

import argparse
from pathlib import Path

import torch


def peer_parser(description: str) -> argparse.ArgumentParser:
    """A parser of `--model --port --device --dtype --threads`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, required=True, help="folder in diffusers format")
    parser.add_argument("--port", type=int, required=True, help="of 127.0.0.1")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda:0")
    parser.add_argument(
        "--dtype",
        choices=["float16", "bfloat16", "float32"],
        help="of the weights; by default float16 on CUDA and float32 on a CPU",
    )
    parser.add_argument("--threads", type=int, required=True, help="threads of torch")
    return parser


def torch_dtype(name: str | None, device: str) -> torch.dtype:
    """The type that `--dtype` names, or the one that fits the device."""
    dtype: torch.dtype = getattr(torch, name or ("float32" if device == "cpu" else "float16"))
    return dtype
