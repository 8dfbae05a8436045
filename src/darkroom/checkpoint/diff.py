"""How two models differ, network by network: equal, merged, low-rank, retrained."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from darkroom.checkpoint.loose import Loose, take_apart
from darkroom.checkpoint.low_rank import factors
from darkroom.checkpoint.pairs import Compared, Pair, both, compare_pieces
from darkroom.errors import InputError, some

Verdict = Literal["equal", "rounded", "low-rank", "merged", "retrained", "other shapes", "on one side only"]

# Networks of their own are about √2 times their size apart, fine-tuned ones a tenth to a third of it.
RETRAINED = 0.7
# A difference is of low rank where so much of it lies in so few directions, in nearly every matrix.
ENERGY, MOST_RANK, RANK_SHARE, NEARLY_ALL = 0.99, 256, 0.25, 0.95
# A model lies between two others where so little of what it differs by is not along the line.
OFF_LINE = 0.05


@dataclass(frozen=True, kw_only=True)
class Change:
    """What one tensor differs by: `relative` to its own size; `rank` holds 99 % of a matrix's difference.

    `along` and `off` are the sums of products with a base: (B − C)·(A − C), |A − C|², |B − C|².
    """

    name: str
    block: str
    matrix: bool
    equal: bool
    rounded: bool
    relative: float
    rank: int | None = None
    low: bool = False
    along: tuple[float, float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How a network differs: the verdict, how far, of what rank, and where, by block.

    `share` is α where the second is α·first + (1 − α)·base. `changed` counts tensors.
    """

    role: str
    verdict: Verdict
    relative: float
    changed: int
    count: int
    rank: int | None = None
    share: float | None = None
    blocks: dict[str, float] = field(default_factory=dict)
    only_first: tuple[str, ...] = ()
    only_second: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()


def diff(first: str | Path, second: str | Path, *, base: str | Path | None = None) -> list[Difference]:
    """Compare two models network by network, in whatever layouts and precisions they are.

    equal: the same bits. rounded: the same after rounding to the lower precision. low-rank: nearly every
    matrix that changed did so in few directions, and nothing else changed, as if a LoRA was merged in; its
    rank is told. With a `base`, merged: the second lies on the line between the first and the base. Else
    merged means a change of less than 0.7 times the weights, fine-tuned or mixed; retrained means more.
    Raises InputError where the models have no network in common.
    """
    a, b = both(first, second)
    c = take_apart(base) if base is not None else None
    found = []
    for role, piece in a.pieces.items():
        if role not in b.pieces:
            continue
        compared = compare_pieces(piece, b.pieces[role])
        root = c.pieces[role].ours() if c is not None and role in c.pieces else {}
        bar = tqdm(compared.pairs, desc=role, unit=" tensors", delay=1, disable=None, leave=False)
        found.append(judge(role, [measure(pair, root.get(pair.name)) for pair in bar], compared))
    return [*found, *_one_sided(a, b)]


def _one_sided(a: Loose, b: Loose) -> Iterator[Difference]:
    """Networks, and tensors of no network, that only one of two models has."""
    for role in a.pieces.keys() ^ b.pieces.keys():
        count = len((a.pieces.get(role) or b.pieces[role]).tensors)
        sides = {"only_first": (role,), "only_second": ()} if role in a.pieces else {}
        sides = sides or {"only_first": (), "only_second": (role,)}
        yield Difference(
            role=role, verdict="on one side only", relative=0.0, changed=count, count=count, **sides
        )
    ours, theirs = ({**loose.extra, **loose.carried}.keys() for loose in (a, b))
    first, second = tuple(ours - theirs), tuple(theirs - ours)
    if first or second:
        yield Difference(
            role="of no network",
            verdict="on one side only",
            relative=0.0,
            changed=len(first) + len(second),
            count=len(ours | theirs),
            only_first=first,
            only_second=second,
        )


def measure(pair: Pair, base: Tensor | None = None) -> Change:
    """What one tensor differs by."""
    first, second = pair.first, pair.second
    matrix = first.ndim >= 2 and min(first.flatten(1).shape) > 1
    shared = {"name": pair.name, "block": pair.block, "matrix": matrix}
    if first.dtype == second.dtype and torch.equal(first, second):
        along = None if base is None else _along(first, second, base)
        return Change(**shared, equal=True, rounded=True, relative=0.0, along=along)
    a, b = first.float(), second.float()
    delta = b - a
    if not bool(delta.isfinite().all()):
        raise InputError(f"{pair.role}.{pair.name}: is not finite in one of the two")
    size = float(a.norm())
    relative = float(delta.norm()) / size if size else math.inf
    if _rounded(first, second):
        return Change(**shared, equal=False, rounded=True, relative=relative)
    rank = _rank(delta.flatten(1)) if matrix else None
    low = rank is not None and rank <= max(1, RANK_SHARE * min(delta.flatten(1).shape))
    along = None if base is None else _along(first, second, base)
    return Change(**shared, equal=False, rounded=False, relative=relative, rank=rank, low=low, along=along)


