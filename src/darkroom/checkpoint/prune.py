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
from darkroom.checkpoint.tables import Tensors
from darkroom.errors import InputError, some

EMAChoice = Literal["drop", "use", "keep"]
LOSS = "loss."
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
    """A checkpoint's tensors without losses and averaged copies, in `dtype`.

    `ema` drops the copies, uses them in the place of the weights, or keeps both. Floating-point tensors
    become `dtype` if one is given, those of the autoencoder not with `full_autoencoder`: SDXL's overflows in
    float16. Raises InputError where there are no averaged weights to use, or where they lack some.
    """
    before = sum(tensor.nbytes for tensor in tensors.values())
    if dtype is not None and fp8_companions(tensors):  # scales are for the float8 weights alone
        tensors = decode_fp8(tensors, dtype)
    copies = {name: tensor for name, tensor in tensors.items() if name.startswith(EMA)}
    losses = tuple(name for name in tensors if name.startswith(LOSS))
    kept = {name: tensor for name, tensor in tensors.items() if name not in losses and name not in copies}
    if ema == "use":
        kept = _averaged(kept, copies)
    if ema == "keep":
        kept |= copies
    if not kept:
        raise InputError(f"nothing would be left: the file holds {some(tensors)}")
    full = _autoencoder(kept) if full_autoencoder else frozenset[str]()
    kept = {name: tensor if name in full else cast(tensor, dtype) for name, tensor in kept.items()}
    dropped = {"averaged copies": tuple(copies) if ema != "keep" else (), "losses": losses}
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
    return tensors | {name: copies[ema_name(name)] for name in names}


def _autoencoder(tensors: Mapping[str, Tensor]) -> frozenset[str]:
    component = dissect(shapes_of(tensors)).components.get(AUTOENCODER)
    return frozenset(component.names) if component else frozenset()
