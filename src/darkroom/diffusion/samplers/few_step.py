"""Samplers for models distilled to a few steps, which estimate the clean latents and noise them again."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from darkroom.diffusion.path import TIMESTEP_SNAP, CosinePath, DiscretePath, NoisePath
from darkroom.diffusion.samplers.cards import CARDS
from darkroom.diffusion.samplers.levels import falling_pairs, ratio
from darkroom.diffusion.samplers.steps import Denoise, Noise, Step, add_noise, toward

# The boundary condition of latent consistency models: timesteps count tenfold, sigma_data is 0.5.
TIMESTEP_SCALE, SIGMA_DATA = 10.0, 0.5


def lcm(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    noise: Noise | None = None,
    boundary: bool = True,
) -> Iterator[Step]:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1; Luo et al. 2023), one call a step.

    Each step takes the estimate for clean latents and noises them anew to the next level. On a discrete path
    the estimate is mixed with x so that it is x at timestep 0, as latent consistency models are trained;
    `boundary` off leaves it as it is, for other models of few steps. Raises InputError without noise.
    """
    CARDS["lcm"].check(boundary=boundary)
    return _lcm(denoise, x, sigmas, noise, boundary)


def tcd(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    noise: Noise | None = None,
    gamma: float = 0.3,
) -> Iterator[Step]:
    """Strategic stochastic sampling of trajectory consistency models (Zheng et al. 2024, algorithm 4).

    Each step, of one call, goes to the time (1 - gamma) * t of the next level's t, and noises from there up
    to it. `gamma` in 0 ... 1 is 0 without noise, which is DDIM, and 1 for the steps of `lcm`. Times are
    timesteps, whole ones on a discrete path, and sigma on an EDM path. Raises InputError for gamma out of
    range, and without noise when it is above 0.
    """
    CARDS["tcd"].check(gamma=gamma)
    return _tcd(denoise, x, sigmas, noise, gamma)


@torch.no_grad()
def _lcm(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise | None, boundary: bool
) -> Iterator[Step]:
    path = denoise.path
    for index, sigma, to in falling_pairs(sigmas):
        denoised = denoise(x, sigma).value
        if boundary and isinstance(path, DiscretePath):
            skip, out = _boundary(path, sigma)
            denoised = toward(x, denoised, skip, out)
        x = add_noise(denoised * path.alpha(to), to, noise, sigma, to)
        yield Step(index, len(sigmas) - 1, sigma, x, denoised)


def _boundary(path: DiscretePath, sigma: float) -> tuple[float, float]:
    """The factors of x and of the estimate: c_skip, on x scaled to unit variance, and c_out."""
    timestep = TIMESTEP_SCALE * path.timestep_from_sigma(sigma)
    skip = SIGMA_DATA**2 / (timestep**2 + SIGMA_DATA**2)
    out = timestep / math.hypot(timestep, SIGMA_DATA)
    return skip * path.input_scale(sigma), out


@torch.no_grad()
def _tcd(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise | None, gamma: float
) -> Iterator[Step]:
    path = denoise.path
    for index, sigma, to in falling_pairs(sigmas):
        denoised = denoise(x, sigma).value
        alpha_to = path.alpha(to)
        # r_down / r_to: the share of the next level's noise that is there before noise is added
        kept = min(1.0, ratio(path, _earlier(path, to, gamma)) / ratio(path, to)) if to > 0 else 1.0
        x = toward(x, denoised, kept * to / sigma, alpha_to - kept * path.alpha(sigma) * to / sigma)
        x = add_noise(x, to * math.sqrt(1 - kept**2), noise, sigma, to)
        yield Step(index, len(sigmas) - 1, sigma, x, denoised)


def _earlier(path: NoisePath, to: float, gamma: float) -> float:
    """The level at the share 1 - gamma of the time of level `to`."""
    if gamma == 0:
        return to
    if not isinstance(path, DiscretePath | CosinePath):
        return (1 - gamma) * to
    timestep = path.timestep_from_sigma(to)
    earlier = (1 - gamma) * timestep
    if isinstance(path, DiscretePath):
        earlier = float(math.floor(earlier + TIMESTEP_SNAP))
    return path.sigma_from_timestep(earlier) if earlier < timestep else to
