"""What holds for every stochastic sampler, and of what order its averages converge."""

import math
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import pytest
import torch
from tests.diffusion.samplers.gaussian import FLOW, MEAN, STD, VP, Gaussian, grid, last, start
from tests.diffusion.samplers.mixtures import Fresh
from torch import Tensor

from darkroom.diffusion.brownian import BrownianNoise
from darkroom.diffusion.guidance import Denoised
from darkroom.diffusion.path import CosinePath, DiscretePath, EDMPath, FlowPath, NoisePath
from darkroom.diffusion.samplers.cards import CARDS
from darkroom.diffusion.samplers.steps import Step
from darkroom.diffusion.samplers.table import SAMPLERS
from darkroom.diffusion.schedules import SCHEDULES, karras_sigmas
from darkroom.errors import InputError

STOCHASTIC = [name for name, card in CARDS.items() if card.stochastic]
SDE = [name for name in STOCHASTIC if CARDS[name].order != "few-step"]
IN_LOG_SNR = [name for name in SDE if name not in ("dpm_2_ancestral", "edm")]  # the others step in sigma
ZERO_SNR = DiscretePath(zero_terminal_snr=True)
each = pytest.mark.parametrize("name", STOCHASTIC)


# ---- order ---------------------------------------------------------------------------------------------


class Impulses:
    """Noise as basis vectors: a linear run's answer to them is how much of each draw is in its end."""

    def __init__(self, size: int) -> None:
        self.size, self.asked = size, 1

    def between(self, sigma: float, sigma_next: float) -> Tensor:
        self.asked += 1
        return torch.nn.functional.one_hot(torch.tensor(self.asked), self.size).double()


def end_of_a_gaussian(sampler, path: NoisePath, sigmas: Sequence[float]) -> tuple[float, float]:
    """The exact mean and standard deviation of what a sampler makes of the Gaussian's noisy marginal.

    The perfect denoiser of a Gaussian is linear, and so is the run: an end of x and of every draw of noise.
    """
    alpha, size = path.alpha(sigmas[0]), 2 + 2 * len(sigmas)
    x = torch.zeros(size, dtype=torch.float64)
    x[1] = 1.0
    end = last(sampler(Gaussian(path), x, sigmas, noise=Impulses(size)))
    parts = end - end[0]
    variance = parts[1] ** 2 * (alpha**2 * STD**2 + sigmas[0] ** 2) + parts[2:].square().sum()
    return float(end[0] + parts[1] * alpha * MEAN), float(variance.sqrt())


def weak_error(sampler, path: NoisePath, steps: int) -> float:
    """The error of the standard deviation on levels even in λ from sigma / alpha = 10 to 0.1."""
    ratios = [10 * 0.01 ** (k / steps) for k in range(steps + 1)]
    sigmas = [r / (1 + r) for r in ratios] if path.kind == "flow" else ratios
    mean, std = end_of_a_gaussian(sampler, path, sigmas)
    alpha, sigma = path.alpha(sigmas[-1]), sigmas[-1]
    assert mean == pytest.approx(alpha * MEAN, abs=1e-12)  # the mean is exact: no estimate leaves it
    return abs(std - math.hypot(alpha * STD, sigma))


# (sampler, options, weak order)
ORDERS = [
    ("ddpm", {}, 1),
    ("ddim", {"eta": 0.5}, 1),
    ("euler_ancestral", {}, 1),
    ("euler_ancestral", {"eta": 0.5}, 1),
    ("dpm_2_ancestral", {}, 2),
    ("dpm_2_ancestral", {"eta": 0.5}, 2),
    ("dpmpp_2s_ancestral", {}, 2),
    ("dpmpp_2s_ancestral", {"eta": 0.5}, 2),
    ("dpmpp_sde", {}, 2),
    ("dpmpp_sde", {"eta": 0.5, "midpoint": 0.5}, 2),
    ("dpmpp_2m_sde", {}, 2),
    ("dpmpp_2m_sde", {"eta": 0.5}, 2),
    ("dpmpp_2m_sde", {"solver": "heun"}, 2),
    ("dpmpp_3m_sde", {}, 2),
    ("sa_solver", {}, 2),
    ("sa_solver", {"tau": 0.5}, 2),
    ("sa_solver", {"predictor_order": 1, "corrector_order": 0}, 1),
    ("sa_solver", {"predictor_order": 2, "corrector_order": 0}, 2),
    ("er_sde", {"order": 1}, 1),
    ("er_sde", {"order": 2}, 2),
    ("er_sde", {"order": 3}, 2),
    ("edm", {"s_churn": 10.0, "s_noise": 1.0}, 2),
]


