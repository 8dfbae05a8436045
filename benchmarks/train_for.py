"""Train for about so many seconds: measure the steps a second first, then set the recipe's steps by it.

    torchrun --nproc-per-node 2 benchmarks/train_for.py denoiser recipes/mini-denoiser.toml --seconds 430

For a machine that is there for a limited time: the learning rate still decays to its end. The number of
steps is kept in OUT/steps, so that the same command goes on with a run that was stopped. `--stop-after` stops
and saves in time, counted from the start of the process.
"""

import argparse
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from darkroom.config import load_recipe
from darkroom.train import autoencoder, denoiser
from darkroom.train.loop import Interrupted, Run

WARM_UP, MEASURED = 6, 40
STAGES = {
    "autoencoder": (autoencoder, autoencoder.AutoencoderRecipe),
    "denoiser": (denoiser, denoiser.DenoiserRecipe),
}


def steps_per_second(run: Run, steps: int = MEASURED) -> float:
    """The rate of a run's forward and backward passes after compilation; its weights stay as they are."""
    for step in range(WARM_UP):
        run.accumulate(step)
    started = _now(run.device)
    for step in range(steps):
        run.accumulate(step)
    rate = torch.tensor(steps / (_now(run.device) - started), device=run.device)
    for group in run.task.groups:
        for parameter in group.parameters:
            parameter.grad = None
    if run.world.size > 1:
        dist.all_reduce(rate, dist.ReduceOp.MIN)
    return float(rate)


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def planned_steps(run: Run, seconds: float) -> int:
    """The steps that fit into `seconds`, or those that an earlier start of the same run planned."""
    plan = run.out / "steps"
    if not plan.exists():
        steps = int(0.95 * seconds * steps_per_second(run))
        if run.world.is_main:
            plan.write_text(str(steps))
        return steps
    return int(plan.read_text())


def main() -> None:
    """Parse, measure, train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--stop-after", type=float, default=float("inf"))
    options = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    if options.stop_after != float("inf"):
        timer = threading.Timer(options.stop_after, os.kill, (os.getpid(), signal.SIGTERM))
        timer.daemon = True  # or a run that fails early would wait for it
        timer.start()
    stage, recipe_type = STAGES[options.stage]
    started = time.perf_counter()
    run = stage.prepare(load_recipe(options.recipe, recipe_type))
    print(f"prepared after {time.perf_counter() - started:.0f} s", flush=True)
    steps = planned_steps(run, options.seconds)
    print(f"{steps} steps, from {time.perf_counter() - started:.0f} s on", flush=True)
    try:
        stage.finish(replace(run, train=replace(run.train, steps=steps)))
    except Interrupted as stopped:
        print(stopped, flush=True)
    print(f"ended after {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
