"""What a decoder could draw at best: the latents z* whose image is nearest to a picture, found by descent.

An autoencoder loses in two places. The encoder may not find the best latents for its decoder: that loss is
the difference between D(z*) and D(E(x)). What D(z*) still lacks no encoder can give: it is the limit of the
decoder and of the size of the latents.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from darkroom.checkpoint.build import Autoencoder
from darkroom.evaluate.metrics import psnr, to_uint8
from darkroom.evaluate.reconstruction import to_image

STEPS = 100
LEARNING_RATE = 0.1  # of latents at unit scale, decayed to zero along a cosine


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """D(z*) of some pictures: uint8 (3, H, W) on the host, and the PSNR of each in dB."""

    images: tuple[Tensor, ...]
    each: tuple[float, ...]

    @property
    def psnr(self) -> float:
        """The mean over pictures, in dB."""
        return sum(self.each) / len(self.each)


def ceiling(
    autoencoder: Autoencoder,
    pictures: Sequence[Tensor],
    *,
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
    on_step: Callable[[], object] = lambda: None,
) -> Ceiling:
    """Find the best latents of each picture, uint8 (3, H, W) on the host, and decode them.

    `on_step` is called after each of `steps` steps of each picture.
    """
    images = []
    for picture in pictures:
        image = to_image(picture, next(autoencoder.parameters()))
        latents = best_latents(autoencoder, image, steps=steps, learning_rate=learning_rate, on_step=on_step)
        with torch.no_grad():
            images.append(to_uint8(autoencoder.decode(latents))[0].cpu())
    pairs = zip(pictures, images, strict=True)
    return Ceiling(images=tuple(images), each=tuple(psnr(p[None], i[None]).item() for p, i in pairs))


def best_latents(
    autoencoder: Autoencoder,
    image: Tensor,
    *,
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """The normalised latents, of the shape of E(image), whose decoded image is nearest to an image in −1..1.

    Adam (Kingma and Ba 2015) from E(image) on, with a learning rate that falls along half a cosine, on the
    squared error after clamping to −1..1. The best latents met are returned, E(image) among them, so that
    they are never worse. Through the nearest codes of a VQ autoencoder gradients pass straight. Nothing is
    random.
    """
    with torch.no_grad():
        z = autoencoder.encode(image)
    best, lowest = z, math.inf
    z = z.clone().requires_grad_()
    adam = torch.optim.Adam([z], lr=learning_rate)
    for step in range(steps + 1):
        loss = _error(autoencoder.decode(z), image)
        if loss.item() < lowest:
            best, lowest = z.detach().clone(), loss.item()
        if step == steps:
            break
        adam.param_groups[0]["lr"] = learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
        (z.grad,) = torch.autograd.grad(loss, z)
        adam.step()
        on_step()
    return best


def _error(made: Tensor, image: Tensor) -> Tensor:
    """The mean squared error of what would be saved; outside −1..1 gradients pass as if nothing were cut."""
    clamped = made + (made.clamp(-1, 1) - made).detach()
    return (clamped - image).square().mean()
