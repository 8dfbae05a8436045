"""The second model of autoguidance: does it speak of the same latents?"""

from typing import TYPE_CHECKING, Any

from darkroom.diffusion.denoiser import Denoiser, Estimator
from darkroom.diffusion.path import FlowPath
from darkroom.errors import InputError

if TYPE_CHECKING:
    from darkroom.checkpoint.model import Model

# What both networks of a pair are given alike, so that they must take it alike.
SAME = ("in_channels", "context_dim", "pooled_dim", "num_classes", "guidance", "guidance_dim")
STATISTICS = 1e-3  # what statistics of one latent space may differ by


def check_weaker(denoiser: Estimator, weaker: Any) -> Estimator:
    """The weaker denoiser, if its estimates can stand beside this one's.

    Raises InputError, naming the field, for what is no denoiser, for a path on which the same level means
    other latents, and for a network that takes other inputs.
    """
    if not all(hasattr(weaker, name) for name in ("__call__", "path", "prediction")):
        raise _wrong(f"must be a denoiser, such as darkroom.load(...).model.denoiser, not {weaker!r}")
    if isinstance(weaker.path, FlowPath) != isinstance(denoiser.path, FlowPath):
        kinds = weaker.path.kind, denoiser.path.kind
        raise _wrong("its path is {}, this model's {}: a level means other latents there".format(*kinds))
    configs = [getattr(getattr(d, "network", None), "config", None) for d in (weaker, denoiser)]
    for name in SAME:
        theirs, ours = (getattr(config, name, None) for config in configs)
        if None not in configs and theirs != ours:
            raise _wrong(f"its network has `{name}` {theirs}, this model's {ours}: they must be the same")
    return weaker


def weaker_denoiser(model: "Model", weaker: "Model") -> Denoiser:
    """A model's denoiser to guide another one by; InputError unless both speak of the same latents."""
    ours, theirs = model.spec.latent_space, weaker.spec.latent_space
    same = (ours.channels, ours.stride) == (theirs.channels, theirs.stride) and all(
        abs(a - b) <= STATISTICS * max(1.0, abs(a))
        for a, b in zip((*ours.mean, *ours.std), (*theirs.mean, *theirs.std), strict=True)
    )
    if not same:
        raise _wrong("its latents are another autoencoder's, or scaled otherwise, than this model's")
    check_weaker(model.denoiser, weaker.denoiser)
    return weaker.denoiser


def _wrong(why: str) -> InputError:
    return InputError(f"guidance: field 'autoguidance.weaker': {why}")
