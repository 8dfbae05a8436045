"""Streams: their distribution, their independence, and the exact numbers they must go on giving."""

import math

import numpy as np
import pytest
import torch

from darkroom.errors import InputError
from darkroom.rng import image_noise, image_seeds, normal, permutation, raw_bits, stream_key, torch_generator

TOP = 2**64 - 1
GOLDEN = {  # (seed, names): the first raw bits, the first normal numbers
    (0, ()): (
        [2748127362102375290, 9674695825801782634],
        [
            -1.928381323814392,
            -0.2988004982471466,
            0.5279644727706909,
            0.5255319476127625,
            0.46816790103912354,
        ],
    ),
    (1, ("start",)): (
        [4146922371685276500, 7258602062007356908],
        [
            -1.3550618886947632,
            1.071844220161438,
            1.1208690404891968,
            -0.026465682312846184,
            1.5134011507034302,
        ],
    ),
    (TOP, ("brownian", 3, 5)): (
        [9471113248140776694, 5747049318923420503],
        [-0.43548858165740967, 1.06940758228302, 0.03716997802257538, 2.9583044052124023, 0.9603555202484131],
    ),
}
GOLDEN_ORDER = [7, 6, 0, 1, 3, 5, 2, 4]
COUNT = 200_000


def cdf(z: np.ndarray) -> np.ndarray:
    """The normal distribution function, exact."""
    return np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in z.tolist()])


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    return normal((COUNT,), 7, "test").astype(np.float64)


def test_normal_by_kolmogorov_smirnov(drawn):
    uniform = np.sort(cdf(drawn))
    ranks = np.arange(1, COUNT + 1) / COUNT
    distance = max(np.abs(uniform - ranks).max(), np.abs(uniform - ranks + 1 / COUNT).max())
    assert distance * math.sqrt(COUNT) < 1.63  # 1 % point of Kolmogorov's distribution


def test_normal_by_chi_square(drawn):
    counts, _ = np.histogram(cdf(drawn), bins=100, range=(0, 1))
    statistic = ((counts - COUNT / 100) ** 2 / (COUNT / 100)).sum()
    assert 66.5 < statistic < 139  # 0.5 % and 99.5 % points at 99 degrees of freedom


def test_normal_moments_and_tails(drawn):
    assert abs(drawn.mean()) < 4 / math.sqrt(COUNT)
    assert abs(drawn.var() - 1) < 4 * math.sqrt(2 / COUNT)
    assert 3.9 < np.abs(drawn).max() < 6.5


def test_the_two_numbers_of_a_pair_are_independent(drawn):
    first, second = drawn[0::2], drawn[1::2]
    bound = 4 / math.sqrt(COUNT / 2)
    assert abs((first * second).mean()) < bound
    assert abs(((first**2 - 1) * (second**2 - 1)).mean()) < 2 * bound


@pytest.mark.parametrize("key", list(GOLDEN))
def test_golden_values(key):
    """Pictures are replayed from their seeds: these numbers may never change."""
    seed, names = key
    bits, floats = GOLDEN[key]
    assert raw_bits(2, seed, *names).tolist() == bits
    assert normal((5,), seed, *names).tolist() == pytest.approx(floats, rel=2e-7)


def test_streams_differ():
    names = [(), ("a",), ("a", "b"), ("ab",), ("a, b",), ("1",), (1,), (1, 1), (11,), ("a", 1), ("a", "1")]
    keys = {stream_key(seed, *n) for n in names for seed in (0, 1, 2**32, TOP)}
    assert len(keys) == 4 * len(names)
    assert stream_key(3, np.int64(4)) == stream_key(3, 4)
    a, b = normal((50_000,), 1, "a"), normal((50_000,), 2, "a")
    assert abs(float((a * b).mean())) < 0.02


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_out_of_range(seed):
    with pytest.raises(InputError, match=r"seed .* from 0 to 2\^64 - 1"):
        normal((1,), seed)


def test_a_shorter_draw_is_the_start_of_a_longer_one():
    assert normal((7,), 3, "x").tolist() == normal((64,), 3, "x")[:7].tolist()
    assert normal((), 3, "x").shape == ()
    assert normal((0, 4), 3).shape == (0, 4)


def test_a_picture_has_the_same_noise_at_any_batch_size():
    seeds = image_seeds(TOP - 1, 4)
    assert seeds == [TOP - 1, TOP, 0, 1]
    together = image_noise(seeds, (4, 3, 5), "start")
    assert together.shape == (4, 4, 3, 5)
    assert together.dtype == torch.float32
    for seed, noise in zip(seeds, together, strict=True):
        assert torch.equal(image_noise([seed], (4, 3, 5), "start")[0], noise)
    assert torch.equal(image_noise(seeds[2:], (4, 3, 5), "start"), together[2:])
    assert not torch.equal(together[0], together[1])


def test_permutation():
    order = permutation(1000, 5, "epoch", 0)
    assert sorted(order.tolist()) == list(range(1000))
    assert order.tolist() != permutation(1000, 5, "epoch", 1).tolist()
    assert permutation(8, 5, "epoch", 0).tolist() == GOLDEN_ORDER
    places = np.stack([np.argsort(permutation(8, seed)) for seed in range(2000)])
    assert np.abs(places.mean(0) - 3.5).max() < 0.2


def test_torch_generator():
    a = torch.rand(3, generator=torch_generator("cpu", TOP, "noise", 1))
    assert torch.equal(a, torch.rand(3, generator=torch_generator("cpu", TOP, "noise", 1)))
    assert not torch.equal(a, torch.rand(3, generator=torch_generator("cpu", TOP, "noise", 2)))
