"""Features of pictures, nearest neighbours and the linear classifier."""

import pytest
import torch

from darkroom.evaluate.features import RidgeClassifier, extract, nearest, palette, texture
from darkroom.nn.perceptual import SqueezeDistance


@pytest.fixture
def network() -> SqueezeDistance:
    torch.manual_seed(0)
    return SqueezeDistance()


def pictures(count: int) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def test_extract_does_not_depend_on_the_batch(network: SqueezeDistance) -> None:
    images = pictures(5)
    whole, parts = extract(images, network.fire9), extract(images, network.fire9, batch_size=2)
    assert whole.shape == (5, 512)
    assert torch.allclose(whole, parts, rtol=1e-4, atol=1e-6)
    assert torch.allclose(whole[3:4], network.fire9(images[3:4].float() / 127.5 - 1.0), rtol=1e-4, atol=1e-6)


def test_texture_is_of_the_first_layers(network: SqueezeDistance) -> None:
    image = pictures(2).float() / 127.5 - 1.0
    found, (relu1, fire3) = texture(network, image), network.layers(image)[:2]
    assert found.shape == (2, 64 * 65 // 2 + 128 * 129 // 2)
    assert torch.allclose(found[:, 1].square(), (relu1[:, 0] * relu1[:, 1]).mean((1, 2)), rtol=1e-4)
    assert torch.allclose(found[:, -1].square(), fire3[:, -1].square().mean((1, 2)), rtol=1e-4)


def test_palette_counts_colours() -> None:
    image = torch.full((1, 3, 4, 4), -1.0)
    image[0, :, 0, 0] = 1.0
    image[0, 0, 1, :2] = 0.01
    found = palette(image)[0].square()
    assert found.sum().item() == pytest.approx(1.0)
    assert found[0].item() == pytest.approx(13 / 16) and found[511].item() == pytest.approx(1 / 16)
    assert found[4 * 64].item() == pytest.approx(2 / 16)


def test_nearest_goes_by_direction_not_length() -> None:
    gallery = torch.tensor([[10.0, 10.0], [0.1, 0.0], [0.0, 5.0]])
    found = nearest(torch.tensor([[3.0, 0.3], [0.0, 0.2], [1.0, 1.1]]), gallery)
    assert found.index.tolist() == [1, 2, 0]
    assert found.similarity[1].item() == pytest.approx(1.0)


def test_ridge_classifier_finds_the_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = ["b", "a", "c"] * 60
    features = torch.randn(180, 6, generator=generator)
    for row, label in enumerate(labels):
        features[row, "abc".index(label)] += 6.0
    features[:, 0] *= 100.0  # scales of features must not matter
    noise = torch.randn(180, 200, generator=generator)  # nor how wide another block is
    classify = RidgeClassifier([features[:120], noise[:120]], labels[:120])
    said = classify([features[120:], noise[120:]])
    assert sum(a == b for a, b in zip(said, labels[120:], strict=True)) >= 54


def test_one_class_is_an_error() -> None:
    with pytest.raises(ValueError, match="two classes"):
        RidgeClassifier([torch.zeros(3, 2)], ["a", "a", "a"])
