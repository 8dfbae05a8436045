"""Previews of a drawing on its way: a latent to RGB matrix, which costs nothing, or a tiny autoencoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from darkroom.checkpoint.build import Autoencoder
from darkroom.config import from_json, to_json
from darkroom.errors import InputError
from darkroom.evaluate.latent_fit import cross_fitted, fit
from darkroom.evaluate.metrics import psnr, to_uint8
from darkroom.files import atomic_write, read_text
from darkroom.images import grid, to_pil
from darkroom.nn.latent_space import LatentSpace
from darkroom.progress import Progress

SIDECAR = "preview.json"
LARGEST = 256  # pixels a side of a preview's file, unless it is larger itself
CHANNELS = 3


class Previewer(Protocol):
    """What shows latents as pictures, cheaply."""

    def __call__(self, latents: Tensor) -> list[Image.Image]:
        """Latents (B, C, h, w), as the denoiser knows them, as pictures of any size."""
        ...


@dataclass(frozen=True, kw_only=True)
class LatentRGB:
    """An affine map of each latent cell to the mean colour of its pixels, −1..1.

    `matrix` has a row of (red, green, blue) for each latent channel. Raises InputError for rows of another
    length.
    """

    matrix: tuple[tuple[float, ...], ...]
    bias: tuple[float, ...] = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        if not self.matrix or {len(row) for row in (*self.matrix, self.bias)} != {CHANNELS}:
            raise InputError("`matrix` must have a row of 3 numbers for each channel, and `bias` 3 numbers")

    def image(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to an image (B, 3, h, w) in about −1..1, on their device.

        Raises InputError for another number of channels.
        """
        if latents.shape[1] != len(self.matrix):
            raise InputError(f"this preview is of {len(self.matrix)} latent channels, not {latents.shape[1]}")
        matrix = torch.tensor(self.matrix, device=latents.device).T[:, :, None, None]
        return F.conv2d(latents.float(), matrix, torch.tensor(self.bias, device=latents.device))

    def __call__(self, latents: Tensor, *, scale: int = 1, smooth: bool = False) -> list[Image.Image]:
        """Latents (B, C, h, w) as pictures of `scale` pixels for each cell, hard-edged or `smooth`."""
        how = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
        return [enlarged(image, scale, how) for image in to_pil(self.image(latents))]


@dataclass(frozen=True)
class TinyPreview:
    """Previews by a tiny autoencoder of the same latent space, such as TAESD: sharp, at a price."""

    autoencoder: Autoencoder

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> list[Image.Image]:
        """Latents (B, C, h, w) as pictures at full size; InputError for another number of channels."""
        channels = self.autoencoder.latent_space.channels
        if latents.shape[1] != channels:
            raise InputError(f"this preview is of {channels} latent channels, not {latents.shape[1]}")
        weight = next(self.autoencoder.parameters())
        return to_pil(self.autoencoder.decode(latents.to(weight)))


