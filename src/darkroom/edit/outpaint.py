"""Outpainting: a larger canvas around a picture, and the mask of what is new."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from darkroom.errors import InputError
from darkroom.images import to_rgb


@dataclass(frozen=True, kw_only=True)
class Margins:
    """How many pixels a picture grows on each side; InputError unless some are and none is below 0."""

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0

    def __post_init__(self) -> None:
        sides = (self.left, self.top, self.right, self.bottom)
        if min(sides) < 0 or max(sides) == 0:
            raise InputError(f"margins must be 0 or more and not all 0, not {sides}")

    def __str__(self) -> str:
        return f"{self.left},{self.top},{self.right},{self.bottom}"

    @classmethod
    def parse(cls, text: str) -> "Margins":
        """N for all sides, or LEFT,TOP,RIGHT,BOTTOM; InputError for anything else."""
        parts = [part.strip() for part in text.split(",")]
        if len(parts) not in (1, 4) or not all(part.isdecimal() for part in parts):
            raise InputError(f"margins must be N or LEFT,TOP,RIGHT,BOTTOM in pixels, not {text!r}")
        left, top, right, bottom = (int(part) for part in (parts * 4 if len(parts) == 1 else parts))
        return cls(left=left, top=top, right=right, bottom=bottom)


def canvas(image: Image.Image, margins: Margins) -> tuple[Image.Image, Image.Image]:
    """The picture on a larger canvas, and the mask ("L") that is white where it is new.

    What is new starts as the picture mirrored at its edges, so that colours go on: a network that starts
    from pure noise does not see it, one that starts from less continues it.
    """
    pixels = np.asarray(to_rgb(image))
    rows, columns = (margins.top, margins.bottom), (margins.left, margins.right)
    grown = np.pad(pixels, (rows, columns, (0, 0)), mode="symmetric")
    mask = np.pad(np.zeros(pixels.shape[:2], np.uint8), (rows, columns), constant_values=255)
    return Image.fromarray(grown), Image.fromarray(mask)
