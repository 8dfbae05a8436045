"""What the stochastic samplers share beside `steps`: ratios of noise, and factors of their SDE.

Every path is the variance-exploding one of x / alpha at the level r = sigma / alpha, so a sampler that is
written in r, or in λ = -log r, is right on all of them, flow included.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from darkroom.diffusion.path import FlowPath, NoisePath
from darkroom.diffusion.samplers.steps import level_pairs, toward
from darkroom.errors import InputError


def ratio(path: NoisePath, sigma: float) -> float:
    """r = sigma / alpha, infinite at pure noise."""
    alpha = path.alpha(sigma)
    return sigma / alpha if alpha > 0 else math.inf


def level(path: NoisePath, ratio: float) -> float:
    """The sigma at which sigma / alpha is `ratio`."""
    if not isinstance(path, FlowPath):
        return ratio
    return ratio / (1 + ratio) if math.isfinite(ratio) else 1.0


def falling_pairs(sigmas: Sequence[float]) -> Iterator[tuple[int, float, float]]:
    """The index, the level and the next level of each step down a list; InputError if the levels rise."""
    if len(sigmas) > 1 and sigmas[-1] > sigmas[0]:
        raise InputError(f"this sampler only goes down: its noise levels rise to {sigmas[-1]:g}")
    return level_pairs(sigmas)


def sde_factors(path: NoisePath, sigma: float, to: float, eta: float) -> tuple[float, float, float]:
    """The factors of x, of the estimate and of new noise, exact for the SDE whose noise is `eta`'s share.

    The SDE keeps e^(-eta * h) of the noise over a step of h in λ (Lu et al. 2022, appendix B; at eta = 1 it
    is the time reversal of the noising process and at 0 the probability flow). Written in r_to / r = e^-h,
    which is 0 at both infinite ends.
    """
    alpha, alpha_to = path.alpha(sigma), path.alpha(to)
    fall = min(1.0, to * alpha / (sigma * alpha_to)) if alpha_to else 1.0
    up = to * math.sqrt(1 - fall ** (2 * eta))
    return fall**eta * to / sigma, alpha_to * (1 - fall ** (1 + eta)), up


def blend(x: Tensor, keep: float, weights: Sequence[float], estimates: Sequence[Tensor]) -> Tensor:
    """keep * x + the weighted sum of estimates, at least one."""
    out = toward(x, estimates[0], keep, weights[0])
    for weight, estimate in zip(weights[1:], estimates[1:], strict=True):
        if weight:
            out = torch.add(out, estimate, alpha=weight)
    return out


def check_span(low: float, high: float) -> None:
    """Raise InputError unless noise is drawn over a span of levels."""
    if low > high:
        raise InputError(f"s_tmin must be at most s_tmax, {high:g}, not {low:g}")
