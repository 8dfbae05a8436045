"""What other programs do differently with the same weights, so that their pictures can be drawn here.

Each row of `COMPAT` is one program; the fields' defaults are how it is done here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from darkroom.diffusion.brownian import BrownianNoise
from darkroom.diffusion.path import EDMPath, FlowPath, NoisePath
from darkroom.errors import unknown
from darkroom.rng import image_noise
from darkroom.text.clip_skip import Counting
from darkroom.text.conditioning import (
    ClassConditioning,
    Conditioning,
    FluxConditioning,
    NoConditioning,
    SD3Conditioning,
    XLConditioning,
)
from darkroom.text.emphasis import Emphasis

Noise = Literal["named", "batch", "each"]


@dataclass(frozen=True, kw_only=True)
class Compat:
    """How a program draws; `docs/compat.md` has the differences side by side. `name` is the program's.

    `noise`: "named", streams of each picture's seed, ours; "batch", one draw of torch's CPU generator for all
    pictures of a call; "each", one such generator for each picture, of seed + k.
    `posterior`: whether encoding takes the mean or a sample; "released", a sample but for FLUX. A1111 samples
    by torch's global state, which nothing here could repeat: the mean is what comes nearest.
    `zero_blank`: whether SDXL without a negative prompt is told zeros or the states of an empty text (None:
    what the model's files say, which is zeros but for the refiner).
    `start`: how the first noise is scaled; see `start_scale`.
    `sd3_t5` and `flux_t5`: tokens of T5 that are read, and whether longer prompts make it more (None: what
    the model's files say).
    `emphasis`: whose grammar of (more), [less] and (much more:1.5) prompts are read by, which also says where
    the chunks of long prompts end, and whether prompts change with the steps ("none": the model's, which is
    none, and long prompts are cut).
    `clip_skip`: how clip skip is counted, or that only SD 1 has it.
    `guided_channels`: how many channels of a DiT's latents guidance moves (None: all).
    `pastes`: whether what lies outside the mask of an inpainting is put back as it was.
    `by_run`: whether our pictures were held against that program's own; else what it does was read in its
    source.
    """

    name: str = "darkroom"
    noise: Noise = "named"
    posterior: Literal["mean", "sample", "released"] = "mean"
    zero_blank: bool | None = None
    start: Literal["ours", "diffusers", "comfy", "a1111"] = "ours"
    sd3_t5: tuple[int, bool] | None = None
    flux_t5: tuple[int, bool] | None = None
    emphasis: Emphasis = "darkroom"
    clip_skip: Counting = "last"
    guided_channels: int | None = None
    pastes: bool = True
    by_run: bool = False

    def conditioning(self, ours: Conditioning) -> Conditioning:
        """A model's conditioning as this program does it."""
        if isinstance(ours, ClassConditioning | NoConditioning):
            return ours
        if self.emphasis != "none":
            ours = replace(ours, emphasis=self.emphasis)
        if isinstance(ours, XLConditioning) and self.zero_blank is not None:
            return replace(ours, zero_blank=self.zero_blank)
        if isinstance(ours, SD3Conditioning) and self.sd3_t5 is not None:
            return replace(ours, t5_length=self.sd3_t5[0], t5_grows=self.sd3_t5[1])
        if isinstance(ours, FluxConditioning) and self.flux_t5 is not None:
            return replace(ours, t5_length=self.flux_t5[0], t5_grows=self.flux_t5[1])
        return ours

    def samples_posterior(self, conditioning: Conditioning) -> bool:
        """Whether a picture is encoded as a sample of the autoencoder's posterior, for a kind of model."""
        if self.posterior == "released":
            return not isinstance(conditioning, FluxConditioning)
        return self.posterior == "sample"

    def start_scale(self, path: NoisePath, sigma: float, schedule: str, sampler: str) -> float:
        """The factor of unit noise to start at `sigma`.

        It is the path's own here and for flow. Else the noise has the level's variance, or that of
        clean latents too: sigma or sqrt(1 + sigma²). Diffusers' Euler takes sigma where the spacing of steps
        is "linspace" or "trailing"; ComfyUI takes it below the highest level, A1111 but for DDIM.
        """
        if self.start == "ours" or isinstance(path, FlowPath):
            return path.start_scale(sigma)
        if self.start == "diffusers":
            euler = sampler.startswith("euler") and schedule in ("linspace", "trailing")
            bare = euler and not isinstance(path, EDMPath)
        elif self.start == "comfy":
            bare = sigma < path.sigma_max and not math.isclose(sigma, path.sigma_max, rel_tol=1e-5)
        else:
            bare = sampler != "ddim"
        return sigma if bare else math.sqrt(1 + sigma**2)


COMPAT = {
    "darkroom": Compat(by_run=True),
    "diffusers": Compat(
        name="diffusers",
        noise="batch",
        posterior="sample",
        start="diffusers",
        sd3_t5=(256, False),
        flux_t5=(512, False),
        emphasis="none",
        clip_skip="usual",
        pastes=False,
        by_run=True,
    ),
    # The releases' own code: CompVis, Stability AI, Black Forest Labs, Meta's DiT.
    "reference": Compat(
        name="reference",
        noise="batch",
        posterior="released",
        sd3_t5=(77, True),
        emphasis="none",
        guided_channels=3,
    ),
    "comfy": Compat(
        name="comfy",
        noise="batch",
        zero_blank=False,
        start="comfy",
        sd3_t5=(77, True),
        flux_t5=(256, True),
        emphasis="comfy",
        pastes=False,
    ),
    # FLUX is drawn by Forge, which was made from A1111.
    "a1111": Compat(
        name="a1111",
        noise="each",
        zero_blank=True,
        start="a1111",
        sd3_t5=(77, False),
        flux_t5=(256, True),
        emphasis="a1111",
        clip_skip="sd1",
    ),
}


def compat(name: str) -> Compat:
    """A program's row; raises InputError, with the nearest name, for one that is not known."""
    if name not in COMPAT:
        raise unknown("compat", name, COMPAT)
    return COMPAT[name]


class NoiseSource(Protocol):
    """Where a batch takes all its random numbers from, unit variance, on the host."""

    def start(self) -> Tensor:
        """What pictures start from, of the latents' shape."""
        ...

    def like(self, tensor: Tensor, name: str) -> Tensor:
        """Noise of a tensor's shape for the use that `name` says, on its device."""
        ...

    def between(self, sigma: float, sigma_next: float) -> Tensor:
        """Noise of the latents' shape for the step between two levels."""
        ...

    def row(self, number: int) -> "NoiseSource":
        """That of one picture of the batch alone."""
        ...


class NamedNoise:
    """Named streams of each picture's own seed: the same for any batch and grid of steps."""

    def __init__(self, seeds: Sequence[int], shape: Sequence[int]) -> None:
        self.seeds, self.shape = seeds, shape
        self.between = BrownianNoise(seeds, shape).between

    def start(self) -> Tensor:
        """What pictures start from, of the latents' shape."""
        return image_noise(self.seeds, self.shape, "start")

    def like(self, tensor: Tensor, name: str) -> Tensor:
        """Noise of a tensor's shape, by name; one picture for all takes the first seed."""
        return image_noise(self.seeds[: len(tensor)], tensor.shape[1:], name).to(tensor.device, tensor.dtype)

    def row(self, number: int) -> "NamedNoise":
        """That of one picture of the batch alone, the same numbers."""
        return NamedNoise(self.seeds[number : number + 1], self.shape)


class TorchNoise:
    """Draws of torch's CPU generators in the order in which they are asked for.

    One generator for the whole batch, or one for each seed.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], *, each: bool) -> None:
        self.shape, self.count = tuple(shape), len(seeds)
        self.generators = [torch.Generator().manual_seed(seed) for seed in (seeds if each else seeds[:1])]

    def start(self) -> Tensor:
        """What pictures start from, of the latents' shape."""
        return self._draw(self.count, self.shape)

    def like(self, tensor: Tensor, name: str) -> Tensor:
        """Noise of a tensor's shape; the name does not matter here."""
        return self._draw(len(tensor), tensor.shape[1:]).to(tensor.device, tensor.dtype)

    def between(self, sigma: float, sigma_next: float) -> Tensor:
        """Noise of the latents' shape; the levels do not matter here."""
        return self._draw(self.count, self.shape)

    def row(self, number: int) -> "TorchNoise":
        """That of one picture of the batch alone, in turn from its own generator or from the one for all."""
        one = TorchNoise([0], self.shape, each=False)
        one.generators = [self.generators[number if len(self.generators) > 1 else 0]]
        return one

    def _draw(self, count: int, shape: Sequence[int]) -> Tensor:
        if len(self.generators) == 1:
            return torch.randn(count, *shape, generator=self.generators[0])
        return torch.cat([torch.randn(1, *shape, generator=g) for g in self.generators[:count]])


def noise_source(kind: Noise, seeds: Sequence[int], shape: Sequence[int]) -> NoiseSource:
    """Where a batch of these seeds takes its noise from; `shape` is that of one picture's latents."""
    return NamedNoise(seeds, shape) if kind == "named" else TorchNoise(seeds, shape, each=kind == "each")
