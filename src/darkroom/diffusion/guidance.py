"""Guidance: how the estimates with and without the prompt become the one that a sampler follows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from darkroom.diffusion.denoiser import Condition, Denoiser
from darkroom.errors import InputError

Which = Literal["cond", "uncond"]
# predict("cond", "uncond") gives one estimate (B, C, h, w) per name, all from a single call of the network.
Predict = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Denoised:
    """An estimate of the clean latents to follow, and the unconditional one if it was computed."""

    value: Tensor
    uncond: Tensor | None = None


class Guide(Protocol):
    """What combines predictions; made anew for each run, so it may keep that run's state."""

    def __call__(self, x: Tensor, sigma: float, predict: Predict) -> Denoised:
        """The estimate to follow at x (B, C, h, w) and level `sigma`."""
        ...


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """uncond + scale * (cond - uncond), in the space of clean latents (Ho and Salimans 2022).

    A scale of 1 is the conditional estimate alone, at half the cost. `channels` are how many of the latents'
    are guided, from the first; the others follow the conditional estimate.
    """

    scale: float
    channels: int | None = None

    def __call__(self, x: Tensor, sigma: float, predict: Predict) -> Denoised:
        """The estimate to follow at x (B, C, h, w) and level `sigma`."""
        if self.scale == 1:
            return Denoised(*predict("cond"))
        cond, uncond = predict("cond", "uncond")
        guided = torch.lerp(uncond, cond, self.scale)
        if self.channels is not None:
            guided = torch.cat([guided[:, : self.channels], cond[:, self.channels :]], dim=1)
        return Denoised(guided, uncond)


class GuidedDenoiser:
    """A denoiser with its conditions and guide bound: the `denoise(x, sigma)` that samplers take.

    Raises InputError when the guide asks for the unconditional estimate and `uncond` is None.
    """

    def __init__(self, denoiser: Denoiser, cond: Condition, uncond: Condition | None, guide: Guide) -> None:
        self.path = denoiser.path
        self._denoiser, self._guide = denoiser, guide
        self._conditions: dict[Which, Condition | None] = {"cond": cond, "uncond": uncond}
        self._joined: dict[tuple[Which, ...], Condition] = {}

    def __call__(self, x: Tensor, sigma: float) -> Denoised:
        """The guided estimate of the clean latents for x (B, C, h, w), all at level `sigma`."""

        def predict(*which: Which) -> tuple[Tensor, ...]:
            if len({self._text_length(name) for name in which}) > 1:
                return tuple(predict(name)[0] for name in which)  # texts of two lengths share no call
            count = len(which)
            batch = x if count == 1 else torch.cat([x] * count)
            levels = torch.full((batch.shape[0],), sigma, dtype=torch.float32, device=x.device)
            return self._denoiser(batch, levels, self._condition(which)).chunk(count)

        return self._guide(x, sigma, predict)

    def _text_length(self, name: Which) -> int | None:
        cond = self._conditions[name]
        return None if cond is None or cond.context is None else cond.context.shape[1]

    def _condition(self, which: tuple[Which, ...]) -> Condition:
        if which not in self._joined:
            parts = [self._conditions[name] for name in which]
            present = [part for part in parts if part is not None]
            if len(present) < len(parts):
                raise InputError(
                    "this guidance needs an unconditional (or negative) condition: none was given"
                )
            self._joined[which] = Condition.cat(present)
        return self._joined[which]
