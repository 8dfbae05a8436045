"""A classifier of the three emoji styles, fitted to real training pictures: by texture and palette, not by
content.

Flat and blob pictures share colours, some drawings are nearly the same in both, and a few are equal. What it
is fitted to and tested on never holds a drawn picture.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from mini_data import Row
from mini_pictures import load
from torch import Tensor

from darkroom.evaluate.features import RidgeClassifier, extract, palette, texture
from darkroom.nn.perceptual import SqueezeDistance

SKIN_TONES_KEPT = 3  # one training picture with a skin tone in so many: they are many, and alike
WIDTHS = (64 * 65 // 2, 128 * 129 // 2, 8**3)  # of the blocks: relu1, fire3, colours


class StyleClassifier:
    """Says which style pictures are drawn in.

    `accuracy` is on real emoji that it was not fitted to, the set-aside ones: "all", and "no skin tones".
    """

    def __init__(self, data: Path, table: Sequence[Row], network: SqueezeDistance) -> None:
        self.network = network
        emoji = [row for row in table if row.kind == "emoji"]
        train = [row for row in emoji if row.split == "train"]
        chosen = [r for r in train if not r.skin_tone] + [r for r in train if r.skin_tone][::SKIN_TONES_KEPT]
        self.rule = RidgeClassifier(self._blocks(load(data, chosen)), [row.style for row in chosen])
        held = [row for row in emoji if row.split != "train"]
        said = zip(self(load(data, held)), held, strict=True)
        right = [(style == row.style, row.skin_tone) for style, row in said]
        plain = [hit for hit, skin_tone in right if not skin_tone]
        self.accuracy = {
            "all": sum(hit for hit, _ in right) / len(right),
            "no skin tones": sum(plain) / len(plain),
        }

    def __call__(self, images: Tensor) -> list[str]:
        """The style of each uint8 picture (N, 3, H, W)."""
        return self.rule(self._blocks(images))

    def _blocks(self, images: Tensor) -> list[Tensor]:
        def both(image: Tensor) -> Tensor:
            return torch.cat([texture(self.network, image), palette(image)], dim=1)

        return list(
            extract(images.to(self.network.mean.device), both, label="style features").split(WIDTHS, 1)
        )
