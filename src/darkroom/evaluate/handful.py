"""A handful of drawn pictures that are hard to keep in different ways, for where the user names none."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from darkroom.data.shapes import OUTLINES
from darkroom.errors import InputError

SIZE = 128
SMALLEST = 32
FINE = 4  # what is drawn with a pen is drawn at this many times the size
WORDS = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs!"

Pixels = NDArray[np.float64]


def handful(size: int = SIZE) -> dict[str, Tensor]:
    """Six pictures by name, uint8 (3, size, size): pure functions of the size.

    Flat shapes, shaded balls, text, hairs, checkers and rings of every spacing, and clouds with the spectrum
    of photos. Raises InputError below 32 pixels.
    """
    if size < SMALLEST:
        raise InputError(f"pictures must be at least {SMALLEST} pixels a side, not {size}")
    return {name: _to_picture(draw(size)) for name, draw in DRAWN.items()}


def _to_picture(pixels: Pixels) -> Tensor:
    return torch.from_numpy(pixels.clip(0, 255).round().astype(np.uint8)).permute(2, 0, 1).contiguous()


def _shapes(size: int) -> Pixels:
    """Flat shapes in strong colours that overlap on pale ground."""
    image = Image.new("RGB", (size * FINE, size * FINE), (244, 238, 226))
    pen, side = ImageDraw.Draw(image), size * FINE
    placed = (
        ("star", (0.28, 0.28, 0.24), (214, 40, 40)),
        ("square", (0.72, 0.26, 0.19), (35, 87, 188)),
        ("heart", (0.27, 0.74, 0.2), (240, 120, 170)),
        ("cross", (0.72, 0.74, 0.2), (40, 150, 80)),
        ("diamond", (0.5, 0.5, 0.15), (250, 200, 30)),
        ("triangle", (0.5, 0.88, 0.09), (20, 20, 20)),
    )
    for name, (x, y, radius), colour in placed:
        pen.polygon(
            [((x + radius * u) * side, (y + radius * v) * side) for u, v in OUTLINES[name]], fill=colour
        )
    return _shrunk(image)


def _balls(size: int) -> Pixels:
    """Shaded balls with a highlight over a gradient of two colours."""
    y, x = _grid(size)
    ground = np.stack([60 + 150 * x, 90 + 90 * y, 200 - 120 * x * y], axis=-1)
    for cx, cy, radius, colour in (
        (0.33, 0.36, 0.25, (225, 80, 50)),
        (0.72, 0.64, 0.22, (60, 170, 150)),
        (0.25, 0.8, 0.13, (235, 190, 60)),
    ):
        u, v = (x - cx) / radius, (y - cy) / radius
        inside = 1 - u * u - v * v
        depth = np.sqrt(inside.clip(0))
        light = (-0.5 * u - 0.6 * v + 0.63 * depth).clip(0)
        shade = (0.25 + 0.75 * light)[..., None] * np.array(colour) + 200 * (light**24)[..., None]
        cover = (inside * radius * size / 2 + 0.5).clip(0, 1)[..., None]  # about a pixel wide at the rim
        ground = ground + cover * (shade - ground)
    return ground


def _text(size: int) -> Pixels:
    """Lines of text from small to large, dark on light above and light on dark below."""
    image = Image.new("RGB", (size, size), (250, 248, 240))
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, size // 2, size, size), fill=(28, 40, 70))
    top, words = 1.0, WORDS.split()
    for number, height in enumerate((7, 8, 9, 10, 12, 7, 8, 9, 11, 14)):
        dark = number < 5
        font = ImageFont.load_default(height * size / SIZE)
        text = " ".join(words[number:] + words[:number])
        at = (size / 42, top if dark else top + size / 2)
        pen.text(at, text, fill=(25, 25, 30) if dark else (240, 225, 160), font=font)
        top = 1.0 if number == 4 else top + 1.28 * height * size / SIZE
    return np.asarray(image, np.float64)


def _hairs(size: int) -> Pixels:
    """Thin curved strokes in many colours, one over the other."""
    image = Image.new("RGB", (size * FINE, size * FINE), (70, 52, 44))
    pen, numbers, side = ImageDraw.Draw(image), _uniform(1, 240 * 6).reshape(240, 6), size * FINE
    t = np.linspace(0, 1, 24)
    for x, y, turn, bend, tone, hue in numbers:
        angle = 1.1 + 0.9 * turn + (bend - 0.5) * 1.6 * t
        steps = np.stack([np.cos(angle), np.sin(angle)]).cumsum(1) * 0.02
        line = [((1.3 * x - 0.2 + u) * side, (1.3 * y - 0.3 + v) * side) for u, v in steps.T]
        colour = tuple(round(v) for v in (60 + 190 * tone, 40 + 150 * tone + 30 * hue, 30 + 100 * tone * hue))
        pen.line(line, fill=colour, width=FINE)
    return _shrunk(image)


def _checkers(size: int) -> Pixels:
    """Checkers of 1, 2, 3, 4 and 8 pixels in two pairs of colours, and rings down to two pixels apart."""
    rows, columns = np.indices((size, size))
    pixels = np.zeros((size, size, 3))
    pairs = (((20, 20, 20), (245, 245, 245)), ((200, 40, 40), (60, 170, 210)))
    band, across = size // 4, -(-size // 5)
    for number, (low, high) in enumerate(pairs):
        for index, cell in enumerate((1, 2, 3, 4, 8)):
            where = (rows // band == number) & (columns // across == index)
            odd = ((rows // cell + columns // cell) % 2)[..., None]
            pixels = np.where(where[..., None], np.where(odd, high, low), pixels)
    squared = columns**2 + (rows - 2 * band) ** 2
    farthest = size**2 + (size - 2 * band) ** 2
    rings = 127.5 + 120 * np.cos(np.pi / 2 * squared / farthest**0.5)
    return np.where((rows >= 2 * band)[..., None], rings[..., None] * np.array([1.0, 0.97, 0.9]), pixels)


def _clouds(size: int) -> Pixels:
    """Noise whose amplitude falls with the frequency, as in photos, in colours that mostly go together."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = np.inf
    noise = _uniform(2, 3 * size * size).reshape(3, size, size) - 0.5
    layers = np.fft.irfft2(np.fft.rfft2(noise) / frequency, (size, size))
    layers /= layers.std((1, 2), keepdims=True)
    shared, warm, green = layers
    red, blue = shared + 0.35 * warm, shared - 0.35 * warm
    return np.stack([120 + 48 * red, 118 + 48 * (shared + 0.15 * green), 108 + 48 * blue], axis=-1)


def _grid(size: int) -> tuple[Pixels, Pixels]:
    """Rows and columns of pixels' centres, in 0..1."""
    places = (np.arange(size) + 0.5) / size
    rows, columns = np.meshgrid(places, places, indexing="ij")
    return rows, columns


def _uniform(key: int, count: int) -> Pixels:
    """Numbers in 0..1 that no release of numpy changes."""
    bits = np.random.Philox(key=key).random_raw(count)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _shrunk(image: Image.Image) -> Pixels:
    """A picture drawn at FINE times its size, by averaging."""
    return np.asarray(image.reduce(FINE), np.float64)


DRAWN: dict[str, Callable[[int], Pixels]] = {
    "shapes": _shapes,
    "balls": _balls,
    "text": _text,
    "hairs": _hairs,
    "checkers": _checkers,
    "clouds": _clouds,
}
