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

from darkroom.checkpoint.layouts import layout_table
from darkroom.checkpoint.loose import Loose, Piece, take_apart
from darkroom.checkpoint.low_rank import factors
from darkroom.checkpoint.pairs import Compared, Pair, both, compare_pieces
from darkroom.checkpoint.rounding import rounded_to, rounding_energy, same_bits, wide
from darkroom.errors import InputError, some

Verdict = Literal[
    "equal",
    "rounded",
    "low-rank",
    "merged",
    "retrained",
    "other shapes",
    "on one side only",
]

# Networks of their own are about √2 times their size apart, fine-tuned ones a tenth to a third of it.
RETRAINED = 0.7
# A difference is of low rank where so much of it lies in so few directions, in nearly every matrix.
ENERGY, MOST_RANK, RANK_SHARE, NEARLY_ALL = 0.99, 256, 0.25, 0.95
# A model lies between two others where so little of what it differs by is not along the line.
OFF_LINE = 0.05
# Nothing is said of a difference of which rounding may be more than this part.
MOST_ROUNDING = 0.25
# Half between two neighbours, where means lie, rounding puts in ulp²/8 and not the ulp²/12 of other places.
HALFWAY = 12 / 8
# Where our names keep matrices as one that diffusers splits, and LoRAs with it.
FUSED = ("mmdit", "flux")
CHUNK = 2**22  # numbers that are multiplied in float64 at once


@dataclass(frozen=True)
class Along:
    """How a tensor lies to the line from a base C through the first, A: sums over its numbers.

    (B − C)·(A − C), |A − C|², |B − C|², and what of the last rounding is expected to have put in.
    """

    product: float = 0.0
    line: float = 0.0
    length: float = 0.0
    rounding: float = 0.0

    def __add__(self, other: "Along") -> "Along":
        return Along(
            self.product + other.product,
            self.line + other.line,
            self.length + other.length,
            self.rounding + other.rounding,
        )

    @property
    def share(self) -> float:
        """α of the nearest point α·A + (1 − α)·C."""
        return self.product / self.line if self.line else 0.0

    @property
    def off(self) -> float:
        """The square of the distance from the line, without what rounding explains."""
        return max(self.length - self.share * self.product - self.rounding, 0.0)