def judge(role: str, changes: Sequence[Change], compared: Compared) -> Difference:
    """The verdict on a network out of what its tensors differ by."""
    changed = [change for change in changes if not change.equal]
    moved = [change for change in changed if not change.rounded]
    verdict, rank, share = _verdict(changed, moved, changes)
    if compared.only_first or compared.only_second or compared.reshaped:
        verdict = "other shapes"
    return Difference(
        role=role,
        verdict=verdict,
        relative=median(change.relative for change in moved) if moved else 0.0,
        changed=len(changed),
        count=len(changes),
        rank=rank,
        share=share,
        blocks=_by_block(changes),
        only_first=compared.only_first,
        only_second=compared.only_second,
        reshaped=compared.reshaped,
    )


def _verdict(
    changed: Sequence[Change], moved: Sequence[Change], changes: Sequence[Change]
) -> tuple[Verdict, int | None, float | None]:
    if not changed:
        return "equal", None, None
    if not moved:
        return "rounded", None, None
    share = _share(changes)
    if share is not None:
        return "merged", None, share
    matrices = [change for change in moved if change.matrix]
    low = [change.rank for change in matrices if change.low and change.rank is not None]
    if len(matrices) == len(moved) and len(low) >= NEARLY_ALL * len(matrices):
        return "low-rank", max(low), None
    return ("retrained" if median(c.relative for c in moved) >= RETRAINED else "merged"), None, None


def _share(changes: Iterable[Change]) -> float | None:
    """α of the line between base and first on which the second lies, if it does."""
    sums = [change.along for change in changes if change.along is not None]
    if not sums:
        return None
    product, line, length = (math.fsum(values) for values in zip(*sums, strict=True))
    if not line or not length:
        return None
    alpha = product / line
    off = math.sqrt(max(length - alpha * product, 0.0) / length)
    return alpha if off <= OFF_LINE and 0 < alpha < 1 else None


def _along(first: Tensor, second: Tensor, base: Tensor) -> tuple[float, float, float] | None:
    if base.shape != first.shape:
        return None
    root = base.double()
    a, b = first.double() - root, second.double() - root
    return float((a * b).sum()), float(a.square().sum()), float(b.square().sum())


def _rounded(first: Tensor, second: Tensor) -> bool:
    """Whether both are the same in the lower of their precisions."""
    if not (first.is_floating_point() and second.is_floating_point()):
        return False
    lower = min(first.dtype, second.dtype, key=lambda dtype: (dtype.itemsize, -torch.finfo(dtype).eps))
    return first.dtype != second.dtype and torch.equal(first.to(lower), second.to(lower))


def _rank(delta: Tensor) -> int:
    return factors(delta, MOST_RANK).rank(ENERGY)


def _by_block(changes: Iterable[Change]) -> dict[str, float]:
    """The largest relative change of each block."""
    blocks: dict[str, float] = defaultdict(float)
    for change in changes:
        blocks[change.block] = max(blocks[change.block], change.relative)
    return dict(sorted(blocks.items()))


def rows(found: Iterable[Difference]) -> list[tuple[str, ...]]:
    """The networks as a table, its columns' names first."""
    head = ("part", "verdict", "relative change", "tensors changed", "rank", "share of the first")
    return [
        head,
        *(
            (
                d.role,
                d.verdict,
                f"{d.relative:.4f}",
                f"{d.changed} of {d.count}",
                "" if d.rank is None else str(d.rank),
                "" if d.share is None else f"{d.share:.3f}",
            )
            for d in found
        ),
    ]


def notes(found: Iterable[Difference]) -> Iterable[str]:
    """Where each network changed most, and names that one of the two lacks."""
    for d in found:
        most = sorted(d.blocks.items(), key=lambda item: -item[1])[:10]
        if any(d.blocks.values()):
            changed = ", ".join(f"{block} {change:.3f}" for block, change in most if change)
            yield f"{d.role}: changed most in {changed}"
        for what, names in (
            ("only in the first", d.only_first),
            ("only in the second", d.only_second),
            ("of other shapes", d.reshaped),
        ):
            if names:
                yield f"{d.role}: {what}: {some(names)}"
