"""Trains the demo model: `python -m training.train --help`."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from training import denoiser as denoiser_module
from training import pool as pool_module
from training import stages
from training.checker import build_checker
from training.data import Drawing
from training.denoiser import DenoiserSettings
from training.export import export_model, folder_size
from training.judge import WEIGHTS
from training.stage_checker import stage_checker
from training.stages import Plan, report
from training.vae import VaeSettings, build_vae
from training.world import PIRATE_FLAG, THING_INDEX

STAGES = ("vae", "denoiser", "sheets", "judge", "checker", "export")
_ROOT = Path(__file__).resolve().parent.parent
MODEL = _ROOT / "service" / "worker" / "models" / "demo"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains the demo model, stage by stage.")
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated, of " + ", ".join(STAGES))
    parser.add_argument("--work", type=Path, default=Path("build/training"), help="folder of checkpoints")
    parser.add_argument("--out", type=Path, default=None, help="folder of contact sheets (default: as --work)")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of the exported model")
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop the denoiser this long after the start")
    parser.add_argument("--vae-seconds", type=float, default=Plan.vae_seconds)
    parser.add_argument("--denoiser-seconds", type=float, default=Plan.denoiser_seconds, help="over all runs")
    parser.add_argument("--checker-steps", type=int, default=Plan.checker_steps)
    parser.add_argument("--judge-steps", type=int, default=Plan.judge_steps)
    parser.add_argument("--painted", type=int, default=Plan.painted, help="painted pictures the checker learns from")
    parser.add_argument("--scenes", type=int, default=Plan.scenes)
    parser.add_argument("--processes", type=int, default=Plan.processes)
    parser.add_argument("--device", default="cuda" if torch.cuda.device_count() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile the models")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes, to see that everything runs; writes to --work alone"
    )
    parser.add_argument("--compile-ahead", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _plan(args: argparse.Namespace) -> Plan:
    args.work.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        work=args.work,
        out=args.out or args.work,
        device=torch.device(args.device),
        deadline=time.monotonic() + args.seconds,
        compiled=args.compile,
        processes=args.processes,
        scenes=args.scenes,
        vae_seconds=args.vae_seconds,
        denoiser_seconds=args.denoiser_seconds,
        checker_steps=args.checker_steps,
        judge_steps=args.judge_steps,
        painted=args.painted,
    )
    if args.smoke:
        torch.set_num_threads(1)
        plan = dataclasses.replace(
            plan,
            scenes=24,
            masks=2,
            processes=1,
            checker_steps=3,
            judge_steps=3,
            flags=12,
            others=24,
            painted=8,
            odd=12,
            rebuilt=8,
            max_steps=3,
            vae=VaeSettings(batch=2),
            denoiser=DenoiserSettings(batch=4),
        )
    return plan


def _compile_ahead(plan: Plan) -> None:
    start = time.monotonic()
    denoiser_module.compile_ahead(plan.denoiser, plan.device)
    print(f"denoiser compiled ahead after {time.monotonic() - start:.0f}s", flush=True)
    pool_module.compile_ahead(build_vae(), plan.device)
    print(f"encoder compiled ahead after {time.monotonic() - start:.0f}s", flush=True)


@dataclass
class _Drawings:
    """Scenes being drawn for the stages asked for."""

    training: Drawing | None = None
    others: Drawing | None = None
    flags: Drawing | None = None


def _start_drawing(plan: Plan, wanted: set[str]) -> _Drawings:
    """Starts what forks processes, which must come before the accelerator is first used."""
    drawings = _Drawings()
    if "vae" in wanted and not (plan.work / "pool.pt").exists():
        drawings.training = Drawing(plan.scenes, plan.targets, plan.masks, seed=0, processes=plan.processes)
    if wanted & {"checker", "judge"}:
        drawings.others = Drawing(plan.others, 1, 1, seed=HELD_BACK, processes=plan.processes)
    if "checker" in wanted:
        drawings.flags = Drawing(
            plan.flags, 1, 1, seed=HELD_BACK + 8192, processes=plan.processes, thing=THING_INDEX[PIRATE_FLAG]
        )
    return drawings


def _run_vae(plan: Plan, drawings: _Drawings) -> None:
    if drawings.training is None:
        return
    ahead = None
    if plan.compiled:
        command = [sys.executable, "-m", "training.train", "--compile-ahead", "--work", str(plan.work)]
        ahead = subprocess.Popen(command)  # noqa: S603
    stages.stage_vae(plan, drawings.training)
    drawings.training = None
    if ahead is not None:
        ahead.wait()


def _run_judge(plan: Plan, drawings: _Drawings) -> None:
    if drawings.others is not None:
        drawings.others.wait()
        path = WEIGHTS if plan.max_steps is None else plan.work / WEIGHTS.name
        stages.stage_judge(plan, drawings.others.arrays, path)


def _run_checker(plan: Plan, drawings: _Drawings) -> None:
    if drawings.others is not None and drawings.flags is not None:
        drawings.others.wait()
        drawings.flags.wait()
        stage_checker(plan, drawings.flags.arrays, drawings.others.arrays)


def _run_export(plan: Plan, model: Path) -> None:
    checker = build_checker()
    checker.load_state_dict(load_file(plan.work / "checker.safetensors"))
    export_model(model, stages.load_vae(plan), stages.load_denoiser(plan), checker)
    report(f"exported {folder_size(model) / 1e6:.2f} MB")


def main() -> None:
    """Runs the stages asked for, in their order."""
    args = _arguments()
    wanted = set(args.stages.split(","))
    if unknown := wanted - set(STAGES):
        raise SystemExit(f"unknown stages: {', '.join(sorted(unknown))}")
    plan = _plan(args)
    if args.compile_ahead:
        _compile_ahead(plan)
        return
    drawings = _start_drawing(plan, wanted)
    torch.manual_seed(int(time.time()) if "denoiser" in wanted else 0)  # a resumed run draws other batches
    steps: dict[str, Callable[[], None]] = {
        "vae": lambda: _run_vae(plan, drawings),
        "denoiser": lambda: stages.stage_denoiser(plan),
        "sheets": lambda: stages.stage_sheets(plan),
        "judge": lambda: _run_judge(plan, drawings),
        "checker": lambda: _run_checker(plan, drawings),
        "export": lambda: _run_export(plan, args.work / "model" if args.smoke else args.model),
    }
    for name in STAGES:
        if name in wanted:
            steps[name]()


HELD_BACK = 500_000_000
"""Seeds of the scenes that the checker and the judge are trained on."""


if __name__ == "__main__":
    main()
