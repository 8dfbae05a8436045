"""A U-Net that is told the guidance scale, as latent consistency models are, against diffusers'."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.closeness import assert_parity
from tests.networks import read_shapes, with_unit_gain

from darkroom.checkpoint import detect
from darkroom.checkpoint.configs.unet import unet_config_from_diffusers, unet_config_to_diffusers
from darkroom.checkpoint.layouts import unet_to_original
from darkroom.checkpoint.single_file import split_checkpoint
from darkroom.errors import InputError
from darkroom.families import FAMILIES
from darkroom.nn.extra import Extra
from darkroom.nn.unet import UNet, UNetConfig, guidance_embedding

CONFIG = UNetConfig(
    channels=(32, 64),
    res_blocks=1,
    attention_depth=(1, 1),
    num_heads=(8, 8),
    context_dim=12,
    guidance_dim=256,
)
SCALES = [1.0, 2.5, 8.0]


def reference(config: UNetConfig) -> Any:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DConditionModel.from_config(unet_config_to_diffusers(config))
    return with_unit_gain(model, 5).eval()


def test_scales_are_embedded_as_in_their_pipelines() -> None:
    diffusers = pytest.importorskip("diffusers")
    embed = diffusers.StableDiffusionPipeline.get_guidance_scale_embedding
    for dim in (256, 33):
        theirs = embed(None, torch.tensor(SCALES) - 1, embedding_dim=dim)
        # At angles of thousands float32 has few digits left.
        torch.testing.assert_close(guidance_embedding(torch.tensor(SCALES), dim), theirs, rtol=0, atol=1e-3)


def test_same_output() -> None:
    model, unet = reference(CONFIG), UNet(CONFIG)
    unet.load_state_dict(model.state_dict(), strict=True)
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(3, 4, 9, 6, generator=generator), torch.randn(3, 7, 12, generator=generator)
    timestep, scales = torch.tensor([999.0, 499.0, 19.0]), torch.tensor(SCALES)
    with torch.no_grad():
        theirs = model(x, timestep, context, timestep_cond=guidance_embedding(scales)).sample
        ours = unet(x, timestep, context, extra=Extra(guidance=scales))
        other = unet(x, timestep, context, extra=Extra(guidance=scales + 1))
    assert_parity(ours, theirs)
    assert float((other - ours).abs().flatten(1).amax(1).min()) > 1e-3


def test_the_scale_is_needed_where_the_network_is_told_it_and_refused_elsewhere() -> None:
    x, timestep, context = torch.zeros(1, 4, 8, 8), torch.tensor([5.0]), torch.zeros(1, 7, 12)
    with pytest.raises(InputError, match=r"needs `extra\.guidance`"):
        UNet(CONFIG)(x, timestep, context)
    with pytest.raises(InputError, match=r"not built for `extra\.guidance`"):
        UNet(replace(CONFIG, guidance_dim=None))(
            x, timestep, context, extra=Extra(guidance=torch.tensor([8.0]))
        )


def test_config_there_and_back() -> None:
    fields = unet_config_to_diffusers(CONFIG)
    assert fields["time_cond_proj_dim"] == 256
    assert unet_config_from_diffusers(fields) == CONFIG


def test_names_of_the_original_layout_there_and_back() -> None:
    ours = UNet(CONFIG).state_dict()
    table = unet_to_original(CONFIG)
    theirs = table(ours)
    assert theirs["time_embed.cond_proj.weight"] is ours["time_embedding.cond_proj.weight"]
    assert table.inverse()(theirs).keys() == ours.keys()
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    assert detect.unet_config(shapes, num_heads=8) == CONFIG


@pytest.mark.parametrize("layout", ["single", "diffusers.unet"])
def test_files_of_stable_diffusions_size(layout: str, shared: Path) -> None:
    """A network of SD 1.5 that is told the guidance, under the names of either layout."""
    shapes = read_shapes(shared, f"sd15.{layout}")
    single = layout == "single"
    name = (
        "model.diffusion_model.time_embed.cond_proj.weight" if single else "time_embedding.cond_proj.weight"
    )
    tensors = {key: torch.empty(shape, device="meta") for key, shape in (shapes | {name: (320, 256)}).items()}
    parts = split_checkpoint(tensors, Path("model.safetensors"))
    assert parts.family == "sd1" and parts.unknown == ()
    assert parts.network is not None
    assert parts.network.config == replace(FAMILIES["sd1"].network, guidance_dim=256)
    assert "time_embedding.cond_proj.weight" in parts.network.tensors
