"""The form of what is said of a sampler; `cards` has the samplers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from darkroom.diffusion.option import PATHS, Option, checked_options


@dataclass(frozen=True, kw_only=True)
class SamplerCard:
    """A sampler in facts.

    `order` is the power of the step with which its error falls (of a stochastic one, that of its averages),
    on levels evenly spaced in `variable`; an adaptive one chooses its steps, and a few-step one has none,
    because it takes each estimate for a finished picture. `calls` are the network's per
    step. `stochastic` says whether it draws noise unless told otherwise. `paths` are the kinds of noising
    path that it runs on, `schedules` the only ones that it takes, None for all. `guided` ones need guidance.
    `to_first_level` ones end at the path's final level where that has noise, the others at 0.
    """

    order: int | Literal["adaptive", "few-step"]
    variable: Literal["sigma", "log_sigma", "log_snr", "timestep"]
    calls: int | Literal["adaptive"]
    stochastic: bool
    good_for: str
    paper: str
    options: Mapping[str, Option] = field(default_factory=dict)
    paths: tuple[str, ...] = PATHS
    schedules: tuple[str, ...] | None = None
    guided: bool = False
    to_first_level: bool = False

    def check(self, **options: object) -> None:
        """Raise InputError for an option that the sampler does not have, or that may not have its value."""
        checked_options("sampler", self.options, options)
