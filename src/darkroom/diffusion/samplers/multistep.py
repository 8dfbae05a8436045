"""Samplers that go on from the estimates of earlier steps, at one call of the network a step."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from darkroom.diffusion.path import NoisePath
from darkroom.diffusion.samplers.adams import (
    adams,
    estimate_weights,
    exponential_moments,
    interpolation_weights,
    power_moments,
)
from darkroom.diffusion.samplers.cards import CARDS
from darkroom.diffusion.samplers.steps import (
    PURE_NOISE,
    Denoise,
    Noise,
    Step,
    bends,
    level_pairs,
    log_ratio,
    toward,
)

SHORT_RUN = 15  # steps from which on a run may end in its full order
# What earlier velocities weigh in an even step, by how many of them there are; the newest has the rest of 1.
ADAMS_BASHFORTH = ((), (-1 / 2,), (-16 / 12, 5 / 12), (-59 / 24, 37 / 24, -9 / 24))


@torch.no_grad()
def dpmpp_2m(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], *, noise: Noise | None = None
) -> Iterator[Step]:
    """DPM-Solver++(2M): second order in log(alpha / sigma), one call a step, noiseless (Lu et al. 2022).

    The first step, one from pure noise and one to sigma = 0 are of first order, their limit.
    """
    path, last, last_h = denoise.path, None, math.inf
    for index, sigma, to in level_pairs(sigmas):
        denoised = denoise(x, sigma).value
        h = log_ratio(path, to) - log_ratio(path, sigma)
        slope = h / (2 * last_h) if last_h and math.isfinite(h) and math.isfinite(last_h) else 0.0
        target = denoised if last is None or slope == 0 else torch.lerp(last, denoised, 1 + slope)
        x = toward(x, target, to / sigma, path.alpha(to) - path.alpha(sigma) * to / sigma)
        yield Step(index, len(sigmas) - 1, sigma, x, denoised)
        last, last_h = denoised, h


def res_multistep(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], *, noise: Noise | None = None
) -> Iterator[Step]:
    """The multistep refined exponential solver (Zhang et al. 2023), second order in log(alpha / sigma).

    It integrates the line through the last two estimates exactly, where DPM-Solver++(2M) takes the line's
    midpoint. Steps at pure noise and to sigma = 0 are of first order.
    """
    return adams(denoise, x, sigmas, order=2, value=_estimate, weights=estimate_weights)


def lms(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], *, noise: Noise | None = None, order: int = 4
) -> Iterator[Step]:
    """Adams-Bashforth in sigma for levels at any distance: the linear multistep method of k-diffusion.

    It integrates the polynomial through the last `order` velocities; the first steps have fewer. Raises
    InputError for an order outside 1 ... 4.
    """
    CARDS["lms"].check(order=order)
    return adams(denoise, x, sigmas, order=order, value=_velocity, weights=_velocity_weights)


def ipndm(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], *, noise: Noise | None = None, order: int = 4
) -> Iterator[Step]:
    """Adams-Bashforth with the coefficients of even steps (improved PNDM: Zhang and Chen 2023).

    Of the full order on levels that are evenly spaced in sigma, of second order on other smooth lists of
    them. Raises InputError for an order outside 1 ... 4.
    """
    CARDS["ipndm"].check(order=order)
    return adams(denoise, x, sigmas, order=order, value=_velocity, weights=_even_weights)


def plms(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], *, noise: Noise | None = None
) -> Iterator[Step]:
    """Pseudo linear multistep (PNDM without Runge-Kutta steps: Liu et al. 2022), second order in time.

    The four-step coefficients of even steps, for levels at evenly spaced timesteps; the first step is
    Heun's, at two calls of the network. It extrapolates the noise, also of networks that predict v.
    """
    return adams(denoise, x, sigmas, order=4, value=_velocity, weights=_even_weights, heun_start=True)


def deis(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    noise: Noise | None = None,
    order: int = 2,
    lower_order_final: bool = True,
) -> Iterator[Step]:
    """DEIS-Multistep (Zhang and Chen 2023): the noise as a polynomial in log(sigma / alpha), integrated.

    With `lower_order_final`, runs of fewer than 15 steps end in lower orders, which is steadier. Steps at
    pure noise and to sigma = 0 are of first order. Raises InputError for an order outside 1 ... 3.
    """
    CARDS["deis"].check(order=order, lower_order_final=lower_order_final)
    lower = lower_order_final and len(sigmas) - 1 < SHORT_RUN
    return adams(denoise, x, sigmas, order=order, value=_noise, weights=_noise_weights, lower_final=lower)


def _velocity(path: NoisePath, x: Tensor, denoised: Tensor, sigma: float) -> Tensor:
    return (x - denoised).div_(sigma)


def _noise(path: NoisePath, x: Tensor, denoised: Tensor, sigma: float) -> Tensor:
    return torch.sub(x, denoised, alpha=path.alpha(sigma)).div_(sigma)


def _estimate(path: NoisePath, x: Tensor, denoised: Tensor, sigma: float) -> Tensor:
    return denoised


def _velocity_weights(path: NoisePath, levels: list[float], to: float) -> list[float]:
    """x_to = x + ∫ velocity d sigma."""
    if max(to, levels[0]) > PURE_NOISE:
        return []
    nodes = [level - levels[0] for level in levels]
    return interpolation_weights(nodes, power_moments(to - levels[0], len(nodes)))[1:]


def _even_weights(path: NoisePath, levels: list[float], to: float) -> list[float]:
    """The same integral, as if the levels were evenly spaced."""
    if max(to, levels[0]) > PURE_NOISE:
        return []
    return [(to - levels[0]) * weight for weight in ADAMS_BASHFORTH[len(levels) - 1]]


def _noise_weights(path: NoisePath, levels: list[float], to: float) -> list[float]:
    """x_to = alpha_to / alpha * x + to * ∫ exp(s - s_to) noise ds, with s = log(sigma / alpha) = -λ."""
    if not bends(path, levels[0], to):
        return []
    start = log_ratio(path, levels[0])
    nodes = [start - log_ratio(path, level) for level in levels]
    moments = exponential_moments(start - log_ratio(path, to), len(nodes))
    return [to * weight for weight in interpolation_weights(nodes, moments)[1:]]
