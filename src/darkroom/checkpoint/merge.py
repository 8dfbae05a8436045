"""One model made of several: weighted sums and added differences, by network and by block."""

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from darkroom.checkpoint.anatomy import EMA
from darkroom.checkpoint.loose import Loose, take_apart
from darkroom.checkpoint.pairs import block_names, restored
from darkroom.checkpoint.rounding import wide
from darkroom.checkpoint.tables import Tensors
from darkroom.errors import InputError, some

Terms = Sequence[tuple[Tensor, float]]  # what is added, and how much of it

# Blocks of a U-Net on the way down, and as many on the way up: SD 1 and 2, and SDXL.
DEPTHS = (12, 9)
RANGE = re.compile(r"(\d+)-(\d+)(?![^\[]*\])")  # but [0-9], one character of a pattern, is none


@dataclass(frozen=True)
class Rule:
    """Other weights where a pattern fits a network's role, a block, or role.name of a tensor.

    In patterns `*`, `?` and `[...]` are those of file names, and 00-05 stands for every number between.
    """

    pattern: str
    weights: tuple[float, ...]

    @classmethod
    def parse(cls, text: str, count: int) -> "Rule":
        """Read pattern=weight, or as many weights with commas between as there are models beside the first.

        Raises InputError for anything else.
        """
        pattern, equals, values = text.rpartition("=")
        weights = _numbers(values)
        if not (pattern and equals) or len(weights) != count:
            wanted = "pattern=weight" if count == 1 else f"pattern={','.join(['weight'] * count)}"
            raise InputError(f"rule {text!r}: must be {wanted}, such as IN0*=0.3, OUT00-05=1 or clip_l=0")
        return cls(pattern, weights)

    def fits(self, role: str, block: str, name: str) -> bool:
        """Whether the pattern fits a tensor by one of its names."""
        texts = (role, block, f"{role}.{block}", f"{role}.{name}")
        return any(fnmatchcase(text, pattern) for pattern in _spelled(self.pattern) for text in texts)


def block_rules(text: str, count: int = 1) -> list[Rule]:
    """Rules out of the numbers that merges by block are shared as: IN00, IN01, ..., M00, OUT00, ...

    They are 25 for SD 1 and 2, 19 for SDXL; one more in front is BASE, for all that is in none of these
    blocks: text encoders, autoencoder, the network's embeddings and last layer. Each holds for all `count`
    models beside the first. Raises InputError for another count of numbers.
    """
    values = _numbers(text)
    depth = next((depth for depth in DEPTHS if len(values) - (2 * depth + 1) in (0, 1)), None)
    if depth is None:
        given = len(values) or "no"
        raise InputError(f"numbers by block: {given} finite ones in {text!r}; must be 25 or 19, or one more")
    sides = [f"network.{side}{{:02d}}" for side in ("IN", "OUT")]
    down, up = ([side.format(index) for index in range(depth)] for side in sides)
    base = ["*"] if len(values) == 2 * depth + 2 else []
    patterns = [*base, *down, "network.M00", *up]
    return [Rule(pattern, (value,) * count) for pattern, value in zip(patterns, values, strict=True)]


