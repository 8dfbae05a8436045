"""A network whose answers are told apart by what it is told, and that counts its calls."""

import torch
from torch import Tensor, nn

from darkroom.diffusion.denoiser import Condition, Denoiser
from darkroom.diffusion.path import FlowPath
from darkroom.nn.extra import Extra

SHAPE = (2, 3, 4, 4)
LEVELS = [1.0, 0.9, 0.75, 0.5, 0.2, 0.0]


class Counting(nn.Module):
    """Answers with the mean of its context and of its pooled vector, and less so where it is made worse."""

    layers = range(24)

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor
        self.batches: list[int] = []
        self.told: list[Extra | None] = []

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, *, extra: Extra | None = None) -> Tensor:
        self.batches.append(x.shape[0])
        self.told.append(extra)
        assert timestep.shape == (x.shape[0],) == context.shape[:1]
        assert timestep.dtype == torch.float32
        answer = context.mean((1, 2))
        if extra is not None and extra.pooled is not None:
            answer = answer + extra.pooled.mean(1)
        if extra is not None:
            answer = answer * (1 - 0.1 * len(extra.skip) - 0.3 * len(extra.perturbed))
        pattern = torch.linspace(0.5, 2, x[0].numel(), dtype=x.dtype).reshape(x.shape[1:])
        return self.factor * answer[:, None, None, None] * pattern


def pattern(network: nn.Module | None = None) -> Tensor:
    """What the network multiplies its answers by, (3, 4, 4)."""
    return torch.linspace(0.5, 2, 48).reshape(SHAPE[1:])


def told(*values: float, length: int = 7, pooled: float | None = None) -> Condition:
    """A condition of texts with these means, one for each picture."""
    context = torch.tensor(values)[:, None, None].expand(-1, length, 8)
    extra = None if pooled is None else Extra(pooled=torch.full((len(values), 4), pooled))
    return Condition(context, extra)


def x0_denoiser(network: nn.Module) -> Denoiser:
    """A denoiser whose network answers with clean latents."""
    return Denoiser(network, FlowPath(), "x0")


def noisy(seed: int = 0) -> Tensor:
    """Noisy latents."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
