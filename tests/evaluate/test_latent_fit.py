"""Fits between latents: each kind finds what was done to them, and is judged on what it has not seen."""

import pytest
import torch

from darkroom.errors import InputError
from darkroom.evaluate.latent_fit import KINDS, agreement, cross_fitted, fit


@pytest.fixture
def latents() -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    mix = torch.randn(4, 4, generator=draws)
    return [
        torch.einsum("ij,jhw->ihw", mix, torch.randn(4, h, w, generator=draws)) + 0.5
        for h, w in ((8, 8), (4, 12), (10, 6))
    ]


def mixed(latents, matrix, bias):
    return [torch.einsum("ij,jhw->ihw", matrix, each) + bias[:, None, None] for each in latents]


def test_an_affine_map_of_channels_is_found_both_ways(latents):
    matrix, bias = (
        torch.randn(4, 4, generator=torch.Generator().manual_seed(1)),
        torch.tensor([1.0, -2, 0, 3]),
    )
    target = mixed(latents, matrix, bias)
    found = fit("affine", latents, target)
    assert torch.allclose(found.matrix, matrix.double(), atol=1e-5)
    assert torch.allclose(found.bias, bias.double(), atol=1e-5)
    back = fit("affine", target, latents)
    assert torch.allclose(back.matrix @ found.matrix, torch.eye(4).double(), atol=1e-4)
    assert agreement(cross_fitted("affine", latents, target), target).r2 == pytest.approx(1, abs=1e-6)
    assert agreement(cross_fitted("scale", latents, target), target).r2 < 0.9


def test_a_scale_of_each_channel_is_found_and_its_inverse_is_exact(latents):
    scale, bias = torch.tensor([2.0, 0.5, 3.0, 0.1]), torch.tensor([1.0, -2, 0, 3])
    target = mixed(latents, scale.diag(), bias)
    there, back = fit("scale", latents, target), fit("scale", target, latents)
    assert torch.allclose(there.matrix, scale.diag().double(), rtol=1e-5)
    assert torch.allclose(there.bias, bias.double(), atol=1e-5)
    assert torch.allclose(there.matrix @ back.matrix, torch.eye(4).double(), atol=1e-12)
    assert torch.allclose(back(there(latents[0])), latents[0], atol=1e-5)


def test_identity_is_only_right_for_equal_latents(latents):
    assert agreement(cross_fitted("identity", latents, latents), latents).r2 == 1
    doubled = [2 * each for each in latents]
    assert agreement(cross_fitted("identity", latents, doubled), doubled).r2 < 0.8


@pytest.mark.parametrize("count", [1, 4])
def test_no_cell_is_predicted_by_a_fit_that_saw_it(count):
    draws = torch.Generator().manual_seed(0)
    source, target = ([torch.randn(8, 4, 8, generator=draws) for _ in range(count)] for _ in range(2))
    seen = fit("affine", source, target)
    assert agreement([seen(each) for each in source], target).r2 > 0.04  # of pure noise: learned by heart
    assert agreement(cross_fitted("affine", source, target), target).r2 < -0.04


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_predictions_have_the_shapes_of_the_latents(latents, kind, count):
    predicted = cross_fitted(kind, latents[:count], latents[:count])
    assert [each.shape for each in predicted] == [each.shape for each in latents[:count]]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(predicted, latents, strict=False))


def test_a_channel_that_never_changes_keeps_its_size(latents):
    flat = [each.clone() for each in latents]
    for each in flat:
        each[1] = 7.0
    found = fit("scale", latents, flat)
    assert found.matrix[1, 1] == 1
    assert torch.isfinite(found.matrix).all() and torch.isfinite(fit("affine", flat, latents).matrix).all()


def test_agreement_tells_the_worst_channel_and_the_error():
    target = [5 + torch.stack([torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 16)]).reshape(2, 4, 4)]
    predicted = [target[0].clone()]
    predicted[0][1] = 5.0  # its mean: R² of that channel is 0
    found = agreement(predicted, target)
    assert found.r2 == pytest.approx(0.5)
    assert found.worst_channel == pytest.approx(0, abs=1e-6)
    assert found.relative_error == pytest.approx(0.5**0.5)


def test_too_few_cells_are_named(latents):
    few = [each[:, :1, :4] for each in latents[:1]]
    with pytest.raises(InputError, match="4 latent cells are too few to fit 4 channels"):
        fit("affine", few, few)
