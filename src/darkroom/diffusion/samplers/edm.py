"""The stochastic sampler of Karras et al.: a little noise is added before each step of Heun's method."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from darkroom.diffusion.samplers.cards import CARDS
from darkroom.diffusion.samplers.levels import check_span, falling_pairs, level, ratio
from darkroom.diffusion.samplers.runge_kutta import heun_step
from darkroom.diffusion.samplers.steps import Denoise, Noise, Step, add_noise


def edm(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    noise: Noise | None = None,
    s_churn: float = 40.0,
    s_tmin: float = 0.05,
    s_tmax: float = 50.0,
    s_noise: float = 1.003,
) -> Iterator[Step]:
    """Stochastic sampling with churn (Karras et al. 2022, algorithm 2), of second order, two calls a step.

    Steps that start at sigma / alpha between `s_tmin` and `s_tmax` first raise it by the share `s_churn` /
    steps, at most √2 - 1 and never above the first level, with noise of scale `s_noise`; at `s_churn` 0 that
    is Heun's method. The defaults are the paper's for ImageNet. Raises InputError for options out of range,
    and without noise when s_churn is above 0.
    """
    CARDS["edm"].check(s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)
    check_span(s_tmin, s_tmax)
    return _edm(denoise, x, sigmas, noise, s_churn, (s_tmin, s_tmax), s_noise)


@torch.no_grad()
def _edm(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise | None,
    s_churn: float,
    span: tuple[float, float],
    s_noise: float,
) -> Iterator[Step]:
    path, total = denoise.path, len(sigmas) - 1
    growth = 1 + min(s_churn / max(total, 1), math.sqrt(2) - 1)
    for index, sigma, to in falling_pairs(sigmas):
        r, churned = ratio(path, sigma), sigma
        if span[0] <= r <= span[1]:
            churned = level(path, min(growth * r, ratio(path, sigmas[0])))
        if churned > sigma:
            kept = path.alpha(churned) / path.alpha(sigma)
            up = math.sqrt(churned**2 - (kept * sigma) ** 2)
            # The noise is that of the step's own interval: those of churned levels overlap.
            x = add_noise(x * kept, s_noise * up, noise, sigma, to)
        denoised = denoise(x, churned).value
        x = heun_step(denoise, x, denoised, churned, to)
        yield Step(index, total, sigma, x, denoised)
