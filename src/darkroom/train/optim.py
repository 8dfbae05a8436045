"""Optimizer, learning-rate schedule and gradient clipping, each a pure function of the step."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with warm-up and decay; `final_lr` is the fraction of `lr` that decay ends at."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 100
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    final_lr: float = 0.0
    grad_clip: float = 1.0


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate and are clipped together; `lr_scale` multiplies
    `OptimConfig.lr`.
    """

    parameters: list[nn.Parameter]
    lr_scale: float = 1.0
    betas: tuple[float, float] | None = None


def build_optimizer(groups: list[ParameterGroup], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the groups; matrices and kernels decay, vectors (norms, biases) do not."""
    options = []
    for group in groups:
        shared = {"betas": group.betas or config.betas, "lr_scale": group.lr_scale}
        matrices = [p for p in group.parameters if p.ndim >= 2]
        vectors = [p for p in group.parameters if p.ndim < 2]
        options.append({"params": matrices, "weight_decay": config.weight_decay, **shared})
        options.append({"params": vectors, "weight_decay": 0.0, **shared})
    return torch.optim.AdamW([o for o in options if o["params"]], lr=config.lr, fused=True)


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The learning rate of step `step` (from 0) of `steps`: linear warm-up, then the chosen decay."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    remaining = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[config.decay]
    return config.lr * (config.final_lr + (1.0 - config.final_lr) * remaining)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def apply_gradients(optimizer: torch.optim.AdamW, groups: list[ParameterGroup], grad_clip: float) -> Tensor:
    """Clip each group's gradient norm and step; returns the largest norm, a scalar on the device.

    A non-finite norm leaves every weight as it was (the fused kernel's `found_inf`), so that a run that
    meets NaN still holds its last good weights, without waiting for the device at each step.
    """
    norms = [nn.utils.clip_grad_norm_(group.parameters, grad_clip) for group in groups]
    norm = torch.stack(norms).max() if len(norms) > 1 else norms[0]
    bad = (~torch.isfinite(torch.stack(norms))).any().float()
    vars(optimizer).update(found_inf=bad, grad_scale=None)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
