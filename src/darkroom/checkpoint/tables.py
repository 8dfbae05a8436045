"""Tables between layouts of weights: lists of rules, each of which knows its inverse."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from darkroom.errors import InputError

Tensors = dict[str, Tensor]


class Rule(Protocol):
    """One step of a table: takes the tensors it knows out of `tensors`, and gives what they are called there.

    In patterns `*` stands for one part of a name and `**` for one or more; what a wildcard of the first
    pattern stood for goes, in the same order, into the wildcards of the others.
    """

    def __call__(self, tensors: Tensors) -> Tensors: ...

    def inverse(self) -> "Rule":
        """The rule that undoes this one."""
        ...


@dataclass(frozen=True)
class Table:
    """Rules in the order in which they take their tensors; names that no rule knows stay as they are."""

    rules: tuple[Rule, ...]

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """The tensors under their other names; raises InputError where one that a rule joins is missing."""
        rest, result = dict(tensors), {}
        for rule in self.rules:
            result |= rule(rest)
        return result | rest

    def inverse(self) -> "Table":
        """The table that undoes this one."""
        return Table(tuple(rule.inverse() for rule in self.rules))


@dataclass(frozen=True)
class Rename:
    """The same tensor under another name."""

    source: str
    target: str

    def __call__(self, tensors: Tensors) -> Tensors:
        return {_fill(self.target, parts): tensors.pop(n) for n, parts in _matches(self.source, tensors)}

    def inverse(self) -> "Rename":
        """The names the other way round."""
        return Rename(self.target, self.source)


@dataclass(frozen=True)
class Swap:
    """The same tensor under another name with its halves along the first axis exchanged."""

    source: str
    target: str

    def __call__(self, tensors: Tensors) -> Tensors:
        result = {}
        for name, parts in _matches(self.source, tensors):
            result[_fill(self.target, parts)] = torch.cat(tensors.pop(name).chunk(2)[::-1])
        return result

    def inverse(self) -> "Swap":
        """Exchanging twice changes nothing."""
        return Swap(self.target, self.source)


@dataclass(frozen=True)
class Transpose:
    """The same matrix under another name with rows and columns exchanged."""

    source: str
    target: str

    def __call__(self, tensors: Tensors) -> Tensors:
        result = {}
        for name, parts in _matches(self.source, tensors):
            result[_fill(self.target, parts)] = tensors.pop(name).T.contiguous()
        return result

    def inverse(self) -> "Transpose":
        """Exchanging twice changes nothing."""
        return Transpose(self.target, self.source)


@dataclass(frozen=True)
class AsConv:
    """A matrix as the weight of a conv that reaches one place, in `dims` dimensions."""

    source: str
    target: str
    dims: int = 2

    def __call__(self, tensors: Tensors) -> Tensors:
        found, axes = _matches(self.source, tensors), (..., *(None,) * self.dims)
        return {_fill(self.target, parts): tensors.pop(name)[axes] for name, parts in found}

    def inverse(self) -> "AsMatrix":
        """The matrix again."""
        return AsMatrix(self.target, self.source, self.dims)


@dataclass(frozen=True)
class AsMatrix:
    """The weight of a conv that reaches one place as a matrix; what is a matrix already stays one."""

    source: str
    target: str
    dims: int = 2

    def __call__(self, tensors: Tensors) -> Tensors:
        found = _matches(self.source, tensors)
        return {_fill(self.target, parts): tensors.pop(name).flatten(1) for name, parts in found}

    def inverse(self) -> AsConv:
        """The conv again."""
        return AsConv(self.target, self.source, self.dims)


@dataclass(frozen=True)
class Split:
    """One tensor as several, cut along the first axis: q, k and v out of one matrix, whose memory they share.

    `shares` say how many parts of the whole each gets; None cuts equal ones.
    """

    source: str
    targets: tuple[str, ...]
    shares: tuple[int, ...] | None = None

    def __call__(self, tensors: Tensors) -> Tensors:
        result = {}
        for name, parts in _matches(self.source, tensors):
            whole = tensors.pop(name)
            pieces = whole.split(self._sizes(name, whole.shape[0]))
            result |= {_fill(t, parts): p for t, p in zip(self.targets, pieces, strict=True)}
        return result

    def inverse(self) -> "Concat":
        """The pieces joined again."""
        return Concat(self.targets, self.source, self.shares)

    def _sizes(self, name: str, rows: int) -> list[int]:
        shares = self.shares or (1,) * len(self.targets)
        if rows % sum(shares):
            raise InputError(f"{name} has {rows} rows: they do not split into {sum(shares)} equal parts")
        return [rows // sum(shares) * share for share in shares]


@dataclass(frozen=True)
class Concat:
    """Several tensors as one, joined along the first axis; `shares` as in `Split`."""

    sources: tuple[str, ...]
    target: str
    shares: tuple[int, ...] | None = None

    def __call__(self, tensors: Tensors) -> Tensors:
        result = {}
        for _, parts in _matches(self.sources[0], tensors):
            pieces = _take(tensors, [_fill(source, parts) for source in self.sources])
            result[_fill(self.target, parts)] = torch.cat(pieces)
        return result

    def inverse(self) -> Split:
        """The whole cut again."""
        return Split(self.target, self.sources, self.shares)


@dataclass(frozen=True)
class JoinHeads:
    """Queries, keys and values as one 1-D conv, head by head: those of the first head, of the second, ..."""

    sources: tuple[str, ...]
    target: str
    heads: int

    def __call__(self, tensors: Tensors) -> Tensors:
        result = {}
        for _, parts in _matches(self.sources[0], tensors):
            pieces = _take(tensors, [_fill(source, parts) for source in self.sources])
            whole = torch.cat([p.unflatten(0, (self.heads, -1)) for p in pieces], dim=1).flatten(0, 1)
            result[_fill(self.target, parts)] = whole[..., None] if whole.ndim == 2 else whole
        return result

    def inverse(self) -> "SplitHeads":
        """The matrices again."""
        return SplitHeads(self.target, self.sources, self.heads)


@dataclass(frozen=True)
class SplitHeads:
    """One 1-D conv as queries, keys and values, where it holds them head by head."""

    source: str
    targets: tuple[str, ...]
    heads: int

    def __call__(self, tensors: Tensors) -> Tensors:
        result, count = {}, len(self.targets)
        for name, parts in _matches(self.source, tensors):
            whole = tensors.pop(name)
            if whole.shape[0] % (count * self.heads):
                raise InputError(f"{name} has {whole.shape[0]} rows: not {count} parts of {self.heads} heads")
            matrix = whole.flatten(1) if whole.ndim > 2 else whole
            pieces = matrix.unflatten(0, (self.heads, -1)).chunk(count, dim=1)
            result |= {
                _fill(t, parts): p.flatten(0, 1).clone() for t, p in zip(self.targets, pieces, strict=True)
            }
        return result

    def inverse(self) -> JoinHeads:
        """The conv again."""
        return JoinHeads(self.targets, self.source, self.heads)


@dataclass(frozen=True)
class Copy:
    """One tensor under several names: a layer that the other layout repeats in every block."""

    source: str
    targets: tuple[str, ...]

    def __call__(self, tensors: Tensors) -> Tensors:
        result = {}
        for name, parts in _matches(self.source, tensors):
            tensor = tensors.pop(name)
            result |= {_fill(target, parts): tensor.clone() for target in self.targets}
        return result

    def inverse(self) -> "Merge":
        """One of the copies."""
        return Merge(self.targets, self.source)


@dataclass(frozen=True)
class Merge:
    """Equal tensors as one; raises InputError where they are not equal (on `meta` none is compared)."""

    sources: tuple[str, ...]
    target: str

    def __call__(self, tensors: Tensors) -> Tensors:
        result = {}
        for _, parts in _matches(self.sources[0], tensors):
            names = [_fill(source, parts) for source in self.sources]
            first, *others = _take(tensors, names)
            for name, other in zip(names[1:], others, strict=True):
                if not first.is_meta and not torch.equal(first, other):
                    raise InputError(f"{name} differs from {names[0]}: they must be copies of one tensor")
            result[_fill(self.target, parts)] = first
        return result

    def inverse(self) -> Copy:
        """A copy under every name."""
        return Copy(self.target, self.sources)


@dataclass(frozen=True)
class Drop:
    """A tensor left out; the way back gives what `make` gives, or nothing where there is nothing to make."""

    name: str
    make: Callable[[], Tensor] | None = None

    def __call__(self, tensors: Tensors) -> Tensors:
        tensors.pop(self.name, None)
        return {}

    def inverse(self) -> "Make":
        """The tensor back in its place."""
        return Make(self.name, self.make)


@dataclass(frozen=True)
class Make:
    """A tensor that the other layout doesn't store, since it follows from the config."""

    name: str
    make: Callable[[], Tensor] | None = None

    def __call__(self, tensors: Tensors) -> Tensors:
        return {} if self.make is None else {self.name: self.make()}

    def inverse(self) -> Drop:
        """The tensor left out."""
        return Drop(self.name, self.make)


@lru_cache(maxsize=4096)
def _regex(pattern: str) -> re.Pattern[str]:
    parts = {"**": "(.+)", "*": r"([^.]+)"}
    return re.compile("".join(parts.get(p, re.escape(p)) for p in re.split(r"(\*+)", pattern)))


def _matches(pattern: str, tensors: Mapping[str, Tensor]) -> list[tuple[str, tuple[str, ...]]]:
    """The names that a pattern describes, with what its wildcards stand for in each."""
    start, regex = pattern.partition("*")[0], _regex(pattern)
    found = ((name, regex.fullmatch(name)) for name in tensors if name.startswith(start))
    return [(name, match.groups()) for name, match in found if match]


def _fill(pattern: str, parts: tuple[str, ...]) -> str:
    """The pattern with its wildcards, in order, replaced by what they stand for."""
    values = iter(parts)
    return re.sub(r"\*+", lambda _: next(values), pattern)


def _take(tensors: Tensors, names: list[str]) -> list[Tensor]:
    if missing := [name for name in names if name not in tensors]:
        raise InputError(f"{', '.join(missing)}: missing beside {next(n for n in names if n in tensors)}")
    return [tensors.pop(name) for name in names]
