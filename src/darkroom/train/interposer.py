"""Train an interposer: a few minutes on the latents that two autoencoders give the same pictures."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import trange

from darkroom.checkpoint.build import Autoencoder
from darkroom.errors import InputError, require_positive
from darkroom.evaluate.latent_fit import SMALLEST, fit
from darkroom.nn.interposer import Interposer, InterposerConfig, Translation
from darkroom.rng import torch_generator
from darkroom.train.optim import (
    OptimConfig,
    ParameterGroup,
    apply_gradients,
    build_optimizer,
    learning_rate,
    set_learning_rate,
)

MOST_PARAMETERS = 500_000
ENLARGED = 2.0  # a view shows its part of a picture at up to twice the size
GAIN, SHIFT = 0.3, 0.2  # how far a view's colours move, on −1..1


@dataclass(frozen=True, kw_only=True)
class InterposerTraining:
    """How an interposer is trained: on `views` of the pictures, squares of at most `cells` latent cells.

    A view is a part of a picture or all of it, resized, turned, mirrored, its colours changed. Raises
    InputError for numbers below 1.
    """

    steps: int = 2000
    batch_size: int = 16
    views: int = 512
    cells: int = 16
    width: int = 64
    blocks: int = 3
    lr: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "views", "cells", "width", "blocks")
        require_positive("interposer training", self, counts)


def train_interposer(
    old: Autoencoder, new: Autoencoder, pictures: Sequence[Tensor], training: InterposerTraining
) -> Interposer:
    """An interposer between the latents that `old` and `new` give pictures, both float32 on one device.

    `pictures` are uint8 (3, H, W) of any sizes. It starts from the affine maps that fit best, and learns both
    ways at once: squared errors, each over the variance of what is predicted. Raises InputError for an
    interposer of more than 500,000 parameters, and for pictures smaller than a cell or too few for the fit.
    """
    config = InterposerConfig(
        latent_channels=old.latent_space.channels, width=training.width, blocks=training.blocks
    )
    interposer = _started(config, training.seed)
    count = sum(parameter.numel() for parameter in interposer.parameters())
    if count > MOST_PARAMETERS:
        raise InputError(
            f"interposer: width {config.width} and {config.blocks} blocks make {count:,} parameters, "
            f"more than {MOST_PARAMETERS:,}"
        )
    known, theirs = view_latents(old, new, pictures, training)
    for translation, source, target in (
        (interposer.to_decoder, known, theirs),
        (interposer.to_denoiser, theirs, known),
    ):
        affine = fit("affine", list(source), list(target))
        translation.set_affine(affine.matrix, affine.bias)
    interposer.to(known.device)
    _learn(interposer, known, theirs, training)
    return interposer.eval().requires_grad_(False)


@torch.no_grad()
def view_latents(
    old: Autoencoder, new: Autoencoder, pictures: Sequence[Tensor], training: InterposerTraining
) -> tuple[Tensor, Tensor]:
    """Views of the pictures through both encoders: two tensors (views, C, h, w)."""
    weight, stride = next(old.parameters()), old.latent_space.stride
    least = min(min(picture.shape[1:]) for picture in pictures)
    side = min(training.cells, least // stride) * stride
    if not side:
        raise InputError(f"pictures of {least} pixels are smaller than the {stride} of a latent cell")
    pairs = []
    for batch in _batches(pictures, side, training):
        image = batch.to(weight)
        pairs.append((old.encode(image), new.encode(image)))
    known, theirs = zip(*pairs, strict=True)
    return torch.cat(known), torch.cat(theirs)


def _started(config: InterposerConfig, seed: int) -> Interposer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_generator("cpu", seed, "interposer").initial_seed())
        return Interposer(config)


def _learn(interposer: Interposer, known: Tensor, theirs: Tensor, training: InterposerTraining) -> None:
    config = OptimConfig(lr=training.lr, warmup_steps=training.steps // 20)
    groups = [ParameterGroup(list(interposer.parameters()))]
    optimizer = build_optimizer(groups, config)
    draws = torch_generator("cpu", training.seed, "batches")
    bar = trange(
        training.steps, desc="training the interposer", unit="step", delay=1, disable=None, leave=False
    )
    for step in bar:
        chosen = torch.randint(len(known), (training.batch_size,), generator=draws).to(known.device)
        a, b = known[chosen], theirs[chosen]
        loss = _loss(interposer.to_decoder, a, b) + _loss(interposer.to_denoiser, b, a)
        loss.backward()
        set_learning_rate(optimizer, learning_rate(config, step, training.steps))
        apply_gradients(optimizer, groups, config.grad_clip)
        if step % 50 == 0:
            bar.set_postfix(error=f"{math.sqrt(loss.item() / 2):.3f}")


def _loss(translation: Translation, source: Tensor, target: Tensor) -> Tensor:
    """The squared error over the variance about the channels' means, 1 − R² of the batch."""
    spread = target.var((0, 2, 3), correction=0).mean().clamp_min(SMALLEST)
    return (translation(source) - target).square().mean() / spread


def _batches(pictures: Sequence[Tensor], side: int, training: InterposerTraining) -> Iterator[Tensor]:
    """Views in −1..1, (B, 3, side, side)."""
    draws = torch_generator("cpu", training.seed, "views")
    with trange(
        training.views, desc="encoding views", unit="view", delay=1, disable=None, leave=False
    ) as bar:
        for start in range(0, training.views, training.batch_size):
            count = min(training.batch_size, training.views - start)
            chosen = [(start + k) % len(pictures) for k in range(count)]
            yield torch.stack([_view(pictures[k], side, draws) for k in chosen])
            bar.update(count)


def _view(picture: Tensor, side: int, draws: torch.Generator) -> Tensor:
    """A part of a picture, uint8 (3, H, W), as (3, side, side) in −1..1."""
    size, top, left, turns, mirrored, coloured = torch.rand(6, generator=draws).tolist()
    largest, smallest = min(picture.shape[1:]), max(1.0, side / ENLARGED)
    part = round(smallest * (largest / smallest) ** size)  # sizes spread evenly over their logarithm
    y, x = (
        round(place * (length - part)) for place, length in zip((top, left), picture.shape[1:], strict=True)
    )
    image = picture[:, y : y + part, x : x + part].float() / 127.5 - 1.0
    image = F.interpolate(image[None], size=(side, side), mode="bicubic", antialias=True)[0].clamp(-1, 1)
    image = image.rot90(int(turns * 4), (1, 2))
    image = image.flip(2) if mirrored < 0.5 else image
    return _coloured(image, draws) if coloured < 0.5 else image


def _coloured(image: Tensor, draws: torch.Generator) -> Tensor:
    """A view with its colours swapped, and each made stronger or weaker, lighter or darker."""
    moves = torch.rand(2, 3, 1, 1, generator=draws) * 2 - 1
    order = torch.randperm(3, generator=draws)
    return (image[order] * (1 + GAIN * moves[0]) + SHIFT * moves[1]).clamp(-1, 1)
