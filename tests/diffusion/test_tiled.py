"""Denoisers that work on tiles or rolled pictures, against what their definition says."""

from dataclasses import replace

import pytest
import torch
from tests.networks import with_unit_gain
from tests.tiny import tiny_parts

from darkroom.diffusion.denoiser import Condition, Denoiser
from darkroom.diffusion.path import FlowPath
from darkroom.diffusion.tiled import Rolled, Tiled
from darkroom.errors import InputError
from darkroom.nn.extra import Extra
from darkroom.nn.mmdit import MMDiT, MMDiTConfig

PATH = FlowPath(sigma_max=0.999)


class Recorder(torch.nn.Module):
    """A network that keeps what it is shown, and answers by a function of it."""

    def __init__(self, answer=lambda x, context, extra: x):
        super().__init__()
        self.calls, self.answer = [], answer

    def forward(self, x, timestep, context, *, extra=None):
        self.calls.append((x, timestep, context, extra))
        return self.answer(x, context, extra)


def noisy(height, width, count=2, channels=4):
    return torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(1))


def levels(count=2):
    return torch.linspace(0.9, 0.4, count)


def test_one_tile_is_the_denoiser_itself():
    model = tiny_parts()
    x, cond = noisy(8, 10), Condition(torch.randn(2, 5, 16))
    expected = model.denoiser(x, levels(), cond)
    assert torch.equal(Tiled(model.denoiser, (8, 10), 2)(x, levels(), cond), expected)
    assert torch.equal(Tiled(model.denoiser, (64, 64), 16)(x, levels(), cond), expected)


def test_tiles_are_the_denoiser_on_each_blended_by_their_weights():
    model = tiny_parts()
    x, cond = noisy(12, 20), Condition(torch.randn(2, 5, 16))
    tiled = Tiled(model.denoiser, (8, 8), 2, tile_batch=3)
    parts = tiled.grid((12, 20))
    assert len(parts.tiles) == 2 * 3
    expected, down, across = torch.zeros_like(x), parts.rows.weights(), parts.columns.weights()
    for row, top in enumerate(parts.rows.starts):
        for column, left in enumerate(parts.columns.starts):
            tile = model.denoiser(x[:, :, top : top + 8, left : left + 8], levels(), cond)
            weight = down[row][:, None] * across[column]
            expected[:, :, top : top + 8, left : left + 8] += tile * weight
    torch.testing.assert_close(tiled(x, levels(), cond), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tile_batch", [1, 4, 100])
def test_how_many_tiles_go_at_once_changes_nothing(tile_batch):
    model = tiny_parts()
    x, cond = noisy(12, 20), Condition(torch.randn(2, 5, 16))
    expected = Tiled(model.denoiser, (8, 8), 2, tile_batch=2)(x, levels(), cond)
    found = Tiled(model.denoiser, (8, 8), 2, tile_batch=tile_batch)(x, levels(), cond)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_every_tile_is_told_its_picture_and_shown_its_part():
    network = Recorder(lambda x, context, extra: x[:, :4])
    context, pooled = torch.arange(2.0)[:, None, None].expand(2, 3, 5), torch.tensor([[10.0], [20.0]])
    beside, reference = noisy(8, 12, channels=1), noisy(8, 12)
    x = noisy(8, 12)
    cond = Condition(context, Extra(pooled=pooled, reference=reference), beside)
    tiled = Tiled(Denoiser(network, PATH, "x0"), (8, 8), 3, tile_batch=2)
    found = tiled(x, levels(), cond)
    ((seen, timestep, told, extra),) = network.calls
    assert seen.shape == (4, 5, 8, 8)
    both = torch.cat([x, beside], dim=1)
    assert torch.equal(seen, torch.cat([both[..., :8], both[..., 4:]]))
    assert torch.equal(extra.reference, torch.cat([reference[..., :8], reference[..., 4:]]))
    assert told[:, 0, 0].tolist() == [0, 1, 0, 1]
    assert extra.pooled[:, 0].tolist() == [10, 20, 10, 20]
    assert torch.allclose(timestep, PATH.timestep_from_sigma(levels().repeat(2)))
    torch.testing.assert_close(found, x, atol=1e-6, rtol=0)  # what comes back is where it was


def test_a_picture_is_the_same_whatever_else_is_in_the_batch():
    model = tiny_parts()
    x, cond = noisy(12, 20, count=3), Condition(torch.randn(3, 5, 16))
    tiled = Tiled(model.denoiser, (8, 8), 2)
    together = tiled(x, levels(3), cond)
    alone = tiled(x[1:2], levels(3)[1:2], cond.take(torch.tensor([1])))
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-5)


def test_a_panorama_has_no_edge_in_x():
    model = tiny_parts()
    x, cond = noisy(8, 24, count=1), Condition(torch.randn(1, 5, 16))
    wrapped = Tiled(model.denoiser, (8, 8), 2, wrap="x")
    assert wrapped.grid((8, 24)).columns.starts == (0, 6, 12, 18)
    # Rolled by the tiles' distance, the picture is cut into the same tiles.
    rolled = wrapped(x.roll(6, -1), levels(1), cond).roll(-6, -1)
    torch.testing.assert_close(wrapped(x, levels(1), cond), rolled, atol=1e-5, rtol=1e-5)
    plain = Tiled(model.denoiser, (8, 8), 2)
    assert (plain(x.roll(6, -1), levels(1), cond).roll(-6, -1) - plain(x, levels(1), cond)).abs().max() > 0.01


