"""What a user says of guidance: plain data, without torch; `guidance.make_guide` makes a guide of it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from darkroom.errors import InputError

# The blocks of Stable Diffusion 3.5 medium that skip-layer guidance leaves out.
SKIPPED = (7, 8, 9)


@dataclass(frozen=True, kw_only=True)
class APG:
    """Adaptive projected guidance (Sadat et al. 2024), which takes high scales without oversaturation.

    `eta` is the share kept of the part along the conditional estimate, 1 all of it; `norm_threshold` bounds
    the norm of the difference over a picture's latents (None: no bound); `momentum` in −1 ... 1, negative to
    damp. Defaults are the paper's for Stable Diffusion XL. Raises InputError for other numbers.
    """

    eta: float = 0.0
    norm_threshold: float | None = 15.0
    momentum: float = -0.5

    def __post_init__(self) -> None:
        _need(_is_number(self.eta), "apg.eta", "a number", self.eta)
        bound = self.norm_threshold
        fits = bound is None or (_is_number(bound) and bound > 0)
        _need(fits, "apg.norm_threshold", "above 0, or none", bound)
        fits = _is_number(self.momentum) and -1 < self.momentum < 1
        _need(fits, "apg.momentum", "between -1 and 1", self.momentum)


@dataclass(frozen=True, kw_only=True)
class CFGZeroStar:
    """CFG-Zero* (Fan et al. 2025): guides from the best multiple of the unconditional output.

    In the first `zero_steps`, which are for flow models, the network is not asked and its output taken to be
    zero. Raises InputError for fewer than 0.
    """

    zero_steps: int = 1

    def __post_init__(self) -> None:
        fits = _is_whole(self.zero_steps) and self.zero_steps >= 0
        _need(fits, "zero_star.zero_steps", "0 or more", self.zero_steps)


@dataclass(frozen=True, kw_only=True)
class SkipLayers:
    """Skip-layer guidance (Stability AI 2024): away from the network without some blocks, early on the way.

    `layers` None are 7, 8 and 9 of Stable Diffusion 3.5 medium; other networks have no default. It acts
    between the fractions `start` and `stop` of the steps. Raises InputError for layers, a scale or fractions
    that cannot be.
    """

    layers: tuple[int, ...] | None = None
    scale: float = 2.8
    start: float = 0.01
    stop: float = 0.2

    def __post_init__(self) -> None:
        _need_layers("skip_layers.layers", self.layers)
        _need_scale("skip_layers.scale", self.scale)
        _need_fractions("skip_layers.start, stop", (self.start, self.stop))


@dataclass(frozen=True, kw_only=True)
class PerturbedAttention:
    """Perturbed-attention guidance (PAG, Ahn et al. 2024): away from places that see themselves only.

    `layers` None are a U-Net's "mid", or the middle block of a transformer; `nn.extra.Extra` says how layers
    are named. Raises InputError for layers or a scale that cannot be.
    """

    layers: tuple[int | str, ...] | None = None
    scale: float = 3.0

    def __post_init__(self) -> None:
        _need_layers("perturbed.layers", self.layers)
        _need_scale("perturbed.scale", self.scale)


@dataclass(frozen=True, kw_only=True)
class Autoguidance:
    """Guidance by a weaker model (Karras et al. 2024): a smaller or less trained one of the same latents.

    `weaker` is its denoiser, as `darkroom.load(...).model.denoiser`. A `scale` of 1 would guide not at all,
    as that of classifier-free guidance. Raises InputError for it, and where it is no number.
    """

    weaker: Any
    scale: float = 2.0

    def __post_init__(self) -> None:
        fits = _is_number(self.scale) and self.scale != 1
        _need(fits, "autoguidance.scale", "a number and not 1, which guides not at all", self.scale)


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How to guide, beside the scale; what is None (or 0) is off and costs nothing.

    `rescale` 0 ... 1 brings the output's deviation back to the conditional one's (Lin et al. 2024). The scale
    guides only in the `interval` of fractions of the steps, or the `sigma_interval` of noise levels (above
    the lower, up to the higher; Kynkäänniemi et al. 2024). `scales` replaces the scale: one number for each
    step, or a function of the fraction of them that is done.

    They act in this order: the scale of the step; `zero_star`'s first steps; classifier-free guidance,
    straight, by `apg` or by `zero_star`; what `skip_layers`, `perturbed` and `autoguidance` add, each its
    scale (less 1 for the last) times the conditional estimate less the worse one; `rescale`.

    Raises InputError naming the field for a value that cannot be, and for two that exclude each other.
    """

    rescale: float = 0.0
    interval: tuple[float, float] | None = None
    sigma_interval: tuple[float, float] | None = None
    scales: tuple[float, ...] | Callable[[float], float] | None = None
    apg: APG | None = None
    zero_star: CFGZeroStar | None = None
    skip_layers: SkipLayers | None = None
    perturbed: PerturbedAttention | None = None
    autoguidance: Autoguidance | None = None

    def __post_init__(self) -> None:
        fits = _is_number(self.rescale) and 0 <= self.rescale <= 1
        _need(fits, "rescale", "in 0 ... 1", self.rescale)
        if self.interval is not None:
            _need_fractions("interval", self.interval)
        if self.sigma_interval is not None:
            fits = _is_pair(self.sigma_interval) and 0 <= self.sigma_interval[0] < self.sigma_interval[1]
            _need(fits, "sigma_interval", "two levels, 0 <= low < high", self.sigma_interval)
        if self.scales is not None and not callable(self.scales):
            fits = isinstance(self.scales, list | tuple) and all(map(_is_number, self.scales))
            _need(fits and bool(self.scales), "scales", "one number for each step", self.scales)
        for name, kind in TECHNIQUES.items():
            value = getattr(self, name)
            _need(value is None or isinstance(value, kind), name, f"{kind.__name__}(...)", value)
        for a, b in (("interval", "sigma_interval"), ("apg", "zero_star")):
            if getattr(self, a) is not None and getattr(self, b) is not None:
                raise InputError(f"guidance: fields '{a}' and '{b}' exclude each other: leave one out")

    def needs_uncond(self, scale: float) -> bool:
        """Whether a run of this scale asks for the unconditional estimate anywhere."""
        if self.scales is None:
            return scale != 1
        return callable(self.scales) or any(one != 1 for one in self.scales)

    def summary(self) -> dict[str, Any]:
        """What is on, as plain data for a picture's parameters.

        A function and a model have no text: they stand there as "a function" and "a model".
        """
        on = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        shown = {name: asdict(value) if name in SIMPLE else value for name, value in on.items()}
        if callable(self.scales):
            shown["scales"] = "a function"
        if self.autoguidance is not None:
            weaker = self.autoguidance.weaker
            name = weaker if isinstance(weaker, str) else "a model"
            shown["autoguidance"] = {"weaker": name, "scale": self.autoguidance.scale}
        return shown


