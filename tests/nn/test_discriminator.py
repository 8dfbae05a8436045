"""The patch discriminator: names, shapes, how far a logit sees, and the losses by hand."""

import math

import pytest
import torch

from darkroom.nn.discriminator import PatchGAN, adaptive_weight, discriminator_loss, generator_loss


def test_names_and_shapes_are_those_of_vqgan() -> None:
    model = PatchGAN()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.ndim == 4}
    assert shapes == {
        "main.0.weight": (64, 3, 4, 4),
        "main.2.weight": (128, 64, 4, 4),
        "main.5.weight": (256, 128, 4, 4),
        "main.8.weight": (512, 256, 4, 4),
        "main.11.weight": (1, 512, 4, 4),
    }
    assert set(dict(model.named_parameters())) - set(shapes) == {
        *("main.0.bias", "main.11.bias"),
        *(f"main.{n}.{part}" for n in (3, 6, 9) for part in ("weight", "bias")),
    }
    assert model(torch.zeros(2, 3, 256, 256)).shape == (2, 1, 30, 30)


@pytest.mark.parametrize(("layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_its_patch(layers: int, patch: int) -> None:
    torch.manual_seed(0)
    model = PatchGAN(channels=8, layers=layers).eval()
    image = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = model(image)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    rows = image.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert rows[-1] - rows[0] + 1 == patch == len(rows)


def test_works_on_small_and_oblong_pictures() -> None:
    model = PatchGAN(channels=8, layers=3)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 1, 2, 2)
    assert model(torch.randn(2, 3, 64, 96)).shape == (2, 1, 6, 10)


def test_losses() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    assert discriminator_loss(real, fake, "hinge").item() == pytest.approx(0.5 * (0.25 + 1.0))
    logistic = [
        math.log1p(math.exp(-2)),
        math.log1p(math.exp(-0.5)),
        math.log1p(math.exp(-3)),
        math.log1p(math.e),
    ]
    assert discriminator_loss(real, fake, "vanilla").item() == pytest.approx(0.25 * sum(logistic))
    assert generator_loss(fake, "hinge").item() == pytest.approx(1.0)
    expected = 0.5 * (math.log1p(math.exp(3)) + math.log1p(math.exp(-1)))
    assert generator_loss(fake, "vanilla").item() == pytest.approx(expected)


def test_both_sides_learn_against_each_other() -> None:
    fake = torch.zeros(4, requires_grad=True)
    for kind in ("hinge", "vanilla"):
        (down,) = torch.autograd.grad(discriminator_loss(torch.zeros(4), fake, kind), fake)
        (up,) = torch.autograd.grad(generator_loss(fake, kind), fake)
        assert (down > 0).all() and (up < 0).all()


def test_adaptive_weight() -> None:
    nll, g = torch.tensor([3.0, 4.0], requires_grad=True), torch.tensor([0.0, 2.0])
    weight = adaptive_weight(nll, g)
    assert weight.item() == pytest.approx(5 / 2.0001)
    assert not weight.requires_grad
    assert adaptive_weight(torch.tensor([5.0]), torch.zeros(1)).item() == 1e4
    assert adaptive_weight(torch.zeros(1), g).item() == 0.0
