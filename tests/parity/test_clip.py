"""The text encoder against transformers' CLIP text models, weight for weight."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests.closeness import assert_parity
from torch import Tensor

from darkroom.checkpoint.layouts import CLIP_TEXT_TO_HUB
from darkroom.text.clip import CLIPTextConfig, CLIPTextEncoder

CONFIGS = {
    "quick gelu": CLIPTextConfig(vocab_size=90, context_length=12, width=24, layers=3, heads=3),
    "gelu, projected, narrow feed-forward": CLIPTextConfig(
        vocab_size=90,
        context_length=12,
        width=32,
        layers=2,
        heads=2,
        intermediate=40,
        activation="gelu",
        projection_dim=20,
    ),
    "old config: end mark 2": CLIPTextConfig(
        vocab_size=90, context_length=12, width=24, layers=1, heads=2, eos_token_id=2
    ),
    "end mark in the middle of the vocabulary": CLIPTextConfig(
        vocab_size=90, context_length=12, width=24, layers=1, heads=4, eos_token_id=40, projection_dim=24
    ),
}


def config_from_transformers(fields: dict[str, Any], *, projected: bool) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=fields["vocab_size"],
        context_length=fields["max_position_embeddings"],
        width=fields["hidden_size"],
        layers=fields["num_hidden_layers"],
        heads=fields["num_attention_heads"],
        intermediate=fields["intermediate_size"],
        activation=fields["hidden_act"],
        projection_dim=fields["projection_dim"] if projected else None,
        eos_token_id=fields["eos_token_id"],
    )


@pytest.mark.parametrize("case", ["text_clip_quickgelu", "text_clip_gelu_proj"])
def test_reference_cases(case: str, shared: Path) -> None:
    with safe_open(shared / f"reference/cases/{case}.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    projected = metadata["class"].endswith("WithProjection")
    encoder = CLIPTextEncoder(config_from_transformers(json.loads(metadata["config"]), projected=projected))
    weights = {n.removeprefix("weights/"): t.float() for n, t in tensors.items() if n.startswith("weights/")}
    encoder.load_state_dict(CLIP_TEXT_TO_HUB.inverse()(weights), strict=True)
    with torch.no_grad():
        states = encoder(tensors["inputs/input_ids"])
    assert_parity(states.last, tensors["outputs/last_hidden_state"])
    assert_parity(states.hidden[-2], tensors["outputs/penultimate_hidden_state"])
    assert_parity(states.pooled, tensors["outputs/text_embeds" if projected else "outputs/pooled"])


def reference_model(config: CLIPTextConfig) -> Any:
    """transformers' model of this shape with random weights, the biases' and the norms' included."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    fields = transformers.CLIPTextConfig(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.context_length,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.mlp_width,
        hidden_act=config.activation,
        projection_dim=config.projection_dim,
        eos_token_id=config.end_token,
        bos_token_id=0,
        pad_token_id=1,
    )
    projected = config.projection_dim is not None
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    model = kind(fields).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def random_ids(config: CLIPTextConfig) -> Tensor:
    """Rows that end early, late, and with the end mark as padding; no other id reaches the mark's value."""
    end = config.vocab_size - 1 if config.end_token == 2 else config.end_token
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, min(end, 39), (4, config.context_length), generator=generator)
    ids[0, 5:] = end
    ids[1, 1:] = end
    ids[2, -1] = end
    ids[3, 7] = end  # other ids follow: the first mark counts, and no later one
    return ids


def loaded(config: CLIPTextConfig, model: Any) -> CLIPTextEncoder:
    encoder = CLIPTextEncoder(config).eval()
    # transformers 4 keeps the prefix that its files have, version 5 drops it: the table takes both.
    encoder.load_state_dict(CLIP_TEXT_TO_HUB.inverse()(model.state_dict()), strict=True)
    return encoder


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_same_states(name: str) -> None:
    config = CONFIGS[name]
    model, ids = reference_model(config), random_ids(config)
    encoder, reference = loaded(config, model), model(ids, output_hidden_states=True)
    states = encoder(ids)
    assert_parity(states.last, reference.last_hidden_state)
    assert_parity(states.pooled, reference[0] if config.projection_dim else reference.pooler_output)
    assert len(states.hidden) == config.layers + 1
    for ours, theirs in zip(states.hidden[:-1], reference.hidden_states[:-1], strict=True):
        assert_parity(ours, theirs)
    assert_parity(encoder.normed(states, -1), reference.last_hidden_state)


@torch.no_grad()
def test_normed_is_what_a_model_without_the_last_layers_gives() -> None:
    config = CONFIGS["quick gelu"]
    model, ids = reference_model(config), random_ids(config)
    encoder = loaded(config, model)
    short = CLIPTextEncoder(dataclasses.replace(config, layers=2))
    kept = {n: t for n, t in encoder.state_dict().items() if not n.startswith("encoder.layers.2.")}
    short.load_state_dict(kept, strict=True)
    assert_parity(encoder.normed(encoder(ids), -2), short(ids).last)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_token_changes_only_what_follows_it_as_in_the_reference(name: str) -> None:
    config = CONFIGS[name]
    model, ids = reference_model(config), random_ids(config)
    encoder = loaded(config, model)
    mutated = ids.clone()
    mutated[:, 3] = 3 + (mutated[:, 3] - 2) % 30
    mutated[1, 3] = ids[1, 3]  # this row ends before: its padding stays
    before, after = encoder(ids), encoder(mutated)
    assert torch.equal(before.last[:, :3], after.last[:, :3])
    changed = (after.last - before.last).norm(dim=2)[[0, 2, 3]]
    assert changed[:, 3:].min() > 1e-4
    assert (after.pooled - before.pooled).norm(dim=1)[[0, 2, 3]].min() > 1e-4
    assert_parity(after.last, model(mutated).last_hidden_state)
