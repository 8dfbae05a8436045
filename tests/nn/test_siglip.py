"""SigLIP's picture encoder and Redux's embedder train too."""

import torch
from tests.networks import with_unit_gain, without_gradient

from darkroom.nn.redux import ReduxConfig, ReduxEmbedder
from darkroom.nn.siglip import SiglipConfig, SiglipEncoder


def test_every_parameter_gets_a_gradient() -> None:
    """But for the keys' biases, which shift all scores of a query alike: float64 shows that as nothing."""
    encoder = with_unit_gain(
        SiglipEncoder(SiglipConfig(image_size=12, patch_size=4, width=16, layers=2, heads=2, intermediate=24))
    )
    embedder = with_unit_gain(ReduxEmbedder(ReduxConfig(width=16, context_dim=8)))
    image = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1
    embedder.double()(encoder.double()(image.double())).pow(3).sum().backward()
    for name, parameter in encoder.named_parameters():
        if name.endswith("k_proj.bias"):
            assert parameter.grad.abs().max() < 1e-9
            parameter.grad = torch.ones_like(parameter)
    assert without_gradient(encoder) == without_gradient(embedder) == set()
