"""The class embedder: its name in published files, its shape, its gradient, bad input."""

from pathlib import Path

import pytest
import torch
from tests.networks import read_shapes, shapes_of, without_gradient

from darkroom.errors import InputError
from darkroom.nn.class_embedder import ClassEmbedder, ClassEmbedderConfig


def test_the_release_has_it(shared: Path) -> None:
    with torch.device("meta"):
        embedder = ClassEmbedder(ClassEmbedderConfig())
    published = read_shapes(shared, "ldm_cin256-v2.single", "cond_stage_model.")
    assert shapes_of(embedder.state_dict()) == published == {"embedding.weight": (1001, 512)}


def test_each_label_is_a_context_of_one_state() -> None:
    embedder = ClassEmbedder(ClassEmbedderConfig(num_classes=4, width=3))
    context = embedder(torch.tensor([3, 0, 1, 2, 3]))
    assert context.shape == (5, 1, 3)
    assert torch.equal(context[0, 0], embedder.embedding.weight[3])
    context.square().sum().backward()
    assert not without_gradient(embedder)
    assert embedder.embedding.weight.grad.norm(dim=1).min() > 0


def test_labels_are_one_per_picture() -> None:
    with pytest.raises(InputError, match=r"shape \(2, 1\): give one per picture"):
        ClassEmbedder(ClassEmbedderConfig(num_classes=4, width=3))(torch.zeros(2, 1, dtype=torch.int64))


@pytest.mark.parametrize("field", ["num_classes", "width"])
def test_bad_numbers_are_named(field: str) -> None:
    with pytest.raises(InputError, match=f"`{field}` = 0"):
        ClassEmbedderConfig(**{field: 0})
