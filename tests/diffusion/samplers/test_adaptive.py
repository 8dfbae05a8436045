"""The adaptive sampler: its tolerance, its calls, its ends, and that no picture depends on its batch."""

import math

import pytest
import torch
from tests.diffusion.samplers.gaussian import FLOW, MEAN, STD, VP, Gaussian, exact, last, start
from tests.diffusion.samplers.mixtures import Fresh, Mixture
from torch import Tensor

from darkroom.diffusion.brownian import BrownianNoise
from darkroom.diffusion.guidance import Denoised
from darkroom.diffusion.path import CosinePath, DiscretePath, EDMPath
from darkroom.diffusion.samplers.adaptive import dpm_adaptive
from darkroom.errors import DarkroomError, InputError

ZERO_SNR = DiscretePath(zero_terminal_snr=True)
PATHS = {"vp": VP, "edm": EDMPath(), "flow": FLOW, "zero_snr": ZERO_SNR, "cosine": CosinePath()}


class Rows(Gaussian):
    """The Gaussian's denoiser, which counts its calls and has rows."""

    def __init__(self, path) -> None:
        super().__init__(path)
        self.calls: list[int] = []

    def __call__(self, x: Tensor, sigma: float) -> Denoised:
        assert len(x) == 1
        self.calls.append(0)
        return super().__call__(x, sigma)

    def row(self, k: int) -> "Rows":
        return self


def picture(path, sigma: float) -> Tensor:
    return start(path, sigma, 48).reshape(1, 3, 4, 4)


def run(path, rtol: float, order: int = 3) -> tuple[float, int]:
    """The largest error at the end, and the calls that it took."""
    model, x = Rows(path), picture(path, path.sigma_max)
    end = last(dpm_adaptive(model, x, [path.sigma_max, 0.0], rtol=rtol, atol=rtol / 10, order=order))
    return float((end - exact(path, x, path.sigma_max, 0.0)).abs().max()), len(model.calls)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("order", [2, 3])
def test_the_error_falls_with_the_tolerance(path, order):
    """At a tolerance 250 times smaller the error is a fifth at most, for a few times the calls."""
    runs = [run(PATHS[path], rtol, order) for rtol in (0.05, 0.01, 0.002, 0.0002)]
    errors, calls = zip(*runs, strict=True)
    assert errors[3] < 0.2 * errors[0] < 0.06 * STD
    assert max(errors[2:]) < 0.02 * STD  # of which the last step, from sigma_min to 0, has a part
    assert 20 < calls[0] < calls[1] < calls[2] < calls[3] < (300 if order == 2 else 120)


def test_the_calls_of_the_default_tolerance():
    """20 to 60 for a picture of Stable Diffusion's path."""
    mixture = Mixture(VP, [[-1.0], [0.8]], [0.3, 0.3], [0.5, 0.5])
    x = mixture.draw(VP.sigma_max, 256).reshape(1, -1, 1, 1)

    class Picture(Rows):
        def __call__(self, x: Tensor, sigma: float) -> Denoised:
            self.calls.append(0)
            return Denoised(mixture(x.reshape(-1, 1, 1, 1), sigma).value.reshape(x.shape))

    model = Picture(VP)
    list(dpm_adaptive(model, x, [VP.sigma_max, 0.0]))
    assert 20 <= len(model.calls) <= 60


def test_only_the_ends_of_the_levels_count():
    x = picture(VP, 10.0)
    few = last(dpm_adaptive(Rows(VP), x, [10.0, 0.5]))
    many = last(dpm_adaptive(Rows(VP), x, [10.0, 7.0, 3.0, 0.5]))
    assert torch.equal(few, many)
    assert float((few - exact(VP, x, 10.0, 0.5)).abs().max()) < 0.02


def test_no_levels_no_steps():
    x = picture(VP, 10.0)
    assert list(dpm_adaptive(Rows(VP), x, [10.0])) == list(dpm_adaptive(Rows(VP), x, [3.0, 3.0])) == []


@pytest.mark.parametrize("path", ["vp", "flow"])
@pytest.mark.parametrize("sigma", [0.02, 0.0005])
def test_below_the_smallest_trained_level_is_one_step(path, sigma):
    """As after img2img of a strength that leaves almost nothing."""
    x = picture(PATHS[path], sigma)
    steps = list(dpm_adaptive(Rows(PATHS[path]), x, [sigma, 0.0]))
    if sigma <= PATHS[path].sigma_min:
        assert len(steps) == 1
    assert torch.allclose(steps[-1].x, exact(PATHS[path], x, sigma, 0.0), atol=2e-3)


class Different:
    """Pictures of different difficulty: each row has a denoiser of its own."""

    def __init__(self, stds: list[float], path=VP) -> None:
        self.stds, self.path = stds, path

    def __call__(self, x: Tensor, sigma: float) -> Denoised:
        assert len(x) == len(self.stds)
        std = torch.tensor(self.stds, dtype=x.dtype)[:, None, None, None]
        alpha = self.path.alpha(sigma)
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        return Denoised(torch.tanh(MEAN + gain * (x - alpha * MEAN)))

    def row(self, k: int) -> "Different":
        return Different(self.stds[k : k + 1], self.path)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("path", [VP, FLOW], ids=["vp", "flow"])
