"""Schedules: lengths, ends, order, options, and what is refused."""

import itertools
import math

import numpy as np
import pytest

from darkroom.diffusion.path import CosinePath, DiscretePath, EDMPath, FlowPath, NoisePath, SizeShift
from darkroom.diffusion.schedule_cards import CARDS
from darkroom.diffusion.schedules import (
    SCHEDULES,
    beta_timestep_sigmas,
    checked_sigmas,
    ddim_uniform_sigmas,
    exponential_sigmas,
    flow_sigmas,
    karras_sigmas,
    kl_optimal_sigmas,
    lcm_sigmas,
    linear_quadratic_sigmas,
    polyexponential_sigmas,
    schedule_sigmas,
    simple_sigmas,
    timestep_sigmas,
)
from darkroom.diffusion.schedules.beta_quantiles import beta_quantiles
from darkroom.errors import InputError

VP = DiscretePath()
ZERO_SNR = DiscretePath(zero_terminal_snr=True)
FIRST_LEVEL = DiscretePath(final="first_level")
PATHS: dict[str, NoisePath] = {
    "discrete": VP,
    "zero snr": ZERO_SNR,
    "first level": FIRST_LEVEL,
    "cosine": CosinePath(),
    "edm": EDMPath(),
    "svd": EDMPath(sigma_max=700.0),
    "flow": FlowPath(),
    "shifted": FlowPath(shift=3.0),
    "short of noise": FlowPath(shift=3.0, sigma_max=0.999),
}


def _defined(name: str, path: NoisePath) -> bool:
    wrong_table = name == "ays_svd" and path.sigma_max != 700
    return path.kind in CARDS[name].paths and not wrong_table


ALLOWED = [(name, path) for name in SCHEDULES for path in PATHS if _defined(name, PATHS[path])]
REFUSED = [(n, p) for n in SCHEDULES for p in PATHS if PATHS[p].kind not in CARDS[n].paths]
BELOW = ("leading", "leading_0", "ddim_uniform")  # these start below the noisiest level
# Their last step stays at its level where that is the path's final one, as in diffusers' DDIM.
DDIM_STAYS = ("leading", "leading_0", "trailing", "linspace")


@pytest.mark.parametrize(("name", "path"), ALLOWED)
@pytest.mark.parametrize("steps", [1, 2, 7, 30, 999, 1000])
def test_levels_fall_to_the_final_one(name, path, steps):
    path, steps = PATHS[path], min(steps, 50) if name == "lcm" else steps
    sigmas = SCHEDULES[name](path, steps)
    assert len(sigmas) == steps + 1
    assert all(type(sigma) is float for sigma in sigmas)
    stays = name in DDIM_STAYS and path == FIRST_LEVEL
    falling = sigmas[:-1] if stays else sigmas
    assert all(a > b for a, b in itertools.pairwise(falling))
    assert sigmas[-1] in (path.final_sigma, 0.0)
    assert sigmas[-1] == path.final_sigma or sigmas[-2] == pytest.approx(path.sigma_min)
    highest = path.shifted(path.sigma_max) if isinstance(path, FlowPath) else path.sigma_max
    assert sigmas[0] <= highest * (1 + 1e-9) or (
        name.startswith("ays") and sigmas[0] == pytest.approx(14.615)
    )


@pytest.mark.parametrize(
    ("name", "path"),
    [(n, p) for n, p in ALLOWED if n not in BELOW and p in ("discrete", "zero snr", "edm", "svd", "flow")],
)
def test_these_start_at_the_noisiest_level(name, path):
    path = PATHS[path]
    for steps in (1, 5, 30):
        assert SCHEDULES[name](path, steps)[0] == pytest.approx(path.sigma_max, rel=1e-4)
    assert flow_sigmas(FlowPath(), 4) == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize(
    ("spacing", "timesteps"),
    [
        ("leading", [801, 601, 401, 201, 1]),
        ("trailing", [999, 799, 599, 399, 199]),
        ("linspace", [999, 749, 500, 250, 0]),
        ("simple", [999, 799, 599, 399, 199]),
        ("ddim_uniform", [801, 601, 401, 201, 1]),
        ("lcm", [999, 799, 599, 399, 199]),
    ],
)
def test_timesteps_of_each_spacing(spacing, timesteps):
    sigmas = SCHEDULES[spacing](VP, 5)
    assert [VP.timestep_from_sigma(sigma) for sigma in sigmas[:-1]] == timesteps


