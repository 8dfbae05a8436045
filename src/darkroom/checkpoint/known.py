"""What the known models hold, by names and shapes: the nearest one to a network of a file. No torch here.

The lists lie in `known.zip`, which `tools/known_lists.py` makes from the families' configs.
"""

import json
import math
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from darkroom.checkpoint.family_rows import describe, find_row
from darkroom.checkpoint.formats.header import Shape, Shapes
from darkroom.errors import InputError

ARCHIVE = Path(__file__).with_name("known.zip")
MOST = 0.5  # the share of names from which on a network is like a known one
FEW = 0.02  # the share of names that a damaged file may differ by and still be of a family
SMALL = 32  # dims below it say how many channels there are, and stay when a network is made narrower


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """The known network that a file's is nearest to.

    `of` are the models that have it; `missing` and `unexpected` compare the names; `reshaped` are tensors of
    other shapes.
    """

    of: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: tuple[str, ...]

    @property
    def differences(self) -> int:
        """How many names are missing or too much."""
        return len(self.missing) + len(self.unexpected)

    @property
    def same_names(self) -> bool:
        """Whether no name is missing or too much."""
        return not self.differences

    @property
    def exact(self) -> bool:
        """Whether names and shapes are all the same."""
        return self.same_names and not self.reshaped


def nearest(kind: str, layout: str, shapes: Shapes, family: str | None = None) -> Nearest | None:
    """The known network whose names, and then shapes, are most like these; among those of `family` if given.

    Shapes may be a fixed part of the known ones, as in a network made narrower. None where no network of
    this kind and layout is known.
    """
    lists = _lists(f"{kind}.{layout}")
    own = [entry for entry in lists if family in entry["of"]]
    own = own or lists
    if not own:
        return None
    shapes = _normal(shapes)
    entry = min(own, key=lambda entry: _distance(entry["tensors"], shapes))
    known = entry["tensors"]
    return Nearest(
        of=tuple(entry["of"]),
        missing=tuple(name for name in known if name not in shapes),
        unexpected=tuple(name for name in shapes if name not in known),
        reshaped=tuple(n for n, shape in shapes.items() if n in known and tuple(known[n]) != tuple(shape)),
    )


def network_family(kind: str, layout: str, shapes: Shapes, *, edm: bool) -> tuple[str | None, str]:
    """The family of a denoising network, and why: by widths that only it has, else by all its names."""
    facts, near = f"{kind}: {describe(kind, shapes)}", nearest(kind, layout, shapes)
    close = near is not None and near.differences <= FEW * len(shapes)
    try:
        family = find_row(kind, shapes, edm=edm).family
        own = near if near and family in near.of else nearest(kind, layout, shapes, family)
        # A tensor that is missing may make one family look like another, which then has other names too.
        if not close or own is None or near is None or own.differences <= near.differences:
            return family, f"{facts}: only {family} has these"
    except InputError:
        pass
    if near is None or not close:
        return None, f"{facts}: no known family has these"
    predicts = "edm" if edm else families()[near.of[0]]["prediction"]
    family = next((f for f in near.of if families()[f]["prediction"] == predicts), near.of[0])
    but = f", but for {near.differences}" if near.differences else ""
    return family, f"{facts}: no known family has these; names are those of {family}{but}"


def likeliest(names: set[str]) -> tuple[str, str] | None:
    """Kind and layout of the known network with most of these names, if it has and holds most of them."""
    best, found = MOST, None
    for member in _members():
        for entry in _read(member):
            known = entry["tensors"].keys()
            share = len(known & names) / max(len(known), len(names), 1)
            if share > best:
                best, found = share, member
    if found is None:
        return None
    kind, _, layout = found.rpartition(".")
    return kind, layout


def _members() -> list[str]:
    names = (name.removesuffix(".json") for name in _archive().namelist())
    return [name for name in names if name != "families"]


@cache
def families() -> dict[str, dict[str, Any]]:
    """Title, prediction, path and text encoders of each family."""
    return _read("families")


def _lists(member: str) -> list[dict[str, Any]]:
    return _read(member) if f"{member}.json" in _archive().namelist() else []


@cache
def _read(member: str) -> Any:
    return json.loads(_archive().read(f"{member}.json"))


@cache
def _archive() -> zipfile.ZipFile:
    return zipfile.ZipFile(ARCHIVE)


def _normal(shapes: Shapes) -> dict[str, Shape]:
    """Names as the lists have them: T5's embedding once."""
    twice = "encoder.embed_tokens.weight"
    if twice in shapes:
        shapes = {name: s for name, s in shapes.items() if name != twice} | {"shared.weight": shapes[twice]}
    return dict(shapes)


def _distance(known: Shapes, shapes: Shapes) -> tuple[int, int, float, int]:
    """How many names differ, how many numbers of dims, how unevenly shapes do, and how many."""
    common = known.keys() & shapes.keys()
    names = len(known) + len(shapes) - 2 * len(common)
    pairs = [(tuple(known[name]), tuple(shapes[name])) for name in common]
    different = [(a, b) for a, b in pairs if a != b]
    return names, sum(len(a) != len(b) for a, b in different), _unevenness(different), len(different)


def _unevenness(pairs: Iterable[tuple[Shape, Shape]]) -> float:
    """How far shapes are from being the known ones made narrower by one factor."""
    dims = [(a, b) for known, found in pairs for a, b in zip(known, found, strict=False)]
    small = sum(a != b for a, b in dims if a < SMALL)
    ratios = sorted(math.log(max(b, 1) / a) for a, b in dims if a >= SMALL)
    if not ratios:
        return float(small)
    middle = ratios[len(ratios) // 2]
    return small + sum(abs(ratio - middle) for ratio in ratios)
