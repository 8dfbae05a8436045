"""The tiny autoencoder (TAESD, Ollin Boer Bohan 2023): a few convs that imitate a large autoencoder."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from darkroom.errors import require_positive
from darkroom.nn.latent_space import LatentSpace

HALVINGS = 3
BLOCKS = 3  # at every resolution but the picture's own, which has one
POOL_GROUPS = 4
CLAMP = 3.0


@dataclass(frozen=True, kw_only=True)
class AutoencoderTinyConfig:
    """The shape of a tiny autoencoder; the defaults are TAESD's for SD 1, 2 and XL.

    SD 3's and FLUX.1's have 16 latent channels, FLUX.2's 32 and `pooled_blocks`: its blocks next to the
    latent take a 1x1 detour through a group norm, which sees the whole picture. Raises InputError for numbers
    below 1.
    """

    kind: Literal["autoencoder_tiny"] = "autoencoder_tiny"
    in_channels: int = 3
    latent_channels: int = 4
    channels: int = 64
    pooled_blocks: bool = False

    def __post_init__(self) -> None:
        require_positive("autoencoder_tiny", self, ("in_channels", "latent_channels", "channels"))

    @property
    def stride(self) -> int:
        """Pixels per latent cell along each axis."""
        return 2**HALVINGS


class Block(nn.Module):
    """Three convs, added to their input."""

    def __init__(self, channels: int, *, pooled: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(channels, channels),
            nn.ReLU(),
            _conv(channels, channels),
            nn.ReLU(),
            _conv(channels, channels),
        )
        self.pool = _pool(channels) if pooled else None

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class Encoder(nn.Module):
    """Image (B, 3, H, W) in −1..1 to latents (B, C, H/8, W/8)."""

    def __init__(self, config: AutoencoderTinyConfig) -> None:
        super().__init__()
        width = config.channels
        layers: list[nn.Module] = [_conv(config.in_channels, width), Block(width)]
        for level in range(HALVINGS):
            pooled = config.pooled_blocks and level == HALVINGS - 1
            layers += [_conv(width, width, stride=2, bias=False)]
            layers += [Block(width, pooled=pooled) for _ in range(BLOCKS)]
        self.layers = nn.Sequential(*layers, _conv(width, config.latent_channels))

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image.add(1).div(2))


class Decoder(nn.Module):
    """Latents (B, C, h, w), held softly to −3..3, to an image (B, 3, 8h, 8w) in about −1..1."""

    def __init__(self, config: AutoencoderTinyConfig) -> None:
        super().__init__()
        width = config.channels
        layers: list[nn.Module] = [_conv(config.latent_channels, width), nn.ReLU()]
        for level in range(HALVINGS):
            layers += [Block(width, pooled=config.pooled_blocks and not level) for _ in range(BLOCKS)]
            layers += [nn.Upsample(scale_factor=2), _conv(width, width, bias=False)]
        self.layers = nn.Sequential(*layers, Block(width), _conv(width, config.in_channels))

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(torch.tanh(latents / CLAMP) * CLAMP).mul(2).sub(1)


class AutoencoderTiny(nn.Module):
    """A tiny autoencoder, whose latents are those of a large one already normalised for its denoiser.

    Parameters carry the names of diffusers' `AutoencoderTiny`. `latent_space` says channels and stride; its
    mean is 0 and its std 1, whatever the large autoencoder's are.
    """

    def __init__(self, config: AutoencoderTinyConfig) -> None:
        super().__init__()
        self.config = config
        self.latent_space = LatentSpace.identity(config.latent_channels, config.stride)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in −1..1 to latents (B, C, H/8, W/8), normalised."""
        return self.encoder(image)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents as the denoiser knows them to an image in about −1..1."""
        return self.decoder(latents)


def _conv(in_channels: int, out_channels: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=bias)


def _pool(channels: int) -> nn.Sequential:
    """A 1x1 detour whose group norm measures the whole picture."""
    inner = 4 * channels
    return nn.Sequential(
        nn.Conv2d(channels, inner, 1, bias=False),
        nn.GroupNorm(POOL_GROUPS, inner),
        nn.ReLU(),
        nn.Conv2d(inner, channels, 1, bias=False),
    )
