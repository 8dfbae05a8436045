"""Upscalers' networks: their sizes, and every input of theirs counts."""

import pytest
import torch
from tests.networks import with_unit_gain, without_gradient

from darkroom.errors import InputError
from darkroom.nn.compact import Compact, CompactConfig
from darkroom.nn.esrgan import RRDBNet, RRDBNetConfig
from darkroom.nn.span import SPAN, SPANConfig

# Parameters of the released networks, as their training logs print them.
RELEASED = [
    (RRDBNet, RRDBNetConfig(), 16_697_987),  # RealESRGAN_x4plus, and ESRGAN itself
    (Compact, CompactConfig(convs=16), 621_424),  # realesr-animevideov3
]


@pytest.mark.parametrize(("network", "config", "count"), RELEASED)
def test_the_released_networks_have_as_many_parameters(network, config, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in network(config).parameters()) == count


@pytest.mark.parametrize(
    "network",
    [
        RRDBNet(RRDBNetConfig(width=8, blocks=2, growth=4)),
        RRDBNet(RRDBNetConfig(width=8, blocks=1, growth=4, unshuffle=2, plus=True)),
        RRDBNet(RRDBNetConfig(width=8, blocks=1, growth=4, unshuffle=4)),
        Compact(CompactConfig(width=8, convs=2, scale=3)),
        SPAN(SPANConfig(width=8, scale=2)),
    ],
    ids=["x4", "x2 folded, plus", "x1 folded", "compact x3", "span x2"],
)
def test_a_picture_grows_by_the_scale_and_every_parameter_counts(network):
    with_unit_gain(network)
    scale = network.config.scale
    image = torch.rand(2, 3, 8, 12, requires_grad=True)
    drawn = network(image)
    assert drawn.shape == (2, 3, 8 * scale, 12 * scale)
    drawn.square().sum().backward()
    assert without_gradient(network) == set()
    assert bool((image.grad != 0).all())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"blocks": 0}, "`blocks` = 0 must be at least 1"),
        ({"doublings": 1, "unshuffle": 4}, "folded by 4 and doubled 1 times"),
        ({"doublings": -1}, "doubled -1 times"),
    ],
)
def test_numbers_that_cannot_be_are_errors(arguments, says):
    with pytest.raises(InputError, match=says):
        RRDBNetConfig(**arguments)
