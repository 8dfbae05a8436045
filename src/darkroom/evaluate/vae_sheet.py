"""The places where reconstructions are worst, magnified side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from darkroom.evaluate.metrics import psnr
from darkroom.images import grid, magnified

CROPS = 6
SIDE = 32  # of a crop, in pixels
ZOOM = 4
APART = 4  # crops start at multiples of this
MARK = (255, 0, 60)


@dataclass(frozen=True)
class Column:
    """A column of the sheet: its label, and the pictures in their order, uint8 (3, H, W)."""

    label: str
    images: Sequence[Tensor]


@dataclass(frozen=True)
class Crop:
    """A square of SIDE pixels of picture number `picture`."""

    picture: int
    top: int
    left: int

    def of(self, images: Sequence[Tensor]) -> Tensor:
        """The crop of its picture among uint8 images (3, H, W)."""
        return images[self.picture][:, self.top : self.top + SIDE, self.left : self.left + SIDE]

    def overlaps(self, other: "Crop") -> bool:
        """Whether the two share pixels."""
        near = abs(self.top - other.top) < SIDE and abs(self.left - other.left) < SIDE
        return self.picture == other.picture and near


def sheet(
    pictures: Mapping[str, Tensor], columns: Sequence[Column], *, judged: Sequence[Column], crops: int = CROPS
) -> Image.Image:
    """A row for each crop: where it is, the original, and every column's with its PSNR, magnified.

    The crops are those of `worst_crops` for the columns `judged`.
    """
    originals, cells, labels = list(pictures.values()), [], []
    for crop in worst_crops(originals, [column.images for column in judged], crops):
        original = crop.of(originals)
        cells += [_located(originals[crop.picture], crop), _magnified(original)]
        labels += [list(pictures)[crop.picture], ""]
        for column in columns:
            made = crop.of(column.images)
            cells.append(_magnified(made))
            labels.append(f"{psnr(original[None], made[None]).item():.1f} dB")
    heads = ["picture", "original", *(column.label for column in columns)]
    return grid(cells, len(heads), labels=labels, column_labels=heads)


def worst_crops(originals: Sequence[Tensor], made: Sequence[Sequence[Tensor]], count: int) -> list[Crop]:
    """Up to `count` crops that share no pixels, where the squared error is largest.

    It is averaged over `made`, the reconstructions of each autoencoder, as a multiple of that one's error on
    all pictures, so that a bad one does not decide alone. The worst of every picture come first, then each
    one's second, so that one picture does not fill the sheet; within a round the largest error leads.
    """
    ranked: list[tuple[int, float, Crop]] = []
    for number, errors in enumerate(_errors(originals, made)):
        chosen: list[Crop] = []
        for error, crop in _candidates(number, errors):
            if len(chosen) < count and not any(crop.overlaps(other) for other in chosen):
                ranked.append((len(chosen), -error, crop))
                chosen.append(crop)
    return [crop for _, _, crop in sorted(ranked, key=lambda entry: entry[:2])[:count]]


def _errors(originals: Sequence[Tensor], made: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The error of each picture at its pixels, (H, W), averaged over autoencoders as in `worst_crops`."""
    totals = [torch.zeros(original.shape[1:], dtype=torch.float64) for original in originals]
    for images in made:
        pairs = zip(originals, images, strict=True)
        squares = [(image.double() - original.double()).square().mean(0) for original, image in pairs]
        typical = torch.stack([square.mean() for square in squares]).mean().clamp_min(1e-12)
        totals = [total + square / typical for total, square in zip(totals, squares, strict=True)]
    return [total / len(made) for total in totals]


def _candidates(number: int, pixels: Tensor) -> list[tuple[float, Crop]]:
    """Every crop of a picture with its mean error, the largest first, from the error (H, W) of its pixels."""
    errors = F.avg_pool2d(pixels[None], SIDE, stride=APART)[0]
    order = errors.flatten().sort(descending=True, stable=True)
    places = [divmod(index, errors.shape[1]) for index in order.indices.tolist()]
    return [
        (error, Crop(number, row * APART, column * APART))
        for error, (row, column) in zip(order.values.tolist(), places, strict=True)
    ]


def _located(picture: Tensor, crop: Crop) -> Image.Image:
    """A picture within the size of a magnified crop, with a frame around the crop."""
    side = SIDE * ZOOM
    image = magnified(_to_pil(picture), side)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    scale = image.width / picture.shape[2]
    left, top, right, bottom = (
        round(value * scale) for value in (crop.left, crop.top, crop.left + SIDE, crop.top + SIDE)
    )
    ImageDraw.Draw(image).rectangle((left, top, right - 1, bottom - 1), outline=MARK, width=2)
    return image


def _magnified(crop: Tensor) -> Image.Image:
    return magnified(_to_pil(crop), SIDE * ZOOM)


def _to_pil(picture: Tensor) -> Image.Image:
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
