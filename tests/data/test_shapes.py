from collections.abc import Callable
from dataclasses import asdict, astuple, replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from darkroom.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    ShapesSource,
    Vocabulary,
    check,
    components,
    describe,
    draw,
    read,
    scene,
)
from darkroom.errors import InputError

EVERYTHING = Vocabulary(backgrounds=tuple(BACKGROUNDS))


def spoiled(image: Image.Image, blur: float, noise: float, seed: int) -> Image.Image:
    """A picture as a decoder would leave it: a little blurred and noisy, its colours a little off."""
    rng = np.random.default_rng(seed)
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(blur)), dtype=np.float64)
    pixels = pixels + rng.normal(0, 8, 3) + rng.normal(0, noise, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def single(shape: str, size: str = "large", colour: str = "red", place: str = "centre") -> Scene:
    placed = ((*PLACES[place], sum(SIZES[size]) / 2),)
    return Scene(colour=colour, shape=shape, size=size, place=place, count=1, placed=placed)


def test_scenes_are_pure_functions() -> None:
    image, caption, described = scene(7, 3, 48)
    again, _, _ = scene(7, 3, 48)
    assert image.tobytes() == again.tobytes() and image.size == (48, 48)
    assert scene(7, 3, 64)[2] == described and caption == described.caption
    assert len({scene(i, s, 32)[1] for i in range(20) for s in range(2)}) > 30


def test_every_attribute_appears() -> None:
    scenes = [describe(i, 0, EVERYTHING) for i in range(1500)]
    assert {s.colour for s in scenes} == set(COLOURS) and {s.shape for s in scenes} == set(SHAPES)
    assert {s.place for s in scenes} == {*PLACES, None} and {s.count for s in scenes} == {1, 2, 3}
    assert {s.background for s in scenes} == set(BACKGROUNDS)
    assert all(s.colour != s.background and (s.place is None) == (s.count > 1) for s in scenes)
    assert abs(sum(s.count == 1 for s in scenes) / 1500 - 1 / 3) < 0.05


def test_captions() -> None:
    assert single("circle", place="left").caption == "a large red circle on the left"
    assert single("star", "small", "pink", "top").caption == "a small pink star at the top"
    assert single("heart", place="bottom right").caption == "a large red heart in the bottom right corner"
    two = replace(single("square", "small", "blue"), place=None, count=2)
    assert two.caption == "two small blue squares"
    assert replace(two, shape="cross", count=3, background="grey").caption == (
        "three small blue crosses, grey background"
    )


@pytest.mark.parametrize(
    ("size", "blur", "noise", "needed"),
    [
        (64, 0.0, 0.0, 1.0),
        (64, 0.8, 6.0, 0.99),
        (128, 1.5, 10.0, 0.98),
        (32, 0.0, 0.0, 0.99),
        (32, 0.5, 4.0, 0.98),
    ],
)
def test_the_checker_reads_what_was_drawn(size: int, blur: float, noise: float, needed: float) -> None:
    count = 20 if size == 128 else 70
    verdicts = []
    for index in range(count):
        image, _, described = scene(index, 11, size, EVERYTHING)
        verdict = check(spoiled(image, blur, noise, index) if blur else image, described)
        verdicts.append(astuple(verdict))
    assert np.mean(verdicts) >= needed, np.mean(verdicts, axis=0)


def test_the_checker_tells_every_pair_of_shapes_and_colours_apart() -> None:
    for shape in SHAPES:
        for size in SIZES:
            (found,) = read(spoiled(draw(single(shape, size), 64), 0.6, 4, 0))
            assert (found.shape, found.size, found.colour) == (shape, size, "red")
    for colour in COLOURS:
        (found,) = read(spoiled(draw(single("ring", "small", colour), 64), 0.6, 4, 0))
        assert found.colour == colour


def test_the_checker_finds_each_mistake() -> None:
    described = single("circle", place="left")
    image = draw(described, 64)
    assert check(image, described).right
    wrong = {"colour": "blue", "shape": "ring", "size": "small", "place": "right", "count": 2}
    for name, value in wrong.items():
        verdict = check(image, replace(described, **{name: value}))
        assert not getattr(verdict, name) and sum(astuple(verdict)) == 4 and not verdict.right
    assert check(draw(replace(described, background="black"), 64), described).colour


def test_the_checker_rejects_what_is_no_shape() -> None:
    blank = Image.new("RGB", (64, 64), "white")
    assert not any(astuple(check(blank, single("circle")))) and read(blank) == []
    bar = blank.copy()
    bar.paste("red", (8, 28, 56, 34))
    assert not check(bar, single("circle")).shape and read(bar)[0].shape is None
    pale = blank.copy()
    pale.paste((255, 190, 190), (20, 20, 44, 44))
    assert not check(pale, single("square")).colour
    mixed = draw(single("circle", "small", "red", "left"), 64)
    mixed.paste(draw(single("circle", "small", "blue", "right"), 64).crop((32, 0, 64, 64)), (32, 0))
    two = replace(single("circle", "small"), place=None, count=2)
    assert asdict(check(mixed, two)) == dict(colour=False, shape=True, size=True, place=True, count=True)


def test_components() -> None:
    mask = np.array([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=bool)
    labels = components(mask)
    assert labels.tolist() == [[1, 0, 0, 2], [0, 1, 0, 2], [0, 0, 0, 0], [3, 3, 3, 3]]
    spiral = np.zeros((9, 9), dtype=bool)
    spiral[0], spiral[:, 8], spiral[8, 2:], spiral[2:, 2], spiral[2, 2:7] = True, True, True, True, True
    assert components(spiral).max() == 1 and components(np.ones((3, 3), bool)).tolist() == [[1] * 3] * 3
    assert components(np.zeros((3, 3), bool)).max() == 0


def test_shapes_as_data() -> None:
    source = ShapesSource(count=5, seed=2)
    pictures = source.pictures(32)
    assert pictures.images.shape == (5, 3, 32, 32) and pictures.images.dtype == torch.uint8
    image, caption, described = scene(3, 2, 32)
    assert pictures.captions[3] == caption == source.scene(3).caption and source.scene(3) == described
    assert np.array_equal(pictures.batch([3])[0].permute(1, 2, 0).numpy(), np.asarray(image))
    assert not pictures.flips.any() and pictures.weights == [1.0] * 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Vocabulary(colours=("redd",)), "did you mean 'red'"),
        (lambda: Vocabulary(shapes=()), "'shapes' of the shapes' vocabulary is empty"),
        (lambda: Vocabulary(counts=(4,)), "'4'"),
        (lambda: Vocabulary(colours=("black",), backgrounds=("black",)), "other than its own"),
        (lambda: scene(0, 0, 16), "at least 32 pixels"),
        (lambda: ShapesSource(count=0).pictures(64), "at least 1"),
    ],
)
def test_bad_input(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
