"""An endless generator of captioned shapes, and a checker that reads what a picture of them shows."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from tqdm import tqdm

from darkroom.data.folder import Pictures
from darkroom.errors import InputError, unknown
from darkroom.rng import stream_key

COLOURS = {
    "red": (220, 30, 30),
    "orange": (255, 140, 0),
    "yellow": (250, 220, 20),
    "green": (30, 160, 50),
    "cyan": (30, 200, 220),
    "blue": (35, 70, 220),
    "purple": (130, 40, 170),
    "pink": (255, 130, 190),
    "brown": (120, 70, 30),
    "black": (20, 20, 20),
}
BACKGROUNDS = {"white": (255, 255, 255), "grey": (185, 185, 185), "black": (20, 20, 20)}
SIZES = {
    "small": (0.115, 0.135),
    "large": (0.185, 0.205),
}  # range of the radius as a part of the picture's side
PLACES = {
    "top left": (0.25, 0.25), "top": (0.5, 0.25), "top right": (0.75, 0.25),
    "left": (0.25, 0.5), "centre": (0.5, 0.5), "right": (0.75, 0.5),
    "bottom left": (0.25, 0.75), "bottom": (0.5, 0.75), "bottom right": (0.75, 0.75),
}  # fmt: skip
LAYOUTS = {
    2: (((0.25, 0.5), (0.75, 0.5)), ((0.5, 0.25), (0.5, 0.75)), ((0.25, 0.25), (0.75, 0.75))),
    3: (((0.25, 0.25), (0.75, 0.25), (0.5, 0.75)), ((0.5, 0.25), (0.25, 0.75), (0.75, 0.75))),
}
NUMBERS = {1: "a", 2: "two", 3: "three"}
JITTER = {1: 0.03, 2: 0.01, 3: 0.01}  # largest offset of a centre; several shapes stay clear of each other

_STAR = [
    (r * np.sin(np.pi * k / 5), -r * np.cos(np.pi * k / 5)) for k, r in enumerate((1.0, 0.42) * 5)
]  # fmt: skip
_TURN = np.linspace(0, 2 * np.pi, 64, endpoint=False)
_HEART = np.stack([
    np.sin(_TURN) ** 3,
    -(13 * np.cos(_TURN) - 5 * np.cos(2 * _TURN) - 2 * np.cos(3 * _TURN) - np.cos(4 * _TURN)) / 16,
], axis=1).tolist()  # fmt: skip
_W = 0.34  # half the width of a cross's arms
OUTLINES: dict[str, Sequence[tuple[float, float]]] = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -0.95), (0.98, 0.8), (-0.98, 0.8)],
    "star": _STAR,
    "cross": [
        (-_W, -1), (_W, -1), (_W, -_W), (1, -_W), (1, _W), (_W, _W),
        (_W, 1), (-_W, 1), (-_W, _W), (-1, _W), (-1, -_W), (-_W, -_W),
    ],
    "diamond": [(0, -1), (0.72, 0), (0, 1), (-0.72, 0)],
    "heart": _HEART,
}  # fmt: skip
HOLE = 0.55  # inner radius of a ring
SHAPES = ("circle", "ring", *OUTLINES)

NOTHING = 40.0  # differences from the background below this (of 441) are no shape
CORE = 0.4  # of the strongest difference; what is above belongs to a shape
SPECK = 0.006  # components below this part of the picture's area are not counted
PALE = 0.5  # below this part of a palette colour's strength a shape does not have that colour
UNLIKE = 0.2  # a shape whose outline errs by more than this, relative to its area, is none of them
RADIUS_BETWEEN = (SIZES["small"][1] * SIZES["large"][0]) ** 0.5

Placed = tuple[float, float, float]  # x, y and radius as parts of the picture's side


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What scenes are drawn from; the defaults are everything, on white.

    Raises InputError for names that are not known and for empty choices.
    """

    colours: tuple[str, ...] = tuple(COLOURS)
    shapes: tuple[str, ...] = SHAPES
    sizes: tuple[str, ...] = tuple(SIZES)
    places: tuple[str, ...] = tuple(PLACES)
    counts: tuple[int, ...] = (1, 2, 3)
    backgrounds: tuple[str, ...] = ("white",)

    def __post_init__(self) -> None:
        known = {"colours": COLOURS, "shapes": SHAPES, "sizes": SIZES, "places": PLACES, "counts": NUMBERS}
        for name, choices in (known | {"backgrounds": BACKGROUNDS}).items():
            chosen = getattr(self, name)
            if not chosen:
                raise InputError(f"field '{name}' of the shapes' vocabulary is empty")
            for value in chosen:
                if value not in choices:
                    raise unknown(f"value of '{name}'", str(value), map(str, choices))
        if any(not set(self.colours) - {background} for background in self.backgrounds):
            raise InputError("every background needs a colour of shapes other than its own")


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a picture shows; `place` is None for more than one shape. `placed` is where each shape lies."""

    colour: str
    shape: str
    size: str
    place: str | None
    count: int
    background: str = "white"
    placed: tuple[Placed, ...] = field(default=(), repr=False)

    @property
    def caption(self) -> str:
        """The scene in words, "a large red circle on the left" or "two small blue squares"."""
        plural = "" if self.count == 1 else "es" if self.shape == "cross" else "s"
        words = f"{NUMBERS[self.count]} {self.size} {self.colour} {self.shape}{plural}"
        if self.place is not None:
            words += f" {_place_words(self.place)}"
        return words if self.background == "white" else f"{words}, {self.background} background"


def _place_words(place: str) -> str:
    if " " in place:
        return f"in the {place} corner"
    return {"left": "on the left", "right": "on the right", "centre": "in the centre"}.get(
        place, f"at the {place}"
    )


def scene(
    index: int, seed: int, size: int = 64, vocabulary: Vocabulary | None = None
) -> tuple[Image.Image, str, Scene]:
    """Picture, caption and contents of scene `index`: a pure function of its arguments.

    `size` is the picture's side in pixels; the scene does not depend on it. Raises InputError below 32
    pixels.
    """
    described = describe(index, seed, vocabulary or Vocabulary())
    return draw(described, size), described.caption, described


def describe(index: int, seed: int, vocabulary: Vocabulary) -> Scene:
    """What scene `index` shows and where, every attribute uniformly from the vocabulary."""
    key = np.array(stream_key(seed, "shapes"), dtype=np.uint64)
    bits = np.random.Philox(key=key, counter=[0, index, 0, 0]).random_raw(20)
    values = iter((bits >> np.uint64(11)) * 2.0**-53)

    def pick(choices: Sequence):  # noqa: ANN202
        return choices[int(next(values) * len(choices))]

    background = pick(vocabulary.backgrounds)
    colour = pick([c for c in vocabulary.colours if c != background])
    shape, size, count = pick(vocabulary.shapes), pick(vocabulary.sizes), pick(vocabulary.counts)
    place = pick(vocabulary.places) if count == 1 else None
    centres = [PLACES[place]] if place is not None else pick(LAYOUTS[count])
    low, high = SIZES[size]
    radius = low + (high - low) * next(values)
    offsets = [
        (JITTER[count] * (2 * next(values) - 1), JITTER[count] * (2 * next(values) - 1)) for _ in centres
    ]
    placed = tuple((x + dx, y + dy, radius) for (x, y), (dx, dy) in zip(centres, offsets, strict=True))
    return Scene(
        colour=colour, shape=shape, size=size, place=place, count=count, background=background, placed=placed
    )  # fmt: skip


def draw(described: Scene, size: int) -> Image.Image:
    """The picture of a scene, RGB, `size` pixels a side, anti-aliased. Raises InputError below 32 pixels."""
    if size < 32:
        raise InputError(f"shapes need pictures of at least 32 pixels a side, not {size}")
    cover = coverage(described.shape, described.placed, size)[..., None]
    low, high = (np.array(c) for c in (BACKGROUNDS[described.background], COLOURS[described.colour]))
    return Image.fromarray((low + cover * (high - low)).round().astype(np.uint8))


def coverage(shape: str, placed: Sequence[Placed], size: int) -> NDArray[np.float64]:
    """How much of each pixel shapes cover, (size, size) in 0..1, by drawing at eight times the size."""
    fine = 8
    mask = Image.new("L", (size * fine, size * fine))
    pen = ImageDraw.Draw(mask)
    for x, y, radius in (np.array(p) * size * fine for p in placed):
        if shape in OUTLINES:
            pen.polygon([(x + radius * u - 0.5, y + radius * v - 0.5) for u, v in OUTLINES[shape]], fill=255)
            continue
        pen.ellipse((x - radius, y - radius, x + radius - 1, y + radius - 1), fill=255)
        if shape == "ring":
            r = radius * HOLE
            pen.ellipse((x - r, y - r, x + r - 1, y + r - 1), fill=0)
    return np.asarray(mask, dtype=np.float64).reshape(size, fine, size, fine).mean((1, 3)) / 255


@dataclass(frozen=True, kw_only=True)
class ShapesSource:
    """Generated shapes as training data: scenes 0..count-1 of a seed."""

    kind: Literal["shapes"] = "shapes"
    count: int
    seed: int = 0
    vocabulary: Vocabulary = field(default_factory=Vocabulary)

    def scene(self, index: int) -> Scene:
        """What picture `index` shows."""
        return describe(index, self.seed, self.vocabulary)

    def pictures(self, size: int) -> Pictures:
        """All pictures drawn into memory; mirroring is not allowed since captions name left and right."""
        if self.count < 1:
            raise InputError(f"field 'count' of the shapes must be at least 1, not {self.count}")
        images, captions = torch.empty(self.count, 3, size, size, dtype=torch.uint8), []
        for index in tqdm(range(self.count), desc="drawing shapes", unit=" pictures", delay=1):
            described = self.scene(index)
            captions.append(described.caption)
            images[index] = torch.from_numpy(np.array(draw(described, size))).permute(2, 0, 1)
        return Pictures(images, captions, [1.0] * self.count, [False] * self.count, size)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Which attributes of a scene a picture shows rightly; `place` is right where a scene names none."""

    colour: bool
    shape: bool
    size: bool
    place: bool
    count: bool

    @property
    def right(self) -> bool:
        """Whether everything is right."""
        return self.colour and self.shape and self.size and self.place and self.count


