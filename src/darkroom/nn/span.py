"""SPAN, the swift parameter-free attention network (Wan et al. 2024), which enlarges pictures."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.errors import require_positive
from darkroom.nn.esrgan import conv3x3

MEAN, RANGE = (0.4488, 0.4371, 0.4040), 255.0  # of the pictures that it was published for
BLOCKS = 6


@dataclass(frozen=True, kw_only=True)
class SPANConfig:
    """The shape of a SPAN; `normalised` says whether it takes pictures less `MEAN`, times `RANGE`.

    Raises InputError for counts below 1.
    """

    kind: Literal["span"] = "span"
    width: int = 48
    scale: int = 4
    normalised: bool = True

    def __post_init__(self) -> None:
        require_positive("span", self, ("width", "scale"))


class SPAB(nn.Module):
    """Three convs, whose result is also how much of it counts (the paper's equation 6)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c1_r, self.c2_r, self.c3_r = (conv3x3(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The block's result, and what its first conv gave, activated."""
        first = F.silu(self.c1_r(x))
        h = self.c3_r(F.silu(self.c2_r(first)))
        return (h + x) * (torch.sigmoid(h) - 0.5), first


class SPAN(nn.Module):
    """A picture (B, 3, H, W) in 0..1 to (B, 3, H·scale, W·scale).

    Parameters carry the names of the original release, whose convs of several branches are one conv each
    here: what they are outside training.
    """

    def __init__(self, config: SPANConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.conv_1 = conv3x3(3, width)
        for number in range(1, BLOCKS + 1):
            self.add_module(f"block_{number}", SPAB(width))
        self.conv_2 = conv3x3(width, width)
        self.conv_cat = nn.Conv2d(4 * width, width, 1)
        self.upsampler = nn.Sequential(conv3x3(width, 3 * config.scale**2), nn.PixelShuffle(config.scale))

    def forward(self, image: Tensor) -> Tensor:
        if self.config.normalised:
            mean = torch.tensor(MEAN, dtype=image.dtype, device=image.device)
            image = (image - mean[:, None, None]) * RANGE
        first = self.conv_1(image)  # (B, width, H, W)
        h, results, inner = first, [], first
        for number in range(1, BLOCKS + 1):
            h, inner = self.get_submodule(f"block_{number}")(h)
            results.append(h)
        joined = torch.cat([first, self.conv_2(h), results[0], inner], dim=1)  # (B, 4·width, H, W)
        return self.upsampler(self.conv_cat(joined))
