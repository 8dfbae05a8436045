"""Samplers of first order, whose steps are exact while the estimate stays as it is."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from darkroom.diffusion.samplers.cards import CARDS
from darkroom.diffusion.samplers.steps import (
    Denoise,
    Noise,
    Step,
    add_noise,
    first_order_factors,
    level_pairs,
    toward,
)


def euler(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], *, noise: Noise | None = None
) -> Iterator[Step]:
    """Euler's method on the probability flow (Karras et al. 2022, algorithm 1), of first order, noiseless.

    On variance-preserving paths this is DDIM without noise, and the first-order DPM-Solver++ on all.
    """
    return _first_order(denoise, x, sigmas, noise, eta=0.0, s_noise=1.0)


def euler_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    noise: Noise | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """Euler steps past each level and noise back up to it: the noise of DDPM's posterior (Ho et al. 2020).

    Works on sigma / alpha, so that a flow path takes the steps of the variance-preserving path it is equal
    to. `eta` in 0 ... 1 is the share of DDPM's noise, `s_noise` a factor on it. Raises InputError for options
    out of range, and without noise when eta is above 0.
    """
    CARDS["euler_ancestral"].check(eta=eta, s_noise=s_noise)
    return _first_order(denoise, x, sigmas, noise, eta, s_noise)


def ddim(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], *, noise: Noise | None = None, eta: float = 0.0
) -> Iterator[Step]:
    """DDIM (Song et al. 2021, equations 12 and 16): `eta` is the share of DDPM's noise, 0 none, 1 all of it.

    Raises InputError for eta outside 0 ... 1, and without noise when eta is above 0.
    """
    CARDS["ddim"].check(eta=eta)
    return _first_order(denoise, x, sigmas, noise, eta, s_noise=1.0)


@torch.no_grad()
def _first_order(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise | None, eta: float, s_noise: float
) -> Iterator[Step]:
    """Steps that are exact while the estimate stays as it is; a share `eta` of the noise is drawn anew."""
    for index, sigma, to in level_pairs(sigmas):
        denoised = denoise(x, sigma).value
        keep, pull, up = first_order_factors(denoise.path, sigma, to, eta)
        x = add_noise(toward(x, denoised, keep, pull), s_noise * up, noise, sigma, to)
        yield Step(index, len(sigmas) - 1, sigma, x, denoised)
