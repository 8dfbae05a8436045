"""What each schedule is, which options it takes and on which paths it is defined. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from darkroom.diffusion.option import PATHS, Option, Value, checked_options
from darkroom.errors import InputError, unknown

PathKind = str  # one of PATHS

# The schedule to name where another one is not defined on a kind of path.
USUAL: dict[PathKind, str] = {"discrete": "trailing", "cosine": "trailing", "edm": "karras", "flow": "flow"}
PRESERVING = ("discrete", "cosine")


@dataclass(frozen=True, kw_only=True)
class ScheduleCard:
    """A schedule in words: what it spaces how, its options, the kinds of path it is defined on, and whose it
    is.
    """

    name: str
    about: str
    paths: tuple[PathKind, ...]
    source: str
    options: Mapping[str, Option]


ENDS = {
    "sigma_min": Option(
        about="the last level above the end (default: the path's lowest)", low=1e-6, high=1e6
    ),
    "sigma_max": Option(about="the first level (default: the path's highest)", low=1e-6, high=1e6),
}
SHIFT = Option(
    about="the shift of a flow path, in place of the model's and the picture's own", low=0.01, high=100
)
RHO = Option(about="how strongly levels gather at the low end", low=0.1, high=100, default=7.0)
SHAPES = {
    "alpha": Option(about="the beta distribution's first shape", low=0.05, high=20, default=0.6),
    "beta": Option(about="the beta distribution's second shape", low=0.05, high=20, default=0.6),
}
THRESHOLD = Option(about="how far down the linear steps go", low=0.001, high=0.999, default=0.025)
LINEAR_STEPS = Option(about="how many steps are linear (default: half)", low=1, high=10_000, whole=True)
ORIGINAL_STEPS = Option(
    about="the steps of the teacher's grid, of which some are visited",
    low=1,
    high=1000,
    default=50,
    whole=True,
)
AYS = "Sabour, Fidler and Kreis 2024, table 3"


def _card(
    name: str, about: str, source: str, paths: tuple[str, ...] = PATHS, /, **options: Option
) -> ScheduleCard:
    shift = {"shift": SHIFT} if "flow" in paths and name != "linear_quadratic" else {}
    return ScheduleCard(name=name, about=about, paths=paths, source=source, options={**options, **shift})


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
        rho=RHO,
        **ENDS,
    ),
    _card("exponential", "even in log sigma", "k-diffusion", **ENDS),
    _card(
        "polyexponential",
        "log sigma follows a power of the step",
        "k-diffusion",
        rho=replace(RHO, default=1.0),
        **ENDS,
    ),
    _card("kl_optimal", "even in the arc tangent of sigma", "Sabour et al. 2024, theorem 3.1", **ENDS),
    _card(
        "beta",
        "quantiles of a beta distribution, in sigma, as diffusers and A1111 do",
        "Lee et al. 2024",
        **SHAPES,
        **ENDS,
    ),
    _card(
        "beta_timesteps",
        "quantiles of a beta distribution, in whole timesteps, as ComfyUI does",
        "Lee et al. 2024",
        **SHAPES,
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
        threshold_noise=THRESHOLD,
        linear_steps=LINEAR_STEPS,
    ),
    _card("ays_sd1", "optimised for Stable Diffusion 1.5", AYS, ("discrete",)),
    _card("ays_sdxl", "optimised for Stable Diffusion XL", AYS, ("discrete",)),
    _card("ays_svd", "optimised for Stable Video Diffusion", AYS, ("edm",)),
    _card(
        "lcm",
        "even distances on a grid of 50 timesteps, for networks distilled on it",
        "Luo et al. 2023",
        ("discrete",),
        original_steps=ORIGINAL_STEPS,
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


def check_schedule_options(name: str, options: Mapping[str, object]) -> dict[str, Value]:
    """The options of a schedule, those that are None left out.

    Raises InputError for an unknown schedule, for an option that it does not take, naming the nearest, and
    for a value that is not in the option's range.
    """
    if name not in CARDS:
        raise unknown("schedule", name, CARDS)
    given = {key: value for key, value in options.items() if value is not None}
    return checked_options(f"schedule {name!r}", CARDS[name].options, given)


def check_path(name: str, kind: PathKind) -> None:
    """Raise InputError, naming those that are, unless a schedule is defined on this kind of path."""
    if kind not in CARDS[name].paths:
        others = ", ".join(card.name for card in CARDS.values() if kind in card.paths)
        raise InputError(
            f"schedule {name!r} is not defined on a {kind!r} path: use {USUAL[kind]!r} (or one of {others})"
        )
