"""Pictures larger than a model was trained for: which tiles, and encoding and decoding them tile by tile."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.checkpoint.build import Autoencoder
from darkroom.checkpoint.model import Model
from darkroom.diffusion.tiled import TILE_BATCH, Tiled
from darkroom.errors import InputError
from darkroom.nn.unet import UNetConfig
from darkroom.request import Request, patch_size, size_multiple
from darkroom.runtime.seamless import is_seamless
from darkroom.runtime.shared_norms import settle, with_shared_norms
from darkroom.tiling import Axes, Grid, grid

# Cells of latents that neighbouring tiles of an autoencoder share.
TILE_CELLS, OVERLAP_CELLS = 64, 16
MOST_SPREAD = 4.0  # by which a small version's deviations are multiplied: beyond, there is but noise


@dataclass(frozen=True, kw_only=True)
class TilePlan:
    """How a model draws a picture of a size in tiles, everything in latent cells; see `plan`."""

    tile: tuple[int, int]
    overlap: int
    multiple: int
    wrap: Axes | None
    grid: Grid

    @property
    def count(self) -> int:
        """How many tiles there are: what a step costs, in calls of the network."""
        return len(self.grid.tiles)


def plan(
    model: Model,
    width: int,
    height: int,
    *,
    tile: tuple[int, int] | None = None,
    overlap: int | None = None,
    wrap: Axes | None = None,
) -> TilePlan:
    """The tiles in which a model draws a picture of `width` x `height`, all in pixels.

    Each is `tile` (width, height), the model's own size unless given, and shares `overlap` or more with the
    next, a quarter of the tile's shorter side unless given. `wrap` as in `darkroom.diffusion.tiled.Tiled`.
    Raises InputError for sizes that the model cannot draw, also those below its minimum, and an overlap that
    is not below the tile.
    """
    stride, step, least = model.spec.latent_space.stride, size_multiple(model), smallest(model)
    tile = tile or (model.spec.defaults.width, model.spec.defaults.height)
    overlap = min(tile) // 4 if overlap is None else overlap
    for name, value in (
        ("width", width),
        ("height", height),
        ("tile width", tile[0]),
        ("tile height", tile[1]),
    ):
        if value < least:
            raise InputError(f"{name} = {value} is below this model's minimum of {least} pixels")
        if value % step:
            raise InputError(f"{name} = {value} must divide by {step} for this model")
    if not 0 <= overlap < min(tile):
        raise InputError(
            f"overlap = {overlap} must be 0 or more, and less than the tile's {min(tile)} pixels"
        )
    cells = (tile[1] // stride, tile[0] // stride)
    shared, multiple = -(-overlap // stride), step // stride
    # Rounded up to cells, an overlap just below a small tile would be all of it.
    shared = min(shared, min(cells) - multiple)
    parts = grid((height // stride, width // stride), cells, shared, multiple=multiple, wrap=wrap)
    return TilePlan(tile=cells, overlap=shared, multiple=multiple, wrap=wrap, grid=parts)


def plan_of(request: Request, model: Model) -> TilePlan:
    """The tiles of a request that is drawn in tiles; InputError as `plan`."""
    assert request.tile is not None
    size, side = (request.width, request.height), (request.tile, request.tile)
    return plan(model, *size, tile=side, overlap=request.tile_overlap, wrap=request.seamless)


def smallest(model: Model) -> int:
    """The smallest side in pixels that a model's network can draw: one position at its innermost level."""
    config = model.network.config
    cells = 2 ** (len(config.channels) - 1) if isinstance(config, UNetConfig) else patch_size(model)
    return cells * model.spec.latent_space.stride


def tiled_model(model: Model, tiles: TilePlan, *, tile_batch: int = TILE_BATCH) -> Model:
    """The model with a denoiser that works tile by tile; it shares the model's weights.

    Raises InputError for a model that draws seamless pictures: its tiles would each tile by themselves.
    """
    if is_seamless(model.network):
        raise InputError("this model draws seamless pictures already: tile the model itself, with `wrap`")
    denoiser = Tiled(
        model.denoiser,
        tiles.tile,
        tiles.overlap,
        tile_batch=tile_batch,
        multiple=tiles.multiple,
        wrap=tiles.wrap,
    )
    return replace(model, denoiser=denoiser)


