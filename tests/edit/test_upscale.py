"""Pictures enlarged in tiles, against one whole pass."""

import pytest
import torch
from tests.networks import with_unit_gain

from darkroom.checkpoint.upscalers import Upscaler
from darkroom.edit.upscale import upscale
from darkroom.errors import InputError
from darkroom.nn.compact import Compact, CompactConfig
from darkroom.nn.esrgan import RRDBNet, RRDBNetConfig

NEIGHBOURS = 3  # pixels around one that the compact network below sees: it has so many convs


def small(dtype=torch.float32):
    """A compact network of three convs in all, whose pictures are near those it is given."""
    network = with_unit_gain(Compact(CompactConfig(width=8, convs=1, scale=2)), gain=0.3).to(dtype)
    return Upscaler(network=network, scale=2, multiple=1, name="small")


def pictures(height, width, count=1):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(5)) * 1.6 - 0.8


@torch.no_grad()
def whole(upscaler, image):
    return (upscaler.network((image + 1) / 2) * 2 - 1).clamp(-1, 1)


@pytest.mark.parametrize("size", [(40, 61), (33, 20), (20, 20), (7, 50)])
def test_tiles_give_what_one_pass_gives(size):
    image = pictures(*size, count=2)
    drawn = upscale(small(), image, tile=24, overlap=3 * NEIGHBOURS)
    assert drawn.dtype == torch.float32
    torch.testing.assert_close(drawn, whole(small(), image), atol=1e-5, rtol=0)


def test_with_less_context_than_the_network_sees_they_differ():
    image = pictures(40, 61)
    drawn = upscale(small(), image, tile=24, overlap=2)
    assert (drawn - whole(small(), image)).abs().max() > 1e-3


def test_a_picture_of_one_tile_is_one_pass():
    image = pictures(20, 24)
    assert torch.equal(upscale(small(), image), whole(small(), image))


def test_sides_that_a_folded_network_cannot_take_are_padded_and_cut():
    network = with_unit_gain(RRDBNet(RRDBNetConfig(width=8, blocks=1, growth=4, unshuffle=4, doublings=3)))
    upscaler = Upscaler(network=network, scale=2, multiple=4, name="folded")
    image = pictures(9, 11)
    padded = torch.nn.functional.pad(image, (0, 1, 0, 3), mode="replicate")
    expected = whole(upscaler, padded)[:, :, :18, :22]
    torch.testing.assert_close(upscale(upscaler, image), expected, atol=1e-6, rtol=0)


def test_a_network_in_half_precision_draws_nearly_the_same():
    image = pictures(40, 40)
    drawn = upscale(small(torch.bfloat16), image, tile=24, overlap=9)
    assert drawn.dtype == torch.float32
    assert 0 < (drawn - whole(small(), image)).abs().max() < 0.05


def test_pictures_stay_in_range():
    network = with_unit_gain(Compact(CompactConfig(width=8, convs=1, scale=2)), gain=3.0)
    loud = Upscaler(network=network, scale=2, multiple=1, name="loud")
    drawn = upscale(loud, pictures(20, 20))
    assert (float(drawn.min()), float(drawn.max())) == (-1, 1)


@pytest.mark.parametrize(
    ("image", "options", "says"),
    [
        (torch.zeros(3, 8, 8), {}, r"must be \(B, 3, H, W\), floating, not \(3, 8, 8\)"),
        (torch.zeros(1, 4, 8, 8), {}, r"must be \(B, 3, H, W\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), {}, "floating"),
        (torch.zeros(1, 3, 8, 8), {"tile": 16, "overlap": 16}, "overlap = 16 cells must be 0 or more"),
    ],
)
def test_what_cannot_be_enlarged_says_why(image, options, says):
    with pytest.raises(InputError, match=says):
        upscale(small(), image, **options)
