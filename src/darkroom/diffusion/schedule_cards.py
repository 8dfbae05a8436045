"""What each schedule is, which options it takes and on which paths it is defined. No torch here."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real

from darkroom.errors import InputError, unknown

PathKind = str  # "discrete", "cosine", "edm" or "flow"

# The schedule to name where another one is not defined on a kind of path.
USUAL: dict[PathKind, str] = {"discrete": "trailing", "cosine": "trailing", "edm": "karras", "flow": "flow"}
PRESERVING = ("discrete", "cosine")
EVERY = (*PRESERVING, "edm", "flow")


@dataclass(frozen=True, kw_only=True)
class ScheduleOption:
    """A number that a schedule takes, from `low` to `high`; `default` None is what `about` says."""

    name: str
    about: str
    low: float
    high: float
    default: float | None = None
    whole: bool = False

    def checked(self, value: object) -> float:
        """The value as the number that the schedule takes; raises InputError, naming the option."""
        number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        if not number or (self.whole and value != int(value)):  # pyright: ignore[reportArgumentType]
            wanted = "a whole number" if self.whole else "a finite number"
            raise InputError(f"the schedule's {self.name} must be {wanted}, not {value!r}")
        if not self.low <= value <= self.high:  # pyright: ignore[reportOperatorIssue]
            raise InputError(
                f"the schedule's {self.name} must be in {self.low:g} ... {self.high:g}, not {value}"
            )
        return int(value) if self.whole else float(value)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, kw_only=True)
class ScheduleCard:
    """A schedule in words: what it spaces how, its options, the kinds of path it is defined on, and whose it
    is.
    """

    name: str
    about: str
    paths: tuple[PathKind, ...]
    source: str
    options: tuple[ScheduleOption, ...] = ()


def _option(name: str, about: str, low: float, high: float, default: float | None = None) -> ScheduleOption:
    return ScheduleOption(name=name, about=about, low=low, high=high, default=default)


ENDS = (
    _option("sigma_min", "the last level above the end (default: the path's lowest)", 1e-6, 1e6),
    _option("sigma_max", "the first level (default: the path's highest)", 1e-6, 1e6),
)
SHIFT = _option("shift", "the shift of a flow path, in place of the model's and the picture's own", 0.01, 100)
RHO = "how strongly levels gather at the low end"
SHAPES = (
    _option("alpha", "the beta distribution's first shape", 0.05, 20, 0.6),
    _option("beta", "the beta distribution's second shape", 0.05, 20, 0.6),
)
ORIGINAL_STEPS = ScheduleOption(
    name="original_steps",
    about="the steps of the teacher's grid, of which some are visited",
    low=1,
    high=1000,
    default=50,
    whole=True,
)
LINEAR_STEPS = ScheduleOption(
    name="linear_steps", about="how many steps are linear (default: half)", low=1, high=10_000, whole=True
)
AYS = "Sabour, Fidler and Kreis 2024, table 3"


def _card(
    name: str, about: str, source: str, paths: tuple[str, ...] = EVERY, *options: ScheduleOption
) -> ScheduleCard:
    shift = (SHIFT,) if "flow" in paths and name != "linear_quadratic" else ()
    return ScheduleCard(name=name, about=about, paths=paths, source=source, options=(*options, *shift))


_CARDS = (
    _card("leading", "even whole timesteps, from below the noisiest to 1", "Stable Diffusion", PRESERVING),
    _card("leading_0", "even whole timesteps, from below the noisiest to 0", "DDIM", PRESERVING),
    _card("trailing", "even whole timesteps, from the noisiest", "Lin et al. 2024, table 2", PRESERVING),
    _card(
        "linspace",
        "even whole timesteps from the noisiest to 0; on flow paths SD 3's levels",
        "Nichol and Dhariwal 2021; Esser et al. 2024",
        (*PRESERVING, "flow"),
    ),
    _card("flow", "even from pure noise to 0, then shifted", "Liu et al. 2023; Esser et al. 2024", ("flow",)),
    _card(
        "karras",
        "even in sigma^(1/rho)",
        "Karras et al. 2022, equation 5",
        EVERY,
        _option("rho", RHO, 0.1, 100, 7.0),
        *ENDS,
    ),
    _card("exponential", "even in log sigma", "k-diffusion", EVERY, *ENDS),
    _card(
        "polyexponential",
        "log sigma follows a power of the step",
        "k-diffusion",
        EVERY,
        _option("rho", RHO, 0.1, 100, 1.0),
        *ENDS,
    ),
    _card("kl_optimal", "even in the arc tangent of sigma", "Sabour et al. 2024, theorem 3.1", EVERY, *ENDS),
    _card(
        "beta",
        "quantiles of a beta distribution, in sigma, as diffusers and A1111 do",
        "Lee et al. 2024",
        EVERY,
        *SHAPES,
        *ENDS,
    ),
    _card(
        "beta_timesteps",
        "quantiles of a beta distribution, in whole timesteps, as ComfyUI does",
        "Lee et al. 2024",
        EVERY,
        *SHAPES,
    ),
    _card(
        "sgm_uniform",
        "even timesteps from the noisiest, without the cleanest",
        "generative-models",
    ),
    _card("simple", "whole timesteps at even distances from the noisiest", "ComfyUI"),
    _card("ddim_uniform", "whole timesteps at even distances from the second cleanest", "ComfyUI, A1111"),
    _card(
        "linear_quadratic",
        "straight down by threshold_noise, then along a parabola",
        "Genmo's Mochi",
        ("flow",),
        _option("threshold_noise", "how far down the linear steps go", 0.001, 0.999, 0.025),
        LINEAR_STEPS,
    ),
    _card("ays_sd1", "optimised for Stable Diffusion 1.5", AYS, ("discrete",)),
    _card("ays_sdxl", "optimised for Stable Diffusion XL", AYS, ("discrete",)),
    _card("ays_svd", "optimised for Stable Video Diffusion", AYS, ("edm",)),
    _card(
        "lcm",
        "even distances on a grid of 50 timesteps, for networks distilled on it",
        "Luo et al. 2023",
        ("discrete",),
        ORIGINAL_STEPS,
    ),
)
CARDS: dict[str, ScheduleCard] = {card.name: card for card in _CARDS}

# Which table "ays" is, for each kind of conditioning.
AYS_TABLES = {"text": "ays_sd1", "xl": "ays_sdxl"}


def resolve_schedule(name: str, conditioning: str) -> str:
    """The name of a schedule, where "ays" stands for the table of a model's own kind.

    Raises InputError for "ays" with a model that no table was made for, and for a name that is not known.
    """
    if name == "ays":
        if conditioning not in AYS_TABLES:
            raise InputError(
                "schedule 'ays' has tables for Stable Diffusion 1, 2 and XL only, which this model is not"
            )
        return AYS_TABLES[conditioning]
    if name not in CARDS:
        raise unknown("schedule", name, [*CARDS, "ays"])
    return name


def check_schedule_options(name: str, options: Mapping[str, object]) -> dict[str, float]:
    """The options of a schedule, those that are None left out.

    Raises InputError for an unknown schedule, for an option that it does not take, naming the nearest, and
    for a value that is not in the option's range.
    """
    if name not in CARDS:
        raise unknown("schedule", name, CARDS)
    known = {option.name: option for option in CARDS[name].options}
    given = {key: value for key, value in options.items() if value is not None}
    if strange := sorted(given.keys() - known.keys()):
        if not known:
            raise InputError(f"schedule {name!r} takes no options, and {strange[0]!r} was given")
        raise unknown(f"option of schedule {name!r}", strange[0], known)
    return {key: known[key].checked(value) for key, value in given.items()}


def check_path(name: str, kind: PathKind) -> None:
    """Raise InputError, naming those that are, unless a schedule is defined on this kind of path."""
    if kind not in CARDS[name].paths:
        others = ", ".join(card.name for card in CARDS.values() if kind in card.paths)
        raise InputError(
            f"schedule {name!r} is not defined on a {kind!r} path: use {USUAL[kind]!r} (or one of {others})"
        )
