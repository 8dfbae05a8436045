"""The Brownian noise: one path per seed, whatever the grid and the batch."""

import itertools
import math
import time

import pytest
import torch
from torch import Tensor

from darkroom.diffusion.brownian import DEPTH, BrownianNoise
from darkroom.diffusion.path import DiscretePath
from darkroom.diffusion.schedules import karras_sigmas

SHAPE = (4, 8, 8)


def clock(sigma: float) -> float:
    """The time on which the path runs, to its resolution."""
    return round(sigma / (1 + sigma) * 2**DEPTH) / 2**DEPTH


def increment(noise: BrownianNoise, start: float, end: float) -> Tensor:
    """The path's own increment, without the scaling to unit variance."""
    return noise.between(start, end) * math.sqrt(abs(clock(start) - clock(end)))


def test_increments_add_up():
    sigmas = [14.6, 7.3, 2.0, 1.0, 0.5, 0.031, 0.03]
    whole = increment(BrownianNoise([3], SHAPE), sigmas[0], sigmas[-1])
    noise = BrownianNoise([3], SHAPE)
    parts = sum(increment(noise, a, b) for a, b in itertools.pairwise(sigmas))
    assert torch.allclose(parts, whole, atol=2e-6)


def test_the_order_of_questions_does_not_matter():
    noise, grid = BrownianNoise([3], SHAPE), karras_sigmas(DiscretePath(), 12)[:-1]
    down = [noise.between(a, b) for a, b in itertools.pairwise(grid)]
    alone = [BrownianNoise([3], SHAPE).between(a, b) for a, b in itertools.pairwise(grid)]
    assert all(torch.equal(a, b) for a, b in zip(down, alone, strict=True))
    assert torch.equal(noise.between(grid[5], grid[4]), -down[4])


def test_a_picture_is_the_same_in_any_batch():
    batch = BrownianNoise([7, 8, 9], SHAPE).between(2.0, 1.0)
    assert batch.shape == (3, *SHAPE)
    assert batch.dtype == torch.float32
    for k, seed in enumerate((7, 8, 9)):
        assert torch.equal(BrownianNoise([seed], SHAPE).between(2.0, 1.0)[0], batch[k])
    assert abs(float((batch[0] * batch[1]).mean())) < 0.3


@pytest.mark.parametrize(
    ("start", "end"), [(14.6, 0.03), (2.0, 1.9), (1.0, 0.5), (0.031, 0.03), (80.0, 79.0)]
)
def test_unit_variance_at_every_scale(start, end):
    drawn = BrownianNoise([0], (40_000,)).between(start, end)
    assert abs(float(drawn.mean())) < 0.025
    assert float(drawn.var()) == pytest.approx(1, abs=0.04)


def test_increments_are_independent():
    noise, grid = BrownianNoise([0], (40_000,)), [10.0, 3.0, 1.0, 0.9, 0.3, 0.1]
    drawn = torch.cat([noise.between(a, b) for a, b in itertools.pairwise(grid)])
    covariance = drawn @ drawn.T / drawn.shape[1]
    assert torch.allclose(covariance, torch.eye(5), atol=0.03)


def test_levels_nearer_than_the_resolution():
    noise = BrownianNoise([0], (10_000,))
    assert float(noise.between(1.0, 1.0 - 1e-9).var()) == pytest.approx(1, abs=0.1)
    assert float(noise.between(1e12, 1e11).var()) == pytest.approx(1, abs=0.1)


def test_a_step_is_fast_and_memory_stays_small():
    noise, grid = BrownianNoise([1], (16, 16, 16)), karras_sigmas(DiscretePath(), 28)[:-1]
    start = time.perf_counter()
    for a, b in itertools.pairwise(grid):
        noise.between(a, b)
    assert (time.perf_counter() - start) / 27 < 0.03  # 3 ms on an idle core; slack for a busy one
    assert len(noise._heights) <= DEPTH + 1
