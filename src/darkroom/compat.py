"""What other programs do differently with the same weights, so that their pictures can be drawn here.

Each row of `COMPAT` is one program; what a field is None or "ours" in is done as everywhere here.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from darkroom.diffusion.brownian import BrownianNoise
from darkroom.diffusion.path import EDMPath, FlowPath, NoisePath
from darkroom.errors import unknown
from darkroom.rng import image_noise
from darkroom.text.conditioning import Conditioning, FluxConditioning, SD3Conditioning, XLConditioning


@dataclass(frozen=True, kw_only=True)
class Compat:
    """How a program draws.

    `noise`: "named" streams of each picture's seed, ours; "batch", one draw of torch's CPU generator for all
    pictures of a call; "each", one such generator for each picture, of seed + k. `posterior`: whether
    encoding takes the mean or a sample. `zero_blank`: whether SDXL without a negative prompt is told zeros or
    the states of an empty text (None: what the model's files say). `start`: how the first noise is scaled.
    `sd3_t5` and `flux_t5`: tokens of T5 that are read, and whether longer prompts make it more.
    `guided_channels`: how many channels of a DiT's latents guidance moves. `by_run`: whether our pictures
    were held against that program's own; else what it does was read in its source.
    """

    noise: Literal["named", "batch", "each"] = "named"
    posterior: Literal["mean", "sample"] = "mean"
    zero_blank: bool | None = None
    start: Literal["ours", "diffusers", "unit", "sigma"] = "ours"
    sd3_t5: tuple[int, bool] | None = None
    flux_t5: tuple[int, bool] | None = None
    guided_channels: int | None = None
    by_run: bool = False

    def conditioning(self, ours: Conditioning) -> Conditioning:
        """A model's conditioning as this program does it."""
        if isinstance(ours, XLConditioning) and self.zero_blank is not None:
            return replace(ours, zero_blank=self.zero_blank and not ours.aesthetic)
        if isinstance(ours, SD3Conditioning) and self.sd3_t5 is not None:
            return replace(ours, t5_length=self.sd3_t5[0], t5_grows=self.sd3_t5[1])
        if isinstance(ours, FluxConditioning) and self.flux_t5 is not None:
            return replace(ours, t5_length=self.flux_t5[0], t5_grows=self.flux_t5[1])
        return ours

    def start_scale(self, path: NoisePath, sigma: float, schedule: str, sampler: str) -> float:
        """The factor of unit noise to start at `sigma`."""
        unit = math.sqrt(1 + sigma**2)
        if self.start == "ours" or isinstance(path, FlowPath):
            return path.start_scale(sigma)
        if self.start == "diffusers":
            euler = sampler.startswith("euler") and schedule in ("linspace", "trailing")
            return sigma if euler and not isinstance(path, EDMPath) else unit
        return sigma if self.start == "sigma" else unit


COMPAT = {
    "darkroom": Compat(by_run=True),
    "diffusers": Compat(
        noise="batch",
        posterior="sample",
        start="diffusers",
        sd3_t5=(256, False),
        flux_t5=(512, False),
        by_run=True,
    ),
    "reference": Compat(noise="batch", sd3_t5=(77, True), guided_channels=3),
    "comfy": Compat(
        noise="batch",
        zero_blank=False,
        start="unit",
        sd3_t5=(77, True),
        flux_t5=(256, True),
        posterior="sample",
    ),
    "a1111": Compat(noise="each", zero_blank=False, start="sigma", sd3_t5=(77, True), posterior="sample"),
}


def compat(name: str) -> Compat:
    """A program's row; raises InputError, with the nearest name, for one that is not known."""
    if name not in COMPAT:
        raise unknown("compat", name, COMPAT)
    return COMPAT[name]


class NoiseSource(Protocol):
    """Where a batch takes all its random numbers from, unit variance, on the host."""

    def start(self, shape: Sequence[int]) -> Tensor:
        """What pictures start from, (B, *shape)."""
        ...

    def like(self, tensor: Tensor, name: str) -> Tensor:
        """Noise of a tensor's shape for the use that `name` says, on its device."""
        ...

    def between(self, sigma: float, sigma_next: float) -> Tensor:
        """Noise of the latents' shape for the step between two levels."""
        ...


class NamedNoise:
    """Named streams of each picture's own seed: the same for any batch and grid of steps."""

    def __init__(self, seeds: Sequence[int], shape: Sequence[int]) -> None:
        self.seeds = seeds
        self.between = BrownianNoise(seeds, shape).between

    def start(self, shape: Sequence[int]) -> Tensor:
        """What pictures start from, (B, *shape)."""
        return image_noise(self.seeds, shape, "start")

    def like(self, tensor: Tensor, name: str) -> Tensor:
        """Noise of a tensor's shape, by name; one picture for all takes the first seed."""
        return image_noise(self.seeds[: len(tensor)], tensor.shape[1:], name).to(tensor.device, tensor.dtype)


class TorchNoise:
    """Draws of torch's CPU generators in the order in which they are asked for.

    One generator for the whole batch, or one for each seed.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], *, each: bool) -> None:
        self.shape, self.count = tuple(shape), len(seeds)
        self.generators = [torch.Generator().manual_seed(seed) for seed in (seeds if each else seeds[:1])]

    def start(self, shape: Sequence[int]) -> Tensor:
        """What pictures start from, (B, *shape)."""
        return self._draw(self.count, shape)

    def like(self, tensor: Tensor, name: str) -> Tensor:
        """Noise of a tensor's shape; the name does not matter here."""
        return self._draw(len(tensor), tensor.shape[1:]).to(tensor.device, tensor.dtype)

    def between(self, sigma: float, sigma_next: float) -> Tensor:
        """Noise of the latents' shape; the levels do not matter here."""
        return self._draw(self.count, self.shape)

    def _draw(self, count: int, shape: Sequence[int]) -> Tensor:
        if len(self.generators) == 1:
            return torch.randn(count, *shape, generator=self.generators[0])
        return torch.cat([torch.randn(1, *shape, generator=g) for g in self.generators[:count]])


def noise_source(kind: str) -> Callable[[Sequence[int], Sequence[int]], NoiseSource]:
    """What makes the noise of a batch from its seeds and the latents' shape."""
    if kind == "named":
        return NamedNoise
    return lambda seeds, shape: TorchNoise(seeds, shape, each=kind == "each")
