"""Noise levels drawn in training: their spread, their kind on each path, and what is refused."""

import math

import pytest
import torch

from darkroom.diffusion.path import CosinePath, DiscretePath, EDMPath, FlowPath
from darkroom.diffusion.training_times import TimesConfig, sample_sigmas
from darkroom.errors import InputError

COUNT = 50_000
UNIFORM, LOGIT = TimesConfig(kind="uniform"), TimesConfig(kind="logit_normal", mean=0.5, std=0.8)
VP, FLOW = DiscretePath(), FlowPath(shift=3.0, sigma_max=0.999)


def drawn(times: TimesConfig, path, count: int = COUNT, seed: int = 0) -> torch.Tensor:
    return sample_sigmas(times, path, count, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("path", [VP, CosinePath(), FLOW, EDMPath()], ids=lambda p: p.kind)
def test_uniform_is_even_in_the_timestep(path):
    sigmas = drawn(UNIFORM, path)
    assert sigmas.shape == (COUNT,)
    assert sigmas.dtype == torch.float32
    assert float(sigmas.max()) <= path.sigma_max * (1 + 1e-5) or path.kind == "flow"
    timesteps = path.timestep_from_sigma(sigmas).double()
    if path.kind == "flow":  # evenly before the shift: undo it
        sigma = sigmas.double()
        timesteps = sigma / (path.shift - (path.shift - 1) * sigma)
    low, high = float(timesteps.min()), float(timesteps.max())
    counts = torch.histc(timesteps.float(), 20, low, high)
    assert float(((counts - COUNT / 20) ** 2 / (COUNT / 20)).sum()) < 60  # 19 degrees of freedom


@pytest.mark.parametrize("times", [UNIFORM, LOGIT], ids=lambda t: t.kind)
def test_discrete_timesteps_are_whole_and_reach_both_ends(times):
    timesteps = VP.timestep_from_sigma(drawn(times, VP))
    assert torch.equal(timesteps, timesteps.round())
    assert float(timesteps.min()) >= 0
    assert float(timesteps.max()) <= 999
    if times is UNIFORM:
        assert timesteps.unique().numel() == 1000
    assert drawn(TimesConfig(kind="logit_normal", mean=50.0), VP).unique().item() == pytest.approx(
        VP.sigma_max
    )


@pytest.mark.parametrize("path", [VP, CosinePath(), FlowPath()], ids=lambda p: p.kind)
def test_logit_normal(path):
    share = path.timestep_from_sigma(drawn(LOGIT, path)).double() / path.num_timesteps
    logits = (share.clamp(1e-4, 1 - 1e-4)).logit()
    assert float(logits.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(logits.std()) == pytest.approx(0.8, abs=0.03)


def test_lognormal():
    logs = drawn(TimesConfig(kind="lognormal", mean=-1.2, std=1.2), EDMPath()).log()
    assert float(logs.mean()) == pytest.approx(-1.2, abs=0.03)
    assert float(logs.std()) == pytest.approx(1.2, abs=0.03)


def test_flow_levels_stay_below_sigma_max():
    top = FLOW.shifted(0.999)
    assert 0.999 < float(drawn(UNIFORM, FLOW).max()) <= top + 1e-6
    assert float(drawn(TimesConfig(kind="logit_normal", mean=50.0), FLOW).max()) == pytest.approx(top)


def test_the_generator_decides():
    assert torch.equal(drawn(LOGIT, FLOW, 8), drawn(LOGIT, FLOW, 8))
    assert not torch.equal(drawn(LOGIT, FLOW, 8), drawn(LOGIT, FLOW, 8, seed=1))
    assert math.isfinite(float(drawn(UNIFORM, DiscretePath(zero_terminal_snr=True)).sum()))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: drawn(LOGIT, EDMPath()), "use 'lognormal' or 'uniform'"),
        (lambda: drawn(TimesConfig(kind="lognormal"), VP), "use 'logit_normal' or 'uniform'"),
        (lambda: TimesConfig(kind="logitnormal"), "did you mean"),
        (lambda: TimesConfig(std=0.0), "'std'"),
    ],
)
def test_what_is_refused(build, message):
    with pytest.raises(InputError, match=message):
        build()