def test_spacings_differ_where_steps_do_not_divide():
    def told(sigmas: list[float]) -> list[float]:
        return [VP.timestep_from_sigma(sigma) for sigma in sigmas[:-1]]

    assert told(simple_sigmas(VP, 3)) == [999, 666, 333]
    assert told(ddim_uniform_sigmas(VP, 3)) == [667, 334, 1]
    # Timestep 1 would be one step more.
    assert told(ddim_uniform_sigmas(VP, 30)) == list(range(991, 1, -33))
    assert told(lcm_sigmas(VP, 4)) == [999, 759, 499, 259]
    assert told(lcm_sigmas(VP, 4, original_steps=40)) == [999, 749, 499, 249]


def test_the_final_level_is_the_paths():
    assert SCHEDULES["leading"](FIRST_LEVEL, 5)[-1] == FIRST_LEVEL.sigma_min
    assert SCHEDULES["sgm_uniform"](FIRST_LEVEL, 5)[-1] == FIRST_LEVEL.sigma_min


@pytest.mark.parametrize("name", ["karras", "exponential", "polyexponential", "kl_optimal", "beta"])
def test_where_the_final_level_was_reached_already_nothing_is_left(name):
    sigmas = SCHEDULES[name](FIRST_LEVEL, 5)
    assert sigmas[-2] == pytest.approx(FIRST_LEVEL.sigma_min)
    assert sigmas == SCHEDULES[name](VP, 5)


def test_karras_is_even_in_the_seventh_root():
    sigmas = karras_sigmas(EDMPath(), 18)
    roots = [sigma ** (1 / 7) for sigma in sigmas[:-1]]
    assert [a - b for a, b in itertools.pairwise(roots)] == pytest.approx([roots[0] - roots[1]] * 17)
    assert (sigmas[0], sigmas[-2]) == (pytest.approx(80), pytest.approx(0.002))


def test_what_is_even_in_others():
    even = {
        "log": [math.log(s) for s in exponential_sigmas(VP, 9)[:-1]],
        "arc tangent": [math.atan(s) for s in kl_optimal_sigmas(VP, 9)[:-1]],
        "timestep": [VP.timestep_from_sigma(s) for s in SCHEDULES["sgm_uniform"](VP, 9)[:-1]],
        "root": [math.sqrt(math.log(s / VP.sigma_min)) for s in polyexponential_sigmas(VP, 9, rho=2.0)[:-2]],
    }
    for values in even.values():
        gaps = [a - b for a, b in itertools.pairwise(values)]
        assert gaps == pytest.approx([gaps[0]] * len(gaps), rel=1e-4)
    assert VP.timestep_from_sigma(SCHEDULES["sgm_uniform"](VP, 9)[-2]) == pytest.approx(999 / 9)


def test_linear_quadratic_leaves_the_line_smoothly():
    sigmas = linear_quadratic_sigmas(FlowPath(), 40, 0.05, linear_steps=10)
    gaps = [a - b for a, b in itertools.pairwise(sigmas)]
    assert gaps[:10] == pytest.approx([0.005] * 10)
    curvature = [b - a for a, b in itertools.pairwise(gaps[10:])]
    assert curvature == pytest.approx([curvature[0]] * len(curvature))
    assert gaps[10] < 1.2 * gaps[9]
    assert linear_quadratic_sigmas(FlowPath(), 1) == [1.0, 0.0]


def test_tables_are_as_published_and_interpolated_in_log():
    table = SCHEDULES["ays_sdxl"](VP, 10)
    assert table == pytest.approx([14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.38, 0.234, 0.113, 0.0])
    twice = SCHEDULES["ays_sdxl"](VP, 20)
    assert twice[:-1:2] == pytest.approx(table[:-1])
    assert twice[1] == pytest.approx(math.sqrt(14.615 * 6.315))
    assert twice[-2] == pytest.approx(math.sqrt(0.113 * 0.029))
    assert SCHEDULES["ays_sd1"](VP, 10)[1] == pytest.approx(6.475)
    assert SCHEDULES["ays_svd"](PATHS["svd"], 10)[1] == pytest.approx(54.5)
    assert SCHEDULES["ays_sd1"](ZERO_SNR, 10)[0] == ZERO_SNR.sigma_max
    assert SCHEDULES["ays_sd1"](FIRST_LEVEL, 10)[-1] == FIRST_LEVEL.sigma_min


