"""T5's encoder without a reference: real checkpoints' names, distances, gradients, bad input."""

import json
from pathlib import Path

import pytest
import torch

from darkroom.errors import InputError
from darkroom.text.t5 import T5Config, T5Encoder, bucket

TINY = T5Config(vocab_size=60, width=16, layers=2, heads=2, head_width=8, intermediate=24)


def encoder() -> T5Encoder:
    torch.manual_seed(0)
    return T5Encoder(TINY)


def test_real_checkpoint_fits(shared: Path) -> None:
    reference = json.loads((shared / "reference/keys/te_t5xxl.single.json").read_text())["tensors"]
    reference.pop("encoder.embed_tokens.weight", None)
    with torch.device("meta"):
        real = T5Encoder(T5Config())
    assert {n: list(t.shape) for n, t in real.state_dict().items()} == {
        n: list(s) for n, s in reference.items()
    }
    assert sum(p.numel() for p in real.parameters()) == 4_762_310_656


def test_near_distances_have_their_own_bucket_and_far_ones_share() -> None:
    offsets = torch.tensor([0, -1, -7, -8, -1000, 1, 7, 1000])
    assert bucket(offsets, TINY).tolist() == [0, 1, 7, 8, 15, 17, 23, 31]


def test_every_token_reaches_every_state_but_a_masked_one() -> None:
    network, ids = encoder(), torch.tensor([[3, 14, 15, 9, 2]])
    other, mask = ids.clone(), torch.tensor([[True, True, True, True, False]])
    other[0, 4] = 7
    assert not torch.allclose(network(ids)[0, 0], network(other)[0, 0])
    assert torch.equal(network(ids, mask)[0, :4], network(other, mask)[0, :4])


def test_order_matters() -> None:
    network, ids = encoder(), torch.tensor([[3, 14, 15, 9, 2]])
    assert not torch.allclose(network(ids).sum(1), network(ids.flip(1)).sum(1))


def test_every_parameter_gets_a_gradient() -> None:
    network = encoder()
    network(torch.arange(60)[None]).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


@pytest.mark.parametrize(
    ("field", "value"), [("heads", 0), ("vocab_size", -1), ("buckets", 6), ("max_distance", 8)]
)
def test_bad_numbers_are_named(field: str, value: int) -> None:
    with pytest.raises(InputError, match=field):
        T5Config(**{field: value})
