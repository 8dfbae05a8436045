"""Schedules: lengths, ends, order, and what is refused."""

import itertools

import pytest

from darkroom.diffusion.path import CosinePath, DiscretePath, EDMPath, FlowPath
from darkroom.diffusion.schedules import SCHEDULES, flow_sigmas, karras_sigmas, timestep_sigmas
from darkroom.errors import InputError

VP = DiscretePath()
ALLOWED = [
    *(("karras", path) for path in (VP, CosinePath(), EDMPath(), FlowPath())),
    *((name, path) for name in ("leading", "trailing", "linspace") for path in (VP, CosinePath())),
    ("flow", FlowPath(shift=3.0)),
]


@pytest.mark.parametrize(("name", "path"), ALLOWED, ids=lambda v: getattr(v, "kind", v))
@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_levels_fall_to_the_final_one(name, path, steps):
    sigmas = SCHEDULES[name](path, steps)
    assert len(sigmas) == steps + 1
    assert all(type(sigma) is float for sigma in sigmas)
    assert all(a > b for a, b in itertools.pairwise(sigmas))
    assert sigmas[-1] == path.final_sigma == 0
    assert sigmas[0] <= path.sigma_max * (1 + 1e-9)


@pytest.mark.parametrize("name", ["karras", "trailing", "linspace"])
def test_these_start_at_the_noisiest_level(name):
    for steps in (1, 5, 30):
        assert SCHEDULES[name](VP, steps)[0] == pytest.approx(VP.sigma_max)
    assert flow_sigmas(FlowPath(), 4) == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize(
    ("spacing", "timesteps"),
    [
        ("leading", [801, 601, 401, 201, 1]),
        ("trailing", [999, 799, 599, 399, 199]),
        ("linspace", [999, 749, 500, 250, 0]),
    ],
)
def test_timesteps_of_each_spacing(spacing, timesteps):
    sigmas = timestep_sigmas(VP, 5, spacing)
    assert [VP.timestep_from_sigma(sigma) for sigma in sigmas[:-1]] == timesteps


def test_the_final_level_is_the_paths():
    path = DiscretePath(final="first_level")
    assert SCHEDULES["leading"](path, 5)[-1] == path.sigma_min


def test_karras_is_even_in_the_seventh_root():
    sigmas = karras_sigmas(EDMPath(), 18)
    roots = [sigma ** (1 / 7) for sigma in sigmas[:-1]]
    assert [a - b for a, b in itertools.pairwise(roots)] == pytest.approx([roots[0] - roots[1]] * 17)
    assert (sigmas[0], sigmas[-2]) == (pytest.approx(80), pytest.approx(0.002))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [0, -3])
def test_no_steps(name, steps):
    with pytest.raises(InputError, match=f"steps must be 1 or more, not {steps}"):
        SCHEDULES[name](VP, steps)


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        ("flow", VP, "use 'trailing'"),
        ("flow", EDMPath(), "use 'karras'"),
        ("leading", FlowPath(), "use 'flow'"),
        ("trailing", EDMPath(), "use 'karras'"),
    ],
)
def test_a_schedule_that_does_not_fit_the_path(name, path, message):
    with pytest.raises(InputError, match=message):
        SCHEDULES[name](path, 5)


def test_more_steps_than_timesteps():
    with pytest.raises(InputError, match="at most the path's 1000 timesteps, not 1001"):
        SCHEDULES["leading"](VP, 1001)
