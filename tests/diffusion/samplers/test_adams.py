"""The weights of multistep samplers."""

import math

import pytest
import torch

from darkroom.diffusion.path import DiscretePath, FlowPath
from darkroom.diffusion.samplers.adams import (
    estimate_weights,
    exponential_moments,
    interpolation_weights,
    power_moments,
)
from darkroom.diffusion.samplers.multistep import ADAMS_BASHFORTH, deis, ipndm, lms
from darkroom.diffusion.samplers.steps import remember
from darkroom.diffusion.samplers.unipc import uni_pc
from darkroom.errors import InputError


def integral(function, h: float, count: int = 20_000) -> float:
    """From 0 to h, by midpoints."""
    return sum(function((k + 0.5) * h / count) for k in range(count)) * h / count


@pytest.mark.parametrize("h", [0.01, 0.5, 6.0, -0.5, -3.0])
def test_moments(h):
    powers, exponentials = power_moments(h, 4), exponential_moments(h, 4)
    for k in range(4):
        assert powers[k] == pytest.approx(integral(lambda s, k=k: s**k, h), rel=1e-6)
        expected = integral(lambda s, k=k: math.exp(s - h) * s**k, h)
        assert exponentials[k] == pytest.approx(expected, rel=1e-6, abs=1e-13)


@pytest.mark.parametrize("eta", [0.0, 0.25, 1.0])
def test_moments_of_an_sde(eta):
    moments, rate = exponential_moments(0.8, 4, eta), 1 + eta
    for k in range(4):
        expected = integral(lambda s, k=k: rate * math.exp(rate * (s - 0.8)) * s**k, 0.8)
        assert moments[k] == pytest.approx(expected, rel=1e-6)


def test_weights_integrate_polynomials_exactly():
    nodes = [0.0, -0.3, -0.9, -1.4]
    for count in range(1, 5):
        weights = interpolation_weights(nodes[:count], power_moments(0.7, count))
        for power in range(count):
            total = sum(w * node**power for w, node in zip(weights, nodes, strict=False))
            assert total == pytest.approx(0.7 ** (power + 1) / (power + 1))


def test_even_nodes_have_the_classic_coefficients():
    for count in range(1, 5):
        classic = interpolation_weights([-float(k) for k in range(count)], power_moments(1.0, count))
        assert ADAMS_BASHFORTH[count - 1] == pytest.approx(classic[1:])


def test_pure_noise_weighs_nothing():
    """The estimate at alpha = 0 is infinitely far off in log(alpha / sigma)."""
    known = estimate_weights(FlowPath(), [0.8, 0.9], 0.6)
    assert estimate_weights(FlowPath(), [0.8, 0.9, 1.0], 0.6) == pytest.approx([*known, 0.0])
    assert estimate_weights(FlowPath(), [0.8, 1.0], 0.6) == [0.0]
    for levels, to in (([1.0], 0.8), ([0.8, 0.9], 0.0), ([0.8, 0.7], 1.0)):
        assert estimate_weights(FlowPath(), levels, to) == []
    assert estimate_weights(DiscretePath(), [4096.0, 4095.0], 10.0) == []


def test_history_keeps_the_newest_value_of_a_level():
    history = []
    for sigma, value in ((4.0, 0.0), (3.0, 1.0), (2.0, 2.0), (2.0, 3.0), (1.0, 4.0), (0.5, 5.0)):
        history = remember(history, sigma, torch.tensor(value), 4)
    assert [(sigma, float(value)) for sigma, value in history] == [
        (0.5, 5.0),
        (1.0, 4.0),
        (2.0, 3.0),
        (3.0, 1.0),
    ]


@pytest.mark.parametrize("infinite", [math.inf, -math.inf])
def test_history_forgets_what_is_infinitely_far(infinite):
    history = []
    for level, kept in ((infinite, [infinite]), (infinite, [infinite]), (2.0, [2.0]), (1.0, [1.0, 2.0])):
        history = remember(history, level, torch.tensor(level), 3)
        assert [level for level, _ in history] == kept


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        (lms, {"order": 5}, r"order must be a whole number in 1 ... 4, not 5"),
        (ipndm, {"order": 0}, r"order must be a whole number in 1 ... 4, not 0"),
        (deis, {"order": 4}, r"order must be a whole number in 1 ... 3, not 4"),
        (deis, {"lower_order_final": 1}, r"lower_order_final must be true or false, not 1"),
        (uni_pc, {"order": 2.0}, r"order must be a whole number in 1 ... 3, not 2.0"),
        (uni_pc, {"solver": "bh3"}, r"unknown solver 'bh3': did you mean 'bh\d'\? Known: bh1, bh2"),
    ],
)
def test_options_are_checked_at_the_call(sampler, options, message):
    def denoise(x, sigma):
        raise AssertionError("not called")

    with pytest.raises(InputError, match=message):
        sampler(denoise, torch.ones(2), [1.0, 0.0], **options)