@pytest.mark.parametrize("path", [VP, FLOW], ids=["vp", "flow"])
@pytest.mark.parametrize(("name", "options", "order"), ORDERS)
def test_weak_order(name, options, order, path):
    sampler = partial(SAMPLERS[name], **options)
    coarse, fine = weak_error(sampler, path, 160), weak_error(sampler, path, 640)
    assert math.log2(coarse / fine) / 2 > order - 0.3
    assert fine < (2e-3 if order == 1 else 1e-4)


# ---- relatives -----------------------------------------------------------------------------------------

# (sampler, options, the sampler that it then is, its options)
RELATIVES = [
    ("ddpm", {}, "ddim", {"eta": 1.0}),
    ("ddpm", {}, "euler_ancestral", {}),
    ("euler_ancestral", {"eta": 0.0}, "euler", {}),
    ("euler_ancestral", {"eta": 0.5}, "ddim", {"eta": 0.5}),
    ("dpm_2_ancestral", {"eta": 0.0}, "dpm_2", {}),
    ("dpmpp_sde", {"eta": 0.0}, "dpmpp_2s_ancestral", {"eta": 0.0}),
    ("dpmpp_2m_sde", {"eta": 0.0}, "dpmpp_2m", {}),
    ("sa_solver", {"tau": 0.0, "predictor_order": 1, "corrector_order": 0}, "euler", {}),
    ("edm", {"s_churn": 0.0}, "heun", {}),
    ("tcd", {"gamma": 0.0}, "ddim", {}),
    ("tcd", {"gamma": 1.0}, "lcm", {"boundary": False}),
]


@pytest.mark.parametrize("path", [EDMPath(), FLOW, ZERO_SNR], ids=["edm", "flow", "zero_snr"])
@pytest.mark.parametrize(("name", "options", "other", "others"), RELATIVES)
def test_relatives(name, options, other, others, path):
    if name == "tcd" and path is ZERO_SNR and options["gamma"] == 1.0:
        pytest.skip("a discrete path's timestep 0 has noise, which is where tcd goes before it adds more")
    ends, x = [], start(path, path.sigma_max)
    sigmas = grid(path, 12)
    for which, chosen in ((name, options), (other, others)):
        ends.append(last(SAMPLERS[which](Gaussian(path), x, sigmas, noise=Fresh(x.shape), **chosen)))
    assert torch.allclose(*ends, atol=1e-9)


@pytest.mark.parametrize("name", IN_LOG_SNR)
def test_flow_and_variance_preserving_paths_are_one_process(name):
    """A flow path's steps are those of the vp path with sigma / alpha as its level, noise included."""
    flow = [0.95, 0.8, 0.5, 0.2, 0.1, 0.0]
    x = start(FLOW, flow[0])
    a = last(SAMPLERS[name](Gaussian(FLOW), x, flow, noise=Fresh(x.shape)))
    ratios = [s / (1 - s) for s in flow]
    b = last(SAMPLERS[name](Gaussian(VP), x / (1 - flow[0]), ratios, noise=Fresh(x.shape)))
    assert torch.allclose(a, b, atol=1e-9)


@pytest.mark.parametrize("name", ["dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde"])
def test_a_noise_of_nothing_needs_no_source(name):
    for options in ({"eta": 0.0}, {"s_noise": 0.0}):
        x = torch.ones(3, dtype=torch.float64)
        assert torch.isfinite(last(SAMPLERS[name](Gaussian(VP), x, grid(VP, 5), **options))).all()


# ---- the ends of paths ---------------------------------------------------------------------------------


@each
def test_one_step_to_zero_is_the_estimate(name):
    x = torch.ones(3, dtype=torch.float64)
    for path, sigma in ((EDMPath(), 80.0), (FLOW, 1.0), (ZERO_SNR, 4096.0)):
        (step,) = SAMPLERS[name](Gaussian(path), x, [sigma, 0.0], noise=Fresh(x.shape))
        at = step.sigma if name != "edm" else sigma
        assert torch.allclose(step.x, Gaussian(path)(x, at).value, atol=1e-6)


