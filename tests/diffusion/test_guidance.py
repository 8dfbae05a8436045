"""Guidance: one network call for both conditions, and what comes of them."""

import pytest
import torch
from torch import Tensor, nn

from darkroom.diffusion.denoiser import Condition, Denoiser
from darkroom.diffusion.guidance import ClassifierFreeGuidance, Denoised, GuidedDenoiser
from darkroom.diffusion.path import FlowPath
from darkroom.errors import InputError

SHAPE = (2, 3, 4, 4)


class Counting(nn.Module):
    """Answers with the mean of its context, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, *, extra: None = None) -> Tensor:
        self.batches.append(x.shape[0])
        assert timestep.shape == (x.shape[0],)
        assert timestep.dtype == torch.float32
        return x * 0 + context.mean((1, 2))[:, None, None, None]


def guided(scale: float, uncond: Condition | None = None) -> tuple[Counting, GuidedDenoiser]:
    network = Counting()
    cond = Condition(torch.tensor([3.0, 5.0])[:, None, None].expand(2, 7, 8))
    denoiser = Denoiser(network, FlowPath(), "x0")
    return network, GuidedDenoiser(denoiser, cond, uncond, ClassifierFreeGuidance(scale))


@pytest.mark.parametrize("scale", [0.0, 0.3, 4.0])
def test_both_conditions_in_one_call(scale):
    network, denoise = guided(scale, Condition(torch.ones(2, 7, 8)))
    denoised = denoise(torch.randn(SHAPE), 0.5)
    assert network.batches == [4]
    assert denoised.value[:, 0, 0, 0].tolist() == pytest.approx([1 + 2 * scale, 1 + 4 * scale])
    assert denoised.uncond is not None
    assert (denoised.uncond == 1).all()
    assert isinstance(denoise.path, FlowPath)


def test_texts_of_two_lengths_share_no_call():
    network, denoise = guided(4.0, Condition(torch.ones(2, 3, 8)))
    denoised = denoise(torch.randn(SHAPE), 0.5)
    assert network.batches == [2, 2]
    assert denoised.value[:, 0, 0, 0].tolist() == pytest.approx([9, 17])


def test_scale_one_asks_for_the_condition_alone():
    network, denoise = guided(1.0)
    denoised = denoise(torch.randn(SHAPE), 0.5)
    assert network.batches == [2]
    assert denoised.value[:, 0, 0, 0].tolist() == [3, 5]
    assert denoised.uncond is None


def test_guidance_without_an_unconditional_condition():
    with pytest.raises(InputError, match="needs an unconditional"):
        guided(2.0)[1](torch.randn(SHAPE), 0.5)


def test_a_guide_sees_x_and_sigma():
    """A guide is any object of that shape, and may keep a run's state."""

    class Halving:
        def __init__(self) -> None:
            self.sigmas: list[float] = []

        def __call__(self, x: Tensor, sigma: float, predict) -> Denoised:
            self.sigmas.append(sigma)
            return Denoised(predict("uncond")[0] + x * 0)

    guide, cond = Halving(), Condition(torch.ones(2, 7, 8))
    denoise = GuidedDenoiser(Denoiser(Counting(), FlowPath(), "x0"), cond, cond, guide)
    assert (denoise(torch.randn(SHAPE), 0.25).value == 1).all()
    assert guide.sigmas == [0.25]
