"""Guides that take another one and change what it gives."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from darkroom.diffusion.denoiser import Estimator
from darkroom.diffusion.guidance.classifier_free import zero_output
from darkroom.diffusion.guidance.contract import Denoised, Guide, Predict, Space, Worse
from darkroom.diffusion.guidance.progress import progress, step_number


@dataclass(frozen=True, kw_only=True)
class AwayFrom:
    """Another guide's estimate + weight * (cond - a worse estimate with the same condition).

    Skip-layer guidance, perturbed-attention guidance (Ahn et al. 2024) and autoguidance (Karras et al. 2024)
    differ only in what makes the estimate worse. `window` is the fraction of the way that it acts in, both
    ends excluded. Costs one call of the network with one row for each picture, inside the window.
    """

    space: ClassVar[Space] = "any"
    guide: Guide
    worse: Worse
    weight: float
    levels: Sequence[float]
    window: tuple[float, float] | None = None

    def __call__(self, x: Tensor, sigma: float, predict: Predict) -> Denoised:
        """The estimate to follow at x (B, C, h, w) and level `sigma`."""
        denoised = self.guide(x, sigma, predict)
        if self.window is not None:
            start, stop = self.window
            if not start < progress(self.levels, sigma) < stop:
                return denoised
        (cond,), (worse,) = predict("cond"), predict("cond", worse=self.worse)
        return replace(denoised, value=torch.add(denoised.value, cond - worse, alpha=self.weight))

    def fresh(self) -> "AwayFrom":
        """The same before its run."""
        return replace(self, guide=self.guide.fresh())


@dataclass(frozen=True, kw_only=True)
class Rescaled:
    """Another guide's estimate, its output brought towards the deviation of the conditional one (φ: `share`).

    In the network's output: each picture's is multiplied by 1 - φ + φ * std(cond) / std(guided), over
    channels and places (Lin et al. 2024, equations 15 and 16).
    """

    space: ClassVar[Space] = "output"
    guide: Guide
    denoiser: Estimator
    share: float

    def __call__(self, x: Tensor, sigma: float, predict: Predict) -> Denoised:
        """The estimate to follow at x (B, C, h, w) and level `sigma`."""
        denoised = self.guide(x, sigma, predict)
        (cond,) = predict("cond")
        if denoised.value is cond:
            return denoised
        # c_out cancels, so that clean latents less c_skip * x do for the outputs.
        zero = zero_output(self.denoiser, x, sigma)
        output = denoised.value - zero
        ratio = (cond - zero).std(dim=(1, 2, 3), keepdim=True) / output.std(dim=(1, 2, 3), keepdim=True)
        return replace(denoised, value=torch.addcmul(zero, output, 1 + self.share * (ratio - 1)))

    def fresh(self) -> "Rescaled":
        """The same before its run."""
        return replace(self, guide=self.guide.fresh())


@dataclass(frozen=True, kw_only=True)
class ZeroInit:
    """Another guide's estimate, but an output of zero in the first `steps`, which need no call (CFG-Zero*).

    Early velocities of flow models are worse than none at high scales (Fan et al. 2025, section 4.2).
    """

    space: ClassVar[Space] = "output"
    guide: Guide
    denoiser: Estimator
    steps: int
    levels: Sequence[float]

    def __call__(self, x: Tensor, sigma: float, predict: Predict) -> Denoised:
        """The estimate to follow at x (B, C, h, w) and level `sigma`."""
        if step_number(self.levels, sigma) >= self.steps:
            return self.guide(x, sigma, predict)
        zero = zero_output(self.denoiser, x, sigma)
        return Denoised(zero, zero)

    def fresh(self) -> "ZeroInit":
        """The same before its run."""
        return replace(self, guide=self.guide.fresh())
