"""Samplers: generators that walk noisy latents down a list of noise levels, one `Step` at a time.

All work on any path `x = alpha * x0 + sigma * noise`. Coefficients are floats, computed on the host in
float64; where alpha is 0 (pure noise) or sigma is 0 (the end) they take their limits. The caller owns
progress, previews and stopping.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from darkroom.diffusion.guidance import Denoised
from darkroom.diffusion.path import NoisePath
from darkroom.errors import InputError


@dataclass(frozen=True, slots=True)
class Step:
    """Step `index` of `total`, done: from level `sigma`, by way of the estimate `denoised`, to the new x."""

    index: int
    total: int
    sigma: float
    x: Tensor
    denoised: Tensor


class Denoise(Protocol):
    """What a sampler calls: the estimate of the clean latents for x (B, C, h, w) at one level."""

    path: NoisePath

    def __call__(self, x: Tensor, sigma: float) -> Denoised:
        """The estimate at level `sigma`."""
        ...


class Noise(Protocol):
    """Where a stochastic sampler takes its noise from."""

    def between(self, sigma: float, sigma_next: float) -> Tensor:
        """Noise of unit variance (B, C, h, w) for the step between two levels."""
        ...


Sampler = Callable[..., Iterator[Step]]


def euler(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], *, noise: Noise | None = None
) -> Iterator[Step]:
    """Euler's method on the probability flow (Karras et al. 2022, algorithm 1), of first order, noiseless.

    On variance-preserving paths this is DDIM without noise, and the first-order DPM-Solver++ on all.
    """
    return _first_order(denoise, x, sigmas, noise, eta=0.0)


def euler_ancestral(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], *, noise: Noise | None = None
) -> Iterator[Step]:
    """Euler steps past each level and noise back up to it: the noise of DDPM's posterior (Ho et al. 2020).

    Works on sigma / alpha, so that a flow path takes the steps of the variance-preserving path it is equal
    to. Raises InputError without noise.
    """
    return _first_order(denoise, x, sigmas, noise, eta=1.0)


def ddim(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], *, noise: Noise | None = None, eta: float = 0.0
) -> Iterator[Step]:
    """DDIM (Song et al. 2021, equations 12 and 16): `eta` is the share of DDPM's noise, 0 none, 1 all of it.

    Raises InputError for eta outside 0 ... 1, and without noise when eta is above 0.
    """
    if not 0 <= eta <= 1:
        raise InputError(f"eta must be in 0 ... 1, not {eta}")
    return _first_order(denoise, x, sigmas, noise, eta=eta)


@torch.no_grad()
def dpmpp_2m(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], *, noise: Noise | None = None
) -> Iterator[Step]:
    """DPM-Solver++(2M): second order in log(alpha / sigma), one call a step, noiseless (Lu et al. 2022).

    The first step, one from pure noise and one to sigma = 0 are of first order, their limit.
    """
    path, last, last_h = denoise.path, None, math.inf
    for index, (sigma, to) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma).value
        h = _log_ratio(path, to) - _log_ratio(path, sigma)
        slope = h / (2 * last_h) if last_h and math.isfinite(h) and math.isfinite(last_h) else 0.0
        target = denoised if last is None or slope == 0 else torch.lerp(last, denoised, 1 + slope)
        x = _toward(x, target, to / sigma, path.alpha(to) - path.alpha(sigma) * to / sigma)
        yield Step(index, len(sigmas) - 1, sigma, x, denoised)
        last, last_h = denoised, h


SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "dpmpp_2m": dpmpp_2m,
}


@torch.no_grad()
def _first_order(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise | None, eta: float
) -> Iterator[Step]:
    """Steps that are exact while the estimate stays as it is; a share `eta` of the noise is drawn anew."""
    for index, (sigma, to) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma).value
        keep, pull, up = first_order_factors(denoise.path, sigma, to, eta)
        x = _toward(x, denoised, keep, pull)
        if up > 0:
            if noise is None:
                raise InputError("this sampler draws noise at each step: give it a noise source")
            x = x.add_(noise.between(sigma, to).to(x), alpha=up)
        yield Step(index, len(sigmas) - 1, sigma, x, denoised)


def first_order_factors(path: NoisePath, sigma: float, to: float, eta: float) -> tuple[float, float, float]:
    """The factors of x, of the estimate and of new noise in a first-order step between two levels.

    With r = sigma / alpha, the step goes to r_down = sqrt(r_to² - r_up²), where the new noise of scale r_up =
    eta * r_to * sqrt(1 - r_to² / r²) fills up what is missing. It is written without r, which is infinite
    where alpha = 0.
    """
    alpha, alpha_to = path.alpha(sigma), path.alpha(to)
    fall = to * alpha / (sigma * alpha_to) if alpha_to else 1.0  # r_to / r
    fresh = eta * math.sqrt(max(0.0, 1 - fall**2))  # r_up / r_to
    kept = math.sqrt(1 - fresh**2)  # r_down / r_to
    return kept * to / sigma, alpha_to - kept * alpha * to / sigma, fresh * to


def _toward(x: Tensor, target: Tensor, keep: float, pull: float) -> Tensor:
    """keep * x + pull * target."""
    if keep == 0:
        return target * pull
    return torch.mul(x, keep).add_(target, alpha=pull)


def _log_ratio(path: NoisePath, sigma: float) -> float:
    """λ = log(alpha / sigma), infinite at both ends."""
    alpha = path.alpha(sigma)
    if alpha <= 0:
        return -math.inf
    return math.log(alpha / sigma) if sigma > 0 else math.inf
