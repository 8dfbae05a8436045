"""A small network between a denoiser's latents and those of an autoencoder that it was not trained with."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from darkroom.errors import InputError, require_positive
from darkroom.nn.autoencoder_kl import AutoencoderKL
from darkroom.nn.autoencoder_tiny import AutoencoderTiny
from darkroom.nn.autoencoder_vq import AutoencoderVQ
from darkroom.nn.latent_space import LatentSpace

Plain = AutoencoderKL | AutoencoderVQ | AutoencoderTiny


@dataclass(frozen=True, kw_only=True)
class InterposerConfig:
    """The shape of an interposer: residual blocks of `width` channels; with none of them it is affine.

    The defaults make 444,336 parameters with 4 latent channels and 447,936 with 16, both ways together.
    Raises InputError for counts that cannot be.
    """

    kind: Literal["interposer"] = "interposer"
    latent_channels: int = 4
    width: int = 64
    blocks: int = 3

    def __post_init__(self) -> None:
        require_positive("interposer", self, ("latent_channels", "width"))
        if self.blocks < 0:
            raise InputError(f"interposer: `blocks` = {self.blocks} must be at least 0")


class Block(nn.Module):
    """Two 3x3 convs, added to their input; no norms, so that a part of a picture does not see the rest."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_1(nn.functional.silu(x))
        return x + self.conv_2(nn.functional.silu(h))


class Translation(nn.Module):
    """Latents (B, C, h, w) of one space to those of another: an affine map of channels, plus a correction.

    A new one is the identity, since the correction's last conv starts at zero.
    """

    def __init__(self, config: InterposerConfig) -> None:
        super().__init__()
        channels, width = config.latent_channels, config.width
        self.affine = nn.Conv2d(channels, channels, 1)
        self.set_affine(torch.eye(channels), torch.zeros(channels))
        self.correction = nn.Sequential()
        if config.blocks:
            blocks = [Block(width) for _ in range(config.blocks)]
            last = nn.Conv2d(width, channels, 1)
            for parameter in last.parameters():
                nn.init.zeros_(parameter)
            self.correction = nn.Sequential(nn.Conv2d(channels, width, 1), *blocks, nn.SiLU(), last)

    def forward(self, latents: Tensor) -> Tensor:
        mapped = self.affine(latents)
        return mapped + self.correction(latents) if len(self.correction) else mapped

    @torch.no_grad()
    def set_affine(self, matrix: Tensor, bias: Tensor) -> None:
        """Let the affine map be `matrix` (C, C) and `bias` (C,)."""
        for parameter, values in zip(self.affine.parameters(), (matrix[:, :, None, None], bias), strict=True):
            parameter.copy_(values)


class Interposer(nn.Module):
    """Both ways between the latents that a denoiser knows and those of an autoencoder."""

    def __init__(self, config: InterposerConfig) -> None:
        super().__init__()
        self.config = config
        self.to_decoder = Translation(config)
        self.to_denoiser = Translation(config)


class Interposed(nn.Module):
    """An autoencoder that speaks a denoiser's latents through an interposer.

    `autoencoder` keeps the latent space that the interposer was trained with on its side; `latent_space` is
    the denoiser's, which the interposer was trained with on the other.
    """

    def __init__(self, autoencoder: Plain, interposer: Interposer, latent_space: LatentSpace) -> None:
        super().__init__()
        self.autoencoder, self.interposer = autoencoder, interposer
        self.latent_space = latent_space
        self.config = autoencoder.config

    def encode(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in −1..1 to latents (B, C, H/f, W/f) as the denoiser knows them."""
        return self.interposer.to_denoiser(self.autoencoder.encode(image))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents as the denoiser knows them to an image in about −1..1."""
        return self.autoencoder.decode(self.interposer.to_decoder(latents))
