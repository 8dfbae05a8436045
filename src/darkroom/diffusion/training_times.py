"""Which noise levels a training step draws."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from darkroom.diffusion.path import CosinePath, DiscretePath, EDMPath, FlowPath, NoisePath
from darkroom.errors import InputError, unknown

TIMES = ("uniform", "logit_normal", "lognormal")


@dataclass(frozen=True, kw_only=True)
class TimesConfig:
    """How noise levels are spread in training.

    `uniform`: evenly over the network's timesteps. `logit_normal`: u = sigmoid(mean + std * normal) of the
    way from clean to noise (Esser et al. 2024, section 3.1). `lognormal`: ln(sigma) is normal (Karras et al.
    2022: mean -1.2, std 1.2), for EDM paths, where logit_normal is not defined.
    """

    kind: Literal["uniform", "logit_normal", "lognormal"] = "uniform"
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in TIMES:
            raise unknown("spread of times", self.kind, TIMES)
        if self.std <= 0:
            raise InputError(f"field 'std': must be above 0, not {self.std}")


def sample_sigmas(times: TimesConfig, path: NoisePath, batch: int, generator: torch.Generator) -> Tensor:
    """Draw noise levels (batch,), float32 on the generator's device; a discrete path draws whole timesteps.

    Raises InputError for a spread that is not defined on the path.
    """
    device = generator.device
    if isinstance(path, EDMPath) != (times.kind == "lognormal") and times.kind != "uniform":
        right = "lognormal" if isinstance(path, EDMPath) else "logit_normal"
        raise InputError(
            f"times {times.kind!r} are not defined on a {path.kind!r} path: use {right!r} or 'uniform'"
        )
    if times.kind == "uniform":
        return _at(path, torch.rand(batch, generator=generator, device=device))
    spread = times.mean + times.std * torch.randn(batch, generator=generator, device=device)
    return spread.exp() if times.kind == "lognormal" else _at(path, spread.sigmoid())


def _at(path: NoisePath, u: Tensor) -> Tensor:
    """The noise level at the fraction u in [0, 1) of the path, from clean to noise."""
    if isinstance(path, DiscretePath):
        timestep = (u * path.num_timesteps).floor().clamp(max=path.num_timesteps - 1)
        return path.sigma_from_timestep(timestep)
    if isinstance(path, CosinePath):
        return path.sigma_from_timestep(u * path.num_timesteps)
    if isinstance(path, FlowPath):
        return path.shifted(u * path.sigma_max)
    low, high = path.timestep_from_sigma(path.sigma_min), path.timestep_from_sigma(path.sigma_max)
    return path.sigma_from_timestep(low + u * (high - low))
