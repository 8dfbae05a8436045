"""The text encoder of the first latent diffusion models without a reference."""

import pytest
import torch
from tests.networks import with_unit_gain, without_gradient

from darkroom.errors import InputError
from darkroom.text.ldm import LDMTextConfig, LDMTextEncoder

TINY = LDMTextConfig(vocab_size=60, context_length=6, width=16, layers=2, heads=2, head_width=4)


def encoder() -> LDMTextEncoder:
    network = with_unit_gain(LDMTextEncoder(TINY))
    assert isinstance(network, LDMTextEncoder)
    return network


def test_every_token_reaches_every_state() -> None:
    network, ids = encoder(), torch.tensor([[3, 14, 15, 9, 2], [7, 7, 7, 7, 7]])
    other = ids.clone()
    other[0, 4] = 8
    before, after = network(ids), network(other)
    assert before.shape == (2, 5, 16)
    assert ((before - after)[0].norm(dim=-1) > 1e-3).all()
    assert torch.equal(before[1], after[1])


def test_order_matters() -> None:
    network, ids = encoder(), torch.tensor([[3, 14, 15, 9, 2]])
    assert not torch.allclose(network(ids).sum(1), network(ids.flip(1)).sum(1))


def test_every_parameter_gets_a_gradient() -> None:
    network = encoder()
    network(torch.arange(60).reshape(10, 6)).pow(3).sum().backward()
    assert not without_gradient(network)


def test_longer_texts_than_places_are_refused() -> None:
    with pytest.raises(InputError, match="7 tokens a text are too many: the text encoder has 6 places"):
        encoder()(torch.zeros(1, 7, dtype=torch.int64))


@pytest.mark.parametrize("field", ["vocab_size", "width", "layers", "heads", "head_width", "intermediate"])
def test_bad_numbers_are_named(field: str) -> None:
    with pytest.raises(InputError, match=f"ldm_text: `{field}` = 0"):
        LDMTextConfig(**{field: 0})