@pytest.mark.parametrize(("name", "path"), [("ays_sd1", DiscretePath(beta_end=0.02)), ("ays_svd", EDMPath())])
def test_tables_are_for_the_levels_they_were_made_for(name, path):
    with pytest.raises(InputError, match=f"{name}' was made for noise levels .* use 'karras'"):
        SCHEDULES[name](path, 10)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [0, -3])
def test_no_steps(name, steps):
    with pytest.raises(InputError, match=f"steps must be 1 or more, not {steps}"):
        SCHEDULES[name](VP, steps)


@pytest.mark.parametrize(("name", "path"), REFUSED)
def test_a_schedule_that_does_not_fit_the_path(name, path):
    path = PATHS[path]
    right = {"edm": "karras", "flow": "flow"}.get(path.kind, "trailing")
    with pytest.raises(InputError, match=f"{name}' is not defined on a '{path.kind}' path: use '{right}'"):
        SCHEDULES[name](path, 5)


@pytest.mark.parametrize(
    "name", ["leading", "trailing", "linspace", "simple", "ddim_uniform", "beta_timesteps"]
)
def test_more_steps_than_timesteps(name):
    with pytest.raises(InputError, match="at most the path's 1000 timesteps, not 1001"):
        SCHEDULES[name](VP, 1001)


@pytest.mark.parametrize("name", ["karras", "exponential", "beta", "kl_optimal", "sgm_uniform"])
def test_schedules_without_whole_timesteps_take_any_number(name):
    sigmas = SCHEDULES[name](VP, 1500)
    assert all(a > b for a, b in itertools.pairwise(sigmas))


def test_beta_timesteps_are_whole_while_they_can_be():
    def parts(steps: int) -> float:
        told = [VP.timestep_from_sigma(s) for s in beta_timestep_sigmas(VP, steps)[:-1]]
        return max(abs(t - round(t)) for t in told)

    assert parts(20) == 0
    assert parts(300) > 0.1


@pytest.mark.parametrize(
    ("alpha", "beta", "quantile"),
    [
        (1.0, 1.0, lambda q: q),
        (1.0, 3.0, lambda q: 1 - (1 - q) ** (1 / 3)),
        (4.0, 1.0, lambda q: q**0.25),
        (0.5, 0.5, lambda q: np.sin(q * np.pi / 2) ** 2),
    ],
)
def test_quantiles_where_there_is_a_formula(alpha, beta, quantile):
    shares = np.array([0.0, 1e-4, 0.01, 0.3, 0.5, 0.77, 0.999, 1.0])
    np.testing.assert_allclose(beta_quantiles(shares, alpha, beta), quantile(shares), rtol=1e-12, atol=1e-300)


def test_options_reach_the_schedule():
    assert schedule_sigmas("karras", VP, 6) == karras_sigmas(VP, 6)
    ours = schedule_sigmas("karras", VP, 6, {"rho": 3, "sigma_min": 0.1, "sigma_max": 10, "shift": None})
    assert ours == karras_sigmas(VP, 6, 3.0, sigma_min=0.1, sigma_max=10.0)
    assert (ours[0], ours[-2]) == (pytest.approx(10), pytest.approx(0.1))
    assert schedule_sigmas("beta", VP, 6, {"alpha": 1, "beta": 1})[1:3] == pytest.approx(
        np.linspace(VP.sigma_max, VP.sigma_min, 6)[1:3].tolist()
    )
    assert schedule_sigmas("lcm", VP, 2, {"original_steps": 10}) == lcm_sigmas(VP, 2, original_steps=10)


@pytest.mark.parametrize("name", [n for n, card in CARDS.items() if "flow" in card.paths])
def test_a_shift_takes_the_place_of_a_flow_paths_own(name):
    sized = FlowPath(size_shift=SizeShift())
    if name == "linear_quadratic":
        with pytest.raises(InputError, match="'shift'"):
            schedule_sigmas(name, sized, 7, {"shift": 5})
        return
    assert schedule_sigmas(name, sized, 7, {"shift": 5}) == SCHEDULES[name](FlowPath(shift=5.0), 7)
    assert schedule_sigmas(name, sized, 7, {"shift": 5}) != SCHEDULES[name](FlowPath(), 7)


