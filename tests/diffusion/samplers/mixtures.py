"""Gaussian mixtures whose perfect denoiser and distribution are known, and noise for tests of samplers."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from darkroom.diffusion.guidance import Denoised
from darkroom.diffusion.path import DiscretePath, NoisePath
from darkroom.diffusion.schedules import karras_sigmas


class Mixture:
    """The perfect denoiser of latents (B, C, 1, 1) from isotropic Gaussians, and their true distribution."""

    def __init__(
        self,
        path: NoisePath,
        means: Sequence[Sequence[float]],
        stds: Sequence[float],
        weights: Sequence[float],
    ) -> None:
        self.path, self.calls = path, 0
        self.means = torch.tensor(means, dtype=torch.float64)
        self.stds = torch.tensor(stds, dtype=torch.float64)
        self.weights = torch.tensor(weights, dtype=torch.float64)

    def __call__(self, x: Tensor, sigma: float) -> Denoised:
        self.calls += 1
        alpha = self.path.alpha(sigma)
        flat = x.flatten(1).to(torch.float64)
        variances = alpha**2 * self.stds**2 + sigma**2
        # log of each Gaussian's density at x, but for a constant
        logs = flat.square().sum(1, keepdim=True) * (-1 / (2 * variances))
        logs += flat @ (alpha * self.means / variances[:, None]).T
        logs -= alpha**2 * self.means.square().sum(1) / (2 * variances)
        logs += self.weights.log() - flat.shape[1] / 2 * variances.log()
        shares = logs.softmax(1)
        gains = alpha * self.stds**2 / variances
        value = shares @ (self.means * (1 - gains * alpha)[:, None]) + (shares @ gains)[:, None] * flat
        return Denoised(value.reshape(x.shape).to(x.dtype))

    def row(self, k: int) -> "Mixture":
        return self

    def draw(self, sigma: float, count: int, seed: int = 0) -> Tensor:
        """Exact draws of x at a level."""
        generator = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        z = torch.randn(count, self.means.shape[1], dtype=torch.float64, generator=generator)
        alpha = self.path.alpha(sigma)
        std = (alpha**2 * self.stds**2 + sigma**2).sqrt()
        return (alpha * self.means[which] + std[which, None] * z)[:, :, None, None]

    def scores(self, values: Tensor, direction: Sequence[float] = (1.0,)) -> Tensor:
        """Normal scores of clean latents along a direction: standard normal if they have the distribution."""
        along = values.flatten(1) @ torch.tensor(direction, dtype=torch.float64)
        return torch.special.ndtri(self.cdf(along, direction).clamp(1e-12, 1 - 1e-12))

    def cdf(self, values: Tensor, direction: Sequence[float] = (1.0,), sigma: float = 0.0) -> Tensor:
        """The distribution function of x at a level, along a direction of length 1."""
        alpha = self.path.alpha(sigma)
        means = alpha * self.means @ torch.tensor(direction, dtype=torch.float64)
        stds = (alpha**2 * self.stds**2 + sigma**2).sqrt()
        z = (values[..., None] - means) / stds
        return (torch.special.ndtr(z) * self.weights).sum(-1)


class Fresh:
    """Independent noise for each question; `scale` away from 1 is what a test must notice."""

    def __init__(self, shape: Sequence[int], seed: int = 3, scale: float = 1.0) -> None:
        self.shape, self.scale = tuple(shape), scale
        self.generator = torch.Generator().manual_seed(seed)
        self.asked: list[tuple[float, float]] = []

    def row(self, k: int) -> "Fresh":
        return self

    def between(self, sigma: float, sigma_next: float) -> Tensor:
        self.asked.append((sigma, sigma_next))
        return self.scale * torch.randn(self.shape, generator=self.generator, dtype=torch.float64)


def ks_distance(scores: Tensor) -> float:
    """Kolmogorov and Smirnov's distance of normal scores from the normal distribution."""
    expected, count = torch.special.ndtr(scores.sort().values), len(scores)
    above = (torch.arange(1, count + 1, dtype=torch.float64) / count - expected).max()
    below = (expected - torch.arange(count, dtype=torch.float64) / count).max()
    return float(torch.maximum(above, below))


def ks_limit(count: int, risk: float) -> float:
    """The distance that exact draws exceed with probability `risk`: that of Kolmogorov's distribution."""
    return math.sqrt(-math.log(risk / 2) / (2 * count))


def spread_error(scores: Tensor) -> float:
    """How far the mean square of normal scores is from 1, in standard errors."""
    return float((scores.square().mean() - 1) / math.sqrt(2 / len(scores)))


def grid(path: NoisePath, steps: int) -> list[float]:
    """Karras levels from the path's highest; on a flow path those of a vp path, from pure noise."""
    if path.kind != "flow":
        return karras_sigmas(path, steps)
    return [1.0, *(r / (1 + r) for r in karras_sigmas(DiscretePath(), steps - 1))]


def last(steps) -> Tensor:
    return list(steps)[-1].x
