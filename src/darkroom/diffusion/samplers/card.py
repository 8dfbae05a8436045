"""The form of what is said of a sampler, and how its options are checked; `cards` has the samplers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from darkroom.errors import InputError, unknown

PATHS = ("discrete", "cosine", "edm", "flow")


@dataclass(frozen=True, kw_only=True)
class SamplerOption:
    """An option of a sampler: its default, whose type is the option's, and what else it may be.

    Numbers lie in `low ... high`, words are among `choices`.
    """

    default: float | bool | str
    meaning: str
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        """The values that it may have, in words."""
        if isinstance(self.default, str):
            return " or ".join(self.choices)
        if isinstance(self.default, bool):
            return "true or false"
        kind = "a whole number" if isinstance(self.default, int) else "a number"
        if math.isfinite(self.high):
            return f"{kind} in {self.low:g} ... {self.high:g}"
        return f"{kind} of at least {self.low:g}" if math.isfinite(self.low) else kind

    def check(self, name: str, value: object) -> None:
        """Raise InputError unless the option, called `name`, may have this value."""
        if isinstance(self.default, str):
            if value not in self.choices:
                raise unknown(name, str(value), self.choices)
        elif not self._fits(value):
            raise InputError(f"{name} must be {self.allowed}, not {value!r}")

    def _fits(self, value: object) -> bool:
        if isinstance(self.default, bool) or isinstance(value, bool):
            return isinstance(self.default, bool) and isinstance(value, bool)
        if not isinstance(value, int if isinstance(self.default, int) else int | float):
            return False
        return value == self.default or (math.isfinite(value) and self.low <= value <= self.high)


@dataclass(frozen=True, kw_only=True)
class SamplerCard:
    """A sampler in facts.

    `order` is the power of the step with which its error falls (of a stochastic one, that of its averages),
    on levels evenly spaced in `variable`; an adaptive one chooses its steps, and a few-step one has none,
    because it takes each estimate for a finished picture. `calls` are the network's per
    step. `stochastic` says whether it draws noise unless told otherwise. `paths` are the kinds of noising
    path that it runs on, `schedules` the only ones that it takes, None for all. `guided` ones need guidance.
    """

    order: int | Literal["adaptive", "few-step"]
    variable: Literal["sigma", "log_sigma", "log_snr", "timestep"]
    calls: int | Literal["adaptive"]
    stochastic: bool
    good_for: str
    paper: str
    options: Mapping[str, SamplerOption] = field(default_factory=dict)
    paths: tuple[str, ...] = PATHS
    schedules: tuple[str, ...] | None = None
    guided: bool = False

    def check(self, **options: object) -> None:
        """Raise InputError for an option that the sampler does not have, or that may not have its value."""
        for name, value in options.items():
            if name not in self.options:
                if not self.options:
                    raise InputError(f"this sampler has no options, so {name!r} cannot be set")
                raise unknown("sampler option", name, self.options)
            self.options[name].check(name, value)