def test_a_picture_takes_its_own_steps(eta, path):
    """Byte for byte as alone, and the steps of the batch are those of its pictures, one after another."""
    stds, seeds, sigmas = [0.05, 1.0, 3.0], [4, 5, 6], [path.sigma_max, 0.0]
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * sigmas[0]

    def steps(rows: list[int]) -> list:
        noise = BrownianNoise([seeds[k] for k in rows], (2, 4, 4))
        model = Different([stds[k] for k in rows], path)
        return list(dpm_adaptive(model, x[rows], sigmas, noise=noise, eta=eta))

    batch, alone = steps([0, 1, 2]), [steps([k]) for k in range(3)]
    assert len({len(own) for own in alone}) > 1
    assert len(batch) == sum(len(own) for own in alone)
    taken = iter(batch)
    for k, own in enumerate(alone):
        for step in own:
            both = next(taken)
            assert torch.equal(both.x[k : k + 1], step.x)
            assert torch.equal(both.denoised[k : k + 1], step.denoised)
            assert torch.equal(both.x[k + 1 :], x[k + 1 :])  # still noise
            assert not both.denoised[k + 1 :].any()
            assert all(torch.equal(both.x[j : j + 1], alone[j][-1].x) for j in range(k))  # done


@pytest.mark.parametrize("path", PATHS)
def test_progress(path):
    """`total` is an estimate that the last step makes right, and the share done grows to 1."""
    x = torch.cat([picture(PATHS[path], PATHS[path].sigma_max)] * 3)
    before = x.clone()
    steps = list(dpm_adaptive(Rows(PATHS[path]), x, [PATHS[path].sigma_max, 0.0]))
    assert torch.equal(x, before)
    assert [step.index for step in steps] == list(range(len(steps)))
    assert steps[-1].total == len(steps)
    shares = [(step.index + 1) / step.total for step in steps]
    assert all(0 < share <= 1 for share in shares)
    middle = shares[len(steps) // 2]
    assert 0.2 < middle < 0.8
    per_picture = len(steps) // 3
    levels = [step.sigma for step in steps]
    assert levels[:per_picture] == levels[per_picture : 2 * per_picture]
    assert levels[:per_picture] == sorted(levels[:per_picture], reverse=True)


def test_noise_is_asked_for_only_for_steps_that_stand():
    """In intervals that meet, so that the increments are those of one path."""
    x = picture(VP, 10.0)
    noise = Fresh(x.shape)
    steps = list(dpm_adaptive(Rows(VP), x, [10.0, 0.5], noise=noise, eta=1.0, rtol=0.2))
    assert len(noise.asked) in (len(steps), len(steps) - 1)  # the last may go to its level without
    for (high, low), step in zip(noise.asked, steps, strict=False):
        assert high == step.sigma
        assert high > low
    assert all(low == high for (_, low), (high, _) in zip(noise.asked, noise.asked[1:], strict=False))


def test_a_hard_place_is_tried_again():
    """Where the estimate jumps, steps fall back, and the calls say so."""

    class Jump(Rows):
        def __call__(self, x: Tensor, sigma: float) -> Denoised:
            self.calls.append(0)
            return Denoised(torch.full_like(x, 1.0 if sigma < 1.0 else -1.0))

    model, x = Jump(VP), picture(VP, 10.0)
    steps = list(dpm_adaptive(model, x, [10.0, 0.1]))
    assert len(model.calls) > 3 * len(steps)
    assert torch.isfinite(steps[-1].x).all()


def test_pure_noise_in_single_and_half_precision():
    for path in (FLOW, ZERO_SNR):
        x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * path.sigma_max
        for dtype, slack in ((torch.float32, 0.04), (torch.bfloat16, 0.2)):
            steps = list(dpm_adaptive(Rows(path), x.to(dtype), [path.sigma_max, 0.0]))
            assert steps[-1].x.dtype == dtype
            truth = exact(path, x.double(), path.sigma_max, 0.0)
            assert float((steps[-1].x.double() - truth).abs().max()) < slack


def test_what_is_refused():
    model, x = Rows(VP), picture(VP, 10.0)
    for options, message in (
        ({"order": 1}, "order"),
        ({"rtol": -0.1}, "rtol"),
        ({"rtol": 0.0, "atol": 0.0}, "both 0"),
        ({"eta": 2.0}, "eta"),
        ({"icoeff": 0.0}, "icoeff"),
        ({"pcoeff": math.nan}, "pcoeff"),
    ):
        with pytest.raises(InputError, match=message):
            dpm_adaptive(model, x, [10.0, 0.0], **options)
    with pytest.raises(InputError, match="noise source"):
        list(dpm_adaptive(model, x, [10.0, 0.0], eta=1.0))
    with pytest.raises(InputError, match="only goes down"):
        list(dpm_adaptive(model, x, [1.0, 10.0]))


def test_what_cannot_be_solved_is_an_error_and_no_endless_loop():
    class Broken(Rows):
        def __call__(self, x: Tensor, sigma: float) -> Denoised:
            value = torch.full_like(x, math.nan) if self.path is VP else torch.randn_like(x)
            return Denoised(value)

    x = picture(VP, 10.0)
    with pytest.raises(DarkroomError, match="not a finite number"):
        list(dpm_adaptive(Broken(VP), x, [10.0, 0.0]))
    with pytest.raises(DarkroomError, match="raise rtol or atol"):
        list(dpm_adaptive(Broken(EDMPath()), x, [10.0, 0.0], rtol=1e-6, atol=1e-6))
