"""Guidance: how many calls it costs, how guides compose, what they keep, and what a run is told where."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tests.diffusion.guided import LEVELS, Counting, noisy, pattern, told, x0_denoiser
from tests.tiny import tiny_parts
from torch import Tensor

from darkroom.diffusion.denoiser import Condition, Denoiser
from darkroom.diffusion.guidance import (
    ClassifierFreeGuidance,
    Denoised,
    GuidedDenoiser,
    make_guide,
    progress,
    weaker_denoiser,
)
from darkroom.diffusion.guidance_settings import (
    APG,
    Autoguidance,
    CFGZeroStar,
    Guidance,
    PerturbedAttention,
    SkipLayers,
)
from darkroom.diffusion.path import DiscretePath, FlowPath
from darkroom.diffusion.samplers.first_order import euler
from darkroom.errors import InputError
from darkroom.nn.mmdit import MMDiT, MMDiTConfig
from darkroom.nn.unet import UNet, UNetConfig

COND, UNCOND = told(3.0, 5.0), told(1.0, 1.0)


def guided(scale: float, uncond: Condition | None = None) -> tuple[Counting, GuidedDenoiser]:
    network = Counting()
    return network, GuidedDenoiser(x0_denoiser(network), COND, uncond, ClassifierFreeGuidance(scale))


def made(guidance: Guidance, scale: float = 4.0, **options) -> tuple[Counting, GuidedDenoiser]:
    network = Counting()
    denoiser = x0_denoiser(network)
    guide = make_guide(guidance, scale, denoiser, LEVELS, **options)
    return network, GuidedDenoiser(denoiser, COND, UNCOND, guide, LEVELS)


def values(estimate: Tensor) -> list[float]:
    """What each picture's answer was before the pattern."""
    means = (estimate / pattern()).mean((1, 2, 3))
    torch.testing.assert_close(estimate, means[:, None, None, None] * pattern())
    return means.tolist()


@pytest.mark.parametrize("scale", [0.0, 0.3, 4.0])
def test_both_conditions_in_one_call(scale):
    network, denoise = guided(scale, UNCOND)
    denoised = denoise(noisy(), 0.5)
    assert network.batches == [4]
    assert values(denoised.value) == pytest.approx([1 + 2 * scale, 1 + 4 * scale])
    assert denoised.uncond is not None
    assert values(denoised.uncond) == pytest.approx([1, 1])
    assert isinstance(denoise.path, FlowPath)


def test_texts_of_two_lengths_share_no_call():
    network, denoise = guided(4.0, told(1.0, 1.0, length=3))
    assert values(denoise(noisy(), 0.5).value) == pytest.approx([9, 17])
    assert network.batches == [2, 2]


def test_parts_that_only_one_has_share_no_call():
    network = Counting()
    uncond = told(1.0, 1.0, pooled=0.5)
    denoise = GuidedDenoiser(x0_denoiser(network), COND, uncond, ClassifierFreeGuidance(2.0))
    assert values(denoise(noisy(), 0.5).value) == pytest.approx([4.5, 8.5])
    assert network.batches == [2, 2]


def test_scale_one_asks_for_the_condition_alone():
    network, denoise = guided(1.0)
    denoised = denoise(noisy(), 0.5)
    assert network.batches == [2]
    assert values(denoised.value) == pytest.approx([3, 5])
    assert denoised.uncond is None


def test_scale_one_for_a_sampler_that_steps_by_both():
    network = Counting()
    guide = ClassifierFreeGuidance(1.0, always_both=True)
    denoised = GuidedDenoiser(x0_denoiser(network), COND, UNCOND, guide)(noisy(), 0.5)
    assert network.batches == [4]
    assert values(denoised.value) == pytest.approx([3, 5])
    assert denoised.uncond is not None
    assert values(denoised.uncond) == pytest.approx([1, 1])


def test_only_the_first_channels():
    network = Counting()
    guide = ClassifierFreeGuidance(4.0, channels=2)
    value = GuidedDenoiser(x0_denoiser(network), COND, UNCOND, guide)(noisy(), 0.5).value
    expected = torch.tensor([[9.0, 9, 3], [17, 17, 5]])[:, :, None, None] * pattern()
    torch.testing.assert_close(value, expected)


def test_guidance_without_an_unconditional_condition():
    with pytest.raises(InputError, match="needs an unconditional"):
        guided(2.0)[1](noisy(), 0.5)


