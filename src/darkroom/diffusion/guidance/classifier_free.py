"""Classifier-free guidance, and two better ways of taking the difference that it follows."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from darkroom.diffusion.denoiser import Estimator, skip_factor
from darkroom.diffusion.guidance.contract import Denoised, Predict, Space

TINY = 1e-30  # in place of a zero to divide by


class Combine(Protocol):
    """How the two estimates become the guided one; it names its space, and may keep a run's state."""

    space: ClassVar[Space]

    def __call__(self, x: Tensor, sigma: float, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """The guided estimate of the clean latents."""
        ...

    def fresh(self) -> "Combine":
        """The same before its run."""
        ...


@dataclass(frozen=True)
class Straight:
    """uncond + scale * (cond - uncond) (Ho and Salimans 2022)."""

    space: ClassVar[Space] = "any"

    def __call__(self, x: Tensor, sigma: float, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """The guided estimate of the clean latents."""
        return torch.lerp(uncond, cond, scale)

    def fresh(self) -> "Straight":
        """Itself: it keeps nothing."""
        return self


@dataclass(kw_only=True)
class AdaptiveProjection:
    """The difference of the clean latents, averaged, bounded, and its part along cond made less (APG).

    With Δ = cond - uncond: Δ += `momentum` * the Δ before (negative: what came before is taken back); Δ is
    shortened to the norm `norm_threshold`, if there is one, over each picture's latents; of its part along
    cond, which oversaturates, the share `eta` is kept. Result: cond + (scale - 1) * Δ (Sadat et al. 2024,
    algorithm 1).
    """

    space: ClassVar[Space] = "denoised"
    eta: float
    norm_threshold: float | None
    momentum: float
    _average: Tensor | None = field(default=None, init=False, repr=False)

    def __call__(self, x: Tensor, sigma: float, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """The guided estimate of the clean latents."""
        change = cond - uncond
        if self.momentum:
            if self._average is not None:
                change = torch.add(change, self._average, alpha=self.momentum)
            self._average = change
        if self.norm_threshold is not None:
            norm = _dot(change, change).sqrt()
            change = change * (self.norm_threshold / norm.clamp(min=TINY)).clamp(max=1)
        if self.eta != 1:
            along = _dot(change, cond) / _dot(cond, cond).clamp(min=TINY)
            change = change - (1 - self.eta) * along * cond
        return torch.add(cond, change, alpha=scale - 1)

    def fresh(self) -> "AdaptiveProjection":
        """The same without an average."""
        return replace(self)


@dataclass(frozen=True)
class ZeroStar:
    """The difference from the multiple of the unconditional output that is nearest (CFG-Zero*).

    In the network's output: s * uncond + scale * (cond - s * uncond), with s = <cond, uncond> / |uncond|² for
    each picture (Fan et al. 2025, equation 11).
    """

    space: ClassVar[Space] = "output"
    denoiser: Estimator

    def __call__(self, x: Tensor, sigma: float, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """The guided estimate of the clean latents."""
        # c_out is a common factor of all outputs here, so that clean latents less c_skip * x do as well.
        zero = zero_output(self.denoiser, x, sigma)
        cond, uncond = cond - zero, uncond - zero
        best = _dot(cond, uncond) / _dot(uncond, uncond).clamp(min=TINY)
        return torch.lerp(best * uncond, cond, scale) + zero

    def fresh(self) -> "ZeroStar":
        """Itself: it keeps nothing."""
        return self


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """Away from the unconditional estimate, in the space of `combine`: uncond + scale * (cond - uncond).

    A scale of 1 is the conditional estimate alone, at half the cost; `scale` may be a function of sigma.
    `channels` are how many of the latents' are guided, from the first; the others follow the conditional
    estimate. `always_both` computes the unconditional one at scale 1 too, for samplers that step by it.
    """

    scale: float | Callable[[float], float]
    channels: int | None = None
    combine: Combine = field(default_factory=Straight)
    always_both: bool = False

    @property
    def space(self) -> Space:
        """The space that it acts in."""
        return self.combine.space

    def __call__(self, x: Tensor, sigma: float, predict: Predict) -> Denoised:
        """The estimate to follow at x (B, C, h, w) and level `sigma`."""
        scale = self.scale(sigma) if callable(self.scale) else self.scale
        if scale == 1:
            return Denoised(*predict("cond", "uncond") if self.always_both else predict("cond"))
        cond, uncond = predict("cond", "uncond")
        guided = self.combine(x, sigma, cond, uncond, scale)
        if self.channels is not None:
            guided = torch.cat([guided[:, : self.channels], cond[:, self.channels :]], dim=1)
        return Denoised(guided, uncond)

    def fresh(self) -> "ClassifierFreeGuidance":
        """The same before its run."""
        combine = self.combine.fresh()
        return self if combine is self.combine else replace(self, combine=combine)


def zero_output(denoiser: Estimator, x: Tensor, sigma: float) -> Tensor:
    """The clean latents that an output of zero means: c_skip * x."""
    return x * skip_factor(denoiser, sigma)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The product of each picture's latents, (B, 1, 1, 1)."""
    return (a * b).sum(dim=(1, 2, 3), keepdim=True)
