"""What multistep samplers share: earlier values, and what they weigh in a step that extrapolates them.

A step integrates a quantity from one level to the next: the velocity dx / dsigma, the noise or the estimate,
as the polynomial through its last values. That is the step of first order, which takes the newest value for
all of it, plus weights times the differences of earlier values from the newest.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from darkroom.diffusion.path import NoisePath
from darkroom.diffusion.samplers.runge_kutta import heun_step
from darkroom.diffusion.samplers.steps import (
    Denoise,
    History,
    Step,
    bends,
    euler_step,
    level_pairs,
    log_ratio,
    remember,
)

# value(path, x, denoised, sigma): the quantity that is extrapolated.
Value = Callable[[NoisePath, Tensor, Tensor, float], Tensor]
# weights(path, levels, to): of the differences of earlier values, next to newest first, from the newest.
Weights = Callable[[NoisePath, list[float], float], Sequence[float]]


@torch.no_grad()
def adams(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    order: int,
    value: Value,
    weights: Weights,
    lower_final: bool = False,
    heun_start: bool = False,
) -> Iterator[Step]:
    """Steps that extrapolate the last `order` values; where fewer are known, of that order.

    `lower_final` ends with a step of order 1 after one of order 2; `heun_start` begins with Heun's step.
    """
    path, total, history = denoise.path, len(sigmas) - 1, []
    for index, sigma, to in level_pairs(sigmas):
        denoised = denoise(x, sigma).value
        history = remember(history, sigma, value(path, x, denoised, sigma), order)
        used = history[: total - index] if lower_final else history
        if heun_start and index == 0:
            x = heun_step(denoise, x, denoised, sigma, to)
        else:
            x = euler_step(path, x, denoised, sigma, to)
        x = add_differences(x, used, weights(path, [level for level, _ in used], to))
        yield Step(index, total, sigma, x, denoised)


def add_differences(x: Tensor, history: History, weights: Sequence[float]) -> Tensor:
    """x plus, in place, each weight times the difference of an earlier value from the newest."""
    for weight, (_, value) in zip(weights, history[1:], strict=False):
        x.add_(value, alpha=weight)
    return x.sub_(history[0][1], alpha=sum(weights)) if weights else x


def interpolation_weights(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """The weight of each node's value in the integral of the polynomial through them.

    `moments` are the integrals of 1, s, s² ... there, as many as there are nodes, which must differ: the
    weights solve Σ weight * node^k = moment_k (Björck and Pereyra 1970). The last node may be infinite, as
    the estimate at pure noise is: it weighs nothing.
    """
    weights, last = list(moments), len(nodes) - 1
    for k in range(last):
        for i in range(last, k, -1):
            weights[i] -= nodes[k] * weights[i - 1]
    for k in range(last - 1, -1, -1):
        for i in range(k + 1, last + 1):
            weights[i] /= nodes[i] - nodes[i - k - 1]
        for i in range(k, last):
            weights[i] -= weights[i + 1]
    return weights


def power_moments(h: float, count: int) -> list[float]:
    """∫ s^k ds from 0 to h, for k = 0 ... count - 1."""
    return [h ** (k + 1) / (k + 1) for k in range(count)]


def exponential_moments(h: float, count: int, eta: float = 0.0) -> list[float]:
    """a ∫ exp(a (s - h)) s^k ds from 0 to h with a = 1 + eta, for k = 0 ... count - 1, by parts.

    They are how much of a step over h in λ is due to an estimate that goes as s^k along it, where the SDE
    has `eta`'s share of noise; without noise they are h^(k+1) k! φ_(k+1)(-h).
    """
    moments = [-math.expm1(-(1 + eta) * h)]
    for k in range(1, count):
        moments.append(h**k - k * moments[-1] / (1 + eta))
    return moments


def estimate_weights(path: NoisePath, levels: list[float], to: float) -> list[float]:
    """x_to = to / sigma * x + alpha_to * ∫ exp(λ - λ_to) estimate dλ, with λ = log(alpha / sigma)."""
    if not bends(path, levels[0], to):
        return []
    start = log_ratio(path, levels[0])
    nodes = [log_ratio(path, level) - start for level in levels]
    moments = exponential_moments(log_ratio(path, to) - start, len(nodes))
    return [path.alpha(to) * weight for weight in interpolation_weights(nodes, moments)[1:]]