@dataclass(frozen=True, kw_only=True)
class Change:
    """What one tensor differs by, `relative` to its size; `rounded`: to what precision, if that is all."""

    name: str
    block: str
    matrix: bool
    equal: bool
    relative: float
    rounded: torch.dtype | None = None
    along: Along | None = None


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """α of α·first + (1 − α)·base, `by_block` where one does not fit all, and how far off that line it is.

    `off` is the distance, 0 to 1, as a part of what the second differs from the base by.
    """

    share: float
    off: float
    by_block: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How a network differs: the verdict, how far, of what rank, and where, by block.

    `share` is α where the second is α·first + (1 − α)·base, 0 where it is the base; `mixture` says more.
    `changed` counts tensors, `rounded` are precisions to which tensors were rounded.
    """

    role: str
    verdict: Verdict
    relative: float
    changed: int
    count: int
    rank: int | None = None
    mixture: Mixture | None = None
    rounded: tuple[str, ...] = ()
    blocks: dict[str, float] = field(default_factory=dict)
    only_first: tuple[str, ...] = ()
    only_second: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()

    @property
    def share(self) -> float | None:
        """The part of the first in a mixture that has one share for all blocks."""
        return None if self.mixture is None or self.mixture.by_block else self.mixture.share


def diff(first: str | Path, second: str | Path, *, base: str | Path | None = None) -> list[Difference]:
    """Compare two models network by network, in whatever layouts and precisions they are.

    equal: the same bits. rounded: the same but for rounding, and to which precision. low-rank: nothing but
    matrices changed, nearly every one in few directions, as if a LoRA was merged in; its rank is told. With a
    `base`, merged: the second lies on the line between the base and the first, as a whole or block by block.
    Else merged means a change of less than 0.7 times the weights, fine-tuned or mixed; retrained means more.
    What rounding to the stored precision puts in counts for neither rank nor line. Raises InputError where
    the models have no network in common, and naming a tensor that changed and is not finite.
    """
    a, b = both(first, second)
    roots = {} if base is None else take_apart(base).pieces
    if base is not None and not roots.keys() & a.pieces.keys() & b.pieces.keys():
        raise InputError(f"{base}: has no network ({some(roots) or 'none'}) in common with the other two")
    found = []
    for role, piece in a.pieces.items():
        if role not in b.pieces:
            continue
        compared = compare_pieces(piece, b.pieces[role])
        root = roots[role].ours() if role in roots else {}
        bar = tqdm(compared.pairs, desc=role, unit=" tensors", delay=1, disable=None, leave=False)
        found.append(judge(piece, [measure(pair, root.get(pair.name)) for pair in bar], compared))
    return [*found, *_one_sided(a, b)]


def _one_sided(a: Loose, b: Loose) -> Iterator[Difference]:
    """Networks, and tensors of no network, that only one of two models has."""
    for role in sorted(a.pieces.keys() ^ b.pieces.keys()):
        count = len((a.pieces.get(role) or b.pieces[role]).tensors)
        first, second = ((role,) if role in loose.pieces else () for loose in (a, b))
        yield _alone(role, count, first, second, count)
    ours, theirs = ({**loose.extra, **loose.carried}.keys() for loose in (a, b))
    first, second = tuple(sorted(ours - theirs)), tuple(sorted(theirs - ours))
    if first or second:
        yield _alone("of no network", len(first) + len(second), first, second, len(ours | theirs))


def _alone(
    role: str, changed: int, first: tuple[str, ...], second: tuple[str, ...], count: int
) -> Difference:
    return Difference(
        role=role,
        verdict="on one side only",
        relative=0.0,
        changed=changed,
        count=count,
        only_first=first,
        only_second=second,
    )


def measure(pair: Pair, base: Tensor | None = None) -> Change:
    """What one tensor differs by."""
    first, second = pair.first, pair.second
    equal = same_bits(first, second)
    return Change(
        name=pair.name,
        block=pair.block,
        matrix=first.ndim >= 2 and min(first.flatten(1).shape) > 1,
        equal=equal,
        relative=0.0 if equal else _relative(pair),
        rounded=None if equal else rounded_to(first, second),
        along=None if base is None or base.shape != first.shape else _along(first, second, base),
    )


def _relative(pair: Pair) -> float:
    """How far two tensors are apart, relative to the first."""
    first = wide(pair.first).flatten()
    delta = wide(pair.second).flatten() - first
    if not bool(delta.isfinite().all()):
        raise InputError(f"{pair.role}.{pair.name}: is not finite in one of the two")
    apart, size = math.sqrt(_dot(delta, delta)), math.sqrt(_dot(first, first))
    return apart / size if size else math.inf if apart else 0.0


def judge(piece: Piece, changes: Sequence[Change], compared: Compared) -> Difference:
    """The verdict on a network out of what its tensors differ by; `piece` is that of the first model."""
    changed = [change for change in changes if not change.equal]
    moved = [change for change in changed if change.rounded is None]
    mixture = _mixture(changes) if moved else None
    rank = _rank(piece, moved, compared) if mixture is None else None
    verdict: Verdict = _verdict(changed, moved, mixture, rank)
    if compared.only_first or compared.only_second or compared.reshaped:
        verdict = "other shapes"
    return Difference(
        role=piece.role,
        verdict=verdict,
        relative=median(change.relative for change in moved) if moved else 0.0,
        changed=len(changed),
        count=len(changes),
        rank=rank,
        mixture=mixture,
        rounded=tuple(sorted({_name(c.rounded) for c in changed if c.rounded is not None})),
        blocks=_by_block(changes),
        only_first=compared.only_first,
        only_second=compared.only_second,
        reshaped=compared.reshaped,
    )


def _verdict(
    changed: Sequence[Change], moved: Sequence[Change], mixture: Mixture | None, rank: int | None
) -> Verdict:
    if not moved:
        return "rounded" if changed else "equal"
    if mixture is not None:
        return "merged"
    if rank is not None:
        return "low-rank"
    return "retrained" if median(change.relative for change in moved) >= RETRAINED else "merged"


def _mixture(changes: Iterable[Change]) -> Mixture | None:
    """The line between base and first on which the second lies, if it does: as a whole, or block by block."""
    blocks: dict[str, Along] = defaultdict(Along)
    for change in changes:
        if change.along is not None:
            blocks[change.block] += change.along
    whole = sum(blocks.values(), Along())
    if not (whole.line and whole.length) or whole.rounding > MOST_ROUNDING * whole.length:
        return None
    off = math.sqrt(whole.off / whole.length)
    if off <= OFF_LINE:
        return Mixture(share=whole.share, off=off)
    off = math.sqrt(math.fsum(along.off for along in blocks.values()) / whole.length)
    shares = {block: along.share for block, along in sorted(blocks.items()) if along.line}
    return Mixture(share=whole.share, off=off, by_block=shares) if off <= OFF_LINE else None


def _along(first: Tensor, second: Tensor, base: Tensor) -> Along | None:
    root = wide(base)
    a, b = (wide(first) - root).flatten(), (wide(second) - root).flatten()
    sums = Along(_dot(a, b), _dot(a, a), _dot(b, b), HALFWAY * rounding_energy(second))
    return sums if math.isfinite(sums.product + sums.line + sums.length) else None


def _dot(a: Tensor, b: Tensor) -> float:
    """The sum of products in float64, a part at a time."""
    parts = zip(a.split(CHUNK), b.split(CHUNK), strict=True)
    return math.fsum(float(x.double() @ y.double()) for x, y in parts)


def _rank(piece: Piece, moved: Sequence[Change], compared: Compared) -> int | None:
    """The rank of what a merged LoRA leaves behind; None for a change of any other kind."""
    if not moved or not all(change.matrix for change in moved):
        return None
    pairs = {pair.name: pair for pair in compared.pairs}
    ranks, full = [], 0
    for change in tqdm(
        moved, desc=f"{piece.role}, ranks", unit=" matrices", delay=1, disable=None, leave=False
    ):
        rank = _low_rank(piece, pairs[change.name])
        if rank is None:
            full += 1
            if full > (1 - NEARLY_ALL) * len(moved):
                return None
        else:
            ranks.append(rank)
    return max(ranks)


def _low_rank(piece: Piece, pair: Pair) -> int | None:
    """The rank of one matrix's difference, the most of the matrices that a LoRA sees in it, if it is low."""
    most = 0
    parts = zip(_parts(piece, pair.name, pair.first), _parts(piece, pair.name, pair.second), strict=True)
    for first, second in parts:
        rank = _few_directions(first, second)
        if rank is None:
            return None
        most = max(most, rank)
    return most


