"""A checkpoint without what only training needs: averaged copies, losses, more precision than is used."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from darkroom.checkpoint.anatomy import AUTOENCODER, EMA, dissect
from darkroom.checkpoint.formats.fp8_names import fp8_companions
from darkroom.checkpoint.formats.io import cast
from darkroom.checkpoint.formats.quantised import decode_fp8
from darkroom.checkpoint.readings import shapes_of
from darkroom.checkpoint.rounding import wide
from darkroom.checkpoint.tables import Tensors
from darkroom.errors import InputError, some

EMAChoice = Literal["drop", "use", "keep"]
LEFTOVERS = {
    "losses": ("loss.",),
    "states of optimizers": ("optimizer.", "optimizers.", "optimizer_states.", "lr_schedulers."),
}
COUNTERS = ("decay", "num_updates")
AVERAGED = "model."  # the average copies what is under it


@dataclass(frozen=True)
class Pruned:
    """What is left, and what went: names by reason, and bytes before and after."""

    tensors: Tensors
    dropped: dict[str, tuple[str, ...]]
    before: int
    after: int


def prune(
    tensors: Mapping[str, Tensor],
    *,
    ema: EMAChoice = "drop",
    dtype: torch.dtype | None = None,
    full_autoencoder: bool = False,
) -> Pruned:
    """A checkpoint's tensors without losses, states of optimizers and averaged copies, in `dtype`.

    `ema` drops the copies, uses them in the place of the weights, or keeps both. Floating-point tensors
    become `dtype` if one is given, those of the autoencoder not with `full_autoencoder`: SDXL's overflows in
    float16; nor do schedules and scales, such as alphas_cumprod, of which each digit counts. Raises
    InputError where there are no averaged weights to use, where they lack some or are of other shapes, where
    a number is too large for `dtype`, and where nothing would be left.
    """
    before = sum(tensor.nbytes for tensor in tensors.values())
    if dtype is not None and fp8_companions(tensors):  # scales are for the float8 weights alone
        tensors = decode_fp8(tensors, dtype)
    copies = {name: tensor for name, tensor in tensors.items() if name.startswith(EMA)}
    dropped = {why: tuple(n for n in tensors if n.startswith(starts)) for why, starts in LEFTOVERS.items()}
    gone = {name for names in dropped.values() for name in names}
    kept = {name: tensor for name, tensor in tensors.items() if name not in gone and name not in copies}
    if ema == "use":
        kept = _averaged(kept, copies)
    if ema == "keep":
        kept |= copies
    dropped["averaged copies"] = tuple(copies) if ema != "keep" else ()
    if not kept:
        raise InputError(f"nothing would be left: the file holds {some(tensors)}")
    full = _full(kept, autoencoder=full_autoencoder)
    kept = {name: tensor if name in full else _cast(name, tensor, dtype) for name, tensor in kept.items()}
    return Pruned(
        tensors=kept,
        dropped={why: names for why, names in dropped.items() if names},
        before=before,
        after=sum(tensor.nbytes for tensor in kept.values()),
    )


def ema_name(name: str) -> str:
    """What the averaged copy of a tensor is called: the name under `model.`, without its dots."""
    return EMA + name.removeprefix(AVERAGED).replace(".", "")


def _averaged(tensors: Tensors, copies: Mapping[str, Tensor]) -> Tensors:
    if not copies:
        raise InputError("there are no averaged weights (model_ema.*) to use: leave ema at drop")
    names = [name for name in tensors if name.startswith(AVERAGED)]
    left = copies.keys() - {ema_name(name) for name in names} - {EMA + name for name in COUNTERS}
    lacking = [name for name in names if ema_name(name) not in copies]
    if left or lacking:
        raise InputError(f"the averaged weights are not those of the model: {some([*left, *lacking])}")
    if reshaped := [name for name in names if tensors[name].shape != copies[ema_name(name)].shape]:
        raise InputError(f"the averaged weights are of other shapes than the model's: {some(reshaped)}")
    return tensors | {name: copies[ema_name(name)] for name in names}


def _full(tensors: Mapping[str, Tensor], *, autoencoder: bool) -> frozenset[str]:
    """What stays in the precision that it has."""
    anatomy = dissect(shapes_of(tensors))
    component = anatomy.components.get(AUTOENCODER) if autoencoder else None
    return anatomy.markers.union(anatomy.buffers, component.names if component else ())


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor in another precision, if its numbers have room there."""
    result = cast(tensor, dtype)
    if result.dtype != tensor.dtype and _overflows(tensor, result):
        raise InputError(f"{name}: has numbers too large for {str(dtype).removeprefix('torch.')}")
    return result


def _overflows(tensor: Tensor, result: Tensor) -> bool:
    return bool((wide(tensor).isfinite() & ~wide(result).isfinite()).any())
