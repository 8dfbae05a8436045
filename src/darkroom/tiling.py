"""Overlapping tiles of a picture, and how what was made of them becomes one picture again."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from darkroom.errors import InputError, unknown

# The sides across which a picture goes on at its other edge; "xy": both.
Axes = Literal["x", "y", "xy"]

# Weights along a side are whole multiples of 1 / STEPS, so that their products, and sums of these, are exact
# in float32: whatever the tiles, a cell's weights add up to one and not to nearly one.
STEPS = 1024


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """Where the tiles of one side begin, in cells: `length` cells, each tile `tile` of them.

    With `wrap` the side is a circle: a tile may begin near the end and go on at the start.
    """

    length: int
    tile: int
    starts: tuple[int, ...]
    wrap: bool = False

    def scaled(self, factor: int) -> "Cuts":
        """The same tiles of a side with `factor` cells for each one."""
        starts = tuple(start * factor for start in self.starts)
        return Cuts(length=self.length * factor, tile=self.tile * factor, starts=starts, wrap=self.wrap)

    def cells(self, number: int) -> Tensor:
        """The cells of a tile, int64 (tile,)."""
        return (torch.arange(self.tile) + self.starts[number]) % self.length

    def weights(self, unused: int = 0) -> Tensor:
        """How much each tile counts at each of its cells, float32 (tiles, tile); 1 in total at every cell.

        Where two tiles overlap, one fades out as the other fades in, along half a cosine; the outermost
        `unused` cells of either count nothing there.
        """
        return _weights(self, unused)

    def fade(self, number: int, unused: int) -> Tensor:
        """From near 0 at an edge that another tile overlaps to 1 inside, float64 (tile,)."""
        middles = torch.arange(self.tile, dtype=torch.float64) + 0.5
        fade = torch.ones(self.tile, dtype=torch.float64)
        for overlap, depth in zip(self._overlaps(number), (middles, middles.flip(0)), strict=True):
            if overlap:
                edge = min(unused, (overlap - 1) // 2)
                part = ((depth - edge) / (overlap - 2 * edge)).clamp(0, 1)
                fade = torch.minimum(fade, (part * (math.pi / 2)).sin() ** 2)
        return fade

    def _overlaps(self, number: int) -> tuple[int, int]:
        """The cells that a tile shares with the one before it and with the one after it."""
        if len(self.starts) == 1:
            return 0, 0
        here, last = self.starts[number], len(self.starts) - 1
        before, after = self.starts[number - 1], self.starts[(number + 1) % len(self.starts)]
        to_left = 0 if not self.wrap and number == 0 else self.tile - (here - before) % self.length
        to_right = 0 if not self.wrap and number == last else self.tile - (after - here) % self.length
        return to_left, to_right


@dataclass(frozen=True)
class Grid:
    """The tiles of a picture: the cuts of its height and of its width."""

    rows: Cuts
    columns: Cuts

    @cached_property
    def tiles(self) -> tuple[tuple[int, int], ...]:
        """Every tile as the numbers of its row and column, row by row."""
        return tuple(
            (row, column)
            for row in range(len(self.rows.starts))
            for column in range(len(self.columns.starts))
        )

    def scaled(self, factor: int) -> "Grid":
        """The same tiles of a picture `factor` times as large."""
        return Grid(self.rows.scaled(factor), self.columns.scaled(factor))

    def crop(self, picture: Tensor, number: int) -> Tensor:
        """What a picture (..., H, W) shows in a tile, (..., tile, tile)."""
        row, column = self.tiles[number]
        for axis, cells in ((-2, self.rows.cells(row)), (-1, self.columns.cells(column))):
            first, last = int(cells[0]), int(cells[-1])
            if last >= first:  # in one piece: no copy
                picture = picture.narrow(axis, first, len(cells))
            else:
                picture = picture.index_select(axis, cells.to(picture.device))
        return picture

    def counts(self, number: int, unused: int = 0) -> Tensor:
        """How much a tile counts at each of its cells, float32 (tile, tile); see `Cuts.weights`."""
        row, column = self.tiles[number]
        return self.rows.weights(unused)[row][:, None] * self.columns.weights(unused)[column]

    def blended(self, tiles: Iterator[Tensor], unused: int = 0) -> Tensor:
        """One picture (B, C, H, W), in float32, of what was made of the tiles (B, C, tile, tile), in order.

        `unused` as in `Cuts.weights`. Tiles are taken one at a time: only the picture is held.
        """
        picture: Tensor | None = None
        for number, tile in enumerate(tiles):
            if picture is None:
                shape = (*tile.shape[:2], self.rows.length, self.columns.length)
                picture = torch.zeros(shape, dtype=torch.float32, device=tile.device)
            row, column = self.tiles[number]
            cells = (
                self.rows.cells(row).to(tile.device)[:, None],
                self.columns.cells(column).to(tile.device),
            )
            picture[:, :, *cells] += tile.float() * self.counts(number, unused).to(tile.device)
        assert picture is not None
        return picture


def cuts(side: str, length: int, tile: int, overlap: int, *, multiple: int = 1, wrap: bool = False) -> Cuts:
    """Cut a side of `length` cells into tiles that share `overlap` cells or more, evenly spaced.

    A tile longer than the side is as long as it is. Everything is counted in whole `multiple`s, by which
    `length` must divide; tile and overlap are rounded down and up to them. A circle (`wrap`) has two tiles at
    least, so that no place is an edge in all of them: where one would do, these two share half. `side` names
    it in messages. Raises InputError for a tile below one multiple, an overlap below 0 or not below the tile,
    and a length that does not divide.
    """
    if tile < multiple:
        raise InputError(f"tile = {tile} cells of the {side} is too small: at least {multiple}")
    if not 0 <= overlap < tile:
        raise InputError(f"overlap = {overlap} cells must be 0 or more, and less than the tile's {tile}")
    if length < 1 or length % multiple:
        raise InputError(
            f"{side} = {length} cells cannot be cut: it must be at least {multiple} and divide by it"
        )
    units, size = length // multiple, min(tile, length) // multiple
    step = max(1, size - -(-overlap // multiple))
    if wrap:
        count = min(units, 2 if size == units else -(-units // step))
        starts = [units * n // count for n in range(count)]
    else:
        count = 1 + -(-(units - size) // step)
        starts = [(units - size) * n // max(count - 1, 1) for n in range(count)]
    return Cuts(
        length=length, tile=size * multiple, starts=tuple(start * multiple for start in starts), wrap=wrap
    )


def grid(
    size: tuple[int, int],
    tile: tuple[int, int],
    overlap: int,
    *,
    multiple: int = 1,
    wrap: Axes | None = None,
) -> Grid:
    """Cut a picture of `size` (height, width) into tiles of `tile` (height, width); see `cuts`.

    `wrap` names the axes in which the picture is a circle: "x" for one that goes on from its right edge to
    its left. Raises InputError as `cuts` does, and for another `wrap`.
    """
    wrapped = check_axes("wrap", wrap) if wrap is not None else ""
    names = (("height", "y"), ("width", "x"))
    rows, columns = (
        cuts(name, length, side, min(overlap, side), multiple=multiple, wrap=axis in wrapped)
        for (name, axis), length, side in zip(names, size, tile, strict=True)
    )
    return Grid(rows, columns)


@lru_cache(maxsize=64)
def _weights(cuts: Cuts, unused: int) -> Tensor:
    numbers = range(len(cuts.starts))
    raw = torch.stack([cuts.fade(number, unused) for number in numbers])
    places = torch.stack([cuts.cells(number) for number in numbers])
    total = torch.zeros(cuts.length, dtype=torch.float64).index_add_(0, places.flatten(), raw.flatten())
    steps = (raw / total[places] * STEPS).round()
    # What rounding left over goes to the tile that counts most at the cell.
    table = torch.zeros(len(cuts.starts), cuts.length, dtype=torch.float64).scatter_(1, places, steps)
    table.scatter_add_(0, table.argmax(0, keepdim=True), (STEPS - table.sum(0))[None])
    return (table.gather(1, places) / STEPS).float()


def check_axes(field: str, axes: str) -> Axes:
    """The axes, if there are such; InputError naming the field if not."""
    if axes not in get_args(Axes):
        raise unknown(field, str(axes), get_args(Axes))
    return axes  # pyright: ignore[reportReturnType]