def test_tiles_of_a_transformer_begin_at_its_patches():
    config = MMDiTConfig(depth=1, num_heads=2, head_width=8, context_dim=16, pooled_dim=8, positions=4)
    network = with_unit_gain(MMDiT(config))
    x, cond = noisy(8, 14, 2, 16), Condition(torch.randn(2, 5, 16), Extra(pooled=torch.randn(2, 8)))
    denoiser = Denoiser(network, PATH, "flow")
    with pytest.raises(InputError, match="too large: this network's positions end at 8x8"):
        denoiser(x, levels(), cond)
    tiled = Tiled(denoiser, (8, 8), 1, multiple=2)
    assert tiled.grid((8, 14)).columns.starts == (0, 6)
    found = tiled(x, levels(), cond)
    first, last = denoiser(x[..., :8], levels(), cond), denoiser(x[..., 6:], levels(), cond)
    torch.testing.assert_close(found[..., :6], first[..., :6], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[..., 8:], last[..., 2:], atol=1e-5, rtol=1e-5)


def test_one_level_for_all_is_what_it_is_for_each():
    model = tiny_parts()
    x, cond, each = noisy(12, 20), Condition(torch.randn(2, 5, 16)), torch.full((2,), 0.3)
    for wrapped in (Tiled(model.denoiser, (8, 8), 2), Rolled(model.denoiser, "xy")):
        torch.testing.assert_close(wrapped(x, 0.3, cond), wrapped(x, each, cond), atol=1e-5, rtol=1e-5)


def test_both_keep_the_contract_of_a_denoiser():
    model = tiny_parts()
    x, output = noisy(8, 8), noisy(8, 8)
    for wrapped in (Tiled(model.denoiser, (4, 4), 1), Rolled(model.denoiser, "xy")):
        assert (wrapped.path, wrapped.prediction) == (model.denoiser.path, model.denoiser.prediction)
        assert wrapped.network is model.network
        expected = model.denoiser.from_output(x, output, levels())
        assert torch.equal(wrapped.from_output(x, output, levels()), expected)
        assert wrapped(x.bfloat16(), levels(), Condition(torch.randn(2, 5, 16))).dtype == torch.bfloat16
        assert replace(model, denoiser=wrapped).network is model.network


def test_a_rolled_denoiser_moves_its_network_over_the_picture():
    network = Recorder(lambda x, context, extra: x[:, :4])
    rolled = Rolled(Denoiser(network, PATH, "x0"), "x")
    x, beside, reference = noisy(8, 12), noisy(8, 12, channels=1), noisy(8, 12)
    found = rolled(x, levels(), Condition(None, Extra(reference=reference), beside))
    torch.testing.assert_close(found, x, atol=0, rtol=0)
    ((seen, _, _, extra),) = network.calls
    shifts = [rolled.shift(level, 8, 12) for level in levels().tolist()]
    assert shifts[0] != shifts[1] and all(down == 0 for down, _ in shifts)
    for row, shift in enumerate(shifts):
        both = torch.cat([x, beside], dim=1)[row].roll(shift, (-2, -1))
        assert torch.equal(seen[row], both)
        assert torch.equal(extra.reference[row], reference[row].roll(shift, (-2, -1)))


def test_rolls_depend_on_the_level_alone_and_reach_everywhere():
    rolled = Rolled(Denoiser(Recorder(), PATH, "x0"), "xy")
    again = Rolled(Denoiser(Recorder(), PATH, "x0"), "xy")
    steps = [k / 400 for k in range(1, 400)]
    shifts = [rolled.shift(level, 4, 6) for level in steps]
    assert shifts == [again.shift(level, 4, 6) for level in steps]
    assert set(shifts) == {(down, right) for down in range(4) for right in range(6)}
    assert all(Rolled(Denoiser(Recorder(), PATH, "x0"), "y").shift(level, 4, 6)[1] == 0 for level in steps)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda d: Tiled(d, (8, 8), 8), "overlap = 8 cells must be 0 or more, and less than the tile's 8"),
        (lambda d: Tiled(d, (0, 8), 0), "tile = 0 cells of the height is too small"),
        (lambda d: Tiled(d, (8, 8), 2, tile_batch=0), "tile_batch must be 1 or more, not 0"),
        (lambda d: Tiled(d, (8, 8), 2, wrap="both"), "unknown wrap 'both'"),
        (lambda d: Rolled(d, "z"), "unknown axes 'z'"),
    ],
)
def test_tiles_that_cannot_be_are_errors_at_once(make, says):
    with pytest.raises(InputError, match=says):
        make(tiny_parts().denoiser)


@pytest.mark.parametrize("wrap", [lambda d: Tiled(d, (8, 8), 2), lambda d: Rolled(d, "x")])
def test_a_reference_of_another_size_is_an_error(wrap):
    cond = Condition(None, Extra(reference=noisy(8, 8)))
    with pytest.raises(
        InputError, match="the reference has 8x8 latent cells: here it must have the picture's, 12x8"
    ):
        wrap(Denoiser(Recorder(), PATH, "x0"))(noisy(8, 12), levels(), cond)
