"""FLUX.1's network without a reference: published names and counts, gradients, inputs, bad input."""

import dataclasses
from pathlib import Path

import pytest
import torch
from tests.networks import on_meta, read_shapes, shapes_of, with_unit_gain, without_gradient

from darkroom.checkpoint.detect import flux_config
from darkroom.checkpoint.layouts import flux_to_diffusers
from darkroom.errors import InputError
from darkroom.nn.extra import Extra
from darkroom.nn.flux import Flux, FluxConfig, rotate_pairs, rotations

TINY = FluxConfig(
    in_channels=4,
    out_channels=4,
    double_blocks=2,
    single_blocks=2,
    num_heads=2,
    axes=(4, 6, 6),
    context_dim=12,
    pooled_dim=10,
)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Extra]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 6, 8, generator=generator)
    extra = Extra(pooled=torch.randn(2, 10, generator=generator), guidance=torch.tensor([3.5, 1.0]))
    return x, torch.tensor([3.0, 900.0]), torch.randn(2, 5, 12, generator=generator), extra


@pytest.mark.parametrize(
    ("name", "parameters"), [("flux1_dev", 11_901_408_320), ("flux1_schnell", 11_891_178_560)]
)
def test_published_names_and_counts(name: str, parameters: int, shared: Path) -> None:
    shapes = read_shapes(shared, f"{name}.single")
    config = flux_config(shapes)
    assert config == FluxConfig(guidance=name == "flux1_dev")
    with torch.device("meta"):
        network = Flux(config)
    assert shapes_of(network.state_dict()) == shapes
    assert sum(p.numel() for p in network.parameters()) == parameters
    theirs = read_shapes(shared, f"{name}.diffusers.transformer")
    assert shapes_of(flux_to_diffusers()(on_meta(shapes))) == theirs
    assert shapes_of(flux_to_diffusers().inverse()(on_meta(theirs))) == shapes


def test_every_parameter_gets_a_gradient() -> None:
    network = with_unit_gain(Flux(TINY))
    x, timestep, context, extra = inputs()
    network(x, timestep, context, extra=extra).square().sum().backward()
    assert not without_gradient(network)


def test_a_new_network_predicts_zero() -> None:
    x, timestep, context, extra = inputs()
    assert not Flux(TINY)(x, timestep, context, extra=extra).any()


def test_rotation_depends_on_distance_only() -> None:
    cos, sin = rotations(TINY, 0, [(6, 8)], torch.device("cpu"))
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(3))

    def score(a: int, b: int) -> torch.Tensor:
        turned = [rotate_pairs(h, (cos[i, 0], sin[i, 0])) for h, i in ((q, a), (k, b))]
        return turned[0] @ turned[1]

    torch.testing.assert_close(score(0, 9), score(20, 29))  # one row and one column further
    assert not torch.isclose(score(0, 9), score(0, 8))


def test_a_reference_changes_the_picture_and_not_its_size() -> None:
    network = with_unit_gain(Flux(TINY))
    x, timestep, context, extra = inputs()
    plain = network(x, timestep, context, extra=extra)
    guided = network(x, timestep, context, extra=dataclasses.replace(extra, reference=x[:, :, :4]))
    assert plain.shape == guided.shape == x.shape
    assert (plain - guided).abs().max() > 1e-3


def test_bad_input_is_named() -> None:
    network = Flux(TINY)
    x, timestep, context, extra = inputs()
    with pytest.raises(InputError, match="do not divide into patches of 2x2"):
        network(x[..., :7], timestep, context, extra=extra)
    with pytest.raises(InputError, match=r"needs `extra\.guidance`"):
        network(x, timestep, context, extra=Extra(pooled=extra.pooled))
    with pytest.raises(InputError, match="context_mask"):
        network(x, timestep, context, extra=dataclasses.replace(extra, context_mask=torch.ones(2, 5)))
    schnell = Flux(dataclasses.replace(TINY, guidance=False))
    with pytest.raises(InputError, match=r"not built for `extra\.guidance`"):
        schnell(x, timestep, context, extra=extra)


@pytest.mark.parametrize(
    ("field", "value"), [("single_blocks", 0), ("axes", (15, 56, 56)), ("num_heads", -1)]
)
def test_bad_numbers_are_named(field: str, value: object) -> None:
    with pytest.raises(InputError, match=field):
        FluxConfig(**{field: value})