def _parts(piece: Piece, name: str, tensor: Tensor) -> list[Tensor]:
    if piece.kind not in FUSED:
        return [tensor]
    return list(layout_table(piece.kind, "diffusers", piece.config)({name: tensor}).values())


def _few_directions(first: Tensor, second: Tensor) -> int | None:
    """The fewest directions that leave 1 % of a difference, beside what rounding put into the others."""
    delta = (wide(second) - wide(first)).flatten(1).float()
    found = factors(delta, MOST_RANK)
    rounding = rounding_energy(first, second)
    if not found.energy:
        return 0
    if rounding > MOST_ROUNDING * found.energy:
        return None
    rows, columns = delta.shape
    rank = torch.arange(1, len(found.values) + 1, dtype=torch.float64)
    left = found.energy - found.values.double().square().cumsum(0)
    spread = rounding * (1 - rank / rows) * (1 - rank / columns)  # rounding goes into all directions alike
    enough = (left <= (1 - ENERGY) * found.energy + spread).nonzero()
    few = max(1, RANK_SHARE * min(rows, columns))
    return int(enough[0]) + 1 if len(enough) and int(enough[0]) < few else None


def _by_block(changes: Iterable[Change]) -> dict[str, float]:
    """The largest relative change of each block."""
    blocks: dict[str, float] = defaultdict(float)
    for change in changes:
        blocks[change.block] = max(blocks[change.block], change.relative)
    return dict(sorted(blocks.items()))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rows(found: Iterable[Difference]) -> list[tuple[str, ...]]:
    """The networks as a table, its columns' names first."""
    head = ("part", "verdict", "relative change", "tensors changed", "rank", "share of the first")
    return [head, *(_row(d) for d in found)]


def _row(d: Difference) -> tuple[str, ...]:
    precisions = " and ".join(d.rounded)
    share = "by block" if d.mixture is not None and d.mixture.by_block else ""
    return (
        d.role,
        f"rounded to {precisions}" if d.verdict == "rounded" else d.verdict,
        f"{d.relative:.4f}",
        f"{d.changed} of {d.count}",
        "" if d.rank is None else str(d.rank),
        share if d.share is None else f"{d.share:.3f}",
    )


def notes(found: Iterable[Difference]) -> Iterable[str]:
    """Where each network changed most, its share in each block, and names that one of the two lacks."""
    for d in found:
        most = [(block, change) for block, change in d.blocks.items() if change]
        if most:
            most = sorted(most, key=lambda item: -item[1])[:10]
            yield f"{d.role}: changed most in {', '.join(f'{block} {change:.3f}' for block, change in most)}"
        if d.mixture is not None:
            shares = [f"{block} {share:.2f}" for block, share in d.mixture.by_block.items()]
            where = f": shares of the first are {', '.join(shares)}" if shares else ""
            yield f"{d.role}: {d.mixture.off:.2%} of the change is off the line from the base{where}"
        for what, names in (
            ("only in the first", d.only_first),
            ("only in the second", d.only_second),
            ("of other shapes", d.reshaped),
        ):
            if names:
                yield f"{d.role}: {what}: {some(names)}"
