"""The order of convergence of every deterministic sampler, on a mixture whose solution is known exactly."""

import pytest
import torch
from benchmarks.sampler_order import HIGH, LOW, Mixture, error, levels, practical_error, slope

from darkroom.diffusion.path import CosinePath, FlowPath
from darkroom.diffusion.samplers.cards import CARDS

PATHS = [CosinePath(), FlowPath()]
STEPS = (80, 160, 320)
ODE = [name for name, card in CARDS.items() if not card.stochastic and card.order != "adaptive"]
# (sampler, options, order)
OF_OPTIONS = [
    *[(name, {"order": order}, order) for name in ("lms", "ipndm") for order in (1, 2, 3)],
    *[("deis", {"order": order}, order) for order in (1, 3)],
    *[
        ("uni_pc", {"order": order, "solver": solver}, order + 1)
        for order in (1, 2, 3)
        for solver in ("bh1", "bh2")
    ],
]


def measured(name: str, path, rising: bool, **options) -> float:
    return slope(STEPS, [error(name, path, steps, rising=rising, **options) for steps in STEPS])


def test_the_exact_solution_solves_the_flow():
    """Its derivative by sigma is (x - estimate) / sigma, on both paths."""
    quantiles, change = torch.linspace(0.05, 0.95, 19, dtype=torch.float64), 1e-4
    for path in PATHS:
        mixture = Mixture(path)
        for sigma in (0.2, 0.5, 0.8):
            x = mixture.exact(quantiles, sigma)
            after, before = (mixture.exact(quantiles, sigma + by) for by in (change, -change))
            expected = (x - mixture(x, sigma).value) / sigma
            assert torch.allclose((after - before) / (2 * change), expected, atol=1e-6)


@pytest.mark.parametrize("variable", ["sigma", "log_sigma", "log_snr", "timestep"])
def test_levels_go_from_end_to_end(variable):
    for path in PATHS:
        for rising in (False, True):
            ratios = [sigma / path.alpha(sigma) for sigma in levels(path, variable, 7, rising)]
            ends = [LOW, HIGH] if rising else [HIGH, LOW]
            assert [ratios[0], ratios[-1]] == pytest.approx(ends)
            assert ratios == sorted(ratios, reverse=not rising)
            assert len(ratios) == 8


@pytest.mark.parametrize("rising", [False, True], ids=["down", "up"])
@pytest.mark.parametrize("path", PATHS, ids=["cosine", "flow"])
@pytest.mark.parametrize("name", ODE)
def test_order(name, path, rising):
    """Within 0.3 of the card's, to the picture and to the noise."""
    # A flow path's timesteps are even in sigma, where plms is exact to the order of its coefficients.
    order = 4 if name == "plms" and path.kind == "flow" else CARDS[name].order
    assert measured(name, path, rising) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize(("name", "options", "order"), OF_OPTIONS)
def test_order_is_as_the_options_say(name, options, order):
    assert measured(name, CosinePath(), False, **options) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("name", ["lms", "plms", "ipndm", "deis", "dpmpp_2m", "uni_pc"])
def test_multistep_samplers_beat_first_order_from_six_calls_on(name):
    """Start and end included, as they are used."""
    for calls in (6, 12, 24):
        assert practical_error(name, calls) < 0.6 * practical_error("euler", calls)
