"""Ancestral samplers: a step of the probability flow past each level, and noise back up to it.

With any share of noise they keep the exact distribution at every level, as far as the step past it does.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from darkroom.diffusion.path import NoisePath
from darkroom.diffusion.samplers.cards import CARDS
from darkroom.diffusion.samplers.first_order import ddim
from darkroom.diffusion.samplers.levels import falling_pairs, level, ratio
from darkroom.diffusion.samplers.runge_kutta import midpoint_step
from darkroom.diffusion.samplers.steps import (
    Denoise,
    Noise,
    Step,
    add_noise,
    first_order_factors,
    toward,
)


def ddpm(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], *, noise: Noise | None = None
) -> Iterator[Step]:
    """DDPM's own sampler, noise of the posterior's variance (Ho et al. 2020, algorithm 2), of first order.

    It is DDIM with all of the noise. Raises InputError without noise.
    """
    return ddim(denoise, x, sigmas, noise=noise, eta=1.0)


def dpm_2_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    noise: Noise | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """Ancestral steps by the midpoint method in sigma, of second order, two calls a step.

    The midpoint is that of log sigma (DPM-Solver-2 of Karras et al. 2022's form, as in k-diffusion). `eta` in
    0 ... 1 is the share of DDPM's noise, `s_noise` a factor on it. Steps to sigma = 0, and from the level
    that stands for infinite noise, are of first order. Raises InputError for options out of range, and
    without noise when eta is above 0.
    """
    CARDS["dpm_2_ancestral"].check(eta=eta, s_noise=s_noise)
    return _dpm_2_ancestral(denoise, x, sigmas, noise, eta, s_noise)


def dpmpp_2s_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    noise: Noise | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """Ancestral steps of DPM-Solver++(2S), of second order in λ, two calls a step (Lu et al. 2022, algorithm
    1).

    `eta` in 0 ... 1 is the share of DDPM's noise, `s_noise` a factor on it. Steps from pure noise and to
    sigma = 0 are of first order. Raises InputError for options out of range, and without noise when eta is
    above 0.
    """
    CARDS["dpmpp_2s_ancestral"].check(eta=eta, s_noise=s_noise)
    return _dpmpp_2s_ancestral(denoise, x, sigmas, noise, eta, s_noise)


@torch.no_grad()
def _dpm_2_ancestral(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise | None, eta: float, s_noise: float
) -> Iterator[Step]:
    path = denoise.path
    for index, sigma, to in falling_pairs(sigmas):
        denoised = denoise(x, sigma).value
        _, _, up = first_order_factors(path, sigma, to, eta)
        down = level(path, _ratio_down(path, to, up))
        x = midpoint_step(denoise, x, denoised, sigma, down)
        if down != to:
            x *= path.alpha(to) / path.alpha(down)
        x = add_noise(x, s_noise * up, noise, sigma, to)
        yield Step(index, len(sigmas) - 1, sigma, x, denoised)


@torch.no_grad()
def _dpmpp_2s_ancestral(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise | None, eta: float, s_noise: float
) -> Iterator[Step]:
    path = denoise.path
    for index, sigma, to in falling_pairs(sigmas):
        denoised = target = denoise(x, sigma).value
        keep, pull, up = first_order_factors(path, sigma, to, eta)
        middle = math.sqrt(ratio(path, sigma)) * math.sqrt(_ratio_down(path, to, up))
        if 0 < middle < math.inf:  # 0 * inf is neither
            middle = level(path, middle)
            keep_half, pull_half, _ = first_order_factors(path, sigma, middle, 0.0)
            target = denoise(toward(x, denoised, keep_half, pull_half), middle).value
        x = add_noise(toward(x, target, keep, pull), s_noise * up, noise, sigma, to)
        yield Step(index, len(sigmas) - 1, sigma, x, denoised)


def _ratio_down(path: NoisePath, to: float, up: float) -> float:
    """The ratio that the flow is followed to, so that noise of scale `up` brings x back to level `to`."""
    return ratio(path, to) * math.sqrt(max(0.0, 1 - (up / to) ** 2)) if to > 0 else 0.0
