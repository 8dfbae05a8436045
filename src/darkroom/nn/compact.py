"""The compact upscaler of Real-ESRGAN, "SRVGGNetCompact": plain convs at the small picture's size."""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.errors import require_positive
from darkroom.nn.esrgan import conv3x3


@dataclass(frozen=True, kw_only=True)
class CompactConfig:
    """The shape of a compact upscaler; the defaults are realesr-general-x4v3's.

    `convs` of `width` channels between the first and the last. Raises InputError for counts below 1.
    """

    kind: Literal["compact"] = "compact"
    width: int = 64
    convs: int = 32
    scale: int = 4

    def __post_init__(self) -> None:
        require_positive("compact", self, ("width", "convs", "scale"))


class Compact(nn.Module):
    """A picture (B, 3, H, W) in 0..1 to (B, 3, H·scale, W·scale): what is added to its enlarged pixels.

    Parameters carry the names of the original release.
    """

    def __init__(self, config: CompactConfig) -> None:
        super().__init__()
        self.config = config
        layers = [conv3x3(3, config.width), nn.PReLU(config.width)]
        for _ in range(config.convs):
            layers += [conv3x3(config.width, config.width), nn.PReLU(config.width)]
        self.body = nn.Sequential(*layers, conv3x3(config.width, 3 * config.scale**2))

    def forward(self, image: Tensor) -> Tensor:
        detail = F.pixel_shuffle(self.body(image), self.config.scale)
        return detail + F.interpolate(image, scale_factor=float(self.config.scale), mode="nearest")
