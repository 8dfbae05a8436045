"""A Gaussian, whose perfect denoiser and exact probability flow are known, and what samplers run on."""

import torch
from torch import Tensor

from darkroom.diffusion.guidance import Denoised
from darkroom.diffusion.path import CosinePath, DiscretePath, EDMPath, FlowPath
from darkroom.diffusion.schedules import flow_sigmas, karras_sigmas

MEAN, STD = 0.7, 0.4  # of the latents
VP, FLOW = DiscretePath(), FlowPath()
PATHS = [VP, CosinePath(), EDMPath(), FLOW, FlowPath(shift=3.0, sigma_max=0.999)]


class Gaussian:
    """The perfect denoiser of latents N(MEAN, STD²), with and without a prompt alike."""

    def __init__(self, path) -> None:
        self.path = path

    def __call__(self, x: Tensor, sigma: float) -> Denoised:
        alpha = self.path.alpha(sigma)
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        estimate = MEAN + gain * (x - alpha * MEAN)
        return Denoised(estimate, estimate)


class Fresh:
    """Independent noise for each step."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape, self.generator = shape, torch.Generator().manual_seed(3)

    def between(self, sigma: float, sigma_next: float) -> Tensor:
        return torch.randn(self.shape, generator=self.generator, dtype=torch.float64)


def grid(path, steps: int) -> list[float]:
    return flow_sigmas(path, steps) if path.kind == "flow" else karras_sigmas(path, steps)


def start(path, sigma: float, count: int = 64) -> Tensor:
    """Draws of x at the first level, spread as the latents' noisy marginal is."""
    z = torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alpha = path.alpha(sigma)
    return alpha * MEAN + z * (alpha**2 * STD**2 + sigma**2) ** 0.5


def exact(path, x: Tensor, sigma: float, to: float) -> Tensor:
    """Where the probability flow takes x from level sigma to `to`: the same quantile of the marginal."""
    alpha, alpha_to = path.alpha(sigma), path.alpha(to)
    quantile = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2) ** 0.5
    return alpha_to * MEAN + quantile * (alpha_to**2 * STD**2 + to**2) ** 0.5


def last(steps) -> Tensor:
    return list(steps)[-1].x