def test_a_guide_sees_x_and_sigma():
    """A guide is any object of that shape, and may keep a run's state."""

    class Halving:
        def __init__(self) -> None:
            self.sigmas: list[float] = []

        def __call__(self, x: Tensor, sigma: float, predict) -> Denoised:
            self.sigmas.append(sigma)
            return Denoised(predict("uncond")[0] + x * 0)

        def fresh(self) -> "Halving":
            return Halving()

    guide = Halving()
    denoise = GuidedDenoiser(x0_denoiser(Counting()), UNCOND, UNCOND, guide)
    assert values(denoise(noisy(), 0.25).value) == pytest.approx([1, 1])
    assert guide.sigmas == [0.25]
    denoise.row(1)(noisy()[:1], 0.5)
    assert guide.sigmas == [0.25]


def test_what_is_off_is_plain_guidance_to_the_bit():
    network, denoise = made(Guidance())
    _, plain = guided(4.0, UNCOND)
    for sigma in LEVELS[:-1]:
        assert torch.equal(denoise(noisy(), sigma).value, plain(noisy(), sigma).value)
    assert network.batches == [4] * 5
    assert make_guide(Guidance(), 4.0, x0_denoiser(network), LEVELS) == ClassifierFreeGuidance(4.0)


def test_all_at_once_in_the_order_that_is_promised():
    """The estimates of each kind by themselves, then the documented formula in float64."""
    weak = Counting(0.8)
    guidance = Guidance(
        rescale=0.6,
        skip_layers=SkipLayers(layers=(2, 4), scale=2.0, start=0.1, stop=0.9),
        perturbed=PerturbedAttention(layers=(3,), scale=1.5),
        autoguidance=Autoguidance(weaker=x0_denoiser(weak), scale=1.7),
    )
    network, denoise = made(guidance, 4.0)
    denoised = denoise(noisy(), LEVELS[2])
    cond, uncond = torch.tensor([3.0, 5.0]).double(), torch.tensor([1.0, 1.0]).double()
    value = uncond + 4 * (cond - uncond)
    value = value + 2.0 * (cond - 0.8 * cond) + 1.5 * (cond - 0.7 * cond) + 0.7 * (cond - 0.8 * cond)
    value = value * (0.4 + 0.6 * cond / value)  # all have the pattern's deviation, times themselves
    assert values(denoised.value) == pytest.approx(value.tolist(), rel=1e-5)
    assert network.batches == [4, 2, 2]
    assert weak.batches == [2]
    assert [t and (t.skip, t.perturbed) for t in network.told] == [None, ((2, 4), ()), ((), (3,))]


def test_outside_of_its_window_a_technique_costs_nothing():
    network, denoise = made(Guidance(skip_layers=SkipLayers(layers=(1,), start=0.2, stop=0.6)))
    for sigma in LEVELS[:-1]:
        denoise(noisy(), sigma)
    assert network.batches == [4, 4, 4, 2, 4, 4]  # acts after the fraction 0.2 and before 0.6: step 2


def test_without_a_prompts_guidance_the_others_need_two_estimates():
    network, denoise = made(Guidance(perturbed=PerturbedAttention(layers=(1, 2), scale=2.0)), 1.0)
    assert values(denoise(noisy(), 0.5).value) == pytest.approx([3 + 2 * 1.8, 5 + 2 * 3.0])
    assert network.batches == [2, 2]


@pytest.mark.parametrize(
    ("guidance", "both"),
    [
        (Guidance(interval=(0.2, 0.6)), [False, True, True, False, False]),
        (Guidance(interval=(0.3, 1.0)), [False, False, True, True, True]),
        (Guidance(sigma_interval=(0.2, 0.9)), [False, True, True, True, False]),
    ],
)
def test_an_interval_halves_the_cost_outside(guidance, both):
    network, denoise = made(guidance)
    for sigma in LEVELS[:-1]:
        denoise(noisy(), sigma)
    assert network.batches == [4 if two else 2 for two in both]


def test_where_nothing_guides_rescaling_changes_no_bit():
    denoiser = Denoiser(Counting(), FlowPath(), "flow")
    guide = make_guide(Guidance(rescale=0.7, interval=(0.2, 0.6)), 4.0, denoiser, LEVELS)
    guided = GuidedDenoiser(denoiser, COND, UNCOND, guide)
    plain = GuidedDenoiser(denoiser, COND, None, ClassifierFreeGuidance(1.0))
    for sigma in (1.0, 0.2):
        assert torch.equal(guided(noisy(), sigma).value, plain(noisy(), sigma).value)


def test_a_scale_for_each_step():
    scales = (1.0, 2.0, 3.0, 4.0, 5.0)
    network, denoise = made(Guidance(scales=scales), 9.0)
    found = [values(denoise(noisy(), sigma).value)[0] for sigma in LEVELS[:-1]]
    assert found == pytest.approx([1 + 2 * scale for scale in scales])
    assert network.batches == [2, 4, 4, 4, 4]
    between = values(denoise(noisy(), 0.8).value)[0]  # a sampler's call on the way to the third level
    assert between == pytest.approx(1 + 2 * 2)


