"""How one autoencoder's latents follow from another's: the same, scaled, or an affine map of channels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from darkroom.errors import InputError

Kind = Literal["identity", "scale", "affine"]
KINDS: tuple[Kind, ...] = ("identity", "scale", "affine")  # each has the ones before it as special cases
SMALLEST = 1e-12  # variances below are taken for a channel that never changes


@dataclass(frozen=True)
class Affine:
    """A map of latents, cell by cell: `matrix` (C, C) and `bias` (C,), float64 on the host."""

    matrix: Tensor
    bias: Tensor

    def __call__(self, latents: Tensor) -> Tensor:
        """Latents (..., C, h, w) through the map, of their own dtype, on their own device."""
        mapped = torch.einsum("ij,...jhw->...ihw", self.matrix, latents.detach().cpu().double())
        return (mapped + self.bias[:, None, None]).to(latents)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How well a map predicts latents: R² over all channels, and of the worst one.

    R² is 1 less the squared error over the latents' variance about their channels' means, so it is below 0
    for a map that does worse than these means.
    """

    r2: float
    worst_channel: float

    @property
    def relative_error(self) -> float:
        """The error as a part of the latents' spread: √(1 − R²)."""
        return (1.0 - self.r2) ** 0.5


def fit(kind: Kind, source: Sequence[Tensor], target: Sequence[Tensor]) -> Affine:
    """The map of a kind from latents (C, h, w) of pictures to those of another autoencoder.

    "scale" gives each channel the target's mean and standard deviation, so that the map the other way is its
    inverse; "affine" is the least squares of all channels together. Raises InputError where there are too few
    cells for that.
    """
    return _fit(kind, _cells(source), _cells(target))


def cross_fitted(kind: Kind, source: Sequence[Tensor], target: Sequence[Tensor]) -> list[Tensor]:
    """The target's latents as predicted from the source's, each cell by a fit that has not seen its picture.

    Pictures of even and of odd number are predicted by each other's fit; the two halves of a picture that is
    alone likewise. Errors as in `fit`.
    """
    if len(source) == 1:
        halves = [torch.tensor_split(latents, 2, dim=-1) for latents in (source[0], target[0])]
        return [torch.cat(_crossed(kind, *halves), dim=-1)]
    return _crossed(kind, source, target)


def agreement(predicted: Sequence[Tensor], target: Sequence[Tensor]) -> Agreement:
    """How well predicted latents (C, h, w) agree with the target's, over all cells of all pictures."""
    values = _cells(target)
    error = (_cells(predicted) - values).square().mean(0)
    spread = values.var(0, correction=0)
    worst = 1.0 - (error / spread.clamp_min(SMALLEST)).max()
    return Agreement(
        r2=float(1.0 - error.sum() / spread.sum().clamp_min(SMALLEST)), worst_channel=float(worst)
    )


def _crossed(kind: Kind, source: Sequence[Tensor], target: Sequence[Tensor]) -> list[Tensor]:
    maps = [fit(kind, source[other::2], target[other::2]) for other in (1, 0)]
    return [maps[number % 2](latents) for number, latents in enumerate(source)]


def _fit(kind: Kind, source: Tensor, target: Tensor) -> Affine:
    """The same from cells (N, C)."""
    channels = source.shape[1]
    if kind == "identity":
        return Affine(torch.eye(channels).double(), torch.zeros(channels).double())
    if len(source) <= channels + 1:
        raise InputError(
            f"{len(source)} latent cells are too few to fit {channels} channels: give more or larger pictures"
        )
    means = source.mean(0), target.mean(0)
    x, y = source - means[0], target - means[1]
    if kind == "scale":
        variances = x.square().mean(0), y.square().mean(0)
        ratio = (variances[1] / variances[0]).sqrt()
        matrix = torch.where(torch.minimum(*variances) > SMALLEST, ratio, 1.0).diag()
    else:
        matrix = torch.linalg.lstsq(x, y, driver="gelsd").solution.T
    return Affine(matrix, means[1] - matrix @ means[0])


def _cells(latents: Sequence[Tensor]) -> Tensor:
    """All cells of the latents of pictures as (N, C) float64 on the host."""
    return torch.cat([each.detach().cpu().double().flatten(1).T for each in latents])