class Found(NamedTuple):
    """One shape read from a picture, None where it resembles nothing known; its centre in 0..1."""

    colour: str | None
    shape: str | None
    size: str | None
    x: float
    y: float


def check(image: Image.Image, expected: Scene) -> Verdict:
    """Whether a picture shows a scene: every shape in it must have the colour, shape and size."""
    found = read(image)
    if not found:
        return Verdict(colour=False, shape=False, size=False, place=False, count=False)
    x, y = (float(np.mean([getattr(f, axis) for f in found])) for axis in ("x", "y"))
    return Verdict(
        colour=all(f.colour == expected.colour for f in found),
        shape=all(f.shape == expected.shape for f in found),
        size=all(f.size == expected.size for f in found),
        place=expected.place is None or nearest_place(x, y) == expected.place,
        count=len(found) == expected.count,
    )


def nearest_place(x: float, y: float) -> str:
    """The place whose centre is nearest."""
    return min(PLACES, key=lambda name: (PLACES[name][0] - x) ** 2 + (PLACES[name][1] - y) ** 2)


def read(image: Image.Image) -> list[Found]:
    """The shapes that a square picture shows, largest first.

    The background is the median of the border. What differs from it by a part of the strongest difference
    is split into connected components; each is named after the palette colour that explains its pixels best
    as a mixture with the background, and after the outline of the same area and centre that fits its
    mixture best.
    """
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(border, axis=0)
    difference = _blur(np.linalg.norm(pixels - background, axis=-1), 0.5)
    if difference.max() < NOTHING:
        return []
    labels = components(difference > CORE * difference.max())
    sizes = np.bincount(labels.ravel())[1:]
    order = [1 + i for i in np.argsort(-sizes, kind="stable") if sizes[i] >= SPECK * labels.size]
    return [_read_one(pixels, background, labels, label) for label in order]