@dataclass(frozen=True)
class PreviewFile:
    """An `on_step` that keeps a PNG of how the drawing stands, replaced whole on every `every`-th step.

    It shows the estimate of the clean latents, all pictures of the batch as a grid.
    """

    path: Path
    previewer: Previewer
    every: int = 1

    def __call__(self, progress: Progress) -> None:
        """Write the preview of a step, if it is one of those to show, or the last."""
        if progress.done % self.every and progress.done != progress.total:
            return
        images = self.previewer(progress.step.denoised)
        scale = max(1, LARGEST // (max(images[0].size) * _columns(len(images))))
        images = [enlarged(image, scale, Image.Resampling.BILINEAR) for image in images]
        image = images[0] if len(images) == 1 else grid(images, _columns(len(images)))
        with atomic_write(self.path) as draft:
            image.save(draft, format="PNG", compress_level=1)  # a few ms instead of 30


@dataclass(frozen=True)
class Fit:
    """A fitted preview, and the mean PSNR in dB of previews of pictures that the fit had not seen.

    They are held against the pictures averaged over each latent cell.
    """

    colours: LatentRGB
    psnr: float


@torch.no_grad()
def fit_preview(autoencoder: Autoencoder, images: Sequence[Tensor]) -> Fit:
    """Fit a matrix, by least squares, from pictures (3, H, W) in −1..1 whose sides divide by the stride.

    The PSNR is of pictures of even and odd number, predicted by each other's fit. Raises InputError where
    there are too few latent cells.
    """
    weight = next(autoencoder.parameters())
    latents = [autoencoder.encode(image[None].to(weight))[0].float() for image in images]
    small = [F.avg_pool2d(image, autoencoder.latent_space.stride) for image in images]
    whole = fit("affine", latents, small)
    held_out = cross_fitted("affine", latents, small)
    values = [
        psnr(to_uint8(a[None]), to_uint8(b[None].cpu())).item() for a, b in zip(small, held_out, strict=True)
    ]
    matrix = tuple(tuple(float(f"{v:.6g}") for v in row) for row in whole.matrix.T.tolist())
    bias = tuple(float(f"{v:.6g}") for v in whole.bias.tolist())
    return Fit(LatentRGB(matrix=matrix, bias=bias), sum(values) / len(values))


def sidecar(model: Path) -> Path:
    """Where the preview of a model's folder or file is kept: in the folder, or beside the file."""
    return model / SIDECAR if model.is_dir() else model.with_name(f"{model.name}.{SIDECAR}")


def save_preview(path: Path, colours: LatentRGB) -> None:
    """Write a matrix as JSON, whole or not at all."""
    with atomic_write(path) as draft:
        draft.write_text(to_json(colours) + "\n", encoding="utf-8")


def load_preview(path: Path) -> LatentRGB:
    """Read what `save_preview` wrote; raises InputError naming the file if it is something else."""
    return from_json(read_text(path), LatentRGB, where=str(path))


def find_preview(model: Path, space: LatentSpace) -> LatentRGB:
    """The matrix of a model: the one kept with it, else a published one of its latent space.

    Raises InputError, which says how to make one, where there is none.
    """
    kept = sidecar(model)
    if kept.is_file():
        return load_preview(kept)
    published = PUBLISHED.get((space.channels, space.stride, space.mean[0], round(1 / space.std[0], 5)))
    if published is None:
        raise InputError(f"{model}: no preview is kept with it: `darkroom preview fit {model}` makes one")
    return published


def enlarged(image: Image.Image, scale: int, how: Image.Resampling) -> Image.Image:
    """A picture at a whole multiple of its size."""
    return image if scale == 1 else image.resize((image.width * scale, image.height * scale), how)


def _columns(count: int) -> int:
    return max(n for n in range(1, count + 1) if (n - 1) ** 2 < count)


def _of_bytes(weights: Sequence[Sequence[int]], bias: Sequence[int]) -> LatentRGB:
    """A matrix that was published as a row for each colour, for values of 0..255."""
    matrix = tuple(tuple(value / 127.5 for value in column) for column in zip(*weights, strict=True))
    return LatentRGB(matrix=matrix, bias=tuple(value / 127.5 - 1 for value in bias))


# By channels, stride, shift and factor of the latent space. SD 1's: Metzer et al. 2022 (Latent-NeRF), after a
# post in the forum of Hugging Face. SDXL's: the documentation of diffusers, after T. A. Vass.
PUBLISHED = {
    (4, 8, 0.0, 0.18215): LatentRGB(
        matrix=(
            (0.298, 0.207, 0.208),
            (0.187, 0.286, 0.173),
            (-0.158, 0.189, 0.264),
            (-0.184, -0.271, -0.473),
        )
    ),
    (4, 8, 0.0, 0.13025): _of_bytes(
        ((60, -60, 25, -70), (60, -5, 15, -50), (60, 10, -5, -35)), (150, 140, 130)
    ),
}
