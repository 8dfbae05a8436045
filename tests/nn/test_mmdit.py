"""SD 3's network without a reference: published names and counts, gradients, positions, bad input."""

from pathlib import Path

import pytest
import torch
from tests.networks import on_meta, read_shapes, shapes_of, with_unit_gain, without_gradient

from darkroom.checkpoint.detect import mmdit_config
from darkroom.checkpoint.layouts import mmdit_to_diffusers
from darkroom.errors import InputError
from darkroom.nn.extra import Extra
from darkroom.nn.mmdit import MMDiT, MMDiTConfig

TINY = MMDiTConfig(
    depth=3,
    num_heads=2,
    head_width=16,
    context_dim=12,
    pooled_dim=10,
    positions=8,
    qk_norm=True,
    dual_layers=1,
)
PREFIX = "model.diffusion_model."


def inputs(size: tuple[int, int] = (8, 12)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Extra]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 16, *size, generator=generator)
    context = torch.randn(2, 5, 12, generator=generator)
    return x, torch.tensor([3.0, 900.0]), context, Extra(pooled=torch.randn(2, 10, generator=generator))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("sd3_medium", 2_028_328_000), ("sd35_medium", 2_243_171_520), ("sd35_large", 8_056_627_520)],
)
def test_published_names_and_counts(name: str, parameters: int, shared: Path) -> None:
    shapes = read_shapes(shared, f"{name}.single", PREFIX)
    config = mmdit_config(shapes)
    with torch.device("meta"):
        network = MMDiT(config)
    assert shapes_of(network.state_dict()) == shapes
    assert sum(p.numel() for p in network.parameters()) in (
        parameters,
        parameters - network.pos_embed.numel(),
    )
    theirs = read_shapes(shared, f"{name}.diffusers.transformer")
    assert shapes_of(mmdit_to_diffusers(config.depth)(on_meta(shapes))) == theirs
    assert shapes_of(mmdit_to_diffusers(config.depth).inverse()(on_meta(theirs))) == shapes


def test_every_parameter_gets_a_gradient() -> None:
    network = with_unit_gain(MMDiT(TINY))
    x, timestep, context, extra = inputs()
    network(x, timestep, context, extra=extra).square().sum().backward()
    # Nothing is done with the text after the last block, so what its queries would ask is never used.
    assert without_gradient(network) == {"joint_blocks.2.context_block.attn.ln_q.weight"}


def test_a_new_network_predicts_zero() -> None:
    x, timestep, context, extra = inputs()
    assert not MMDiT(TINY)(x, timestep, context, extra=extra).any()


def test_positions_come_from_the_middle_of_the_table() -> None:
    network = MMDiT(TINY)
    table = network.pos_embed.reshape(8, 8, 32)
    assert torch.equal(network.cropped_positions(3, 4).reshape(3, 4, 32), table[2:5, 2:6])


def test_bad_input_is_named() -> None:
    network = MMDiT(TINY)
    x, timestep, context, extra = inputs()
    with pytest.raises(InputError, match=r"36x8 are too large.* at 16x16"):
        network(torch.zeros(2, 16, 8, 36), timestep, context, extra=extra)
    with pytest.raises(InputError, match="do not divide into patches"):
        network(x[:, :, :7], timestep, context, extra=extra)
    with pytest.raises(InputError, match=r"needs `extra\.pooled`"):
        network(x, timestep, context)
    with pytest.raises(InputError, match="needs `context`"):
        network(x, timestep, None, extra=extra)
    with pytest.raises(InputError, match="texts of width 12, not 11"):
        network(x, timestep, context[..., :11], extra=extra)
    with pytest.raises(InputError, match="context_mask"):
        network(x, timestep, context, extra=Extra(pooled=extra.pooled, context_mask=torch.ones(2, 5)))
    with pytest.raises(InputError, match=r"not built for `extra\.guidance`"):
        network(x, timestep, context, extra=Extra(pooled=extra.pooled, guidance=torch.ones(2)))


@pytest.mark.parametrize(("field", "value"), [("depth", 0), ("dual_layers", 25), ("num_heads", -1)])
def test_bad_numbers_are_named(field: str, value: int) -> None:
    with pytest.raises(InputError, match=field):
        MMDiTConfig(**{field: value})
