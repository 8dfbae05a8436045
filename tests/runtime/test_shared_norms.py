"""Group norms that keep one picture's statistics for others."""

import torch
from tests.networks import with_unit_gain
from torch import nn

from darkroom.runtime.shared_norms import settle, with_shared_norms


def network():
    return with_unit_gain(nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8, eps=1e-5), nn.GroupNorm(2, 8)))


@torch.no_grad()
def test_while_they_measure_they_are_ordinary():
    plain, x = network(), torch.randn(2, 3, 6, 5)
    shared = with_shared_norms(plain)
    assert torch.equal(shared(x), plain(x))
    assert torch.equal(shared(x[..., :3]), plain(x[..., :3]))


@torch.no_grad()
def test_settled_ones_go_by_the_picture_that_they_saw_last():
    plain, x = network(), torch.randn(2, 3, 6, 5) * 3 + 1
    shared = with_shared_norms(plain)
    shared(torch.randn(2, 3, 4, 4))
    shared(x)
    settle(shared)
    torch.testing.assert_close(shared(x), plain(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shared(x[..., 1:3]), plain(x)[..., 1:3], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain(x[..., 1:3]), plain(x)[..., 1:3], atol=0.1)


@torch.no_grad()
def test_one_that_saw_nothing_stays_ordinary_and_weights_are_shared():
    plain, x = network(), torch.randn(1, 3, 4, 4)
    shared = with_shared_norms(plain)
    settle(shared)
    assert torch.equal(shared(x), plain(x))
    assert all(a is b for a, b in zip(shared.parameters(), plain.parameters(), strict=True))
    assert type(plain[1]) is nn.GroupNorm


@torch.no_grad()
def test_halves_are_normalised_in_float32():
    plain, x = network(), torch.randn(1, 3, 8, 8)
    shared = with_shared_norms(plain.bfloat16())
    shared(x.bfloat16())
    settle(shared)
    drawn = shared(x.bfloat16())
    assert drawn.dtype == torch.bfloat16
    torch.testing.assert_close(drawn, plain(x.bfloat16()), atol=0.05, rtol=0.05)
