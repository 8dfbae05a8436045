"""The KL autoencoder of latent diffusion: image -> Gaussian -> image (Rombach et al. 2022, section 3.1)."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.errors import InputError
from darkroom.nn.latent_space import LatentSpace
from darkroom.nn.layers import Downsample, ResBlock, SpatialAttention, Upsample

EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class AutoencoderShape:
    """What both halves need; `channels` holds one width a level, each but the last halves the size.

    `attention_levels` are the numbers of the levels, from 0, whose blocks attend to the whole picture. Raises
    InputError for a level that isn't there.
    """

    in_channels: int = 3
    latent_channels: int = 4
    channels: tuple[int, ...] = (128, 256, 512, 512)
    res_blocks: int = 2
    groups: int = 32
    mid_attention: bool = True
    attention_levels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        levels = len(self.channels)
        if wrong := [level for level in self.attention_levels if not 0 <= level < levels]:
            raise InputError(
                f"autoencoder: `attention_levels` has {wrong[0]}, but levels are 0 to {levels - 1}"
            )

    @property
    def stride(self) -> int:
        """Pixels per latent cell along each axis."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLConfig(AutoencoderShape):
    """The shape of a KL autoencoder."""

    kind: Literal["autoencoder_kl"] = "autoencoder_kl"
    quant_conv: bool = True


@dataclass(frozen=True)
class Posterior:
    """A diagonal Gaussian over latents: `mean` and `logvar`, both (B, C, H/f, W/f)."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> "Posterior":
        """Split (B, 2C, h, w) into mean and log-variance, clamped to [-30, 20] as in the original."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30.0, 20.0))

    def sample(self, noise: Tensor) -> Tensor:
        """Reparametrised draw: mean + std · noise."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """KL divergence to N(0, I), summed over a picture's latent: (B,)."""
        kl = 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar)
        return kl.flatten(1).sum(1)


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by self-attention where the level has it."""

    def __init__(self, in_channels: int, channels: int, blocks: int, groups: int, *, attention: bool) -> None:
        super().__init__()
        widths = [in_channels] + [channels] * blocks
        self.resnets = nn.ModuleList(ResBlock(a, b, groups=groups, eps=EPS) for a, b in pairwise(widths))
        self.attentions = nn.ModuleList(
            SpatialAttention(channels, groups=groups, eps=EPS) for _ in range(blocks if attention else 0)
        )

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.resnets):
            x = block(x)
            if self.attentions:
                x = self.attentions[index](x)
        return x


class DownLevel(Level):
    """A level of the encoder, then a halving unless it is the last."""

    def __init__(self, config: AutoencoderShape, level: int) -> None:
        widths, attention = config.channels, level in config.attention_levels
        before = widths[max(level - 1, 0)]
        super().__init__(before, widths[level], config.res_blocks, config.groups, attention=attention)
        last = level == len(widths) - 1
        self.downsamplers = nn.ModuleList([] if last else [Downsample(widths[level], asymmetric=True)])

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for downsample in self.downsamplers:
            x = downsample(x)
        return x


class UpLevel(Level):
    """A level of the decoder, which has a block more, then a doubling unless it is the picture's."""

    def __init__(self, config: AutoencoderShape, level: int) -> None:
        widths, attention = config.channels, level in config.attention_levels
        before = widths[min(level + 1, len(widths) - 1)]
        super().__init__(before, widths[level], config.res_blocks + 1, config.groups, attention=attention)
        self.upsamplers = nn.ModuleList([Upsample(widths[level])] if level else [])

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class MidBlock(nn.Module):
    """Two residual blocks with self-attention between them (or none)."""

    def __init__(self, channels: int, groups: int, *, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(channels, channels, groups=groups, eps=EPS) for _ in range(2))
        self.attentions = nn.ModuleList(
            [SpatialAttention(channels, groups=groups, eps=EPS)] if attention else []
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = block(x)
        return x


class Encoder(nn.Module):
    """Image (B, 3, H, W) to (B, out_channels, H/f, W/f)."""

    def __init__(self, config: AutoencoderShape, out_channels: int) -> None:
        super().__init__()
        widths = config.channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(DownLevel(config, level) for level in range(len(widths)))
        self.mid_block = MidBlock(widths[-1], config.groups, attention=config.mid_attention)
        self.conv_norm_out = nn.GroupNorm(config.groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        h = self.conv_in(image)
        for level in self.down_blocks:
            h = level(h)
        h = self.mid_block(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class Decoder(nn.Module):
    """Latents (B, C, h, w) to an image (B, 3, h·f, w·f)."""

    def __init__(self, config: AutoencoderShape) -> None:
        super().__init__()
        widths = config.channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], config.groups, attention=config.mid_attention)
        self.up_blocks = nn.ModuleList(UpLevel(config, level) for level in reversed(range(len(widths))))
        self.conv_norm_out = nn.GroupNorm(config.groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            h = level(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class AutoencoderKL(nn.Module):
    """The autoencoder of Stable Diffusion, its latents normalised by its own `latent_space`.

    Parameters carry diffusers' `AutoencoderKL` names. `encode` and `decode` speak normalised latents;
    training and tools that need the raw space use `posterior` and `decode_raw`.
    """

    def __init__(self, config: AutoencoderKLConfig, latent_space: LatentSpace | None = None) -> None:
        super().__init__()
        self.config = config
        self.latent_space = latent_space or LatentSpace.identity(config.latent_channels, config.stride)
        channels = config.latent_channels
        self.encoder = Encoder(config, out_channels=2 * channels)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if config.quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.quant_conv else nn.Identity()

    def posterior(self, image: Tensor) -> Posterior:
        """The Gaussian over raw latents of an image in −1..1."""
        return Posterior.from_moments(self.quant_conv(self.encoder(image)))

    def decode_raw(self, z: Tensor) -> Tensor:
        """Raw latents to an image."""
        return self.decoder(self.post_quant_conv(z))

    def encode(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in −1..1 to latents (B, C, H/f, W/f), normalised: the posterior mean."""
        return self.latent_space.normalise(self.posterior(image).mean)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents as the denoiser knows them to an image in about −1..1."""
        return self.decode_raw(self.latent_space.denormalise(latents))

    @property
    def last_layer(self) -> Tensor:
        """The weight whose gradients balance the adversarial loss (Esser et al. 2021, equation 7)."""
        return self.decoder.conv_out.weight
