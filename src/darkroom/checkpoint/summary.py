"""What models hold: bundled ones, counted from the headers of their files, and families, from their
configs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from darkroom.checkpoint.build import (
    AutoencoderConfig,
    NetworkConfig,
    TextConfig,
    Unfilled,
    build_autoencoder,
    build_network,
    build_text_encoder,
)
from darkroom.checkpoint.formats.io import count_elements, tensor_files
from darkroom.checkpoint.model import AUTOENCODER, DENOISER, TEXT_ENCODER, numbered, read_spec
from darkroom.families import FAMILIES, Family
from darkroom.family_parts import TINY_AUTOENCODERS
from darkroom.presets import CARDS, bundled

COMMON_SIZE = 512  # pixels a side, to compare latents of all families at


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
    texts = []
    while any(folder.glob(f"{numbered(TEXT_ENCODER, len(texts))}.safetensors*")):
        texts.append(folder / f"{numbered(TEXT_ENCODER, len(texts))}.safetensors")
    parts = [folder / AUTOENCODER, folder / DENOISER, *texts]
    autoencoder, denoiser, *encoders = (count_elements(part) for part in parts)
    size = sum(file.stat().st_size for part in parts for file in tensor_files(part))
    shape = spec.latent_space.shape(spec.defaults.height, spec.defaults.width)
    return Summary(
        spec.defaults.width, spec.defaults.height, shape, autoencoder, denoiser, sum(encoders), size
    )


def bundled_rows() -> Iterator[tuple[str, ...]]:
    """The models of the package as a table, its columns' names first."""
    yield (
        "name",
        "year",
        "picture",
        "latents",
        "autoencoder",
        "denoiser",
        "text encoder",
        "on disk",
        "licence",
    )
    for name, folder in bundled().items():
        s, card = summarise(folder), CARDS[name]
        counts = [_count(count) for count in (s.autoencoder, s.denoiser, s.text_encoder)]
        size, megabytes = f"{s.width}x{s.height}", f"{s.size / 1e6:.1f} MB"
        yield (name, str(card.year), size, _shape(s.latent_shape), *counts, megabytes, card.licence)


def family_rows() -> Iterator[tuple[str, ...]]:
    """The families that can be loaded as a table, its columns' names first; parameters are counted."""
    yield (
        "family",
        "model",
        "year",
        f"latents at {COMMON_SIZE}",
        "at its size",
        "network",
        "autoencoder",
        "text",
        "licence",
        "note",
    )
    for name, family in FAMILIES.items():
        spec = family.spec
        width, height = spec.defaults.width, spec.defaults.height
        yield (
            name,
            family.title,
            str(family.year),
            _shape(spec.latent_space.shape(COMMON_SIZE, COMMON_SIZE)),
            f"{_shape(spec.latent_space.shape(height, width))} ({width})",
            f"{family.network.kind} {_count(parameters(family.network))}",
            _count(parameters(family.autoencoder)),
            _texts(family),
            family.licence,
            family.note,
        )


def tiny_rows() -> Iterator[tuple[str, ...]]:
    """The tiny autoencoders as a table, its columns' names first."""
    yield ("name", "in the place of the autoencoder of", f"latents at {COMMON_SIZE}", "parameters", "licence")
    for name, (families, config) in TINY_AUTOENCODERS.items():
        side = COMMON_SIZE // config.stride
        shape = _shape((config.latent_channels, side, side))
        yield (name, families, shape, _count(parameters(config)), "MIT")


@cache
def parameters(config: NetworkConfig | AutoencoderConfig | TextConfig) -> int:
    """How many numbers a network of this config learns; it is built on `meta`, so it takes no memory."""
    with torch.device("meta"), Unfilled():
        if isinstance(config, NetworkConfig):
            network = build_network(config)
        else:
            text = isinstance(config, TextConfig)
            network = build_text_encoder(config) if text else build_autoencoder(config)
    return sum(parameter.numel() for parameter in network.parameters())


def _texts(family: Family) -> str:
    texts = [f"{role} {_count(parameters(config))}" for role, config in family.texts.items()]
    return " + ".join(texts) or "none"


def _count(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