@each
@pytest.mark.parametrize("steps", [3, 10, 30])
@pytest.mark.parametrize("path", [ZERO_SNR, CosinePath(), FLOW], ids=["discrete", "cosine", "flow"])
def test_pure_noise_is_left_well(name, path, steps):
    """From sigma = 4096 or alpha = 0, in float32: all pictures end among the data."""
    sigmas = SCHEDULES["flow" if path is FLOW else "trailing"](path, steps)
    x = (torch.randn(500, generator=torch.Generator().manual_seed(2)) * sigmas[0]).float()
    end = last(SAMPLERS[name](Gaussian(path), x, sigmas, noise=Fresh(x.shape)))
    assert float((end - MEAN).abs().max()) < 6 * STD
    assert float(end.mean()) == pytest.approx(MEAN, abs=0.1)


@each
@pytest.mark.parametrize("top", [0.9999, 0.99967, 0.999])
def test_nearly_pure_noise_is_left_well(name, top):
    """Where flow schedules start that leave out pure noise, with a first step that is long."""
    x = torch.randn(500, generator=torch.Generator().manual_seed(2)).float()
    sigmas = [top, 0.9, 0.6, 0.3, 0.0]
    end = last(SAMPLERS[name](Gaussian(FLOW), x, sigmas, noise=Fresh(x.shape)))
    assert float((end - MEAN).abs().max()) < 6 * STD


@each
def test_the_end_may_be_above_zero(name):
    """As where a schedule ends at the first trained level: some noise of that level is left."""
    sigmas = karras_sigmas(VP, 60)[:-1]
    x = start(VP, sigmas[0], 20_000)
    end = last(SAMPLERS[name](Gaussian(VP), x, sigmas, noise=Fresh(x.shape)))
    if name in SDE:
        assert float(end.std()) == pytest.approx(math.hypot(STD, sigmas[-1]), rel=0.06)
    assert torch.isfinite(end).all()


# ---- noise ---------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("path", [VP, FLOW], ids=["vp", "flow"])
def test_noise_is_asked_for_in_intervals_that_do_not_overlap(name, path):
    """So that the increments of one Brownian path are independent; each lies within its step."""
    sigmas = grid(path, 12)
    x = start(path, sigmas[0])
    noise = Fresh(x.shape)
    bounds = []
    for step in SAMPLERS[name](Gaussian(path), x, sigmas, noise=noise):
        bounds += [(sigmas[step.index], sigmas[step.index + 1])] * (len(noise.asked) - len(bounds))
    assert noise.asked
    for (high, low), (top, bottom) in zip(noise.asked, bounds, strict=True):
        assert top >= high > low >= bottom
    assert all(low >= high for (_, low), (high, _) in pairwise(noise.asked))


@pytest.mark.parametrize("path", [VP, FLOW, ZERO_SNR], ids=["vp", "flow", "zero_snr"])
def test_churn_goes_above_each_level_but_the_first(path):
    """Where the network was not trained."""

    sigmas, x, heard = grid(path, 12), torch.ones(2), []

    class Hearing(Gaussian):
        def __call__(self, x: Tensor, sigma: float) -> Denoised:
            heard.append(sigma)
            return super().__call__(x, sigma)

    list(SAMPLERS["edm"](Hearing(path), x, sigmas, noise=Fresh(x.shape), s_tmin=0.0, s_tmax=1e9))
    assert max(heard) == sigmas[0]
    assert len(set(heard) - set(sigmas)) >= 10


@pytest.mark.parametrize("name", SDE)
def test_finer_grids_follow_the_same_path(name):
    """The same seed in more steps is the same picture in more detail, and no other seed's."""
    x = start(VP, VP.sigma_max, 2 * 64).reshape(2, 64)

    def end(steps: int, seeds: range) -> Tensor:
        noise = BrownianNoise(seeds, (64,))
        return last(SAMPLERS[name](Gaussian(VP), x, karras_sigmas(VP, steps), noise=noise))

    coarse, fine, other = end(30, range(2)), end(60, range(2)), end(30, range(2, 4))
    assert float((coarse - fine).std()) < 0.3 * float((coarse - other).std())


