"""The text encoder without a reference: real checkpoints' names, initialisation, compilation, bad input."""

import json
from pathlib import Path

import pytest
import torch

from darkroom.checkpoint.layouts import CLIP_TEXT_TO_HUB
from darkroom.errors import InputError
from darkroom.text.clip import CLIPTextConfig, CLIPTextEncoder

TINY = CLIPTextConfig(vocab_size=60, context_length=10, width=16, layers=2, heads=2, projection_dim=8)
IDS = torch.tensor([[58, 4, 9, 30, 59, 59, 59, 59, 59, 59], [58, 7, 7, 8, 21, 3, 2, 9, 40, 59]])


def encoder(config: CLIPTextConfig = TINY) -> CLIPTextEncoder:
    torch.manual_seed(0)
    return CLIPTextEncoder(config)


REAL = {
    "sd15.diffusers.text_encoder": CLIPTextConfig(),
    "te_clip_l.single": CLIPTextConfig(),
    "flux.diffusers.text_encoder": CLIPTextConfig(),
    "sd21.diffusers.text_encoder": CLIPTextConfig(width=1024, layers=23, heads=16, activation="gelu"),
    "sd3.diffusers.text_encoder": CLIPTextConfig(projection_dim=768),
    "sdxl.diffusers.text_encoder_2": CLIPTextConfig(
        width=1280, layers=32, heads=20, activation="gelu", projection_dim=1280
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_real_checkpoints_fit(name: str, shared: Path) -> None:
    reference = json.loads((shared / f"reference/keys/{name}.json").read_text())["tensors"]
    with torch.device("meta"):
        real = CLIPTextEncoder(REAL[name])
        tensors = {name: torch.empty(shape) for name, shape in reference.items()}
        tensors["text_model.embeddings.position_ids"] = torch.empty(1, 77)  # old files have them
    projection = tensors.pop("text_projection.weight", None) if not REAL[name].projection_dim else None
    assert projection is None or name.startswith("te_")  # single files may carry one that is not used
    ours = CLIP_TEXT_TO_HUB.inverse()(tensors)
    assert {n: t.shape for n, t in real.state_dict().items()} == {n: t.shape for n, t in ours.items()}


def test_end_mark_defaults_to_the_last_id() -> None:
    assert CLIPTextConfig().end_token == 49407
    assert CLIPTextConfig(vocab_size=50, eos_token_id=7).end_token == 7


def test_pooled_is_the_first_end_mark_even_before_others() -> None:
    config = CLIPTextConfig(vocab_size=60, context_length=10, width=16, layers=1, heads=2)
    states = encoder(config)(IDS)
    assert torch.equal(states.pooled, states.last[[0, 1], [4, 9]])


def test_states_end_with_the_normed_last() -> None:
    network = encoder()
    states = network(IDS)
    assert [tuple(h.shape) for h in states.hidden] == [(2, 10, 16)] * 3
    assert states.pooled.shape == (2, 8)
    assert torch.equal(states.last, network.normed(states, -1))
    assert not torch.allclose(states.last, network.normed(states, -2))


def test_initialisation_keeps_the_scale_of_the_states() -> None:
    network = encoder(CLIPTextConfig(vocab_size=500, context_length=32, width=128, layers=6, heads=4))
    states = network(torch.randint(500, (4, 32), generator=torch.Generator().manual_seed(0)))
    layer = network.encoder.layers[0]
    assert network.embeddings.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert network.embeddings.position_embedding.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)
    assert layer.self_attn.out_proj.weight.std().item() == pytest.approx((12 * 128) ** -0.5, rel=0.05)
    assert layer.mlp.fc1.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert layer.mlp.fc2.weight.std().item() == pytest.approx((12 * 128) ** -0.5, rel=0.05)
    assert all(p.abs().max() == 0 for n, p in network.named_parameters() if n.endswith("bias"))
    assert states.last.std().item() == pytest.approx(1.0, rel=0.05)
    assert states.hidden[-1].std() < 2.0


def test_every_parameter_trains() -> None:
    network = encoder()
    states = network(IDS)
    (states.last.square() * torch.linspace(0, 1, 16)).sum().add(states.pooled.square().sum()).backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or p.grad.norm() == 0] == []


@pytest.mark.slow
def test_compiles_without_graph_breaks() -> None:
    network = encoder()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS).last, network(IDS).last)
    torch.testing.assert_close(compiled(IDS).pooled, network(IDS).pooled)


def test_bfloat16_autocast_stays_near_float32() -> None:
    network = encoder()
    with torch.autocast("cpu", torch.bfloat16):
        states = network(IDS)
    reference = network(IDS).last
    assert (states.last.float() - reference).norm() / reference.norm() < 0.03


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="11 tokens"):
        encoder()(torch.zeros(1, 11, dtype=torch.int64))
    with pytest.raises(InputError, match="`width` = 16 must divide by `heads` = 3"):
        CLIPTextConfig(width=16, heads=3)
    with pytest.raises(InputError, match="`layers` = 0"):
        CLIPTextConfig(layers=0)
