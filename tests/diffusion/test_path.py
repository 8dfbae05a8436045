"""Noising paths: their two directions, their ends, and floats against tensors."""

import math

import pytest
import torch

from darkroom.diffusion.path import (
    ZERO_SNR_ALPHA_BAR,
    CosinePath,
    DiscretePath,
    EDMPath,
    FlowPath,
    alpha_bars,
)
from darkroom.errors import InputError

SCHEDULES = ("linear", "scaled_linear", "cosine")
DISCRETE = [DiscretePath(beta_schedule=s, zero_terminal_snr=z) for s in SCHEDULES for z in (False, True)]
PATHS = [*DISCRETE, CosinePath(), EDMPath(), FlowPath(), FlowPath(shift=3.0, sigma_max=0.999)]


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_timestep_and_sigma_are_inverses(path):
    for share in (0.0, 0.1, 0.37, 0.9, 1.0):
        sigma = path.sigma_min ** (1 - share) * path.sigma_max**share
        assert path.sigma_from_timestep(path.timestep_from_sigma(sigma)) == pytest.approx(sigma, rel=1e-5)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_tensors_agree_with_floats(path):
    sigmas = torch.logspace(math.log10(path.sigma_min), math.log10(path.sigma_max), 50)
    timesteps = path.timestep_from_sigma(sigmas)
    assert timesteps.dtype == torch.float32
    floats = [path.timestep_from_sigma(s) for s in sigmas.tolist()]
    assert timesteps.tolist() == pytest.approx(floats, abs=2.1e-3, rel=1e-5)
    levels = path.sigma_from_timestep(torch.tensor(floats))
    assert levels.tolist() == pytest.approx([path.sigma_from_timestep(t) for t in floats], rel=5e-4)
    for name in ("alpha", "input_scale"):
        method = getattr(path, name)
        assert method(sigmas).tolist() == pytest.approx(
            [method(s) for s in sigmas.tolist()], rel=1e-4, abs=1e-7
        )


@pytest.mark.parametrize("path", DISCRETE, ids=repr)
def test_trained_levels_give_whole_timesteps(path):
    """Also through float32: a network trained on 500 must not be told 499.9999."""
    timesteps = torch.arange(path.num_timesteps, dtype=torch.float32)
    sigmas = path.sigma_from_timestep(timesteps)
    assert torch.equal(path.timestep_from_sigma(sigmas), timesteps)
    assert (sigmas.diff() > 0).all()
    assert [path.timestep_from_sigma(path.sigma_from_timestep(t)) for t in (0.0, 500.0, 999.0)] == [
        0,
        500,
        999,
    ]
    assert path.timestep_from_sigma(path.sigma_from_timestep(500.3)) == pytest.approx(500.3)


def test_stable_diffusion_range():
    path = DiscretePath()
    assert path.sigma_min == pytest.approx(0.0292, abs=5e-5)
    assert path.sigma_max == pytest.approx(14.6146, abs=5e-5)
    assert DiscretePath(final="first_level").final_sigma == path.sigma_min
    assert path.final_sigma == 0
    bars = alpha_bars(path)
    assert float(bars[0]) == pytest.approx(1 - 0.00085)


def test_levels_beyond_the_trained_ones_are_held():
    path = DiscretePath()
    assert path.timestep_from_sigma(1e3) == 999
    assert path.timestep_from_sigma(0.0) == 0
    assert path.timestep_from_sigma(torch.tensor([1e3, 0.0])).tolist() == [999, 0]


def test_zero_terminal_snr_ends_in_noise_and_keeps_the_first_level():
    plain, zero = alpha_bars(DiscretePath()), alpha_bars(DiscretePath(zero_terminal_snr=True))
    assert float(zero[-1]) == ZERO_SNR_ALPHA_BAR
    assert float(zero[0]) == pytest.approx(float(plain[0]))
    assert DiscretePath(zero_terminal_snr=True).sigma_max == pytest.approx(4096, rel=1e-6)
    assert CosinePath().sigma_from_timestep(1000.0) == pytest.approx(4096, rel=1e-6)


def test_start_scales():
    """The network sees unit variance at the start of variance-preserving and flow paths."""
    for path in (DiscretePath(), CosinePath()):
        assert path.start_scale(10.0) * path.input_scale(10.0) == pytest.approx(1)
    assert FlowPath(sigma_max=0.999).start_scale(0.999) == 1
    assert EDMPath().start_scale(80.0) == 80


def test_flow_shift():
    path = FlowPath(shift=3.0)
    assert path.shifted(0.5) == pytest.approx(0.75)
    assert (path.shifted(0.0), path.shifted(1.0)) == (0, 1)
    assert path.timestep_from_sigma(0.75) == 750
    assert path.alpha(0.75) == 0.25


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DiscretePath(beta_start=0.0), "beta_start"),
        (lambda: DiscretePath(beta_start=0.02, beta_end=0.01), "start <= end"),
        (lambda: DiscretePath(beta_schedule="sigmoid"), "beta_schedule 'sigmoid'"),
        (lambda: DiscretePath(num_timesteps=1), "num_timesteps"),
        (lambda: CosinePath(offset=-0.1), "offset"),
        (lambda: CosinePath(num_timesteps=0), "num_timesteps"),
        (lambda: EDMPath(sigma_min=100.0), "0 < min < max"),
        (lambda: EDMPath(sigma_data=0.0), "sigma_data"),
        (lambda: FlowPath(sigma_max=1.5), "sigma_max"),
        (lambda: FlowPath(shift=0.0), "shift"),
        (lambda: FlowPath(num_timesteps=0), "num_timesteps"),
    ],
)
def test_bad_fields_are_named(build, message):
    with pytest.raises(InputError, match=message):
        build()
