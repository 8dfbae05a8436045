"""What a model folder holds, read from the headers of its files alone."""

from dataclasses import dataclass
from pathlib import Path

from darkroom.checkpoint.io import count_elements, tensor_files
from darkroom.checkpoint.model import AUTOENCODER, DENOISER, TEXT_ENCODER, read_spec


@dataclass(frozen=True)
class Summary:
    """A model's default size, the `latent_shape` (C, h, w) there, counts of parameters, and bytes on disk."""

    width: int
    height: int
    latent_shape: tuple[int, int, int]
    autoencoder: int
    denoiser: int
    text_encoder: int
    size: int


def summarise(folder: Path) -> Summary:
    """Count what is in a model folder; raises InputError if one of its files is missing or damaged."""
    spec = read_spec(folder)
    space, defaults = spec.latent_space, spec.defaults
    counts = [count_elements(folder / name) for name in (AUTOENCODER, DENOISER, TEXT_ENCODER)]
    files = [file for name in (AUTOENCODER, DENOISER, TEXT_ENCODER) for file in tensor_files(folder / name)]
    return Summary(
        defaults.width,
        defaults.height,
        (space.channels, defaults.height // space.stride, defaults.width // space.stride),
        *counts,
        size=sum(file.stat().st_size for file in files),
    )