def test_a_scale_that_is_a_function_of_the_way():
    asked = []
    _, denoise = made(Guidance(scales=lambda done: asked.append(done) or 2 + done), 9.0)
    found = [values(denoise(noisy(), sigma).value)[0] for sigma in (1.0, 0.825, 0.2)]
    assert asked == pytest.approx([0, 0.3, 0.8])
    assert found == pytest.approx([1 + 2 * (2 + done) for done in asked])


def test_scales_inside_an_interval():
    network, denoise = made(Guidance(scales=lambda done: 3.0, interval=(0.4, 0.6)), 9.0)
    found = [values(denoise(noisy(), sigma).value)[0] for sigma in LEVELS[1:4]]
    assert found == pytest.approx([3, 7, 3])
    assert network.batches == [2, 4, 2]


@pytest.mark.parametrize("wrong", [float("nan"), "4", None])
def test_a_function_that_gives_no_number(wrong):
    _, denoise = made(Guidance(scales=lambda done: wrong))
    with pytest.raises(InputError, match="field 'scales': its function gave"):
        denoise(noisy(), 0.5)


def test_zeroed_steps_ask_nothing():
    network = Counting()
    denoiser = Denoiser(network, FlowPath(), "flow")
    guide = make_guide(Guidance(zero_star=CFGZeroStar(zero_steps=2)), 4.0, denoiser, LEVELS)
    steps = list(euler(GuidedDenoiser(denoiser, COND, UNCOND, guide, LEVELS), noisy(), LEVELS))
    assert network.batches == [4, 4, 4]
    torch.testing.assert_close(steps[1].x, noisy())  # a velocity of zero goes nowhere
    assert not torch.allclose(steps[2].x, noisy())


def test_two_runs_of_one_guidance_are_independent():
    guidance = Guidance(apg=APG(momentum=-0.7, norm_threshold=None, eta=0.5))
    runs = []
    for _ in range(2):
        _, denoise = made(guidance)
        runs.append([denoise(noisy(k), sigma).value for k, sigma in enumerate(LEVELS[:-1])])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)
    assert not torch.allclose(runs[0][0] / pattern(), runs[0][1] / pattern())  # momentum is the run's state


def test_a_row_is_a_picture_alone_with_a_guide_of_its_own():
    guidance = Guidance(apg=APG(momentum=-0.7), rescale=0.5, perturbed=PerturbedAttention(layers=(1,)))
    _, denoise = made(guidance)
    together = [denoise(noisy(), sigma).value for sigma in LEVELS[:-1]]
    for k in (1, 0):
        row = denoise.row(k)  # after the whole run, whose average is not its own
        for sigma, expected in zip(LEVELS[:-1], together, strict=True):
            torch.testing.assert_close(row(noisy()[k : k + 1], sigma).value, expected[k : k + 1])


