"""T5's encoder against transformers' own, weight for weight."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests.closeness import assert_parity
from torch import Tensor

from darkroom.text.t5 import T5Config, T5Encoder

TINY = T5Config(vocab_size=90, width=24, layers=2, heads=3, head_width=8, intermediate=40)
CONFIGS = {
    "as wide inside as outside": TINY,
    "wider heads, one layer": replace(TINY, layers=1, heads=5, head_width=16),
    "few buckets, short reach": replace(TINY, layers=4, heads=2, head_width=12, buckets=8, max_distance=20),
}


def ours(config: T5Config, weights: dict[str, Tensor]) -> T5Encoder:
    """Our encoder with the reference's weights, of which the second copy of the embedding is left out."""
    encoder = T5Encoder(config).eval()
    encoder.load_state_dict({n: t for n, t in weights.items() if n != "encoder.embed_tokens.weight"})
    return encoder


def test_reference_case(shared: Path) -> None:
    with safe_open(shared / "reference/cases/text_t5.safetensors", "pt") as file:
        fields = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    config = T5Config(
        vocab_size=fields["vocab_size"],
        width=fields["d_model"],
        layers=fields["num_layers"],
        heads=fields["num_heads"],
        head_width=fields["d_kv"],
        intermediate=fields["d_ff"],
    )
    weights = {n.removeprefix("weights/"): t.float() for n, t in tensors.items() if n.startswith("weights/")}
    with torch.no_grad():
        assert_parity(
            ours(config, weights)(tensors["inputs/input_ids"]), tensors["outputs/last_hidden_state"]
        )


def reference_model(config: T5Config) -> Any:
    """transformers' encoder of this shape with random weights, the norms' included."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    fields = transformers.T5Config(
        vocab_size=config.vocab_size,
        d_model=config.width,
        d_kv=config.head_width,
        d_ff=config.intermediate,
        num_layers=config.layers,
        num_heads=config.heads,
        relative_attention_num_buckets=config.buckets,
        relative_attention_max_distance=config.max_distance,
        feed_forward_proj="gated-gelu",
    )
    model = transformers.T5EncoderModel(fields).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "padding masked"])
@pytest.mark.parametrize("name", CONFIGS)
def test_parity(name: str, masked: bool) -> None:
    config = CONFIGS[name]
    model = reference_model(config)
    ids = torch.randint(config.vocab_size, (3, 150))  # beyond `max_distance`
    mask = torch.arange(150) < torch.tensor([[150], [40], [3]]) if masked else None
    with torch.no_grad():
        reference = model(ids, attention_mask=torch.ones_like(ids) if mask is None else mask.long())
        assert_parity(ours(config, model.state_dict())(ids, mask), reference.last_hidden_state)
