"""The text encoder of the first latent diffusion models against diffusers' `LDMBertModel`."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.closeness import assert_parity
from tests.networks import with_unit_gain

from darkroom.checkpoint.layouts import LDM_TEXT_TO_DIFFUSERS
from darkroom.text.ldm import LDMTextConfig, LDMTextEncoder

TINY = LDMTextConfig(vocab_size=90, context_length=11, width=24, layers=3, heads=2, head_width=8)
CONFIGS = {
    "narrower inside than outside": TINY,
    "wider heads, one layer": replace(TINY, layers=1, heads=5, head_width=16),
    "one head, thin feed-forward": replace(TINY, width=32, heads=1, head_width=32, intermediate=20),
}


def reference_model(config: LDMTextConfig) -> Any:
    """diffusers' encoder of this shape with random weights, the norms' included."""
    module = pytest.importorskip("diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion")
    fields = module.LDMBertConfig(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.context_length,
        encoder_layers=config.layers,
        encoder_ffn_dim=config.mlp_width,
        encoder_attention_heads=config.heads,
        head_dim=config.head_width,
        d_model=config.width,
    )
    return with_unit_gain(module.LDMBertModel(fields))


def loaded(config: LDMTextConfig, model: Any) -> LDMTextEncoder:
    """Our encoder with the reference's weights."""
    encoder = LDMTextEncoder(config).eval()
    encoder.load_state_dict(LDM_TEXT_TO_DIFFUSERS.inverse()(model.state_dict()), strict=True)
    return encoder


@pytest.mark.parametrize("length", [11, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_same_states(name: str, length: int) -> None:
    config = CONFIGS[name]
    model = reference_model(config)
    ids = torch.randint(config.vocab_size, (3, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_parity(loaded(config, model)(ids), model(ids, return_dict=False)[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_same_gradients(name: str) -> None:
    config = CONFIGS[name]
    model = reference_model(config).double()
    encoder = loaded(config, model).double()
    ids = torch.arange(config.vocab_size)[: 9 * 10].reshape(9, 10) % config.vocab_size
    (encoder(ids) - 1.0).pow(3).sum().backward()
    (model(ids, return_dict=False)[0] - 1.0).pow(3).sum().backward()
    reference = dict(model.model.named_parameters())
    for parameter_name, parameter in encoder.named_parameters():
        assert_parity(parameter.grad, reference[parameter_name].grad)
