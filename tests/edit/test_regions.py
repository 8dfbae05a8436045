"""Regions: how much each prompt counts, which is 1 in total everywhere."""

import pytest
import torch
from PIL import Image

from darkroom.edit.regions import Region, region_masks
from darkroom.errors import InputError

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


def total(masks):
    return masks.base + sum(masks.regions)


def test_two_halves_leave_nothing_to_the_base():
    masks = region_masks([Region(prompt="a", box=LEFT), Region(prompt="b", box=RIGHT)], 64, 128, 8)
    assert masks.base.shape == masks.regions[0].shape == (1, 1, 8, 16)
    assert masks.base.eq(0).all()
    assert torch.equal(masks.regions[0][0, 0, 0], torch.tensor([1.0] * 8 + [0.0] * 8))
    assert torch.equal(masks.regions[1], masks.regions[0].flip(-1))


def test_where_no_region_is_the_base_counts_alone():
    masks = region_masks([Region(prompt="a", box=(0.25, 0.5, 0.5, 1.0))], 64, 64, 8)
    assert masks.regions[0][0, 0, 4:, 2:4].eq(1).all()
    assert masks.regions[0].sum() == 8
    assert torch.equal(masks.base, 1 - masks.regions[0])


def test_weights_and_the_base_share_a_place():
    regions = [Region(prompt="a", box=LEFT, weight=3.0), Region(prompt="b", box=(0.0, 0.0, 1.0, 1.0))]
    masks = region_masks(regions, 8, 16, 8, base_weight=1.0)
    assert torch.allclose(masks.regions[0][0, 0, 0], torch.tensor([0.6, 0.0]))
    assert torch.allclose(masks.regions[1][0, 0, 0], torch.tensor([0.2, 0.5]))
    assert torch.allclose(masks.base[0, 0, 0], torch.tensor([0.2, 0.5]))


def test_a_box_covers_a_part_of_a_cell():
    masks = region_masks([Region(prompt="a", box=(0.0, 0.0, 0.3, 1.0))], 8, 80, 8)
    assert torch.allclose(masks.regions[0][0, 0, 0, :4], torch.tensor([1.0, 1.0, 1.0, 0.0]))
    masks = region_masks([Region(prompt="a", box=(0.125, 0.25, 0.5, 1.0))], 16, 32, 8)
    expected = torch.tensor([[0.5 * 0.5, 0.5, 0.0, 0.0], [0.5, 1.0, 0.0, 0.0]])
    assert torch.allclose(masks.regions[0][0, 0], expected)


@pytest.mark.parametrize("mode", ["1", "L"])
def test_a_mask_is_averaged_over_cells(mode):
    picture = Image.new("L", (32, 16), 0)
    picture.paste(255, (4, 0, 16, 16))
    masks = region_masks([Region(prompt="a", mask=picture.convert(mode))], 16, 32, 8)
    assert torch.allclose(masks.regions[0][0, 0, 0], torch.tensor([0.5, 1.0, 0.0, 0.0]))
    tensor = torch.zeros(1, 16, 32)
    tensor[:, :, 4:16] = 1
    same = region_masks([Region(prompt="a", mask=tensor)], 16, 32, 8)
    assert torch.allclose(same.regions[0], masks.regions[0])


def test_feathered_edges_are_soft_and_keep_the_middle():
    regions = [Region(prompt="a", box=LEFT), Region(prompt="b", box=RIGHT)]
    row = region_masks(regions, 64, 256, 8, feather=16.0).regions[0][0, 0, 3]
    assert row[0] == pytest.approx(1, abs=1e-6) and row[-1] == pytest.approx(0, abs=1e-6)
    assert (row.diff() <= 1e-6).all()
    # A Gaussian of two cells, integrated up to half a cell from the edge.
    expected = 0.5 * (1 + torch.erf(torch.tensor(0.5 / 2 / 2**0.5)))
    assert row[15] == pytest.approx(float(expected), abs=0.01)


@pytest.mark.parametrize("base_weight", [0.0, 0.4])
@pytest.mark.parametrize("feather", [0.0, 11.0])
def test_everything_adds_up_to_one(base_weight, feather):
    regions = [
        Region(prompt="a", box=(0.1, 0.2, 0.77, 0.9), weight=0.3),
        Region(prompt="b", box=(0.4, 0.0, 0.9, 0.5), weight=7.0),
        Region(prompt="c", mask=torch.rand(1, 72, 104, generator=torch.Generator().manual_seed(0))),
    ]
    masks = region_masks(regions, 72, 104, 8, base_weight=base_weight, feather=feather)
    assert torch.allclose(total(masks), torch.ones(1, 1, 9, 13), atol=1e-6)
    assert all((mask >= 0).all() for mask in (masks.base, *masks.regions))


def test_no_regions_leave_all_to_the_base():
    masks = region_masks([], 16, 16, 8)
    assert masks.regions == () and masks.base.eq(1).all()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "region 'a hat' needs a box or a mask, and not both"),
        ({"box": LEFT, "mask": torch.ones(1, 8, 8)}, "needs a box or a mask, and not both"),
        ({"box": (0.0, 0.0, 1.5, 1.0)}, "must be left, top, right, bottom, each in 0 ... 1"),
        ({"box": (-0.1, 0.0, 1.0, 1.0)}, "each in 0 ... 1"),
        ({"box": (0.0, 0.0, 1.0)}, "each in 0 ... 1"),
        ({"box": (0.0, 0.0, float("nan"), 1.0)}, "each in 0 ... 1"),
        ({"box": (0.5, 0.0, 0.5, 1.0)}, "is empty: left must be below right"),
        ({"box": (0.0, 0.9, 0.5, 0.1)}, "is empty"),
        ({"box": LEFT, "weight": 0.0}, "weight must be above 0, not 0.0"),
        ({"box": LEFT, "weight": float("inf")}, "weight must be above 0, not inf"),
        ({"mask": Image.new("RGB", (8, 8))}, "of mode RGB, and must be in grey: convert it to mode L"),
    ],
)
def test_regions_that_cannot_be(arguments, says):
    with pytest.raises(InputError, match=says):
        Region(prompt="a hat", **arguments)


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (Image.new("L", (16, 8), 255), "its mask is 16x8, and the picture is 16x16"),
        (torch.ones(1, 8, 8), "its mask is 8x8"),
        (torch.ones(2, 1, 16, 16), "its mask is 2 masks of 16x16"),
        (torch.zeros(1, 16, 16), "black everywhere, so the region is empty"),
        (Image.new("L", (16, 16), 0), "black everywhere"),
        (torch.ones(1, 16, 16) * 255, "its numbers are 255 to 255"),
    ],
)
def test_masks_that_do_not_fit(mask, says):
    with pytest.raises(InputError, match=says):
        region_masks([Region(prompt="a", mask=mask)], 16, 16, 8)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"base_weight": -1.0}, "base_weight must be 0 or more"),
        ({"feather": -1.0}, "feather must be 0 or more"),
        ({"stride": 7}, "no whole number of latent cells, which are 7 pixels wide"),
    ],
)
def test_numbers_that_cannot_be(arguments, says):
    with pytest.raises(InputError, match=says):
        region_masks([Region(prompt="a", box=LEFT)], 16, 16, **({"stride": 8} | arguments))
