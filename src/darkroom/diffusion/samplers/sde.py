"""Solvers of the reverse-time SDE in λ, exact in its linear part: the SDE forms of DPM-Solver++."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from darkroom.diffusion.path import NoisePath
from darkroom.diffusion.samplers.cards import CARDS
from darkroom.diffusion.samplers.levels import blend, falling_pairs, level, ratio, sde_factors
from darkroom.diffusion.samplers.steps import (
    Denoise,
    History,
    Noise,
    Step,
    add_noise,
    first_order_factors,
    log_ratio,
    needed,
    remember,
    toward,
)

# What the newest and the older estimates weigh: lags in λ behind the newest, the step h, eta.
Weigh = Callable[[Sequence[float], float, float], list[float]]


def dpmpp_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    noise: Noise | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    midpoint: float = 0.5,
) -> Iterator[Step]:
    """DPM-Solver++ (2S) for the SDE, as in k-diffusion: weak order 2, two calls a step.

    The noise up to the inner level is a part of the noise of the whole step, in the proportion that the
    reverse-time SDE gives it. `eta` in 0 ... 1 is the share of DDPM's noise, `s_noise` a factor on it;
    `midpoint`, in 0.01 ... 1, is where the inner level lies between the two in λ. Steps from pure noise
    and to sigma = 0 are of first order. Raises InputError for options out of range, and without noise when
    eta is above 0.
    """
    CARDS["dpmpp_sde"].check(eta=eta, s_noise=s_noise, midpoint=midpoint)
    return _dpmpp_sde(denoise, x, sigmas, noise, eta, s_noise, midpoint)


def dpmpp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    noise: Noise | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver: Literal["midpoint", "heun"] = "midpoint",
) -> Iterator[Step]:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, appendix B): weak order 2 with one call a step.

    `eta`, 0 or more, is how much noise the SDE has: 0 none, which is DPM-Solver++(2M), 1 that of DDPM;
    `s_noise` is a factor on it. Raises InputError for an unknown solver and options out of range, and without
    noise when eta is above 0.
    """
    CARDS["dpmpp_2m_sde"].check(eta=eta, s_noise=s_noise, solver=solver)
    return _multistep(denoise, x, sigmas, noise, eta, s_noise, _SOLVERS[solver], 2)


def dpmpp_3m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    noise: Noise | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """DPM-Solver++(3M) for the SDE, as in k-diffusion: one call a step, going on from three estimates.

    The published form weighs the second difference by half of what third order takes, so that it is of
    second order with a small error. `eta` and `s_noise` are those of `dpmpp_2m_sde`. Raises InputError for
    options out of range, and without noise when eta is above 0.
    """
    CARDS["dpmpp_3m_sde"].check(eta=eta, s_noise=s_noise)
    return _multistep(denoise, x, sigmas, noise, eta, s_noise, _third, 3)


@torch.no_grad()
def _dpmpp_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise | None,
    eta: float,
    s_noise: float,
    midpoint: float,
) -> Iterator[Step]:
    path = denoise.path
    for index, sigma, to in falling_pairs(sigmas):
        denoised = denoise(x, sigma).value
        keep, pull, up = first_order_factors(path, sigma, to, eta)
        if to == 0 or path.alpha(sigma) <= 0 or to == sigma:
            x = add_noise(toward(x, denoised, keep, pull), s_noise * up, noise, sigma, to)
        else:
            middle = level(path, ratio(path, sigma) ** (1 - midpoint) * ratio(path, to) ** midpoint)
            keep_half, pull_half, up_half = first_order_factors(path, sigma, middle, eta)
            half = toward(x, denoised, keep_half, pull_half)
            x = toward(x, denoised, keep, 0.0)
            if s_noise * up > 0:
                first, whole = _nested(path, needed(noise), sigma, middle, to)
                half = half.add_(first.to(half), alpha=s_noise * up_half)
                x = x.add_(whole.to(x), alpha=s_noise * up)
            target = torch.lerp(denoised, denoise(half, middle).value, 1 / (2 * midpoint))
            x = x.add_(target, alpha=pull)
        yield Step(index, len(sigmas) - 1, sigma, x, denoised)


def _nested(path: NoisePath, noise: Noise, sigma: float, middle: float, to: float) -> tuple[Tensor, Tensor]:
    """Noise of unit variance up to a middle level, and that of the whole step, of which it is a part.

    The noise of x / r² has independent increments, whose variances are those of 1 / r².
    """
    first = noise.between(sigma, middle)
    r, r_middle, r_to = (ratio(path, s) for s in (sigma, middle, to))
    part = (r_to / r_middle) ** 2 * (1 - (r_middle / r) ** 2) / (1 - (r_to / r) ** 2)
    if part >= 1:
        return first, first
    rest = noise.between(middle, to)
    return first, first * math.sqrt(part) + rest * math.sqrt(1 - part)


@torch.no_grad()
def _multistep(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise | None,
    eta: float,
    s_noise: float,
    weigh: Weigh,
    length: int,
) -> Iterator[Step]:
    """Steps that go on from the last `length` estimates, with the weights that `weigh` gives them."""
    path = denoise.path
    history: History = []  # λ and estimates
    for index, sigma, to in falling_pairs(sigmas):
        denoised = denoise(x, sigma).value
        lam, h = log_ratio(path, sigma), log_ratio(path, to) - log_ratio(path, sigma)
        history = remember(history, lam, denoised, length)
        keep, pull, up = sde_factors(path, sigma, to, eta)
        if len(history) > 1 and 0 < h < math.inf:
            lags = [lam - past for past, _ in history]
            weights = [path.alpha(to) * weight for weight in weigh(lags, h, eta)]
            x = blend(x, keep, weights, [estimate for _, estimate in history])
        else:
            x = toward(x, denoised, keep, pull)
        x = add_noise(x, s_noise * up, noise, sigma, to)
        yield Step(index, len(sigmas) - 1, sigma, x, denoised)


def _midpoint(lags: Sequence[float], h: float, eta: float) -> list[float]:
    whole = -math.expm1(-(1 + eta) * h)
    slope = whole * h / (2 * lags[1])
    return [whole + slope, -slope]


def _heun(lags: Sequence[float], h: float, eta: float) -> list[float]:
    whole, phi_2 = _phis(h, eta)
    slope = phi_2 * h / lags[1]
    return [whole + slope, -slope]


def _third(lags: Sequence[float], h: float, eta: float) -> list[float]:
    if len(lags) == 2:
        return _heun(lags, h, eta)
    whole, phi_2 = _phis(h, eta)
    phi_3 = phi_2 / ((1 + eta) * h) - 0.5
    near, far, both = lags[1] / h, (lags[2] - lags[1]) / h, lags[2] / h
    # The weights of the two first differences, which lie `near` and `near + far` behind.
    newer = (phi_2 * (1 + near / both) - phi_3 / both) / near
    older = (phi_3 / both - phi_2 * near / both) / far
    return [whole + newer, older - newer, -older]


def _phis(h: float, eta: float) -> tuple[float, float]:
    """How much of a step is due to a constant estimate, and to one that grows evenly from 0 to 1 over it."""
    whole = -math.expm1(-(1 + eta) * h)
    return whole, 1 - whole / ((1 + eta) * h)


_SOLVERS: dict[str, Weigh] = {"midpoint": _midpoint, "heun": _heun}