def decode(
    autoencoder: Autoencoder,
    latents: Tensor,
    *,
    tile: int = TILE_CELLS,
    overlap: int = OVERLAP_CELLS,
    wrap: Axes | None = None,
) -> Tensor:
    """Latents (B, C, h, w) to images (B, 3, H, W) in about −1..1, float32, in tiles of `tile` latent cells.

    The memory it takes is that of one tile. Neighbours share `overlap` cells or more: the outer third of
    that is context and thrown away, in the middle third one tile fades into the next. Group norms go by a
    small version of the whole picture, which is decoded first: tiles measured one by one would differ in
    brightness and contrast. Attention sees its tile. Raises InputError for tiles that cannot be.
    """
    cells = grid((latents.shape[2], latents.shape[3]), (tile, tile), overlap, wrap=wrap)
    stride, unused = autoencoder.latent_space.stride, overlap // 3
    made = _each(autoencoder, lambda network, part: network.decode(part), latents, cells, 1)
    return cells.scaled(stride).blended(made, unused=unused * stride)


def encode(
    autoencoder: Autoencoder,
    image: Tensor,
    *,
    tile: int = TILE_CELLS,
    overlap: int = OVERLAP_CELLS,
    wrap: Axes | None = None,
) -> Tensor:
    """Images (B, 3, H, W) in −1..1 to latents (B, C, h, w), float32, in tiles of `tile` latent cells.

    As `decode`, the other way. Raises InputError for tiles that cannot be, and sides that are no whole number
    of latent cells.
    """
    stride = autoencoder.latent_space.stride
    height, width = image.shape[2:]
    if height % stride or width % stride:
        raise InputError(
            f"an image of {width}x{height} is no whole number of latent cells of {stride} pixels"
        )
    cells = grid((height // stride, width // stride), (tile, tile), overlap, wrap=wrap)
    made = _each(autoencoder, lambda network, part: network.encode(part), image, cells.scaled(stride), stride)
    return cells.blended(made, unused=overlap // 3)


def _each(
    autoencoder: Autoencoder,
    run: Callable[[Autoencoder, Tensor], Tensor],
    picture: Tensor,
    parts: Grid,
    multiple: int,
) -> Iterator[Tensor]:
    """What an autoencoder makes of each tile of a picture."""
    with torch.no_grad():
        if len(parts.tiles) > 1 and any(isinstance(part, nn.GroupNorm) for part in autoencoder.modules()):
            autoencoder = with_shared_norms(autoencoder)
            run(autoencoder, _small(picture, parts.rows.tile * parts.columns.tile, multiple))
            settle(autoencoder)
        for number in range(len(parts.tiles)):
            yield run(autoencoder, parts.crop(picture, number))


def _small(picture: Tensor, area: int, multiple: int) -> Tensor:
    """A picture (B, C, H, W) in at most about so many places, its channels' means and deviations kept.

    Averaging over places would take some of the variance away, which norms are about. Sides are multiples of
    `multiple`.
    """
    shrink = min(1.0, (area / (picture.shape[2] * picture.shape[3])) ** 0.5)
    size = [max(1, round(side * shrink / multiple)) * multiple for side in picture.shape[2:]]
    small = F.interpolate(picture.float(), size=size, mode="area")
    spread, mean = torch.std_mean(picture.float(), dim=(2, 3), keepdim=True)
    small_spread, small_mean = torch.std_mean(small, dim=(2, 3), keepdim=True)
    ratio = torch.where(small_spread > 0, spread / small_spread, 1.0).clamp(max=MOST_SPREAD)
    return ((small - small_mean) * ratio + mean).to(picture.dtype)
