"""The state of a run on disk: enough to go on bit for bit, written so that a crash loses nothing."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from darkroom.errors import DarkroomError, InputError
from darkroom.files import atomic_write
from darkroom.train.ema import EMA, named_parameters

KEPT = 2


def save_state(
    folder: Path, step: int, networks: Mapping[str, nn.Module], ema: EMA, optimizer: torch.optim.Optimizer
) -> Path:
    """Write `folder/step-N` whole (draft, sync, rename), point `latest` at it and drop old ones."""
    target = folder / f"step-{step:08d}"
    draft = folder / f".{target.name}.partial"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        for name, tensors in _tensors(networks, ema, optimizer).items():
            with atomic_write(draft / f"{name}.safetensors") as path:
                save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path)
        (draft / "state.json").write_text(json.dumps({"step": step}))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(draft, target)
        with atomic_write(folder / "latest") as path:
            path.write_text(target.name)
    except (OSError, DarkroomError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise DarkroomError(
            f"{target}: could not save the training state ({error}); the one before is whole"
        ) from error
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)
    return target


def load_state(
    folder: Path, networks: Mapping[str, nn.Module], ema: EMA, optimizer: torch.optim.Optimizer
) -> int:
    """Restore what `latest` points at and return its step; 0 when the run has not saved yet.

    Raises InputError if a file is damaged or was written by another architecture.
    """
    pointer = folder / "latest"
    if not pointer.exists():
        return 0
    source = folder / pointer.read_text().strip()
    try:
        step = json.loads((source / "state.json").read_text())["step"]
        saved = {name: load_file(source / f"{name}.safetensors") for name in ("networks", "ema", "optimizer")}
        _restore(saved, networks, ema, optimizer)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{source}: cannot resume from this training state: {error}") from error
    return step


def _tensors(
    networks: Mapping[str, nn.Module], ema: EMA, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, Tensor]]:
    weights = {f"{prefix}.{k}": v for prefix, net in networks.items() for k, v in net.state_dict().items()}
    moments = {
        f"{name}.{key}": value
        for name, parameter in named_parameters(networks)
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    return {"networks": weights, "ema": ema.shadow, "optimizer": moments}


def _restore(
    saved: dict[str, dict[str, Tensor]],
    networks: Mapping[str, nn.Module],
    ema: EMA,
    optimizer: torch.optim.Optimizer,
) -> None:
    for prefix, network in networks.items():
        own = {
            k.removeprefix(f"{prefix}."): v
            for k, v in saved["networks"].items()
            if k.startswith(f"{prefix}.")
        }
        network.load_state_dict(own, strict=True)
    ema.load(saved["ema"])
    for name, parameter in named_parameters(networks):
        if f"{name}.step" in saved["optimizer"]:
            # The fused kernel walks memory in order, so the moments must lie as the parameter does.
            moments = {key: torch.empty_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            for key, moment in moments.items():
                moment.detach_().copy_(saved["optimizer"][f"{name}.{key}"])
            step = saved["optimizer"][f"{name}.step"].to(parameter.device)
            optimizer.state[parameter] = {"step": step, **moments}
