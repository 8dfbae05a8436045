"""What holds for every deterministic sampler, whatever its formula."""

import time
from itertools import pairwise

import pytest
import torch
from tests.diffusion.samplers.gaussian import FLOW, STD, VP, Fresh, Gaussian, exact, grid, last, start
from torch import Tensor

from darkroom.diffusion.guidance import Denoised
from darkroom.diffusion.path import CosinePath, DiscretePath
from darkroom.diffusion.samplers.cards import CARDS
from darkroom.diffusion.samplers.steps import Step, inverse_levels
from darkroom.diffusion.samplers.table import SAMPLERS
from darkroom.diffusion.schedules import SCHEDULES, karras_sigmas
from darkroom.errors import InputError

ODE = [name for name, card in CARDS.items() if not card.stochastic and card.order != "adaptive"]
# Whose variable is the same on every path; the others step in the path's own sigma.
IN_LOG_SNR = [name for name in ODE if CARDS[name].variable == "log_snr" or name == "euler"]
ZERO_SNR = DiscretePath(zero_terminal_snr=True)
each = pytest.mark.parametrize("name", ODE)


@pytest.mark.parametrize("name", IN_LOG_SNR)
def test_flow_and_variance_preserving_paths_are_one_process(name):
    """A flow path's steps are those of the vp path with sigma / alpha as its level, down and up."""
    flow = [0.95, 0.8, 0.5, 0.2, 0.0]
    for levels in (flow, [0.2, 0.4, 0.7, 0.9]):
        x = start(FLOW, levels[0])
        a = last(SAMPLERS[name](Gaussian(FLOW), x, levels))
        b = last(SAMPLERS[name](Gaussian(VP), x / (1 - levels[0]), [s / (1 - s) for s in levels]))
        assert torch.allclose(a, (1 - levels[-1]) * b, atol=1e-9)


@each
def test_one_step_to_zero_is_the_estimate(name):
    x = torch.ones(3, dtype=torch.float64)
    for path, sigma in ((VP, 14.0), (FLOW, 1.0)):
        (step,) = SAMPLERS[name](Gaussian(path), x, [sigma, 0.0])
        assert torch.allclose(step.x, Gaussian(path)(x, sigma).value)
        assert torch.isfinite(step.x).all()


@pytest.mark.parametrize("name", ["deis", "uni_pc"])
def test_full_order_to_the_end_still_ends_in_the_estimate(name):
    for path, levels in ((VP, [9.0, 3.0, 1.0, 0.0]), (FLOW, [1.0, 0.8, 0.4, 0.0])):
        steps = list(SAMPLERS[name](Gaussian(path), start(path, levels[0]), levels, lower_order_final=False))
        assert torch.allclose(steps[-1].x, steps[-1].denoised)


@each
def test_steps_tell_where_they_are_and_leave_x_alone(name):
    x = start(FLOW, 1.0)
    before = x.clone()
    steps = list(SAMPLERS[name](Gaussian(FLOW), x, grid(FLOW, 5)))
    assert torch.equal(x, before)
    assert [(s.index, s.total) for s in steps] == [(k, 5) for k in range(5)]
    assert [s.sigma for s in steps] == grid(FLOW, 5)[:-1]
    assert all(isinstance(s, Step) for s in steps)
    for earlier, later in pairwise(steps):  # what a preview holds is not overwritten by later steps
        assert torch.equal(later.denoised, Gaussian(FLOW)(earlier.x, later.sigma).value)


@each
def test_what_the_network_answered_is_not_written_to(name):
    """A network may answer with x itself, or with one tensor again and again."""
    answer = torch.full((4,), 0.5)

    def denoise(x: Tensor, sigma: float) -> Denoised:
        return Denoised(answer, answer)

    def echo(x: Tensor, sigma: float) -> Denoised:
        return Denoised(x, x)

    denoise.path = echo.path = VP
    list(SAMPLERS[name](denoise, torch.ones(4), grid(VP, 6)))
    assert torch.equal(answer, torch.full((4,), 0.5))
    for step in SAMPLERS[name](echo, torch.ones(4), grid(VP, 6)):
        assert torch.allclose(step.x, torch.ones(4), atol=1e-5)


@each
def test_samplers_need_no_gradient_and_keep_the_callers_mode(name):
    x = torch.ones(2, requires_grad=True)
    for step in SAMPLERS[name](Gaussian(VP), x, [5.0, 1.0, 0.0]):
        assert torch.is_grad_enabled()
        assert not step.x.requires_grad


@each
def test_half_precision_stays_in_it(name):
    x = start(FLOW, 1.0).to(torch.bfloat16)
    assert all(step.x.dtype == torch.bfloat16 for step in SAMPLERS[name](Gaussian(FLOW), x, grid(FLOW, 5)))


@each
def test_a_level_twice_changes_nothing(name):
    """As at the end of schedules that stop at the first trained level twice over."""
    once = [8.0, 4.0, 2.0, 1.0, 0.5, 0.0]
    twice = [8.0, 4.0, 2.0, 2.0, 1.0, 1.0, 0.5, 0.0]
    x = start(VP, 8.0)
    steps = [step.x for step in SAMPLERS[name](Gaussian(VP), x, twice)]
    if name != "uni_pc":  # which corrects the step before
        assert torch.allclose(steps[2], steps[1], atol=1e-9)
    if name not in ("heun", "dpm_2", "plms", "uni_pc", "dpmpp_2m", "dpmpp_2m_cfg_pp"):
        assert torch.allclose(steps[-1], last(SAMPLERS[name](Gaussian(VP), x, once)), atol=1e-6)