@pytest.mark.parametrize("name", [*STOCHASTIC, "dpm_adaptive"])
def test_a_picture_is_the_same_in_any_batch_and_order(name):
    """Byte for byte."""
    options = {"eta": 1.0} if name == "dpm_adaptive" else {}
    seeds, shape = [11, 12, 13, 14], (3, 5, 5)

    class Alone(Gaussian):
        def row(self, k: int) -> "Alone":
            return self

    def end(order: Sequence[int]) -> Tensor:
        x = torch.cat([BrownianNoise([seeds[k] + 100], shape).between(2.0, 1.0) for k in order])
        noise = BrownianNoise([seeds[k] for k in order], shape)
        sigmas = karras_sigmas(VP, 8)
        return last(SAMPLERS[name](Alone(VP), x * sigmas[0], sigmas, noise=noise, **options))

    batch, turned = end([0, 1, 2, 3]), end([3, 1, 0, 2])
    for place, k in enumerate([3, 1, 0, 2]):
        assert torch.equal(turned[place], batch[k])
        assert torch.equal(end([k])[0], batch[k])


def test_a_row_of_brownian_noise_is_the_batch_s():
    noise = BrownianNoise([5, 6, 7], (2, 4))
    levels = karras_sigmas(VP, 9)[:-1]
    rows = [noise.row(k) for k in range(3)]
    for sigma, to in pairwise(levels):
        batch = noise.between(sigma, to)
        for k in (2, 0, 1):
            assert torch.equal(rows[k].between(sigma, to), batch[k : k + 1])


# ---- manners -------------------------------------------------------------------------------------------


@each
def test_steps_tell_where_they_are_and_leave_x_alone(name):
    x = start(FLOW, 1.0)
    before = x.clone()
    steps = list(SAMPLERS[name](Gaussian(FLOW), x, grid(FLOW, 5), noise=Fresh(x.shape)))
    assert torch.equal(x, before)
    assert [(s.index, s.total) for s in steps] == [(k, 5) for k in range(5)]
    assert [s.sigma for s in steps] == grid(FLOW, 5)[:-1]
    assert all(isinstance(s, Step) for s in steps)
    kept = [(s.x.clone(), s.denoised.clone()) for s in steps]
    again = SAMPLERS[name](Gaussian(FLOW), x, grid(FLOW, 5), noise=Fresh(x.shape))
    for step, (x_then, denoised_then) in zip(again, kept, strict=True):  # not overwritten by later steps
        assert torch.equal(step.x, x_then)
        assert torch.equal(step.denoised, denoised_then)


@each
def test_what_was_answered_is_not_written_to(name):
    """A network may answer with one tensor again and again, and so may a source of noise."""
    answer, drawn = torch.full((4,), 0.5), torch.ones(4)

    class Same:
        path = VP

        def __call__(self, x: Tensor, sigma: float) -> Denoised:
            return Denoised(answer)

        def between(self, sigma: float, sigma_next: float) -> Tensor:
            return drawn

    list(SAMPLERS[name](Same(), torch.ones(4), grid(VP, 6), noise=Same()))
    assert torch.equal(answer, torch.full((4,), 0.5))
    assert torch.equal(drawn, torch.ones(4))


@each
def test_samplers_need_no_gradient_and_keep_dtype_and_mode(name):
    x = torch.ones(2, requires_grad=True)
    for step in SAMPLERS[name](Gaussian(VP), x, [5.0, 2.0, 1.0, 0.0], noise=Fresh(x.shape)):
        assert torch.is_grad_enabled()
        assert not step.x.requires_grad
    half = torch.ones(2, dtype=torch.bfloat16)
    steps = SAMPLERS[name](Gaussian(FLOW), half, grid(FLOW, 5), noise=Fresh(half.shape))
    assert all(step.x.dtype == torch.bfloat16 for step in steps)


@each
def test_a_level_twice_changes_nothing(name):
    twice = [8.0, 4.0, 2.0, 2.0, 1.0, 1.0, 0.5, 0.0]
    x = start(VP, 8.0)
    options = {"s_churn": 0.0} if name == "edm" else {"boundary": False} if name == "lcm" else {}
    steps = [s.x for s in SAMPLERS[name](Gaussian(VP), x, twice, noise=Fresh(x.shape), **options)]
    assert all(torch.isfinite(step).all() for step in steps)
    if name not in ("lcm", "tcd", "sa_solver"):  # which draw anew, or correct the step before
        assert torch.allclose(steps[2], steps[1], atol=1e-9)


