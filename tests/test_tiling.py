"""Tiles of a picture, and weights that add up to exactly one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from darkroom.errors import InputError
from darkroom.tiling import Cuts, cuts, grid

SIDES = st.tuples(
    st.integers(1, 40), st.integers(1, 20), st.integers(0, 19), st.sampled_from([1, 2, 3]), st.booleans()
).filter(lambda s: s[2] < s[1] * s[3])


def total(parts: Cuts, unused: int = 0) -> torch.Tensor:
    """What the weights of a side add up to at each cell, float32."""
    summed = torch.zeros(parts.length)
    for number, weights in enumerate(parts.weights(unused)):
        summed[parts.cells(number)] += weights
    return summed


@settings(max_examples=150, deadline=None)
@given(SIDES)
def test_tiles_cover_a_side_and_share_what_was_asked(side):
    units, tile, overlap, multiple, wrap = side
    parts = cuts("width", units * multiple, tile * multiple, overlap, multiple=multiple, wrap=wrap)
    assert parts.tile == min(tile, units) * multiple
    assert {int(cell) for n in range(len(parts.starts)) for cell in parts.cells(n)} == set(
        range(parts.length)
    )
    assert all(start % multiple == 0 for start in parts.starts)
    pairs = list(zip(parts.starts, parts.starts[1:], strict=False))
    asked = min(overlap, parts.tile - multiple)
    if wrap and parts.tile == parts.length:  # two tiles, whatever they share
        assert len(parts.starts) == min(2, units)
        return
    assert all(a < b and parts.tile - (b - a) >= asked for a, b in pairs)
    if wrap:  # also across the edge
        assert parts.tile - (parts.starts[0] + parts.length - parts.starts[-1]) >= asked
    if not wrap:
        assert parts.starts[-1] + parts.tile == parts.length


@settings(max_examples=150, deadline=None)
@given(SIDES, st.integers(0, 12))
def test_weights_add_up_to_exactly_one(side, unused):
    units, tile, overlap, multiple, wrap = side
    parts = cuts("width", units * multiple, tile * multiple, overlap, multiple=multiple, wrap=wrap)
    assert torch.equal(total(parts, unused), torch.ones(parts.length))
    assert all((weights >= 0).all() for weights in parts.weights(unused))


def test_weights_of_a_picture_add_up_to_exactly_one():
    parts = grid((37, 53), (16, 20), 7, wrap="x")
    ones = (torch.ones(1, 1, 16, 20) for _ in parts.tiles)
    assert torch.equal(parts.blended(ones), torch.ones(1, 1, 37, 53))


def test_what_is_cropped_and_blended_again_is_the_picture():
    picture = torch.randn(2, 3, 37, 53)
    for wrap in (None, "x", "y", "xy"):
        parts = grid((37, 53), (16, 20), 7, wrap=wrap)
        again = parts.blended(parts.crop(picture, number) for number in range(len(parts.tiles)))
        assert torch.allclose(again, picture, atol=1e-6)


def test_a_tile_fades_smoothly_and_in_the_middle_only():
    first, second = cuts("width", 28, 16, 4).weights()
    assert first[:12].eq(1).all()
    assert second[4:].eq(1).all()
    # Half a cosine over four cells.
    expected = torch.tensor([0.9619, 0.6913, 0.3087, 0.0381])
    assert torch.allclose(first[12:], expected, atol=1e-3)
    assert torch.allclose(second[:4], expected.flip(0), atol=1e-3)
    first, _ = cuts("width", 24, 16, 8).weights(unused=3)
    assert first[:11].eq(1).all() and first[13:].eq(0).all() and first[11] > first[12] > 0


def test_a_picture_no_larger_than_a_tile_is_one_tile():
    assert len(grid((16, 16), (16, 16), 4).tiles) == 1
    assert len(grid((8, 12), (16, 16), 12).tiles) == 1
    assert len(grid((16, 17), (16, 16), 4).tiles) == 2


def test_a_circle_is_cut_twice_even_if_one_tile_would_do():
    parts = cuts("width", 16, 16, 4, wrap=True)
    assert parts.starts == (0, 8)
    weights = parts.weights()
    assert weights[0, 0] < 0.05 and weights[1, 0] < 0.05  # nothing is an edge: its cells hardly count


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            {"length": 32, "tile": 16, "overlap": 16},
            "overlap = 16 cells must be 0 or more, and less than the",
        ),
        ({"length": 32, "tile": 16, "overlap": -1}, "overlap = -1"),
        ({"length": 32, "tile": 0, "overlap": 0}, "tile = 0 cells of the width is too small"),
        ({"length": 0, "tile": 4, "overlap": 0}, "width = 0 cells"),
        ({"length": 33, "tile": 16, "overlap": 0, "multiple": 2}, "width = 33 cells"),
    ],
)
def test_what_cannot_be_cut_says_why(arguments, says):
    with pytest.raises(InputError, match=says):
        cuts("width", **arguments)


def test_other_axes_are_an_error():
    with pytest.raises(InputError, match="unknown wrap 'z'"):
        grid((16, 16), (8, 8), 2, wrap="z")
