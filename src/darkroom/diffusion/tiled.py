"""Denoisers that show their network another cut of a picture: tile by tile, or rolled round."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from darkroom.diffusion.denoiser import Condition, Denoiser, Levels
from darkroom.errors import InputError
from darkroom.rng import raw_bits
from darkroom.tiling import Axes, Grid, check_axes, grid

TILE_BATCH = 4


class Tiled(Denoiser):
    """A denoiser of pictures larger than its network's: each tile is one for it, and estimates are blended.

    `tile` (height, width) and `overlap` are in latent cells; tiles are spaced evenly and overlap by at least
    that (MultiDiffusion, Bar-Tal et al. 2023, whose weights are here smooth: a tile fades into the next along
    half a cosine). `tile_batch` tiles of each picture go through the network at once. `multiple` is what
    tiles begin and end at, the side of the network's patches. `wrap` names the axes in which the picture goes
    on at its other edge: "x" for a panorama of 360 degrees.

    Where one tile covers the picture the result is the denoiser's own. Every tile is told the whole picture's
    prompt and sizes, and shown its own part of what lies beside the latents. Raises InputError for tiles that
    cannot be (see `darkroom.tiling.cuts`) and for a reference of another size than the picture.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        tile: tuple[int, int],
        overlap: int,
        *,
        tile_batch: int = TILE_BATCH,
        multiple: int = 1,
        wrap: Axes | None = None,
    ) -> None:
        super().__init__(denoiser.network, denoiser.path, denoiser.prediction)
        if tile_batch < 1:
            raise InputError(f"tile_batch must be 1 or more, not {tile_batch}")
        self.whole, self.tile_batch = denoiser, tile_batch
        self.grid = partial(grid, tile=tile, overlap=overlap, multiple=multiple, wrap=wrap)
        self.grid(tile)  # what is wrong with the tiles is said now and not at the first step

    def __call__(self, x: Tensor, sigma: Levels, cond: Condition) -> Tensor:
        """The clean latents (B, C, h, w), in x's dtype, estimated from x at levels `sigma`."""
        parts = self.grid((x.shape[2], x.shape[3]))
        if len(parts.tiles) == 1:
            return self.whole(x, sigma, cond)
        return parts.blended(self._estimates(parts, x, sigma, cond)).to(x.dtype)

    def _estimates(self, parts: Grid, x: Tensor, sigma: Levels, cond: Condition) -> Iterator[Tensor]:
        """The estimate of each tile (B, C, tile, tile), in order."""
        for first in range(0, len(parts.tiles), self.tile_batch):
            numbers = range(first, min(first + self.tile_batch, len(parts.tiles)))
            tiles = torch.cat([parts.crop(x, number) for number in numbers])
            told = _told(parts, numbers, cond, x)
            levels = sigma.repeat(len(numbers)) if isinstance(sigma, Tensor) else sigma
            yield from self.whole(tiles, levels, told).chunk(len(numbers))


class Rolled(Denoiser):
    """A denoiser whose pictures have no edge in some axes: before each call they are rolled round.

    How far is a random number of cells, another one at every noise level, so that no place is always at the
    edge of what the network sees: how a transformer, which has no padding to change, draws pictures that
    tile. It depends on nothing but the level, so that a picture is the same in any batch; levels that are on
    a device are waited for.
    """

    def __init__(self, denoiser: Denoiser, axes: Axes) -> None:
        super().__init__(denoiser.network, denoiser.path, denoiser.prediction)
        self.whole, self.axes = denoiser, check_axes("axes", axes)

    def __call__(self, x: Tensor, sigma: Levels, cond: Condition) -> Tensor:
        """The clean latents (B, C, h, w), in x's dtype, estimated from x at levels `sigma`."""
        levels = sigma.tolist() if isinstance(sigma, Tensor) else [sigma] * len(x)
        shifts = [self.shift(level, x.shape[2], x.shape[3]) for level in levels]
        turn, back = partial(_roll, shifts=shifts), [(-down, -right) for down, right in shifts]
        extra = cond.extra
        if extra is not None and extra.reference is not None:
            _check_reference(extra.reference, x)
            extra = replace(extra, reference=turn(extra.reference))
        beside = None if cond.beside is None else turn(cond.beside)
        return _roll(self.whole(turn(x), sigma, replace(cond, extra=extra, beside=beside)), back)

    def shift(self, level: float, height: int, width: int) -> tuple[int, int]:
        """How many cells latents of this size are rolled down and to the right at a noise level."""
        # As float32: the same whether it comes from the host or from a tensor.
        down, right = raw_bits(2, 0, "roll", float(np.float32(level)).hex())
        return int(down) % height if "y" in self.axes else 0, int(right) % width if "x" in self.axes else 0


def _told(parts: Grid, numbers: Sequence[int], cond: Condition, x: Tensor) -> Condition:
    """What several tiles of all pictures are told, tile by tile: the pictures' own, what is seen cut out."""
    extra, beside = cond.extra, cond.beside
    reference = None if extra is None else extra.reference
    rows = torch.arange(len(x), device=x.device).repeat(len(numbers))
    bare = replace(cond, beside=None, extra=None if extra is None else replace(extra, reference=None))
    told = bare.take(rows)
    if beside is not None:
        told = replace(told, beside=torch.cat([parts.crop(beside, number) for number in numbers]))
    if reference is not None and told.extra is not None:
        _check_reference(reference, x)
        seen = torch.cat([parts.crop(reference, number) for number in numbers])
        told = replace(told, extra=replace(told.extra, reference=seen))
    return told


def _check_reference(reference: Tensor, x: Tensor) -> None:
    """A picture to edit is cut and rolled as the drawn one is, so it must be as large."""
    if reference.shape[2:] != x.shape[2:]:
        found, right = (f"{t.shape[3]}x{t.shape[2]}" for t in (reference, x))
        raise InputError(f"the reference has {found} latent cells: here it must have the picture's, {right}")


def _roll(pictures: Tensor, shifts: Sequence[tuple[int, int]]) -> Tensor:
    """Pictures (B, C, h, w), each rolled down and to the right by its own numbers of cells."""
    if len(set(shifts)) == 1:
        return pictures.roll(shifts[0], dims=(-2, -1))
    return torch.stack([p.roll(shift, dims=(-2, -1)) for p, shift in zip(pictures, shifts, strict=True)])
