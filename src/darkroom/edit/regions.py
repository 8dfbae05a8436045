"""Regions: parts of a picture with prompts of their own, and how much each prompt counts at every place."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from darkroom.errors import InputError
from darkroom.inputs import read_picture

Box = tuple[float, float, float, float]

MODES = ("1", "L")  # of masks as pictures


@dataclass(frozen=True, kw_only=True)
class Region:
    """A prompt for a part of a picture: a `box`, or where `mask` is white.

    A box is left, top, right, bottom as fractions of the picture's width and height. A mask is a picture in
    grey, or a tensor (1, H, W) in 0..1, as large as the drawn picture. `weight` is how much the prompt counts
    against the others at the same place (see `region_masks`). Raises InputError unless there is one of the
    two, for a box that is empty or reaches beyond the picture, a mask of colours, and a weight that is not
    above 0.
    """

    prompt: str
    box: Box | None = None
    mask: Image | Tensor | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if (self.box is None) == (self.mask is None):
            raise InputError(f"{self._name} needs a box or a mask, and not both")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise InputError(f"{self._name}: weight must be above 0, not {self.weight}")
        if self.box is not None:
            self._check_box(self.box)
        if isinstance(self.mask, Image) and self.mask.mode not in MODES:
            raise InputError(
                f"{self._name}: its mask is a picture of mode {self.mask.mode}, and must be in grey: "
                "convert it to mode L"
            )

    @property
    def _name(self) -> str:
        """What messages call it."""
        return f"region {self.prompt!r:.60}"

    def _check_box(self, box: Box) -> None:
        if len(box) != 4 or not all(0 <= side <= 1 for side in box):
            raise InputError(f"{self._name}: box {box} must be left, top, right, bottom, each in 0 ... 1")
        left, top, right, bottom = box
        if left >= right or top >= bottom:
            raise InputError(
                f"{self._name}: box {box} is empty: left must be below right, and top below bottom"
            )

    def coverage(self, height: int, width: int, stride: int) -> Tensor:
        """How much of each latent cell it covers, float32 (1, 1, h, w), for a picture of this size in pixels.

        Raises InputError for a mask of another size, or one that covers nothing.
        """
        if self.box is not None:
            left, top, right, bottom = self.box
            down, across = _covered(top, bottom, height // stride), _covered(left, right, width // stride)
            return (down[:, None] * across)[None, None]
        mask = read_picture("mask", self.mask, None).cpu()
        if tuple(mask.shape) != (1, 1, height, width):
            found, many = (
                f"{mask.shape[3]}x{mask.shape[2]}",
                f"{len(mask)} masks of " if len(mask) > 1 else "",
            )
            raise InputError(f"{self._name}: its mask is {many}{found}, and the picture is {width}x{height}")
        if not bool((mask > 0).any()):
            raise InputError(f"{self._name}: its mask is black everywhere, so the region is empty")
        return F.avg_pool2d(mask.clamp(0, 1), stride)


@dataclass(frozen=True)
class RegionMasks:
    """How much each prompt counts at each latent cell: `base`, the picture's own, and `regions` in order.

    Each is (1, 1, h, w) float32; at every cell they add up to 1.
    """

    base: Tensor
    regions: tuple[Tensor, ...]


def region_masks(
    regions: Sequence[Region],
    height: int,
    width: int,
    stride: int,
    *,
    base_weight: float = 0.0,
    feather: float = 0.0,
    device: torch.device | str = "cpu",
) -> RegionMasks:
    """How much each region's prompt and the picture's own count, for a picture of this size in pixels.

    The picture's own prompt has `base_weight` everywhere, and 1 less the coverage where regions leave room;
    a region has its weight times its coverage; then all are divided by their sum. `feather` softens the
    regions' edges by a Gaussian of so many pixels (standard deviation). Raises InputError for masks of
    another size or without any white, numbers below 0, and sides that are not whole latent cells.
    """
    if height % stride or width % stride or min(height, width) < stride:
        raise InputError(
            f"{width}x{height} is no whole number of latent cells, which are {stride} pixels wide"
        )
    for name, value in (("base_weight", base_weight), ("feather", feather)):
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"{name} must be 0 or more, not {value}")
    covers = [_softened(region.coverage(height, width, stride), feather / stride) for region in regions]
    shape = (1, 1, height // stride, width // stride)
    left_over = (1 - sum(covers, torch.zeros(shape))).clamp(min=0)
    raw = [region.weight * cover for region, cover in zip(regions, covers, strict=True)]
    base = base_weight + left_over
    total = base + sum(raw, torch.zeros(shape))
    shares = tuple((part / total).to(device) for part in raw)
    # The rest, so that rounding is not missing anywhere.
    rest = (1 - sum(shares, torch.zeros(shape, device=device))).clamp(min=0)
    return RegionMasks(rest, shares)


def _covered(first: float, last: float, cells: int) -> Tensor:
    """How much of each of so many cells lies between two fractions of a side, float32 (cells,)."""
    edges = torch.arange(cells, dtype=torch.float64)
    inside = (edges + 1).clamp(max=last * cells) - edges.clamp(min=first * cells)
    return inside.clamp(0, 1).float()


def _softened(cover: Tensor, spread: float) -> Tensor:
    """A mask (1, 1, h, w) blurred by a Gaussian of so many cells; past the edges it goes on as it ends."""
    reach = math.ceil(3 * spread)
    if not reach:
        return cover
    places = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (places / spread) ** 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(cover, (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel[None, None, None]), kernel[None, None, :, None])
