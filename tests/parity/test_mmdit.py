"""SD 3's network against diffusers' `SD3Transformer2DModel`, weight for weight."""

from pathlib import Path

import pytest
import torch
from tests.closeness import assert_parity
from tests.networks import read_case, with_unit_gain

from darkroom.checkpoint.layouts import mmdit_to_diffusers
from darkroom.nn.extra import Extra
from darkroom.nn.mmdit import MMDiT, MMDiTConfig

CONFIGS = {
    "medium": MMDiTConfig(depth=3, num_heads=3, head_width=16, context_dim=24, pooled_dim=20, positions=12),
    "3.5 large": MMDiTConfig(
        depth=2, num_heads=2, head_width=24, context_dim=40, pooled_dim=12, positions=9, qk_norm=True
    ),
    "3.5 medium": MMDiTConfig(
        in_channels=4,
        out_channels=4,
        depth=4,
        num_heads=4,
        head_width=8,
        context_dim=16,
        pooled_dim=8,
        positions=16,
        qk_norm=True,
        dual_layers=3,
    ),
    "patches of one cell": MMDiTConfig(
        in_channels=3,
        out_channels=6,
        patch_size=1,
        depth=1,
        num_heads=2,
        head_width=16,
        context_dim=16,
        pooled_dim=8,
        positions=20,
        dual_layers=1,
    ),
}
SIZES = [(16, 12), (10, 18), (8, 14), (5, 19)]


@pytest.mark.parametrize("case", ["sd3_none", "sd35_rms", "sd35_rms_dual"])
def test_reference_cases(case: str, shared: Path) -> None:
    reference = read_case(shared, case)
    fields = reference.config
    config = MMDiTConfig(
        depth=fields["num_layers"],
        num_heads=fields["num_attention_heads"],
        head_width=fields["attention_head_dim"],
        context_dim=fields["joint_attention_dim"],
        pooled_dim=fields["pooled_projection_dim"],
        positions=fields["pos_embed_max_size"],
        qk_norm=fields["qk_norm"] is not None,
        dual_layers=len(fields.get("dual_attention_layers", ())),
    )
    network = MMDiT(config)
    network.load_state_dict(mmdit_to_diffusers(config.depth).inverse()(reference.weights), strict=True)
    inputs = reference.inputs
    extra = Extra(pooled=inputs["pooled_projections"])
    with torch.no_grad():
        output = network(
            inputs["hidden_states"], inputs["timestep"], inputs["encoder_hidden_states"], extra=extra
        )
    assert_parity(output, reference.outputs["sample"])


@pytest.mark.parametrize(("name", "size"), list(zip(CONFIGS, SIZES, strict=True)))
def test_against_diffusers(name: str, size: tuple[int, int]) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = CONFIGS[name]
    reference = diffusers.SD3Transformer2DModel(
        sample_size=128,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        attention_head_dim=config.head_width,
        num_attention_heads=config.num_heads,
        joint_attention_dim=config.context_dim,
        caption_projection_dim=config.width,
        pooled_projection_dim=config.pooled_dim,
        pos_embed_max_size=config.positions,
        qk_norm="rms_norm" if config.qk_norm else None,
        dual_attention_layers=tuple(range(config.dual_layers)),
    ).eval()
    network = MMDiT(config)
    torch.testing.assert_close(network.pos_embed, reference.pos_embed.pos_embed)  # made alike
    with_unit_gain(network)
    reference.load_state_dict(mmdit_to_diffusers(config.depth)(network.state_dict()), strict=True)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, config.in_channels, *size, generator=generator)
    context = torch.randn(3, 7, config.context_dim, generator=generator)
    pooled = torch.randn(3, config.pooled_dim, generator=generator)
    timestep = torch.tensor([1000.0, 437.5, 0.9])
    with torch.no_grad():
        expected = reference(x, context, pooled, timestep).sample
        assert_parity(network(x, timestep, context, extra=Extra(pooled=pooled)), expected)