def test_what_stands_in_for_a_denoiser_is_told_a_level_for_each_row():
    class Standing:
        path, prediction = FlowPath(), "x0"

        def __init__(self) -> None:
            self.levels: list[Tensor] = []

        def __call__(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
            self.levels.append(sigma)
            return x0_denoiser(Counting())(x, sigma, cond)

    class Cut(Denoiser):
        def __call__(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
            return super().__call__(x, sigma.clone(), cond)

    standing = Standing()
    for denoiser in (standing, Cut(Counting(), FlowPath(), "x0")):
        guide = make_guide(Guidance(rescale=0.5), 4.0, denoiser, LEVELS)
        value = GuidedDenoiser(denoiser, COND, UNCOND, guide)(noisy(), 0.5).value
        torch.testing.assert_close(value, made(Guidance(rescale=0.5))[1](noisy(), 0.5).value)
    assert torch.equal(standing.levels[0], torch.full((4,), 0.5))


@pytest.mark.parametrize("levels", [LEVELS, [1 - sigma for sigma in LEVELS]])
def test_progress_counts_steps_and_is_continuous(levels):
    steps = len(levels) - 1
    assert [progress(levels, sigma) for sigma in levels] == [k / steps for k in range(steps + 1)]
    for k, (begin, end) in enumerate(pairwise(levels)):
        assert progress(levels, (begin + end) / 2) == pytest.approx((k + 0.5) / steps)
    assert progress(levels, 2 * levels[0] - levels[1]) == 0
    assert progress(levels, 2 * levels[-1] - levels[-2]) == 1


def small_unet(**fields) -> UNet:
    shape = {
        "channels": (8, 8),
        "res_blocks": 1,
        "attention_depth": (1, 1),
        "num_heads": (2, 2),
        "context_dim": 8,
        "groups": 4,
    }
    return UNet(UNetConfig(**shape | fields))


def small_mmdit(depth: int) -> MMDiT:
    config = MMDiTConfig(depth=depth, num_heads=1, head_width=8, context_dim=8, pooled_dim=4, positions=4)
    return MMDiT(config)


@pytest.mark.parametrize(
    ("network", "layers"),
    [
        (small_unet(), ("mid",)),
        (small_unet(mid_depth=0), ("down.1.0",)),
        (small_mmdit(5), (2,)),
    ],
)
def test_default_layers_of_perturbed_attention(network, layers):
    denoiser = Denoiser(network, FlowPath(), "flow")
    guide = make_guide(Guidance(perturbed=PerturbedAttention()), 4.0, denoiser, LEVELS)
    assert guide.worse.perturbed == layers


def test_default_layers_to_skip():
    denoiser = Denoiser(small_mmdit(24), FlowPath(), "flow")
    guide = make_guide(Guidance(skip_layers=SkipLayers()), 4.0, denoiser, LEVELS)
    assert guide.worse.skip == (7, 8, 9)
    assert (guide.weight, guide.window) == (2.8, (0.01, 0.2))


def test_layers_as_a_command_line_gives_them():
    denoiser = Denoiser(small_mmdit(5), FlowPath(), "flow")
    guidance = Guidance(perturbed=PerturbedAttention(layers=("1", "3")))
    assert make_guide(guidance, 4.0, denoiser, LEVELS).worse.perturbed == (1, 3)


MMDIT, UNET = small_mmdit(5), small_unet()


@pytest.mark.parametrize(
    ("guidance", "scale", "network", "message"),
    [
        (
            Guidance(scales=(1.0, 2.0)),
            4.0,
            MMDIT,
            "'scales': must have one number for each of 5 steps, not 2",
        ),
        (Guidance(rescale=0.5), 1.0, MMDIT, "'rescale': changes nothing .* 'true_guidance_scale'"),
        (Guidance(apg=APG()), 1.0, MMDIT, "'apg': changes nothing"),
        (Guidance(interval=(0.0, 0.5), scales=(1.0,) * 5), 4.0, MMDIT, "'interval': changes nothing"),
        (Guidance(zero_star=CFGZeroStar(zero_steps=5)), 4.0, MMDIT, "zero_steps': must leave one of 5 steps"),
        (Guidance(zero_star=CFGZeroStar()), 4.0, UNET, "zero_steps': is for .* predicts 'eps': set it to 0"),
        (Guidance(skip_layers=SkipLayers()), 4.0, MMDIT, "'skip_layers.layers': there is a default for"),
        (Guidance(skip_layers=SkipLayers(layers=(1,))), 4.0, UNET, "'skip_layers.layers': a U-Net has no"),
        (Guidance(skip_layers=SkipLayers(layers=(5,))), 4.0, MMDIT, "no layer 5, only 0 to 4"),
        (Guidance(perturbed=PerturbedAttention(layers=("middle",))), 4.0, UNET, "no layer 'middle', only"),
        (
            Guidance(autoguidance=Autoguidance(weaker="mini")),
            4.0,
            UNET,
            "'autoguidance.weaker': must be a den",
        ),
    ],
)
def test_what_does_not_fit_a_run(guidance, scale, network, message):
    prediction, path = ("eps", DiscretePath()) if network is UNET else ("flow", FlowPath())
    with pytest.raises(InputError, match=f"guidance: field {message}" if message[0] == "'" else message):
        make_guide(guidance, scale, Denoiser(network, path, prediction), LEVELS)


@pytest.mark.parametrize(
    ("weaker", "message"),
    [
        (Denoiser(UNET, DiscretePath(), "eps"), "its path is discrete, this model's flow"),
        (Denoiser(small_unet(in_channels=5), FlowPath(), "flow"), "has `in_channels` 5, this model's 4"),
        (Denoiser(small_unet(context_dim=12), FlowPath(), "flow"), "has `context_dim` 12, this model's 8"),
        (torch.nn.Identity(), "must be a denoiser"),
    ],
)
def test_a_weaker_model_that_does_not_fit(weaker, message):
    guidance = Guidance(autoguidance=Autoguidance(weaker=weaker))
    with pytest.raises(InputError, match=f"'autoguidance.weaker': .*{message}"):
        make_guide(guidance, 4.0, Denoiser(UNET, FlowPath(), "flow"), LEVELS)


def test_a_weaker_model_of_other_latents():
    model = tiny_parts()
    assert weaker_denoiser(model, model) is model.denoiser
    space = replace(model.spec.latent_space, std=(1.5, 0.7, 2.0, 1.9))
    other = replace(model, spec=replace(model.spec, latent_space=space))
    with pytest.raises(InputError, match=r"'autoguidance.weaker': its latents are another autoencoder's"):
        weaker_denoiser(model, other)
