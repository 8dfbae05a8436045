"""Enlarging pictures by a learned upscaler, tile by tile."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from darkroom.checkpoint.upscalers import Upscaler
from darkroom.errors import InputError
from darkroom.tiling import Grid, grid

TILE, OVERLAP = 256, 48


def upscale(upscaler: Upscaler, image: Tensor, *, tile: int = TILE, overlap: int = OVERLAP) -> Tensor:
    """Images (B, 3, H, W) in −1..1 to (B, 3, H·scale, W·scale), float32 on the images' device.

    The network runs where its weights are, and in their dtype, on squares of `tile` pixels that share
    `overlap` or more: the outer third of that is context and thrown away, in the middle third one square
    fades into the next. Where a third is as much as the network sees around a pixel, the result is that of
    one whole pass.
    Raises InputError for images of other shapes, and for tiles that cannot be.
    """
    if image.ndim != 4 or image.shape[1] != 3 or not image.is_floating_point():
        raise InputError(f"an image to enlarge must be (B, 3, H, W), floating, not {tuple(image.shape)}")
    parts = grid((image.shape[2], image.shape[3]), (tile, tile), overlap)
    larger = parts.scaled(upscaler.scale)
    with torch.no_grad():
        drawn = larger.blended(_tiles(upscaler, image, parts), unused=overlap // 3 * upscaler.scale)
    return drawn.clamp_(-1, 1)


def _tiles(upscaler: Upscaler, image: Tensor, parts: Grid) -> Iterator[Tensor]:
    """Each tile, enlarged, in −1..1."""
    for number in range(len(parts.tiles)):
        yield _whole(upscaler, parts.crop(image, number)) * 2 - 1


def _whole(upscaler: Upscaler, image: Tensor) -> Tensor:
    """An image in −1..1, enlarged in one pass, in 0..1, float32.

    Sides that the network does not take are padded by repeating the last row and column, and cut again.
    """
    weight = next(upscaler.network.parameters())
    height, width = image.shape[2:]
    edges = (0, -width % upscaler.multiple, 0, -height % upscaler.multiple)
    seen = F.pad((image.to(weight.device, torch.float32) + 1) / 2, edges, mode="replicate")
    drawn = upscaler.network(seen.to(weight.dtype))
    drawn = drawn[:, :, : height * upscaler.scale, : width * upscaler.scale]
    return drawn.to(image.device, torch.float32)
