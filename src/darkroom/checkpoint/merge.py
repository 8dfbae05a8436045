"""One model made of several: weighted sums and added differences, by network and by block."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from darkroom.checkpoint.anatomy import EMA
from darkroom.checkpoint.loose import Loose, Piece, take_apart
from darkroom.checkpoint.pairs import block_names, restored
from darkroom.checkpoint.tables import Tensors
from darkroom.errors import InputError, some


@dataclass(frozen=True)
class Rule:
    """Other weights where a pattern fits a network's role, a block, or role.name of a tensor."""

    pattern: str
    weights: tuple[float, ...]

    @classmethod
    def parse(cls, text: str, count: int) -> "Rule":
        """Read pattern=weight, or as many weights with commas between as there are models beside the first.

        Raises InputError for anything else.
        """
        pattern, equals, values = text.rpartition("=")
        try:
            weights = tuple(float(value) for value in values.split(","))
        except ValueError:
            weights = ()
        if not (pattern and equals) or len(weights) != count or not all(map(math.isfinite, weights)):
            wanted = "pattern=weight" if count == 1 else f"pattern={','.join(['weight'] * count)}"
            raise InputError(f"rule {text!r}: must be {wanted}, such as IN0*=0.3 or clip_l=0")
        return cls(pattern, weights)


def merge(
    first: Loose,
    others: Sequence[str | Path],
    weights: Sequence[float],
    *,
    base: str | Path | None = None,
    rules: Sequence[Rule] = (),
) -> Loose:
    """Add to a model what others differ by: first + Σ weight · (other − base), the base being the first.

    So two models at weight 0.5 are averaged, and with a `base` their difference from it is added. Of several
    rules that fit a tensor the last decides. Values are computed in float32 and stored as those of the first
    model. Whole numbers, networks that one of the others lacks (a warning names them), and channels beyond
    those of the others (inpainting's in the first layer) stay the first model's. Raises InputError for a
    model that has nothing in common, and naming tensors that differ in name or shape or are not finite.
    """
    if len(weights) != len(others):
        raise InputError(f"each model beside the first needs a weight: {len(others)}, not {len(weights)}")
    paths = [*others, *([base] if base is not None else [])]
    loose = [take_apart(path) for path in paths]
    _check_common(first, paths, loose)
    pieces = dict(first.pieces)
    for role, piece in first.pieces.items():
        if all(role in other.pieces for other in loose):
            mine = [other.pieces[role] for other in loose]
            pieces[role] = _merged(piece, mine, tuple(weights), rules, paths, based=base is not None)
    used = {rule.pattern for rule in rules if _used(rule, first.pieces.values())}
    if idle := [rule.pattern for rule in rules if rule.pattern not in used]:
        raise InputError(f"rules that fit nothing: {some(idle)}")
    extra = {name: tensor for name, tensor in first.extra.items() if not name.startswith(EMA)}
    return replace(first, pieces=pieces, extra=extra)


def _check_common(first: Loose, paths: Sequence[str | Path], others: Sequence[Loose]) -> None:
    for path, other in zip(paths, others, strict=True):
        if not first.pieces.keys() & other.pieces.keys():
            raise InputError(
                f"{path}: has no network in common with the first model: it holds {other.contents}"
            )
        if lacking := first.pieces.keys() - other.pieces.keys():
            warnings.warn(f"{path}: has no {some(lacking)}: stays as in the first model", stacklevel=3)
    if any(name.startswith(EMA) for name in first.extra):
        warnings.warn(
            f"averaged copies ({EMA}*) are left out: they are not those of the result", stacklevel=3
        )


def _merged(
    piece: Piece,
    others: Sequence[Piece],
    weights: tuple[float, ...],
    rules: Sequence[Rule],
    paths: Sequence[str | Path],
    *,
    based: bool,
) -> Piece:
    ours, blocks = piece.ours(), block_names(piece)
    theirs = [other.ours() for other in others]
    for path, tensors in zip(paths, theirs, strict=True):
        _check(piece.role, ours, tensors, path)
    made: Tensors = {}
    for name in tqdm(ours, desc=piece.role, unit=" tensors", delay=1, disable=None, leave=False):
        own = _weights(rules, weights, piece.role, blocks[name], name)
        values = [tensors[name] for tensors in theirs]
        root = values.pop() if based else ours[name]
        made[name] = _sum(f"{piece.role}.{name}", ours[name], values, root, own)
    return restored(piece, made)


def _sum(
    name: str, first: Tensor, others: Sequence[Tensor], base: Tensor, weights: Sequence[float]
) -> Tensor:
    """One tensor of the result; untouched where nothing is added, another's where only that is left."""
    if not first.is_floating_point() or not any(weights):
        return first
    if base is first and len(others) == 1 and weights[0] == 1 and others[0].shape == first.shape:
        return others[0].to(first.dtype)
    inside = tuple(slice(size) for size in others[0].shape)
    result = first.float().clone()
    start = base[inside].float()
    for other, weight in zip(others, weights, strict=True):
        result[inside] += weight * (other.float() - start)
    if not bool(result.isfinite().all()) or result.abs().max() > torch.finfo(first.dtype).max:
        raise InputError(f"{name}: is not finite after merging; give smaller weights or a wider dtype")
    return result.to(first.dtype)


def _weights(
    rules: Sequence[Rule], weights: tuple[float, ...], role: str, block: str, name: str
) -> tuple[float, ...]:
    fitting = (rule.weights for rule in reversed(rules) if _fits(rule.pattern, role, block, name))
    return next(fitting, weights)


def _fits(pattern: str, role: str, block: str, name: str) -> bool:
    return any(fnmatchcase(text, pattern) for text in (role, block, f"{role}.{block}", f"{role}.{name}"))


def _used(rule: Rule, pieces: Iterable[Piece]) -> bool:
    return any(
        _fits(rule.pattern, piece.role, block, name)
        for piece in pieces
        for name, block in block_names(piece).items()
    )


def _check(role: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], path: str | Path) -> None:
    """The same names, and the same shapes but for more channels of the first model's inputs."""
    missing, more = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    reshaped = [n for n in ours if n in theirs and not _inside(theirs[n].shape, ours[n].shape)]
    sides = {"lacks": missing, "has beside": more, "has in other shapes": reshaped}
    if problems := [f"{what} {some(names)}" for what, names in sides.items() if names]:
        raise InputError(f"{path}: its {role} does not go with the first model's: it " + "; ".join(problems))


def _inside(shape: Sequence[int], other: Sequence[int]) -> bool:
    """The same but for fewer input channels of a convolution."""
    if len(shape) != len(other):
        return False
    differ = [axis for axis, (a, b) in enumerate(zip(shape, other, strict=True)) if a != b]
    return not differ or (differ == [1] and len(shape) == 4 and shape[1] < other[1])