@pytest.mark.parametrize(
    ("name", "path", "options", "message"),
    [
        ("karas", VP, {}, "unknown schedule 'karas': did you mean 'karras'"),
        ("karras", VP, {"roh": 7}, "unknown schedule 'karras' option 'roh': did you mean 'rho'"),
        ("trailing", VP, {"rho": 7}, "the schedule 'trailing' has no options, so 'rho' cannot be set"),
        ("karras", VP, {"rho": 0}, "rho must be a number in 0.1 ... 100, not 0"),
        ("karras", VP, {"rho": math.nan}, "rho must be a number in 0.1 ... 100, not nan"),
        ("karras", VP, {"rho": "7"}, "rho must be a number in 0.1 ... 100, not '7'"),
        ("beta", VP, {"alpha": -1}, "alpha must be a number in 0.05 ... 20, not -1"),
        ("karras", VP, {"shift": 3}, "shift is for flow paths, and this one is 'discrete'"),
        ("lcm", VP, {"original_steps": 4.5}, "original_steps must be a whole number in 1 ... 1000, not 4.5"),
        ("lcm", VP, {"original_steps": 50.0}, "original_steps must be a whole number in"),
        ("lcm", VP, {"original_steps": 4}, "needs steps <= original_steps"),
        ("karras", VP, {"sigma_min": 20}, "sigma_min = 20 is outside the noise levels"),
        ("karras", VP, {"sigma_max": 0.01}, "sigma_max = 0.01 is outside the noise levels"),
        ("exponential", VP, {"sigma_min": 2, "sigma_max": 1}, "sigma_min = 2 must be below sigma_max = 1"),
        ("linear_quadratic", FlowPath(), {"linear_steps": 5}, "linear_steps must be in 1 ... 4 of 5 steps"),
        ("linear_quadratic", FlowPath(), {"threshold_noise": 0.9}, "threshold_noise must be below 0.571"),
    ],
)
def test_options_that_cannot_be(name, path, options, message):
    with pytest.raises(InputError, match=message):
        schedule_sigmas(name, path, 5, options)


def test_options_may_be_numpys_numbers():
    assert schedule_sigmas("karras", VP, 5, {"rho": np.int64(7)}) == schedule_sigmas("karras", VP, 5)
    options = {"original_steps": np.int32(50)}
    assert schedule_sigmas("lcm", VP, 4, options) == schedule_sigmas("lcm", VP, 4)


@pytest.mark.parametrize(
    ("path", "sigmas"),
    [
        (VP, [14.615, 3, 0.029, 0]),
        (VP, (5, 1)),
        (FIRST_LEVEL, [5, 0]),
        (EDMPath(), [80, 0.002, 0.0]),
        (FlowPath(shift=3.0), [1, 0.5, 1e-4, 0]),
        (ZERO_SNR, [4095.9, 1.0]),
    ],
)
def test_levels_of_ones_own(path, sigmas):
    checked = checked_sigmas(path, sigmas)
    assert checked == list(sigmas)
    assert all(type(sigma) is float for sigma in checked)


@pytest.mark.parametrize(
    ("path", "sigmas", "message"),
    [
        (VP, [1.0], "at least two noise levels, a step between them, not 1"),
        (VP, [], "at least two"),
        (VP, "14, 1", "a list of numbers"),
        (VP, 3.0, "a list of numbers"),
        (VP, [5, "1"], r"sigmas\[1\] must be a finite number, not '1'"),
        (VP, [5, True], r"sigmas\[1\] must be a finite number"),
        (VP, [math.inf, 1], r"sigmas\[0\] must be a finite number, not inf"),
        (VP, [5, math.nan, 0], r"sigmas\[1\] must be a finite number, not nan"),
        (VP, [5, 1, 1, 0], r"must fall: sigmas\[2\] = 1 is not below 1"),
        (VP, [1, 5], r"must fall: sigmas\[1\] = 5 is not below 1"),
        (VP, [5, 0, -1], r"sigmas\[1\] = 0 is outside"),
        (
            VP,
            [5, -1],
            r"sigmas\[1\] = -1 is outside the noise levels of this 'discrete' path, 0.02917 ... 14.61",
        ),
        (VP, [80, 1, 0], r"sigmas\[0\] = 80 is outside"),
        (VP, [5, 0.001, 0], r"sigmas\[1\] = 0.001 is outside"),
        (
            FlowPath(),
            [14.6, 0.5, 0],
            r"sigmas\[0\] = 14.6 is outside the noise levels of this 'flow' path, 0 ... 1",
        ),
    ],
)
def test_levels_that_cannot_be(path, sigmas, message):
    with pytest.raises(InputError, match=message):
        checked_sigmas(path, sigmas)


def test_timestep_sigmas_take_no_other_paths():
    with pytest.raises(InputError, match="use 'flow'"):
        timestep_sigmas(FlowPath(), 5, "trailing")
