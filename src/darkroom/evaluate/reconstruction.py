"""What an autoencoder keeps of pictures, in numbers: the figures by which two autoencoders are compared."""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from darkroom.checkpoint.build import Autoencoder
from darkroom.evaluate.metrics import gmsd, psnr, ssim, to_uint8
from darkroom.runtime.precision import computes_in

HALVES = (torch.bfloat16, torch.float16)

# A distance (B,) of images (B, 3, H, W) in −1..1, such as `load_perceptual` gives.
Distance = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How near a reconstruction is to its picture: PSNR in dB, SSIM, GMSD and, if given one, a distance.

    Larger is better for PSNR and SSIM, smaller for GMSD and the perceptual distance.
    """

    psnr: float
    ssim: float
    gmsd: float
    perceptual: float | None = None


@dataclass(frozen=True, kw_only=True)
class LatentStatistics:
    """Mean and standard deviation of the normalised latents, by channel, and the largest magnitude of all."""

    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...]
    largest: float

    @property
    def mean(self) -> float:
        """The mean over all channels."""
        return sum(self.channel_mean) / len(self.channel_mean)

    @property
    def std(self) -> float:
        """The standard deviation over all channels together."""
        pairs = zip(self.channel_mean, self.channel_std, strict=True)
        return math.sqrt(sum(m * m + s * s for m, s in pairs) / len(self.channel_mean) - self.mean**2)


@dataclass(frozen=True, kw_only=True)
class Reconstructed:
    """One autoencoder on some pictures.

    `images` are its reconstructions, uint8 (3, H, W) on the host, and `each` how near each of them is, in the
    pictures' order. `finite` says by the dtype's name ("float16") whether all reconstructions are finite in
    it; None where the device does not compute in it.
    """

    channels: int
    stride: int
    parameters: int
    each: tuple[Quality, ...]
    images: tuple[Tensor, ...]
    latents: LatentStatistics
    finite: dict[str, bool | None]

    @property
    def quality(self) -> Quality:
        """The mean over pictures, of PSNR in dB."""
        return mean_quality(self.each)


def measure(
    autoencoder: Autoencoder, pictures: Sequence[Tensor], *, perceptual: Distance | None = None
) -> Reconstructed:
    """Encode and decode pictures, one at a time, and say how near they come back.

    `pictures` are uint8 (3, H, W) on the host, of sides that divide by the stride and are at least 32
    pixels. The autoencoder, in float32, works on the device where it lies and is not changed. Distances are
    of 8-bit values, as pictures are saved.
    """
    latents, images, finite = [], [], {"float32": True}
    for picture in pictures:
        code, made = round_trip(autoencoder, picture)
        latents.append(code.cpu())
        images.append(to_uint8(made)[0].cpu())
        finite["float32"] &= bool(made.isfinite().all())
    pairs = zip(pictures, images, strict=True)
    halves = {str(dtype).removeprefix("torch."): finite_in(autoencoder, pictures, dtype) for dtype in HALVES}
    return Reconstructed(
        channels=autoencoder.latent_space.channels,
        stride=autoencoder.latent_space.stride,
        parameters=sum(parameter.numel() for parameter in autoencoder.parameters()),
        each=tuple(quality(picture, made, perceptual) for picture, made in pairs),
        images=tuple(images),
        latents=latent_statistics(latents),
        finite=finite | halves,
    )


def quality(picture: Tensor, made: Tensor, perceptual: Distance | None = None) -> Quality:
    """How near a reconstruction is to its picture, both uint8 (3, H, W) on the host."""
    a, b = picture[None], made[None]
    distance = None if perceptual is None else _distance(perceptual, picture, made)
    return Quality(
        psnr=psnr(a, b).item(), ssim=ssim(a, b).item(), gmsd=gmsd(a, b).item(), perceptual=distance
    )


def mean_quality(each: Sequence[Quality]) -> Quality:
    """The mean over pictures of every figure."""
    distances = [q.perceptual for q in each if q.perceptual is not None]
    return Quality(
        psnr=_mean([q.psnr for q in each]),
        ssim=_mean([q.ssim for q in each]),
        gmsd=_mean([q.gmsd for q in each]),
        perceptual=_mean(distances) if distances else None,
    )


def latent_statistics(latents: Sequence[Tensor]) -> LatentStatistics:
    """Statistics over all positions of normalised latents (B, C, h, w), whatever their sizes."""
    values = torch.cat([code.double().transpose(0, 1).flatten(1) for code in latents], dim=1)
    return LatentStatistics(
        channel_mean=tuple(values.mean(1).tolist()),
        channel_std=tuple(values.std(1, correction=0).tolist()),
        largest=values.abs().max().item(),
    )


def finite_in(autoencoder: Autoencoder, pictures: Sequence[Tensor], dtype: torch.dtype) -> bool | None:
    """Whether every reconstruction is finite with weights and arithmetic in `dtype`.

    None where the device does not compute in it. Works on a copy of the autoencoder.
    """
    if not computes_in(next(autoencoder.parameters()).device, dtype):
        return None
    network = deepcopy(autoencoder).to(dtype)
    return all(bool(round_trip(network, picture)[1].isfinite().all()) for picture in pictures)


@torch.no_grad()
def round_trip(autoencoder: Autoencoder, picture: Tensor) -> tuple[Tensor, Tensor]:
    """The latents of a picture, and the image (1, 3, H, W) that they decode to."""
    latents = autoencoder.encode(to_image(picture, next(autoencoder.parameters())))
    return latents, autoencoder.decode(latents)


def to_image(picture: Tensor, like: Tensor) -> Tensor:
    """A picture, uint8 (3, H, W), as an image (1, 3, H, W) in −1..1 of the dtype and device of `like`."""
    return (picture[None].to(like.device).float() / 127.5 - 1.0).to(like.dtype)


@torch.no_grad()
def _distance(perceptual: Distance, picture: Tensor, made: Tensor) -> float:
    a, b = (image[None].float() / 127.5 - 1.0 for image in (picture, made))
    return perceptual(a, b).item()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
