"""A classifier of the three emoji styles, fitted to real training pictures: by texture and palette, not by
content.

Flat and blob pictures share colours, some drawings are nearly the same in both, and a few are equal. What it
is fitted to and tested on never holds a drawn picture. Pictures out of a decoder are a little softer and
noisier, so softened copies of real pictures are among those it is fitted to: without them it judges the
decoder, not the style.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from mini_data import Row
from mini_pictures import load
from torch import Tensor

from darkroom.evaluate.features import RidgeClassifier, extract, palette, texture
from darkroom.nn.perceptual import SqueezeDistance
from darkroom.rng import torch_generator

SKIN_TONES_KEPT = 3  # one training picture with a skin tone in so many: they are many, and alike
SOFTENED_KEPT = 2  # one picture in so many is added as a softened copy
BLUR, NOISE = (0.3, 1.2), 6.0  # pixels; of 255, near edges
WIDTHS = (64 * 65 // 2, 128 * 129 // 2, 8**3)  # of the blocks: relu1, fire3, colours


class StyleClassifier:
    """Says which style pictures are drawn in.

    `accuracy` is on real emoji that it was not fitted to, the set-aside ones: "all", those with
    "no skin tones", and "all, softened".
    """

    def __init__(self, data: Path, table: Sequence[Row], network: SqueezeDistance) -> None:
        self.network = network
        emoji = [row for row in table if row.kind == "emoji"]
        train = [row for row in emoji if row.split == "train"]
        chosen = [r for r in train if not r.skin_tone] + [r for r in train if r.skin_tone][::SKIN_TONES_KEPT]
        images, styles = load(data, chosen), [row.style for row in chosen]
        copies = soften(images[::SOFTENED_KEPT])
        self.rule = RidgeClassifier(
            self._blocks(torch.cat([images, copies])), styles + styles[::SOFTENED_KEPT]
        )
        held = [row for row in emoji if row.split != "train"]
        images, plain = load(data, held), [not row.skin_tone for row in held]
        right = self._right(images, held)
        self.accuracy = {
            "all": _share(right),
            "no skin tones": _share(hit for hit, wanted in zip(right, plain, strict=True) if wanted),
            "all, softened": _share(self._right(soften(images), held)),
        }

    def _right(self, images: Tensor, real: Sequence[Row]) -> list[bool]:
        return [style == row.style for style, row in zip(self(images), real, strict=True)]

    def __call__(self, images: Tensor) -> list[str]:
        """The style of each uint8 picture (N, 3, H, W)."""
        return self.rule(self._blocks(images))

    def _blocks(self, images: Tensor) -> list[Tensor]:
        def both(image: Tensor) -> Tensor:
            return torch.cat([texture(self.network, image), palette(image)], dim=1)

        return list(
            extract(images.to(self.network.mean.device), both, label="style features").split(WIDTHS, 1)
        )


def soften(images: Tensor) -> Tensor:
    """Copies of uint8 pictures (N, 3, H, W) as if out of a decoder: blurred a little, noise at edges."""
    generator = torch_generator("cpu", 0, "soften")
    return torch.cat([_soften(batch.float(), generator) for batch in images.split(32)])


def _soften(batch: Tensor, generator: torch.Generator) -> Tensor:
    blurred, noisy, strength, amount = torch.rand(4, generator=generator).tolist()
    if blurred < 0.8:
        offset = torch.arange(-3, 4) / (BLUR[0] + (BLUR[1] - BLUR[0]) * strength)
        window = (-0.5 * offset.square()).exp()
        window = window / window.sum()
        planes = F.pad(batch.flatten(0, 1)[:, None], (3, 3, 3, 3), mode="replicate")
        batch = F.conv2d(F.conv2d(planes, window[None, None, :, None]), window[None, None, None]).view_as(
            batch
        )
    if noisy < 0.8:
        edges = (batch - F.avg_pool2d(batch, 5, 1, 2)).abs().mean(1, keepdim=True).clamp_max(20) / 20
        noise = torch.randn(batch.shape, generator=generator) * NOISE * amount
        batch = batch + noise * (0.3 + edges)
    return batch.clamp(0, 255).round().byte()


def _share(right: Iterable[bool]) -> float:
    found = list(right)
    return sum(found) / len(found)