def merge(
    first: Loose,
    others: Sequence[str | Path],
    weights: Sequence[float],
    *,
    base: str | Path | None = None,
    rules: Sequence[Rule] = (),
    dtype: torch.dtype | None = None,
) -> Loose:
    """Add to a model what others differ by: first + Σ weight · (other − base), the base being the first.

    So two models at weight 0.5 are averaged, whichever comes first, and with a `base` their difference from
    it is added. Of several rules that fit a tensor the last decides. Values are computed in float64, a tensor
    at a time, and stored as `dtype`, or as those of the first model. A model at weight 0 has no part in a
    tensor, and one at weight 1 alone is copied bit by bit. Whole numbers, networks that one of the others
    lacks (a warning names them), and input channels that one of them lacks (inpainting's in the first layer)
    stay the first model's. Raises InputError for a model that has nothing in common, and naming tensors that
    differ in name or shape or are not finite.
    """
    if len(weights) != len(others):
        raise InputError(f"each model beside the first needs a weight: {len(others)}, not {len(weights)}")
    paths = [*others, *([base] if base is not None else [])]
    loose = [take_apart(path) for path in paths]
    _check_common(first, paths, loose)
    pieces = dict(first.pieces)
    blocks = {role: block_names(piece) for role, piece in first.pieces.items()}
    for role, piece in first.pieces.items():
        if all(role in other.pieces for other in loose):
            ours, theirs = piece.ours(), [other.pieces[role].ours() for other in loose]
            for path, tensors in zip(paths, theirs, strict=True):
                _check(role, ours, tensors, path)
            roots = theirs.pop() if base is not None else None
            own = {name: _weights(rules, tuple(weights), role, blocks[role][name], name) for name in ours}
            pieces[role] = restored(piece, _merged(role, ours, theirs, roots, own, dtype))
    if idle := [rule.pattern for rule in rules if not _used(rule, blocks)]:
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
    role: str,
    ours: Tensors,
    others: Sequence[Tensors],
    base: Tensors | None,
    weights: Mapping[str, tuple[float, ...]],
    dtype: torch.dtype | None,
) -> Tensors:
    """The tensors of one network; `weights` are those of the others by the tensor's name."""
    made: Tensors = {}
    for name in tqdm(ours, desc=role, unit=" tensors", delay=1, disable=None, leave=False):
        terms = [(other[name], weight) for other, weight in zip(others, weights[name], strict=True) if weight]
        root = None if base is None else base[name]
        made[name] = _sum(f"{role}.{name}", ours[name], terms, root, dtype)
    return made


def _sum(
    name: str,
    first: Tensor,
    terms: Terms,
    base: Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """One tensor of the result; the first's where nothing is added, another's where only that is left."""
    if not first.is_floating_point():
        return first
    dtype = dtype or first.dtype
    copied = _copied(first, terms, base)
    if copied is not None and copied.dtype == dtype:
        return copied
    result = wide(copied) if copied is not None else _added(first, terms, first if base is None else base)
    low, high = (float(value) for value in result.aminmax())
    if not max(-low, high) <= torch.finfo(dtype).max:  # nor where they are NaN
        raise InputError(f"{name}: is not finite after merging; give smaller weights or a wider dtype")
    return result.to(dtype)


def _copied(first: Tensor, terms: Terms, base: Tensor | None) -> Tensor | None:
    """The tensor that is the whole result, if one is."""
    if not terms:
        return first
    other, weight = terms[0]
    alone = base is None and len(terms) == 1 and weight == 1 and other.shape == first.shape
    return other if alone else None


def _added(first: Tensor, terms: Terms, root: Tensor) -> Tensor:
    """The sum in float64, over the input channels that all have."""
    shapes = (first.shape, root.shape, *(other.shape for other, _ in terms))
    common = tuple(slice(min(sizes)) for sizes in zip(*shapes, strict=True))
    result = first.to(torch.float64, copy=True)
    for other, weight in terms:
        result[common].add_(other[common].double() - root[common].double(), alpha=weight)
    return result


def _weights(
    rules: Sequence[Rule], weights: tuple[float, ...], role: str, block: str, name: str
) -> tuple[float, ...]:
    fitting = (rule.weights for rule in reversed(rules) if rule.fits(role, block, name))
    return next(fitting, weights)


def _used(rule: Rule, blocks: Mapping[str, Mapping[str, str]]) -> bool:
    """Whether a rule fits any tensor of any network; `blocks` are theirs by role and name."""
    return any(rule.fits(role, block, name) for role, own in blocks.items() for name, block in own.items())


@lru_cache(maxsize=4096)
def _spelled(pattern: str) -> tuple[str, ...]:
    """A pattern with its first range of numbers written out, or as it is."""
    found = RANGE.search(pattern)
    if found is None:
        return (pattern,)
    low, high = found.groups()
    numbers = (str(number).zfill(len(low)) for number in range(int(low), int(high) + 1))
    return tuple(f"{pattern[: found.start()]}{number}{pattern[found.end() :]}" for number in numbers)


def _numbers(text: str) -> tuple[float, ...]:
    """The finite numbers of a list with commas between; none where any is something else."""
    try:
        values = tuple(float(value) for value in text.split(","))
    except ValueError:
        return ()
    return values if all(map(math.isfinite, values)) else ()


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
