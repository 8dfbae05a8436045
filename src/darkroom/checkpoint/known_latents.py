"""Latents of known pictures, and what a network is told with them: what `measure` denoises."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from darkroom.checkpoint.build import Autoencoder, Network
from darkroom.checkpoint.model import DenoiserSpec, Model
from darkroom.data.shapes import ShapesSource
from darkroom.diffusion.denoiser import Condition
from darkroom.evaluate.paths import picture_files
from darkroom.evaluate.vae_compare import read_pictures
from darkroom.inputs import ENLARGING, Pictures, Shown, shown
from darkroom.nn.dit import DiTConfig
from darkroom.nn.extra import Extra
from darkroom.nn.latent_space import LatentSpace
from darkroom.request import size_multiple
from darkroom.rng import normal
from darkroom.text.conditioning import Told

CELLS = 32  # latents a side, at most: enough to tell, and a quarter of the work of the usual size
SCENES = 6  # simple pictures beside the drawn handful, for models of simple pictures
FIELDS = 6
MOST = 60  # pictures
TOKENS = 77


@torch.no_grad()
def known_latents(model: Model, images: Sequence[Path] = ()) -> tuple[Tensor, Condition]:
    """Latents (N, C, h, w) of pictures, float32 on the network's device, and their condition without prompt.

    `images` are files and folders; without any, a dozen pictures are drawn. Raises InputError for what cannot
    be read.
    """
    image = square_images(model.spec, size_multiple(model), images).to(_device(model.network))
    latents = encoded(model.autoencoder, image)
    return latents, _shown(model, image).on(_no_prompt(model, image))


def square_images(spec: DenoiserSpec, multiple: int, images: Sequence[Path] = ()) -> Tensor:
    """Pictures (N, 3, H, H) in −1..1, at the model's size or smaller, a multiple of so many pixels."""
    most = min(spec.defaults.width, spec.defaults.height, CELLS * spec.latent_space.stride)
    side = most // multiple * multiple
    files = picture_files(images)[:MOST]
    pictures = list(read_pictures(files or images, stride=multiple, size=side).values())
    if not images:
        pictures += list(ShapesSource(count=SCENES).pictures(side).images)
    return torch.stack(pictures).float() / 127.5 - 1


@torch.no_grad()
def encoded(autoencoder: Autoencoder, image: Tensor) -> Tensor:
    """Latents (N, C, h, w) of images (N, 3, H, W), float32 on their device, encoded one at a time."""
    autoencoder.to(image.device)
    dtype = next(autoencoder.parameters()).dtype
    return torch.cat([autoencoder.encode(one.to(dtype)).float() for one in image.split(1)])


def random_latents(space: LatentSpace, cells: int = CELLS) -> Tensor:
    """Smooth random fields (N, C, cells, cells) of unit variance, amplitudes falling with the frequency, for
    where there is no autoencoder.
    """
    frequency = np.hypot(np.fft.fftfreq(cells)[:, None], np.fft.rfftfreq(cells)[None])
    frequency[0, 0] = 1 / cells
    noise = normal((FIELDS, space.channels, cells, cells), 0, "fields")
    fields = torch.from_numpy(np.fft.irfft2(np.fft.rfft2(noise) / frequency, (cells, cells))).float()
    return (fields - fields.mean()) / fields.std()


def no_condition(network: Network, latents: Tensor) -> Condition:
    """What a network is told of each of the latents where its text encoders are missing: zeros of the right
    widths.
    """
    config, count = network.config, len(latents)
    context, pooled = getattr(config, "context_dim", None), getattr(config, "pooled_dim", None)
    classes, beside = getattr(config, "num_classes", None), config.in_channels - latents.shape[1]
    labels = latents.new_zeros(count).long()
    if isinstance(config, DiTConfig) and config.num_classes is not None:
        labels += config.num_classes  # no class
    extra = Extra(
        pooled=None if pooled is None else latents.new_zeros(count, pooled),
        class_labels=None if classes is None else labels,
        guidance=latents.new_ones(count) if getattr(config, "guidance", False) else None,
    )
    return Condition(
        None if context is None else latents.new_zeros(count, TOKENS, context),
        extra,
        latents.new_zeros(count, beside, *latents.shape[2:]) if beside else None,
    )


def _no_prompt(model: Model, image: Tensor) -> Condition:
    """The condition of the empty prompt for each of the images."""
    conditioning, device = model.spec.conditioning, image.device
    for part in model.texts:
        part.encoder.to(device)
    ids = tuple(tensor.to(device) for tensor in conditioning.tokens(model.texts, [""]))
    told = Told(height=image.shape[2], width=image.shape[3])
    blank = torch.ones(1, dtype=torch.bool, device=device)
    return conditioning.condition(model.texts, ids, told, blank).take(
        torch.zeros(len(image)).long().to(device)
    )


def _shown(model: Model, image: Tensor) -> Shown:
    """What is seen beside the latents: everything masked, flat depth, grey edges, the picture made small."""
    kind, space = model.spec.beside, model.spec.latent_space
    flat = image.new_zeros(1, 1, *image.shape[2:])
    small = F.interpolate(image, scale_factor=1 / space.stride, mode="area")
    pictures = Pictures(
        image=small if kind in ENLARGING else None if kind == "reference" else flat.expand(-1, 3, -1, -1),
        mask=flat + 1,
        control=flat.expand(-1, 3, -1, -1),
        noise_level=0,
    )
    encode = partial(encoded, model.autoencoder)
    return shown(kind, pictures, len(image), space, encode=encode, draw=torch.zeros_like)


def _device(network: Network) -> torch.device:
    return next(network.parameters()).device
