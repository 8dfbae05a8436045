"""Between prompts: conditions of one length, and what lies between two of them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Literal

import torch
from torch import Tensor

from darkroom.blend import slerp
from darkroom.diffusion.denoiser import Condition
from darkroom.errors import InputError
from darkroom.nn.extra import PER_CALL, Extra

# Texts are repeated to the length that all of them divide, if that is at most this many times the longest.
MOST_REPEATS = 4
# What of a condition is a vector that may be mixed.
MIXED = ("pooled", "guidance")


def same_length(conditions: Sequence[Condition]) -> list[Condition]:
    """Conditions whose contexts (B, L, D) are repeated to one length, to share a call of the network.

    Cross-attention gives the same for a context and for the context twice, so to a U-Net or a DiT that reads
    texts by it this changes nothing; an MM-DiT, whose texts are read together with the picture, would see
    another one. Where the lengths have no multiple in common that is short enough, they stay.
    """
    lengths = {condition.context.shape[1] for condition in conditions if condition.context is not None}
    if len(lengths) < 2:
        return list(conditions)
    length = math.lcm(*lengths)
    if length > MOST_REPEATS * max(lengths):
        return list(conditions)
    return [_repeated(condition, length) for condition in conditions]


def _repeated(condition: Condition, length: int) -> Condition:
    """A condition whose context, and its mask if there is one, are repeated to a length."""
    if condition.context is None:
        return condition
    times = length // condition.context.shape[1]
    extra = condition.extra
    if extra is not None and extra.context_mask is not None:
        extra = replace(extra, context_mask=extra.context_mask.repeat(1, times))
    return replace(condition, context=condition.context.repeat(1, times, 1), extra=extra)


def interpolate(
    a: Condition, b: Condition, t: float, *, how: Literal["linear", "arc"] = "linear"
) -> Condition:
    """The condition at `t` between two prompts: `a` at 0, `b` at 1, each exactly.

    Contexts and pooled vectors are mixed on the line, or each token's state on the arc between the two
    (`darkroom.blend.slerp`), as are pooled vectors. Contexts of two lengths are repeated to one; read both
    prompts in one call of `tokens` where that cannot be. Raises InputError for `t` outside 0 ... 1, for what
    only one of them has, for classes, and for lengths without a common multiple that is short.
    """
    if not 0 <= t <= 1:
        raise InputError(f"t must be in 0 ... 1, not {t}")
    a, b = same_length([a, b])
    mix = _line if how == "linear" else _arc
    one, other = a.extra or Extra(), b.extra or Extra()
    if any(getattr(one, name) != getattr(other, name) for name in PER_CALL):
        raise InputError(f"cannot mix conditions: their {' or '.join(map(repr, PER_CALL))} differ")
    names = [f.name for f in fields(Extra) if f.name not in PER_CALL]
    mixed = {name: _mixed(name, getattr(one, name), getattr(other, name), t, mix) for name in names}
    extra = None if a.extra is None and b.extra is None else replace(one, **mixed)
    context = _mixed("context", a.context, b.context, t, mix)
    beside = _mixed("beside", a.beside, b.beside, t, mix)
    return Condition(context, extra, beside)


def _mixed(
    name: str, a: Tensor | None, b: Tensor | None, t: float, mix: Callable[[Tensor, Tensor, float], Tensor]
) -> Tensor | None:
    if a is None and b is None:
        return None
    if a is None or b is None:
        raise InputError(f"cannot mix conditions: only one of them has {name!r}")
    if a is b or (a.shape == b.shape and torch.equal(a, b)):
        return a
    if a.shape != b.shape:
        found = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise InputError(f"cannot mix conditions: their {name!r} have shapes {found}: read them in one call")
    if name not in ("context", *MIXED):
        raise InputError(f"cannot mix conditions: their {name!r} differ")
    return mix(a, b, t)


def _line(a: Tensor, b: Tensor, t: float) -> Tensor:
    return a if t == 0 else b if t == 1 else torch.lerp(a.float(), b.float(), t).to(a.dtype)


def _arc(a: Tensor, b: Tensor, t: float) -> Tensor:
    return _line(a, b, t) if a.ndim == 1 else slerp(a, b, t, dim=-1)  # scales are no vector
