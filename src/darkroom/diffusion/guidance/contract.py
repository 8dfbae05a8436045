"""What guides are given, and what they give.

A guide is an object made for each run: `guide(x, sigma, predict)` is the estimate to follow. It may keep that
run's state, and guides compose: most take another one and change what it gives. Each names the space that it
acts in: "denoised", that of clean latents; "output", that of the network's answers; or "any", where the
result is the same in both, since weights add up to 1.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from darkroom.diffusion.denoiser import Estimator
from darkroom.nn.extra import Layer

Which = Literal["cond", "uncond"]
Space = Literal["denoised", "output", "any"]


@dataclass(frozen=True)
class Denoised:
    """An estimate of the clean latents to follow, and the unconditional one if it was computed."""

    value: Tensor
    uncond: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Worse:
    """How an estimate is made worse on purpose, to be led away from.

    The network leaves out the blocks `skip`, or in the layers `perturbed` shows each place of the picture
    itself only (see `Extra`), or another denoiser makes the estimate in its place: `by`.
    """

    skip: tuple[int, ...] = ()
    perturbed: tuple[Layer, ...] = ()
    by: Estimator | None = None


class Predict(Protocol):
    """What estimates the clean latents at the x and sigma of a guide's call; asked again, it remembers."""

    def __call__(self, *which: Which, worse: Worse | None = None) -> tuple[Tensor, ...]:
        """One estimate (B, C, h, w) for each name, those asked for at once from as few calls as can be."""
        ...


class Guide(Protocol):
    """What combines predictions; made anew for each run, so it may keep that run's state."""

    def __call__(self, x: Tensor, sigma: float, predict: Predict) -> Denoised:
        """The estimate to follow at x (B, C, h, w) and level `sigma`."""
        ...

    def fresh(self) -> "Guide":
        """The same guide as it was before its run: itself, if it keeps nothing."""
        ...
