"""UniPC: a predictor whose step is corrected, one step later, by the estimate found at its end."""

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from darkroom.diffusion.path import NoisePath
from darkroom.diffusion.samplers.adams import add_differences, estimate_weights
from darkroom.diffusion.samplers.cards import CARDS
from darkroom.diffusion.samplers.steps import (
    Denoise,
    History,
    Noise,
    Step,
    bends,
    euler_step,
    level_pairs,
    log_ratio,
    remember,
)

Solver = Literal["bh1", "bh2"]


def uni_pc(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    noise: Noise | None = None,
    order: int = 2,
    solver: Solver = "bh2",
    lower_order_final: bool = True,
) -> Iterator[Step]:
    """UniPC in the estimate (Zhao et al. 2023), of order `order + 1`, one call a step.

    `solver` is the paper's B(h): bh1 is h, bh2 is exp(h) - 1. They differ where a coefficient is 1/2 for
    simplicity, on the way down: in correctors of order 1 and predictors of order 2. With `lower_order_final`
    the last steps are of lower order, which is steadier. Raises InputError for an order outside 1 ... 3 and
    an unknown solver.
    """
    CARDS["uni_pc"].check(order=order, solver=solver, lower_order_final=lower_order_final)
    return _uni_pc(denoise, x, sigmas, order, solver, lower_order_final)


@torch.no_grad()
def _uni_pc(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], order: int, solver: Solver, lower_final: bool
) -> Iterator[Step]:
    path, total = denoise.path, len(sigmas) - 1
    history, used, begun = [], [], x
    for index, sigma, to in level_pairs(sigmas):
        denoised = denoise(x, sigma).value
        if used and used[0][0] != sigma:
            x = _corrected(path, begun, used, (sigma, denoised), solver)
        history, begun = remember(history, sigma, denoised, order), x
        used = history[: total - index] if lower_final else history
        used = used if bends(path, sigma, to) else used[:1]
        x = _predicted(path, begun, used, to, solver)
        yield Step(index, total, sigma, x, denoised)


def _predicted(path: NoisePath, x: Tensor, history: History, to: float, solver: Solver) -> Tensor:
    """UniP: a new x at level `to` from the estimates so far."""
    sigma, denoised = history[0]
    x = euler_step(path, x, denoised, sigma, to)
    if len(history) < 2:
        return x
    start = log_ratio(path, sigma)
    h = log_ratio(path, to) - start
    if len(history) > 2 or h < 0:
        return add_differences(x, history, estimate_weights(path, [level for level, _ in history], to))
    distance = (log_ratio(path, history[1][0]) - start) / h if h else math.inf
    return add_differences(x, history, [path.alpha(to) * _half(h, solver) / distance])


def _corrected(
    path: NoisePath, x: Tensor, history: History, new: tuple[float, Tensor], solver: Solver
) -> Tensor:
    """UniC: the last step anew, from x where it began, with the estimate at its end."""
    (sigma, denoised), to = history[0], new[0]
    x = euler_step(path, x, denoised, sigma, to)
    known = [history[0], new, *history[1:]]
    h = log_ratio(path, to) - log_ratio(path, sigma)
    if len(history) > 1 or h < 0:
        return add_differences(x, known, estimate_weights(path, [level for level, _ in known], to))
    return add_differences(x, known, [path.alpha(to) * _half(h, solver)])


def _half(h: float, solver: Solver) -> float:
    """Half of B(h); from pure noise, where h is infinite, bh1 has no limit and the step stays as it was."""
    if solver == "bh2":
        return -math.expm1(-h) / 2
    return h / 2 if math.isfinite(h) else 0.0
