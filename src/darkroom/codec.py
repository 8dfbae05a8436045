"""Pictures through an autoencoder and back: what the commands `encode` and `reconstruct` do."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from darkroom.checkpoint.build import Autoencoder
from darkroom.checkpoint.formats.io import save_tensors
from darkroom.checkpoint.load import load_any_autoencoder
from darkroom.config import to_json
from darkroom.data.folder import load_picture
from darkroom.errors import InputError
from darkroom.evaluate.metrics import psnr, to_uint8
from darkroom.images import error_picture, grid, to_pil, to_tensor

COLUMNS = ("original", "reconstruction", "error x4")


@dataclass(frozen=True)
class Reconstruction:
    """A picture, what the autoencoder makes of it, and how near that is: PSNR in dB of 8-bit values."""

    original: Image.Image
    reconstruction: Image.Image
    psnr: float


def encode_files(
    model: str | Path, images: Sequence[Path], out: Path, size: int | None = None
) -> dict[str, Tensor]:
    """Write the latents (C, h, w) of pictures, by the names given, to one safetensors file, and return them.

    The header holds the latent space, so that the file can be read without the model. `size` is as in
    `read_image`. Raises InputError for a picture that cannot be read or encoded, before anything is written.
    """
    autoencoder = load_any_autoencoder(model)
    latents = {
        str(path): _encode(autoencoder, read_image(path, autoencoder.config.stride, size))
        for path in _shown(images)
    }
    metadata = {"format": "pt", "latent_space": to_json(autoencoder.latent_space), "model": Path(model).name}
    save_tensors(out, latents, metadata)
    return latents


def reconstruct_files(
    model: str | Path, images: Sequence[Path], size: int | None = None
) -> list[Reconstruction]:
    """Encode and decode pictures; errors and `size` as in `encode_files`."""
    autoencoder = load_any_autoencoder(model)
    stride = autoencoder.config.stride
    return [_reconstruct(autoencoder, read_image(path, stride, size)) for path in _shown(images)]


def read_image(path: Path, stride: int, size: int | None = None) -> Tensor:
    """A picture file as (3, H, W) in −1..1; with `size`, its centre square at that size.

    Raises InputError if it cannot be read, or if a side does not divide by `stride`.
    """
    image = to_tensor(Image.fromarray(load_picture(path, size)))
    height, width = image.shape[1:]
    if height % stride or width % stride:
        found = f"{width}x{height}"
        raise InputError(f"{path}: {found} does not divide by the stride {stride}; with a size it is cropped")
    return image


def comparison(reconstructions: Sequence[Reconstruction]) -> Image.Image:
    """Each picture, its reconstruction and their difference side by side, one picture a row."""
    rows = [
        (r.original, r.reconstruction, error_picture(r.original, r.reconstruction)) for r in reconstructions
    ]
    labels = [f"{r.psnr:.1f} dB" for r in reconstructions]
    return grid(
        [image for row in rows for image in row], len(COLUMNS), column_labels=COLUMNS, row_labels=labels
    )


def _shown(images: Sequence[Path]) -> Iterable[Path]:
    """The files, with a progress bar when they take over a second."""
    return tqdm(images, unit="picture", delay=1)


@torch.no_grad()
def _encode(autoencoder: Autoencoder, image: Tensor) -> Tensor:
    return autoencoder.encode(image[None])[0]


@torch.no_grad()
def _reconstruct(autoencoder: Autoencoder, image: Tensor) -> Reconstruction:
    made = autoencoder.decode(autoencoder.encode(image[None]))
    value = psnr(to_uint8(image[None]), to_uint8(made)).item()
    return Reconstruction(to_pil(image)[0], to_pil(made)[0], value)
