"""Samplers of second order that look ahead within each step, at two calls of the network a step."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from darkroom.diffusion.samplers.steps import PURE_NOISE, Denoise, Noise, Step, euler_step, level_pairs


@torch.no_grad()
def heun(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], *, noise: Noise | None = None
) -> Iterator[Step]:
    """Heun's method in sigma (Karras et al. 2022, algorithm 1), of second order, noiseless.

    On flow paths it is Heun's method for the velocity. Steps to sigma = 0, and from the level that stands
    for infinite noise, are Euler's.
    """
    for index, sigma, to in level_pairs(sigmas):
        denoised = denoise(x, sigma).value
        x = heun_step(denoise, x, denoised, sigma, to)
        yield Step(index, len(sigmas) - 1, sigma, x, denoised)


@torch.no_grad()
def dpm_2(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], *, noise: Noise | None = None
) -> Iterator[Step]:
    """DPM-Solver-2 (Lu et al. 2022, algorithm 1): the slope at the midpoint in log sigma, of second order.

    Steps to sigma = 0, and from the level that stands for infinite noise, are Euler's.
    """
    for index, sigma, to in level_pairs(sigmas):
        denoised = denoise(x, sigma).value
        x = midpoint_step(denoise, x, denoised, sigma, to)
        yield Step(index, len(sigmas) - 1, sigma, x, denoised)


def heun_step(denoise: Denoise, x: Tensor, denoised: Tensor, sigma: float, to: float) -> Tensor:
    """A new x at level `to`, by the mean of the slopes (x - denoised) / sigma at both ends of the step.

    The slopes differ by (denoised - denoised_to) / to on every path, because Euler's step goes straight.
    """
    ahead = euler_step(denoise.path, x, denoised, sigma, to)
    if not _looks_ahead(sigma, to):
        return ahead
    change = denoise(ahead, to).value - denoised
    return torch.add(ahead, change, alpha=(sigma - to) / (2 * to))


def midpoint_step(denoise: Denoise, x: Tensor, denoised: Tensor, sigma: float, to: float) -> Tensor:
    """A new x at level `to`, by the slope half way there in log sigma."""
    straight = euler_step(denoise.path, x, denoised, sigma, to)
    if not _looks_ahead(sigma, to):
        return straight
    middle = math.sqrt(sigma * to)
    change = denoise(euler_step(denoise.path, x, denoised, sigma, middle), middle).value - denoised
    return torch.add(straight, change, alpha=(sigma - to) / middle)


def _looks_ahead(sigma: float, to: float) -> bool:
    return to > 0 and sigma <= PURE_NOISE
