"""Several prompts in one picture: schedules, alternation, sums and regions."""

import pytest
import torch
from tests.diffusion.guided import LEVELS, Counting, noisy, pattern, told, x0_denoiser
from torch import Tensor

from darkroom.diffusion.guidance import ClassifierFreeGuidance, GuidedDenoiser, Share, make_guide
from darkroom.diffusion.guidance_settings import Guidance, PerturbedAttention
from darkroom.errors import InputError

A, B, U = told(3.0, 5.0), told(2.0, 7.0), told(1.0, 1.5)


def run(cond, uncond=U, scale: float = 4.0, levels=LEVELS) -> tuple[Counting, GuidedDenoiser]:
    network = Counting()
    guide = ClassifierFreeGuidance(scale)
    return network, GuidedDenoiser(x0_denoiser(network), cond, uncond, guide, levels)


def per_picture(*values: float) -> Tensor:
    return torch.tensor(values)[:, None, None, None] * pattern()


def test_a_schedule_changes_prompts_on_the_way():
    first, second = [Share(A)], [Share(B)]
    network, denoise = run(lambda done: first if done < 0.5 else second)
    for sigma, (a, b) in zip(LEVELS[:-1], [(3, 5)] * 3 + [(2, 7)] * 2, strict=True):
        value = denoise(noisy(), sigma).value
        torch.testing.assert_close(value, per_picture(1 + 4 * (a - 1), 1.5 + 4 * (b - 1.5)))
    assert network.batches == [4] * 5


def test_alternation_prepares_each_call_once():
    """Other lists at each step, of the same conditions: texts are joined for two calls, not for five."""
    _, denoise = run(lambda done: [Share(B if round(done * 5) % 2 else A)])
    found = [denoise(noisy(), sigma).value for sigma in LEVELS[:-1]]
    expected = [per_picture(9, 15.5), per_picture(5, 23.5)]
    for k, value in enumerate(found):
        torch.testing.assert_close(value, expected[k % 2])
    assert len(denoise._plans) == 2


def test_prompts_that_change_at_every_step_are_not_hoarded():
    levels = [1 - k / 100 for k in range(101)]
    _, denoise = run(lambda done: [Share(told(done, done))], levels=levels)
    for sigma in levels[:-1]:
        denoise(noisy(), sigma)
    assert len(denoise._plans) <= 16
    torch.testing.assert_close(denoise(noisy(), levels[40]).value, per_picture(1 + 4 * -0.6, 1.5 + 4 * -1.1))


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_and_leads_away_from_the_unconditional_by_the_sum(scale):
    """Composable diffusion: uncond + scale * sum(weight * (cond - uncond))."""
    network, denoise = run(lambda done: [Share(A, weight=1.0), Share(B, weight=0.5)], scale=scale)
    value = denoise(noisy(), 0.5).value
    expected = [u + scale * ((a - u) + 0.5 * (b - u)) for a, b, u in ((3, 2, 1), (5, 7, 1.5))]
    torch.testing.assert_close(value, per_picture(*expected))
    assert network.batches == [6]


def test_weights_of_one_need_no_unconditional():
    network, denoise = run(lambda done: [Share(A, 0.75), Share(B, 0.25)], None, scale=1.0)
    torch.testing.assert_close(denoise(noisy(), 0.5).value, per_picture(2.75, 5.5))
    assert network.batches == [4]


def test_regions_follow_their_prompts():
    left = torch.zeros(1, 1, 4, 4)
    left[..., :2] = 1
    for masks in ((left, 1 - left), (left.expand(2, 1, 4, 4), (1 - left).expand(2, 1, 4, 4))):
        shares = [Share(A, mask=masks[0]), Share(B, mask=masks[1])]
        network, denoise = run(lambda done, shares=shares: shares)
        denoised = denoise(noisy(), 0.5)
        expected = left * per_picture(9, 15.5) + (1 - left) * per_picture(5, 23.5)
        torch.testing.assert_close(denoised.value, expected)
        assert network.batches == [6]