TECHNIQUES: dict[str, type] = {
    "apg": APG,
    "zero_star": CFGZeroStar,
    "skip_layers": SkipLayers,
    "perturbed": PerturbedAttention,
    "autoguidance": Autoguidance,
}
SIMPLE = TECHNIQUES.keys() - {"autoguidance"}  # of numbers only


def read_guidance(words: Sequence[str]) -> Guidance:
    """Guidance from words such as "rescale=0.7", "apg", "perturbed.scale=3" and "skip_layers.layers=[7, 8]".

    Values are TOML; a technique by its name alone has its defaults. Raises InputError for an unknown field
    (with the nearest one), a value of another type and whatever `Guidance` refuses.
    """
    from darkroom.config import parse, read_value

    data: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        table, dot, field = name.strip().replace("-", "_").partition(".")
        value = read_value(text.strip()) if equals else {}
        if not dot:
            data[table] = value
        elif isinstance(data.setdefault(table, {}), dict):
            data[table][field] = value
    return parse(data, Guidance, where="guidance")


def _is_number(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_pair(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value))


def _need(fits: bool, field: str, wanted: str, given: object) -> None:
    if not fits:
        raise InputError(f"guidance: field '{field}': must be {wanted}, not {given!r}")


def _need_fractions(field: str, given: Any) -> None:
    fits = _is_pair(given) and 0 <= given[0] < given[1] <= 1
    _need(fits, field, "two fractions, 0 <= start < stop <= 1", given)


def _need_scale(field: str, scale: float) -> None:
    fits = _is_number(scale) and scale != 0
    _need(fits, field, "a number and not 0, which guides not at all", scale)


def _need_layers(field: str, layers: Any) -> None:
    if layers is None:
        return
    names = isinstance(layers, list | tuple) and all(_is_whole(n) or isinstance(n, str) for n in layers)
    fits = names and 0 < len(layers) == len(set(layers))
    _need(fits, field, "at least one layer, each once", layers)
