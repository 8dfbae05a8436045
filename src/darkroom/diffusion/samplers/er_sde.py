"""Extended reverse-time SDE solver: how much noise is drawn follows a function of the level."""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from darkroom.diffusion.path import NoisePath
from darkroom.diffusion.samplers.cards import CARDS
from darkroom.diffusion.samplers.levels import blend, falling_pairs, ratio
from darkroom.diffusion.samplers.steps import Denoise, History, Noise, Step, add_noise, remember

NODES = 24  # of the quadrature over a step in log r: exact to 1e-12 over steps of any length in use


def er_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    noise: Noise | None = None,
    order: int = 3,
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """ER-SDE-Solver (Cui et al. 2023, algorithms 1 to 3), one call a step, weak order 2.

    The noise function is the paper's fifth, φ(r) = r (e^(r^0.3) + 10) in r = sigma / alpha, which draws less
    noise at low levels than DDPM. `order`, 1 ... 3, is how many estimates a step goes on from; `s_noise` is a
    factor on the noise. Raises InputError for options out of range, and without noise.
    """
    CARDS["er_sde"].check(order=order, s_noise=s_noise)
    return _er_sde(denoise, x, sigmas, noise, order, s_noise)


@torch.no_grad()
def _er_sde(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise | None, order: int, s_noise: float
) -> Iterator[Step]:
    path = denoise.path
    history: History = []  # ratios and estimates
    for index, sigma, to in falling_pairs(sigmas):
        denoised = denoise(x, sigma).value
        history = remember(history, ratio(path, sigma), denoised, order)
        keep, weights, up = _factors(path, sigma, to, [old for old, _ in history])
        x = blend(x, keep, weights, [estimate for _, estimate in history])
        x = add_noise(x, s_noise * up, noise, sigma, to)
        yield Step(index, len(sigmas) - 1, sigma, x, denoised)


def _factors(
    path: NoisePath, sigma: float, to: float, ratios: Sequence[float]
) -> tuple[float, list[float], float]:
    """The factors of x, of the estimates at `ratios` (newest first) and of new noise."""
    r_to, alpha_to = ratio(path, to), path.alpha(to)
    # φ(r_to) / φ(r) = share * r_to / r
    share = _noise_share(r_to) / _noise_share(ratios[0]) if r_to < ratios[0] else 1.0
    fall = to * path.alpha(sigma) / (sigma * alpha_to) if alpha_to else 1.0
    weights = [1 - share * fall, *(0.0 for _ in ratios[1:])]
    if 0 < r_to < ratios[0] and len(ratios) > 1:
        _add_slopes(weights, r_to, ratios)
    return share * to / sigma, [alpha_to * w for w in weights], to * math.sqrt(max(0.0, 1 - share**2))


def _add_slopes(weights: list[float], r_to: float, ratios: Sequence[float]) -> None:
    """The terms of the estimate's first and second derivative in r, by differences of past estimates."""
    r = ratios[0]
    phi = r_to * _noise_share(r_to)
    by_phi, slope_by_phi = _integrals(r_to, r)
    first = (r_to - r + phi * by_phi) / (r - ratios[1])
    weights[0] += first
    weights[1] -= first
    if len(ratios) > 2:
        second = ((r_to - r) ** 2 / 2 + phi * slope_by_phi) * 2 / (r - ratios[2])
        newer, older = second / (r - ratios[1]), second / (ratios[1] - ratios[2])
        for k, change in enumerate((newer, -newer - older, older)):
            weights[k] += change


def _noise_share(r: float) -> float:
    """φ(r) / r, infinite at pure noise."""
    return math.exp(min(r**0.3, 700.0)) + 10 if math.isfinite(r) else math.inf


def _integrals(r_to: float, r: float) -> tuple[float, float]:
    """∫ 1 / φ(u) du and ∫ (u - r) / φ(u) du from r_to to r, by Gauss and Legendre's rule in log u."""
    points, scales = _gauss()
    low, high = math.log(r_to), math.log(r)
    u = np.exp((low + high) / 2 + (high - low) / 2 * points)
    density = scales * (high - low) / 2 / (np.exp(u**0.3) + 10)
    return float(density.sum()), float(((u - r) * density).sum())


@lru_cache(maxsize=1)
def _gauss() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(NODES)
