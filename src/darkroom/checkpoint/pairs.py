"""Two models side by side: each network's tensors under the same names, and the blocks that they are in."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from darkroom.checkpoint.layouts import layout_table
from darkroom.checkpoint.loose import Loose, Piece, take_apart
from darkroom.checkpoint.tables import Tensors
from darkroom.errors import InputError, some

# Blocks by their number, in the original release's names: the U-Net's as user interfaces name them.
BLOCKS = {
    r"input_blocks\.(\d+)\.": "IN{:02d}",
    r"middle_block\.": "M00",
    r"output_blocks\.(\d+)\.": "OUT{:02d}",
    r"(?:time_embed|label_emb)\.": "TIME",
    r"out\.": "OUT",
    r"(double|single|joint)_blocks\.(\d+)\.": "{}{:02d}",
    r"blocks\.(\d+)\.": "block{:02d}",
    r"(?:encoder\.)?(?:layers|block)\.(\d+)\.": "layer{:02d}",
    r"encoder\.": "encoder",
    r"decoder\.": "decoder",
}


@dataclass(frozen=True)
class Pair:
    """A tensor of two models, by its name under ours and its block, such as IN04 or double07."""

    role: str
    name: str
    block: str
    first: Tensor
    second: Tensor


@dataclass(frozen=True)
class Compared:
    """Two networks of one role; `only_first` and `only_second` are names that the other lacks, `reshaped`
    those of different shapes.
    """

    pairs: tuple[Pair, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    reshaped: tuple[str, ...]


def compare_pieces(first: Piece, second: Piece) -> Compared:
    """Pair the tensors of two networks, whatever layouts they come in; raises InputError for two kinds."""
    if first.kind != second.kind:
        raise InputError(f"the {first.role} is a {first.kind} in one and a {second.kind} in the other")
    a, b = first.ours(), second.ours()
    blocks = block_names(first)
    common = [name for name in a if name in b]
    same = [name for name in common if a[name].shape == b[name].shape]
    return Compared(
        pairs=tuple(Pair(first.role, n, blocks.get(n, "other"), a[n], b[n]) for n in same),
        only_first=tuple(name for name in a if name not in b),
        only_second=tuple(name for name in b if name not in a),
        reshaped=tuple(name for name in common if a[name].shape != b[name].shape),
    )


def block_names(piece: Piece) -> dict[str, str]:
    """The block of each tensor by its name under ours."""
    ours = {name: tensor.to("meta") for name, tensor in piece.ours().items()}
    original = dict(ours)
    if piece.kind in ("unet", "controlnet"):
        original = layout_table(piece.kind, "original", piece.config)(ours)
    theirs = {id(tensor): name for name, tensor in original.items()}
    return {name: _block(theirs.get(id(tensor), name)) for name, tensor in ours.items()}


def both(first: str | Path, second: str | Path) -> tuple[Loose, Loose]:
    """Two models taken apart; raises InputError where they have no network in common."""
    a, b = take_apart(first), take_apart(second)
    if not a.pieces.keys() & b.pieces.keys():
        holds = f"the first holds {a.contents}, the second {b.contents}"
        raise InputError(f"{first} and {second}: have no network in common: {holds}")
    return a, b


def check_alike(found: Compared, role: str, first: object, second: object) -> None:
    """Raise InputError, with up to ten names on each side, for two networks that are not of one shape."""
    sides = {
        f"only in {first}": found.only_first,
        f"only in {second}": found.only_second,
        "of other shapes": found.reshaped,
    }
    if problems := [f"{where}: {some(names)}" for where, names in sides.items() if names]:
        raise InputError(f"the {role} differs; " + "; ".join(problems))


def restored(piece: Piece, ours: Tensors) -> Piece:
    """A network with other values, under the names that it had."""
    return replace(piece, tensors=layout_table(piece.kind, piece.layout, piece.config)(ours))


def _block(name: str) -> str:
    for pattern, label in BLOCKS.items():
        if match := re.match(pattern, name):
            return label.format(*_numbers(match.groups()))
    return "other"


def _numbers(groups: tuple[str | None, ...]) -> Iterator[str | int]:
    for group in groups:
        if group is not None:
            yield int(group) if group.isdecimal() else group