def _read_one(pixels: NDArray, background: NDArray, labels: NDArray, label: int) -> Found:
    mask = labels == label
    colour, strength = _name_colour(pixels[mask] - background, background)
    core = pixels[mask] - background
    peak = np.median(core[np.argsort(-np.linalg.norm(core, axis=1))[: max(4, len(core) // 2)]], axis=0)
    region = _grow(mask) & ((labels == label) | (labels == 0))
    cover = np.where(region, ((pixels - background) @ peak) / (peak @ peak), 0).clip(0, 1)
    x, y = _centre(cover)
    shape, radius, error = _name_shape(cover, x, y)
    known = shape if error < UNLIKE else None
    size = "large" if radius > RADIUS_BETWEEN else "small"
    return Found(colour if strength > PALE else None, known, size, x, y)


def _name_colour(core: NDArray, background: NDArray) -> tuple[str | None, float]:
    """The palette colour whose mixtures with the background are nearest to the pixels, and its strength."""
    best, lowest, strength = None, np.inf, 0.0
    for name, colour in COLOURS.items():
        towards = np.array(colour) - background
        if np.linalg.norm(towards) < NOTHING:
            continue
        part = (core @ towards / (towards @ towards)).clip(0, 1)
        residual = float(np.square(core - part[:, None] * towards).sum())
        if residual < lowest:
            best, lowest, strength = name, residual, float(np.quantile(part, 0.8))
    return best, strength


def _name_shape(cover: NDArray, x: float, y: float) -> tuple[str, float, float]:
    """The outline that fits best, its radius, and its squared error relative to the area."""
    size, area = cover.shape[0], cover.sum()
    fits = []
    for shape in SHAPES:
        unit_area, (dx, dy) = _moments(shape)
        radius = float(np.sqrt(area / unit_area)) / size
        template = coverage(shape, [(x - dx * radius, y - dy * radius, radius)], size)
        for sigma in (0.0, 0.5, 1.0, 1.5):
            blurred = _blur(template, sigma) if sigma else template
            fits.append((float(np.square(cover - blurred).sum() / area), shape, radius))
    error, shape, radius = min(fits)
    return shape, radius, error


@lru_cache
def _moments(shape: str) -> tuple[float, tuple[float, float]]:
    """Area and centroid of a shape of radius 1 about its own centre."""
    cover, radius = coverage(shape, [(0.5, 0.5, 0.4)], 128), 0.4
    x, y = _centre(cover)
    return float(cover.mean() / radius**2), ((x - 0.5) / radius, (y - 0.5) / radius)


def _centre(cover: NDArray) -> tuple[float, float]:
    places = (np.arange(cover.shape[0]) + 0.5) / cover.shape[0]
    total = cover.sum()
    return float(cover.sum(0) @ places / total), float(cover.sum(1) @ places / total)


def _grow(mask: NDArray) -> NDArray:
    """The mask and its pixels' eight neighbours."""
    padded = np.pad(mask, 1)
    height, width = mask.shape
    return np.any([padded[i : i + height, j : j + width] for i in range(3) for j in range(3)], axis=0)


def components(mask: NDArray) -> NDArray[np.int64]:
    """Connected components of a mask (8 neighbours), int64 of its shape: 0 outside, then 1, 2, ...

    Every pixel takes the largest number among its neighbours until nothing changes.
    """
    height, width = mask.shape
    numbers = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(numbers, 1)
        neighbours = [padded[i : i + height, j : j + width] for i in range(3) for j in range(3)]
        spread = np.where(mask, np.max(neighbours, axis=0), 0)
        if np.array_equal(spread, numbers):
            return np.unique(np.append(numbers, 0), return_inverse=True)[1][:-1].reshape(mask.shape)
        numbers = spread


def _blur(values: NDArray, sigma: float) -> NDArray:
    """Gaussian blur of a picture (H, W), edges repeated."""
    reach = int(np.ceil(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    for axis in (0, 1):
        width = [(reach, reach) if a == axis else (0, 0) for a in (0, 1)]
        padded = np.pad(values, width, mode="edge")
        pieces = [k * np.take(padded, range(i, i + values.shape[axis]), axis) for i, k in enumerate(kernel)]
        values = np.sum(pieces, axis=0)
    return values
