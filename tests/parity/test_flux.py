"""FLUX.1's network against diffusers' `FluxTransformer2DModel`, weight for weight."""

import dataclasses
from pathlib import Path

import pytest
import torch
from tests.closeness import assert_parity
from tests.networks import read_case, with_unit_gain

from darkroom.checkpoint.layouts import flux_to_diffusers
from darkroom.nn.extra import Extra
from darkroom.nn.flux import Flux, FluxConfig, pack, positions, unpack

DEV = FluxConfig(
    in_channels=4,
    out_channels=4,
    double_blocks=2,
    single_blocks=3,
    num_heads=2,
    axes=(4, 6, 6),
    context_dim=24,
    pooled_dim=12,
)
CONFIGS = {
    "dev": DEV,
    "schnell": dataclasses.replace(DEV, guidance=False, axes=(8, 12, 12), num_heads=3),
    "fill": dataclasses.replace(DEV, in_channels=24, double_blocks=1, single_blocks=1),
    "one head, uneven axes": dataclasses.replace(DEV, num_heads=1, axes=(2, 10, 4), single_blocks=1),
}
SIZES = [(8, 12), (10, 6), (2, 14), (6, 6)]


@pytest.mark.parametrize("case", ["flux_guidance", "flux_no_guidance"])
def test_reference_cases(case: str, shared: Path) -> None:
    reference = read_case(shared, case)
    fields, inputs = reference.config, reference.inputs
    config = FluxConfig(
        in_channels=fields["in_channels"] // 4,
        out_channels=fields["in_channels"] // 4,
        double_blocks=fields["num_layers"],
        single_blocks=fields["num_single_layers"],
        num_heads=fields["num_attention_heads"],
        axes=tuple(fields["axes_dims_rope"]),
        context_dim=fields["joint_attention_dim"],
        pooled_dim=fields["pooled_projection_dim"],
        guidance=fields["guidance_embeds"],
    )
    network = Flux(config)
    network.load_state_dict(flux_to_diffusers().inverse()(reference.weights), strict=True)
    extra = Extra(pooled=inputs["pooled_projections"], guidance=inputs.get("guidance"))
    x = unpack(inputs["hidden_states"], rows=6)
    with torch.no_grad():
        output = network(x, inputs["timestep"] * 1000, inputs["encoder_hidden_states"], extra=extra)
    assert_parity(pack(output), reference.outputs["sample"])


@pytest.mark.parametrize("edits", [False, True])
@pytest.mark.parametrize(("name", "size"), list(zip(CONFIGS, SIZES, strict=True)))
def test_against_diffusers(name: str, size: tuple[int, int], edits: bool) -> None:
    """With `edits` a second picture of another size follows, whose tokens have 1 on the first axis."""
    diffusers = pytest.importorskip("diffusers")
    config = CONFIGS[name]
    reference = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * config.in_channels,
        out_channels=4 * config.out_channels,
        num_layers=config.double_blocks,
        num_single_layers=config.single_blocks,
        attention_head_dim=config.head_width,
        num_attention_heads=config.num_heads,
        joint_attention_dim=config.context_dim,
        pooled_projection_dim=config.pooled_dim,
        guidance_embeds=config.guidance,
        axes_dims_rope=config.axes,
    ).eval()
    network = with_unit_gain(Flux(config))
    reference.load_state_dict(flux_to_diffusers()(network.state_dict()), strict=True)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, config.in_channels, *size, generator=generator)
    other = torch.randn(3, config.in_channels, 4, 10, generator=generator) if edits else None
    context = torch.randn(3, 7, config.context_dim, generator=generator)
    pooled = torch.randn(3, config.pooled_dim, generator=generator)
    t = torch.tensor([1.0, 0.4375, 0.0009])
    guidance = torch.tensor([3.5, 1.0, 30.0]) if config.guidance else None
    count = size[0] * size[1] // 4
    places = positions(7, [(size[0] // 2, size[1] // 2), (2, 5)][: 1 + edits]).float()
    tokens = pack(x) if other is None else torch.cat([pack(x), pack(other)], dim=1)
    with torch.no_grad():
        expected = reference(
            tokens, context, pooled, t, img_ids=places[7:], txt_ids=places[:7], guidance=guidance
        ).sample[:, :count]
        extra = Extra(pooled=pooled, guidance=guidance, reference=other)
        assert_parity(pack(network(x, t * 1000, context, extra=extra)), expected)


def test_latents_are_packed_as_the_reference_packs_them() -> None:
    diffusers = pytest.importorskip("diffusers")
    x = torch.randn(2, 16, 6, 10)
    assert torch.equal(pack(x), diffusers.FluxPipeline._pack_latents(x, 2, 16, 6, 10))
    assert torch.equal(unpack(pack(x), rows=3), x)