@each
@pytest.mark.parametrize("path", [ZERO_SNR, CosinePath()], ids=["discrete", "cosine"])
@pytest.mark.parametrize("steps", [3, 10, 30])
def test_infinite_noise_is_left_well(name, path, steps):
    """From sigma = 4096, in float32: as near the exact solution as Euler's steps, or a little farther."""
    sigmas = SCHEDULES["trailing"](path, steps)
    x = (torch.randn(256, generator=torch.Generator().manual_seed(2)) * sigmas[0]).float()
    truth = exact(path, x.double(), sigmas[0], 0.0)
    ours, euler = (last(SAMPLERS[which](Gaussian(path), x, sigmas)) for which in (name, "euler"))
    assert float((ours - truth).abs().max()) < 1.5 * float((euler - truth).abs().max()) + 1e-3


@each
@pytest.mark.parametrize("path", [ZERO_SNR, FLOW], ids=["discrete", "flow"])
def test_infinite_noise_is_reached_well(name, path):
    """The inverse, up to sigma = 4096 or alpha = 0, in float32: noise of unit variance comes of the data."""
    sigmas = inverse_levels(path, SCHEDULES["trailing" if path is ZERO_SNR else "flow"](path, 30))
    x = start(path, sigmas[0], 1000).float()
    noise = last(SAMPLERS[name](Gaussian(path), x, sigmas)) / sigmas[-1]
    assert sigmas[-1] in (1.0, path.sigma_max)
    assert float(noise.mean()) == pytest.approx(0, abs=0.2)
    assert float(noise.std()) == pytest.approx(1, abs=0.3)


@each
@pytest.mark.parametrize("path", [VP, FLOW], ids=["discrete", "flow"])
def test_there_and_back(name, path):
    """From the smallest level up to the noise and back down: the start again, the nearer the more steps."""

    def distance(steps: int) -> float:
        up = inverse_levels(path, grid(path, steps))
        x = start(path, up[0])
        noise = last(SAMPLERS[name](Gaussian(path), x, up))
        assert float((noise - exact(path, x, up[0], up[-1])).abs().max()) < 0.3 * up[-1]
        return float((last(SAMPLERS[name](Gaussian(path), noise, up[::-1])) - x).abs().max())

    coarse, fine = distance(50), distance(200)
    assert fine < 0.1 * STD
    # CFG++'s two directions undo each other by design, and better than their order.
    assert fine < coarse * (0.35 if CARDS[name].order == 1 else 0.2) or fine < 1e-5


def test_inverse_levels_start_from_the_smallest_level_of_the_path():
    assert inverse_levels(FLOW, [1.0, 0.5, 0.0]) == [0.001, 0.5, 1.0]
    assert inverse_levels(VP, [3.0, 1.0, 0.0]) == [VP.sigma_min, 1.0, 3.0]
    assert inverse_levels(VP, [3.0, 1.0, VP.sigma_min]) == [VP.sigma_min, 1.0, 3.0]
    assert inverse_levels(VP, [3.0, VP.sigma_min, 0.0]) == [VP.sigma_min, 3.0]
    assert inverse_levels(VP, [3.0, 0.001, 0.0]) == [0.001, 3.0]


@each
def test_levels_that_turn_or_start_at_zero_are_refused(name):
    x = torch.ones(2)
    with pytest.raises(InputError, match=r"above 0, not 0.0: see .inverse_levels."):
        list(SAMPLERS[name](Gaussian(VP), x, [0.0, 1.0, 2.0]))
    for levels in ([2.0, 1.0, 1.5, 0.0], [1.0, 3.0, 2.0, 4.0]):
        with pytest.raises(InputError, match="must all fall, or all rise"):
            list(SAMPLERS[name](Gaussian(VP), x, levels))
    assert list(SAMPLERS[name](Gaussian(VP), x, [1.0])) == []


@pytest.mark.parametrize("name", ["euler_cfg_pp", "dpmpp_2m_cfg_pp"])
def test_cfg_pp_needs_guidance(name):
    def plain(x: Tensor, sigma: float) -> Denoised:
        return Denoised(x)

    plain.path = VP
    with pytest.raises(InputError, match="needs guidance: give a guidance scale other than 1"):
        list(SAMPLERS[name](plain, torch.ones(2), [1.0, 0.5]))


def test_cfg_pp_undoes_its_own_steps():
    """Up and down again under guidance, at the same estimates: exactly where it began."""
    value, uncond = torch.tensor([1.0, -2.0]), torch.tensor([0.3, 0.1])

    def denoise(x: Tensor, sigma: float) -> Denoised:
        return Denoised(value, uncond)

    for path, levels in ((VP, [0.1, 0.5, 2.0, 9.0]), (FLOW, [0.1, 0.5, 0.9])):
        denoise.path = path
        noise = last(SAMPLERS["euler_cfg_pp"](denoise, torch.tensor([0.7, 0.4]), levels))
        back = last(SAMPLERS["euler_cfg_pp"](denoise, noise, levels[::-1]))
        assert torch.allclose(back, torch.tensor([0.7, 0.4]), atol=1e-4)


@each
def test_overhead(name):
    """At most 60 µs of the processor a call, around a network that costs nothing; the best of five runs."""
    x, sigmas = torch.randn(1, 4, 8, 8), karras_sigmas(VP, 300)
    free, calls = Denoised(torch.zeros_like(x), torch.zeros_like(x)), CARDS[name].calls

    class Free:
        path = VP

        def __call__(self, x: Tensor, sigma: float) -> Denoised:
            return free

    def seconds() -> float:
        began = time.process_time()
        for _ in SAMPLERS[name](Free(), x, sigmas, noise=Fresh(x.shape)):
            pass
        return time.process_time() - began

    assert min(seconds() for _ in range(5)) / (300 * calls) < 60e-6
