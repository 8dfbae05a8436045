"""The generator of ESRGAN (Wang et al. 2018) and Real-ESRGAN (Wang et al. 2021), which enlarges pictures."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.errors import InputError, require_positive

SLOPE = 0.2  # of the leaky rectifiers below zero
RESIDUAL = 0.2  # how much of a block is added to its input


@dataclass(frozen=True, kw_only=True)
class RRDBNetConfig:
    """The shape of an RRDBNet; the defaults are Real-ESRGAN's x4plus.

    `blocks` of `width` channels, each dense block adding `growth` channels a conv. The picture is folded by
    `unshuffle` first (2 x 2 pixels as channels of one, for 2) and doubled `doublings` times in the end.
    `plus` adds the shortcuts of ESRGAN+ (Rakotonirina and Rasoanaivo 2020). Raises InputError for counts that
    cannot be, and where the picture would come out smaller.
    """

    kind: Literal["rrdbnet"] = "rrdbnet"
    width: int = 64
    blocks: int = 23
    growth: int = 32
    doublings: int = 2
    unshuffle: int = 1
    plus: bool = False

    def __post_init__(self) -> None:
        require_positive("rrdbnet", self, ("width", "blocks", "growth", "unshuffle"))
        if self.doublings < 0 or 2**self.doublings % self.unshuffle:
            raise InputError(
                f"rrdbnet: a picture folded by {self.unshuffle} and doubled {self.doublings} times is not "
                "enlarged by a whole number"
            )

    @property
    def scale(self) -> int:
        """How many times as wide and high the picture becomes."""
        return 2**self.doublings // self.unshuffle


class DenseBlock(nn.Module):
    """Five convs, each of which sees the input and what all before it gave (Huang et al. 2017)."""

    def __init__(self, config: RRDBNetConfig) -> None:
        super().__init__()
        width, growth = config.width, config.growth
        self.conv1 = conv3x3(width, growth)
        self.conv2 = conv3x3(width + growth, growth)
        self.conv3 = conv3x3(width + 2 * growth, growth)
        self.conv4 = conv3x3(width + 3 * growth, growth)
        self.conv5 = conv3x3(width + 4 * growth, width)
        self.conv1x1 = nn.Conv2d(width, growth, 1, bias=False) if config.plus else None

    def forward(self, x: Tensor) -> Tensor:
        x1 = leaky(self.conv1(x))
        x2 = leaky(self.conv2(torch.cat([x, x1], dim=1)))
        if self.conv1x1 is not None:
            x2 = x2 + self.conv1x1(x)
        x3 = leaky(self.conv3(torch.cat([x, x1, x2], dim=1)))
        x4 = leaky(self.conv4(torch.cat([x, x1, x2, x3], dim=1)))
        if self.conv1x1 is not None:
            x4 = x4 + x2
        return x + RESIDUAL * self.conv5(torch.cat([x, x1, x2, x3, x4], dim=1))


class RRDB(nn.Module):
    """A residual in residual dense block: three dense blocks, a part of which is added to the input."""

    def __init__(self, config: RRDBNetConfig) -> None:
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = DenseBlock(config), DenseBlock(config), DenseBlock(config)

    def forward(self, x: Tensor) -> Tensor:
        return x + RESIDUAL * self.rdb3(self.rdb2(self.rdb1(x)))


class RRDBNet(nn.Module):
    """A picture (B, 3, H, W) in 0..1, whose sides divide by `unshuffle`, to (B, 3, H·scale, W·scale).

    Parameters carry Real-ESRGAN's names, but that the convs after doublings are numbered: `conv_up.0`.
    """

    def __init__(self, config: RRDBNetConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.conv_first = conv3x3(3 * config.unshuffle**2, width)
        self.body = nn.Sequential(*(RRDB(config) for _ in range(config.blocks)))
        self.conv_body = conv3x3(width, width)
        self.conv_up = nn.ModuleList(conv3x3(width, width) for _ in range(config.doublings))
        self.conv_hr = conv3x3(width, width)
        self.conv_last = conv3x3(width, 3)

    def forward(self, image: Tensor) -> Tensor:
        h = self.conv_first(F.pixel_unshuffle(image, self.config.unshuffle))  # (B, width, H/u, W/u)
        h = h + self.conv_body(self.body(h))
        for conv in self.conv_up:
            h = leaky(conv(F.interpolate(h, scale_factor=2.0, mode="nearest")))  # twice the size
        return self.conv_last(leaky(self.conv_hr(h)))  # (B, 3, H·scale, W·scale)


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A conv of 3 x 3 that keeps the size."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


def leaky(x: Tensor) -> Tensor:
    """A rectifier that lets a fifth through below zero."""
    return F.leaky_relu(x, SLOPE)