def test_what_masks_leave_is_the_unconditional_estimate():
    left = torch.zeros(1, 1, 4, 4)
    left[..., :2] = 1
    _, denoise = run(lambda done: [Share(A, mask=left)])
    value = denoise(noisy(), 0.5).value
    torch.testing.assert_close(value, left * per_picture(9, 15.5) + (1 - left) * per_picture(1, 1.5))


def test_negative_prompts_change_too():
    network, denoise = run(lambda done: [Share(A)], lambda done: [Share(U, 0.5), Share(B, 0.5)])
    denoised = denoise(noisy(), 0.5)
    torch.testing.assert_close(denoised.uncond, per_picture(1.5, 4.25))
    torch.testing.assert_close(denoised.value, per_picture(1.5 + 4 * 1.5, 4.25 + 4 * 0.75))
    assert network.batches == [6]


def test_a_condition_that_comes_twice_is_asked_once():
    network, denoise = run(lambda done: [Share(A, 0.5), Share(U, 0.25), Share(A, 0.25)])
    torch.testing.assert_close(denoise(noisy(), 0.5).value, per_picture(1 + 4 * 1.5, 1.5 + 4 * 2.625))
    assert network.batches == [4]


def test_texts_of_other_lengths_and_parts_are_grouped():
    shares = [
        Share(A, 0.25),
        Share(told(2.0, 7.0, length=3), 0.25),
        Share(told(1.0, 6.0, pooled=1.0), 0.25),
        Share(told(4.0, 4.0, length=3), 0.25),
    ]
    network, denoise = run(lambda done: shares)
    mean = [(3 + 2 + 2 + 4) / 4, (5 + 7 + 7 + 4) / 4]
    expected = per_picture(1 + 4 * (mean[0] - 1), 1.5 + 4 * (mean[1] - 1.5))
    torch.testing.assert_close(denoise(noisy(), 0.5).value, expected)
    assert sorted(network.batches) == [2, 4, 4]


def test_a_mix_is_made_worse_as_a_whole():
    network = Counting()
    denoiser = x0_denoiser(network)
    guidance = Guidance(perturbed=PerturbedAttention(layers=(1,), scale=2.0))
    guide = make_guide(guidance, 4.0, denoiser, LEVELS)
    shares = [Share(A), Share(B, 0.5)]
    denoise = GuidedDenoiser(denoiser, lambda done: shares, U, guide, LEVELS)
    mix = [3 + 0.5 * 2 - 0.5 * 1, 5 + 0.5 * 7 - 0.5 * 1.5]
    expected = [u + 4 * (m - u) + 2 * 0.3 * m for m, u in zip(mix, (1, 1.5), strict=True)]
    torch.testing.assert_close(denoise(noisy(), 0.5).value, per_picture(*expected))
    assert network.batches == [6, 6]


def test_a_row_of_a_mix():
    left = torch.zeros(2, 1, 4, 4)
    left[0, ..., :2] = left[1, ..., 2:] = 1
    calls, right = [], 1 - left

    def told_at(done: float) -> list[Share]:
        calls.append(done)
        return [Share(A, 0.5, left), Share(B, done, right)]

    _, denoise = run(told_at)
    together = denoise(noisy(), 0.5).value
    row = denoise.row(1)
    for _ in range(3):
        torch.testing.assert_close(row(noisy()[1:], 0.5).value, together[1:])
    assert len(row._plans) == 1
    assert set(calls) == {0.6}


@pytest.mark.parametrize(
    ("cond", "uncond", "message"),
    [
        (lambda done: [], U, "needs at least one"),
        (lambda done: [Share(A, float("nan"))], U, "numbers for weights"),
        (lambda done: [Share(A, 0.5)], None, "do not add up to 1 everywhere"),
        (A, lambda done: [Share(U, 0.5)], "do not add up to 1 everywhere"),
    ],
)
def test_mixes_that_mean_nothing(cond, uncond, message):
    with pytest.raises(InputError, match=message):
        run(cond, uncond, scale=1.0 if uncond is None else 4.0)[1](noisy(), 0.5)


def test_prompts_that_change_need_levels():
    with pytest.raises(InputError, match="need the run's levels"):
        run(lambda done: [Share(A)], levels=())[1](noisy(), 0.5)
