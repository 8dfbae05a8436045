"""A run's guide from what a user said."""

from collections.abc import Iterator, Sequence

from torch import nn

from darkroom.diffusion.denoiser import Estimator
from darkroom.diffusion.guidance.classifier_free import (
    AdaptiveProjection,
    ClassifierFreeGuidance,
    Combine,
    Straight,
    ZeroStar,
)
from darkroom.diffusion.guidance.contract import Guide, Worse
from darkroom.diffusion.guidance.corrections import AwayFrom, Rescaled, ZeroInit
from darkroom.diffusion.guidance.progress import Scale
from darkroom.diffusion.guidance.weaker import check_weaker
from darkroom.diffusion.guidance_settings import SKIPPED, Guidance
from darkroom.errors import InputError
from darkroom.nn.extra import Extra, Layer
from darkroom.nn.mmdit import MMDiT

SKIPPED_OF_DEPTH = 24  # blocks of Stable Diffusion 3.5 medium


def make_guide(
    guidance: Guidance,
    scale: float,
    denoiser: Estimator,
    levels: Sequence[float],
    *,
    channels: int | None = None,
    always_both: bool = False,
) -> Guide:
    """The guide of one run over `levels`, made anew each time, so that runs are independent.

    `scale` is that of classifier-free guidance; `channels` and `always_both` are `ClassifierFreeGuidance`'s.
    Raises InputError naming the field for what does not fit this network, its prediction, the number of steps
    or the scale.
    """
    _check(guidance, scale, denoiser, len(levels) - 1)
    guide: Guide = ClassifierFreeGuidance(
        _scale(guidance, scale, levels), channels, _combine(guidance, denoiser), always_both
    )
    for worse, weight, window in _worse(guidance, denoiser):
        guide = AwayFrom(guide=guide, worse=worse, weight=weight, levels=levels, window=window)
    if guidance.rescale:
        guide = Rescaled(guide=guide, denoiser=denoiser, share=guidance.rescale)
    if guidance.zero_star is not None and guidance.zero_star.zero_steps:
        steps = guidance.zero_star.zero_steps
        guide = ZeroInit(guide=guide, denoiser=denoiser, steps=steps, levels=levels)
    return guide


def _check(guidance: Guidance, scale: float, denoiser: Estimator, steps: int) -> None:
    if guidance.scales is not None and not callable(guidance.scales) and len(guidance.scales) != steps:
        raise InputError(
            f"guidance: field 'scales': must have one number for each of {steps} steps, "
            f"not {len(guidance.scales)}"
        )
    if not guidance.needs_uncond(scale):
        _check_idle(guidance)
    if guidance.zero_star is not None and (zeros := guidance.zero_star.zero_steps):
        if denoiser.prediction != "flow":
            raise InputError(
                f"guidance: field 'zero_star.zero_steps': is for models that predict 'flow', and this one "
                f"predicts {denoiser.prediction!r}: set it to 0"
            )
        if zeros >= steps:
            raise InputError(
                f"guidance: field 'zero_star.zero_steps': must leave one of {steps} steps, not be {zeros}"
            )


def _check_idle(guidance: Guidance) -> None:
    """Raise InputError for a field that changes the difference from no prompt, where there is none."""
    changing = ("interval", "sigma_interval", "apg", "zero_star")
    idle = [name for name in changing if getattr(guidance, name) is not None]
    others = (guidance.skip_layers, guidance.perturbed, guidance.autoguidance)
    if guidance.rescale and not any(others):
        idle.append("rescale")
    if idle:
        raise InputError(
            f"guidance: field '{idle[0]}': changes nothing where the scale of guidance is 1: "
            "leave it out, or set another scale (a distilled model's is 'true_guidance_scale')"
        )


def _scale(guidance: Guidance, scale: float, levels: Sequence[float]) -> float | Scale:
    if guidance.scales is guidance.interval is guidance.sigma_interval is None:
        return scale
    return Scale(
        scales=scale if guidance.scales is None else guidance.scales,
        levels=levels,
        interval=guidance.interval,
        sigma_interval=guidance.sigma_interval,
    )


def _combine(guidance: Guidance, denoiser: Estimator) -> Combine:
    if guidance.apg is not None:
        apg = guidance.apg
        return AdaptiveProjection(eta=apg.eta, norm_threshold=apg.norm_threshold, momentum=apg.momentum)
    return Straight() if guidance.zero_star is None else ZeroStar(denoiser)


def _worse(
    guidance: Guidance, denoiser: Estimator
) -> Iterator[tuple[Worse, float, tuple[float, float] | None]]:
    """Each worse estimate, the weight of leading away from it, and the fractions where that is done."""
    network = getattr(denoiser, "network", None)
    if (skip := guidance.skip_layers) is not None:
        layers = _skipped(network) if skip.layers is None else tuple(skip.layers)
        _check_layers("skip_layers", network, Extra(skip=layers))
        yield Worse(skip=layers), skip.scale, (skip.start, skip.stop)
    if (perturbed := guidance.perturbed) is not None:
        named = _middle(network) if perturbed.layers is None else _numbered(perturbed.layers)
        _check_layers("perturbed", network, Extra(perturbed=named))
        yield Worse(perturbed=named), perturbed.scale, None
    if (auto := guidance.autoguidance) is not None:
        yield Worse(by=check_weaker(denoiser, auto.weaker)), auto.scale - 1, None


def _check_layers(field: str, network: nn.Module | None, extra: Extra) -> None:
    """Raise InputError, naming the field, for layers that the network does not have."""
    known = getattr(network, "layers", None)
    if known is None:  # something else in a denoiser's place: what it calls will say
        return
    try:
        if extra.skip and not isinstance(known, range):
            raise InputError("a U-Net has no blocks that can be left out")
        extra.check_layers(type(network).__name__, known)
    except InputError as error:
        raise InputError(f"guidance: field '{field}.layers': {error}") from error


def _skipped(network: nn.Module | None) -> tuple[int, ...]:
    if isinstance(network, MMDiT) and network.config.depth == SKIPPED_OF_DEPTH:
        return SKIPPED
    raise InputError(
        "guidance: field 'skip_layers.layers': there is a default for Stable Diffusion 3.5 medium only: "
        "name the blocks to leave out"
    )


def _middle(network: nn.Module | None) -> tuple[Layer, ...]:
    """A U-Net's middle, or the last of its levels that has attention; a transformer's middle block."""
    known: Sequence[Layer] = getattr(network, "layers", ())
    if not known:
        raise InputError("guidance: field 'perturbed.layers': this network has no default: name the layers")
    if isinstance(known, range):
        return (len(known) // 2,)
    down = [layer for layer in known if str(layer).startswith("down")]
    return ("mid" if "mid" in known else down[-1],)


def _numbered(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """Layers with numbers for texts of digits, as a command line gives them."""
    return tuple(int(layer) if isinstance(layer, str) and layer.isdecimal() else layer for layer in layers)