@each
def test_pure_noise_twice_changes_nothing(name):
    options = {"s_churn": 0.0} if name == "edm" else {"gamma": 0.0} if name == "tcd" else {}
    levels, ends = [1.0, 0.7, 0.4, 0.1], []
    x = start(FLOW, 1.0)
    for sigmas in (levels, [1.0, *levels]):
        noise = Fresh(x.shape, scale=0.0)
        ends.append(last(SAMPLERS[name](Gaussian(FLOW), x, sigmas, noise=noise, **options)))
    assert torch.allclose(*ends, atol=1e-9)


@each
def test_calls_are_counted(name):
    class Counted(Gaussian):
        calls = 0

        def __call__(self, x: Tensor, sigma: float) -> Denoised:
            self.calls += 1
            return super().__call__(x, sigma)

    model, x = Counted(VP), torch.ones(2)
    list(SAMPLERS[name](model, x, grid(VP, 40), noise=Fresh(x.shape)))
    assert model.calls == 40 * CARDS[name].calls + 1 - CARDS[name].calls  # one fewer where x0 is reached


REFUSED = [
    ("euler_ancestral", {"eta": 1.1}, "eta"),
    ("euler_ancestral", {"s_noise": math.inf}, "s_noise"),
    ("dpm_2_ancestral", {"eta": 1.1}, "eta"),
    ("dpmpp_2s_ancestral", {"s_noise": -0.1}, "s_noise"),
    ("dpmpp_sde", {"midpoint": 0.0}, "midpoint"),
    ("dpmpp_sde", {"eta": math.nan}, "eta"),
    ("dpmpp_2m_sde", {"solver": "hune"}, "did you mean 'heun'"),
    ("dpmpp_3m_sde", {"eta": -1.0}, "eta"),
    ("sa_solver", {"tau": -1.0}, "tau"),
    ("sa_solver", {"predictor_order": 5}, "predictor_order"),
    ("sa_solver", {"s_tmin": 2.0, "s_tmax": 1.0}, "s_tmin must be at most s_tmax"),
    ("er_sde", {"order": 4}, "order"),
    ("edm", {"s_tmin": 60.0}, "s_tmin must be at most s_tmax"),
    ("edm", {"s_churn": -1.0}, "s_churn"),
    ("lcm", {"boundary": 1}, "boundary"),
    ("tcd", {"gamma": 1.5}, "gamma"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED)
def test_options_out_of_range_are_refused_at_once(name, options, message):
    with pytest.raises(InputError, match=message):
        SAMPLERS[name](Gaussian(VP), torch.ones(2), [2.0, 1.0, 0.0], **options)


@each
def test_no_noise_and_rising_levels_are_refused(name):
    with pytest.raises(InputError, match="noise source"):
        list(SAMPLERS[name](Gaussian(VP), torch.ones(2), [2.0, 1.0, 0.5, 0.0]))
    if name not in ("ddpm", "euler_ancestral"):  # of DDIM's kind, which also goes up without noise
        with pytest.raises(InputError, match="only goes down"):
            list(SAMPLERS[name](Gaussian(VP), torch.ones(2), [1.0, 2.0], noise=Fresh((2,))))


SIMPLE = ["ddpm", "euler_ancestral", "dpmpp_2m_sde", "lcm", "tcd"]


@pytest.mark.parametrize("name", SIMPLE)
def test_overhead(name):
    """At most 60 µs a step around a network and noise that cost nothing (best of many: others run too)."""
    x, sigmas = torch.randn(1, 4, 8, 8), karras_sigmas(VP, 300)
    free = Denoised(torch.zeros_like(x))

    class Free:
        path = VP

        def __call__(self, x: Tensor, sigma: float) -> Denoised:
            return free

        def between(self, sigma: float, sigma_next: float) -> Tensor:
            return free.value

    def seconds() -> float:
        began = time.perf_counter()
        for _ in SAMPLERS[name](Free(), x, sigmas, noise=Free()):
            pass
        return time.perf_counter() - began

    assert min(seconds() for _ in range(10)) / 300 < 60e-6


def test_flow_with_a_shift_is_the_same_path():
    """The shift is the schedule's, not the sampler's."""
    x = start(FLOW, 0.9)
    a, b = (
        last(SAMPLERS["dpmpp_sde"](Gaussian(path), x, [0.9, 0.5, 0.2, 0.0], noise=Fresh(x.shape)))
        for path in (FLOW, FlowPath(shift=3.0))
    )
    assert torch.equal(a, b)
