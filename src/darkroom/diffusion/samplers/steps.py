"""What all samplers share: a `Step`, what they call, and the coefficients of a first-order step.

A sampler is a generator that walks noisy latents down a list of noise levels, one `Step` at a time. All work
on any path `x = alpha * x0 + sigma * noise`. Coefficients are floats, computed on the host in float64; where
alpha is 0 (pure noise) or sigma is 0 (the end) they take their limits. The caller owns progress, previews
and stopping.
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

    def row(self, number: int, /) -> "Denoise":
        """The same for one picture of the batch alone."""
        ...


class Noise(Protocol):
    """Where a stochastic sampler takes its noise from."""

    def between(self, sigma: float, sigma_next: float) -> Tensor:
        """Noise of unit variance (B, C, h, w) for the step between two levels."""
        ...

    def row(self, number: int, /) -> "Noise":
        """That of one picture of the batch alone."""
        ...


Sampler = Callable[..., Iterator[Step]]
History = list[tuple[float, Tensor]]  # levels, or what stands for them, and values there, newest first

# Noise above this level leaves nothing of the picture. Paths that stand for infinite noise start up there
# (zero-terminal SNR at 4096) and fall to a few in one step. Were that step of higher order, it would weigh
# the difference between two estimates a hundredfold.
PURE_NOISE = 200.0


def level_pairs(sigmas: Sequence[float]) -> Iterator[tuple[int, float, float]]:
    """The index, the level and the next level of each step down, or up, a list of noise levels.

    Raises InputError if the levels turn round, and if they start at 0, where no network says what the noise
    is: see `inverse_levels`.
    """
    if sigmas and sigmas[0] <= 0:
        raise InputError(f"the first noise level must be above 0, not {sigmas[0]}: see `inverse_levels`")
    falling = len(sigmas) < 2 or sigmas[-1] <= sigmas[0]
    for index, (sigma, to) in enumerate(pairwise(sigmas)):
        if sigma != to and (to < sigma) != falling:
            raise InputError(f"noise levels must all fall, or all rise: {sigma:g} is followed by {to:g}")
        yield index, sigma, to


def inverse_levels(path: NoisePath, sigmas: Sequence[float]) -> list[float]:
    """A schedule's levels from the picture to the noise: rising, from the path's smallest in place of 0."""
    rising = sorted(sigma for sigma in sigmas if sigma > 0)
    smallest = path.sigma_min
    return [smallest, *rising] if len(rising) < len(sigmas) and smallest < rising[0] else rising


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


def toward(x: Tensor, target: Tensor, keep: float, pull: float) -> Tensor:
    """keep * x + pull * target."""
    if keep == 0:
        return target * pull
    return torch.mul(x, keep).add_(target, alpha=pull)


def add_noise(x: Tensor, scale: float, noise: Noise | None, sigma: float, to: float) -> Tensor:
    """x with the noise of the step between two levels, in place; InputError if there is no source of it."""
    if scale <= 0:
        return x
    return x.add_(needed(noise).between(sigma, to).to(x), alpha=scale)


def needed(noise: Noise | None) -> Noise:
    """The source of noise; InputError if there is none."""
    if noise is None:
        raise InputError("this sampler draws noise at each step: give it a noise source")
    return noise


def remember(history: History, level: float, value: Tensor, count: int) -> History:
    """The last `count` values; one at the level of the newest takes its place, one at infinity goes."""
    older = [past for past in history if past[0] != level and math.isfinite(past[0])]
    return [(level, value), *older][:count]


def log_ratio(path: NoisePath, sigma: float) -> float:
    """λ = log(alpha / sigma), infinite at both ends."""
    alpha = path.alpha(sigma)
    if alpha <= 0:
        return -math.inf
    return math.log(alpha / sigma) if sigma > 0 else math.inf


def euler_step(path: NoisePath, x: Tensor, denoised: Tensor, sigma: float, to: float) -> Tensor:
    """A new x at level `to`: the step of first order, exact while the estimate stays as it is."""
    keep = to / sigma
    return toward(x, denoised, keep, path.alpha(to) - path.alpha(sigma) * keep)


def bends(path: NoisePath, sigma: float, to: float) -> bool:
    """Whether a step can be of higher order in λ = log(alpha / sigma), which is finite at both its ends."""
    return 0 < to <= PURE_NOISE and sigma <= PURE_NOISE and path.alpha(sigma) > 0 and path.alpha(to) > 0
