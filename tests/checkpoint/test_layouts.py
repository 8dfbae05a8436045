"""The tables of published layouts on the names and shapes of the real checkpoints."""

from pathlib import Path

import pytest
import torch
from tests.networks import on_meta, read_shapes, shapes_of, with_unit_gain

from darkroom.checkpoint.detect import (
    autoencoder_config,
    clip_config,
    count_blocks,
    dit_config,
    t5_config,
    unet_config,
)
from darkroom.checkpoint.layouts import (
    AUTOENCODER_TO_LEGACY,
    CLIP_TEXT_TO_HUB,
    CLIP_TEXT_TO_OPENCLIP,
    autoencoder_to_original,
    unet_to_original,
)
from darkroom.nn.autoencoder_kl import AutoencoderKL
from darkroom.nn.autoencoder_vq import AutoencoderVQ, AutoencoderVQConfig
from darkroom.nn.dit import DiT, DiTConfig
from darkroom.nn.unet import UNet
from darkroom.text.clip import CLIPTextConfig, CLIPTextEncoder
from darkroom.text.t5 import T5Config

AUTOENCODERS = [
    *((f"ldm_{name}.single", "") for name in ("vq-f4", "vq-f4-noattn", "vq-f8", "vq-f8-n256", "vq-f16")),
    *((f"ldm_kl-f{stride}.single", "") for stride in (4, 8, 16, 32)),
    *((f"{name}.single", "") for name in ("sd_vae_ft_mse", "sdxl_vae", "sd3_vae", "flux_ae")),
    *((f"{name}.single", "first_stage_model.") for name in ("sd15", "sd21", "sdxl_base", "playground_v25")),
    ("ldm_cin256-v2.single", "first_stage_model."),
]
AUTOENCODERS_OF_DIFFUSERS = [
    *(f"ldm_{name}.diffusers" for name in ("vq-f4", "vq-f8", "kl-f4", "kl-f8")),
    *(f"{family}.diffusers.vae" for family in ("sd15", "sd21", "sdxl", "sd3", "flux")),
    "sd15.diffusers.vae.legacy_attn",
]


def autoencoder_shapes(ours: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Those of the autoencoder that these shapes ask for."""
    config = autoencoder_config(ours)
    with torch.device("meta"):
        vq = isinstance(config, AutoencoderVQConfig)
        return shapes_of((AutoencoderVQ(config) if vq else AutoencoderKL(config)).state_dict())


@pytest.mark.parametrize(("name", "prefix"), AUTOENCODERS)
def test_autoencoders_of_the_releases(name: str, prefix: str, shared: Path) -> None:
    theirs = read_shapes(shared, name, prefix)
    table = autoencoder_to_original(count_blocks(theirs, "encoder.down"))
    ours = shapes_of(table.inverse()(on_meta(theirs)))
    assert autoencoder_shapes(ours) == ours
    assert shapes_of(table(on_meta(ours))) == theirs


@pytest.mark.parametrize("name", AUTOENCODERS_OF_DIFFUSERS)
def test_autoencoders_of_diffusers(name: str, shared: Path) -> None:
    ours = shapes_of(AUTOENCODER_TO_LEGACY.inverse()(on_meta(read_shapes(shared, name))))
    assert autoencoder_shapes(ours) == ours


UNETS = [
    ("sd15", 859_520_964),
    ("sd21", 865_910_724),
    ("sdxl_base", 2_567_463_684),
    ("sdxl_refiner", 2_259_526_660),
    ("playground_v25", 2_567_463_684),
]
LDM_UNETS = [("ldm_cin256-v2.single", {"num_heads": 1}), ("ldm_text2img256.single.unet", {"head_width": 32})]


@pytest.mark.parametrize(("family", "parameters"), UNETS)
def test_unets_of_the_releases(family: str, parameters: int, shared: Path) -> None:
    theirs = read_shapes(shared, f"{family}.single", "model.diffusion_model.")
    config = unet_config(theirs)
    ours = shapes_of(unet_to_original(config).inverse()(on_meta(theirs)))
    with torch.device("meta"):
        network = UNet(config)
    assert shapes_of(network.state_dict()) == ours == read_shapes(shared, f"{family}.diffusers.unet")
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert shapes_of(unet_to_original(config)(on_meta(ours))) == theirs


@pytest.mark.parametrize(("name", "heads"), LDM_UNETS)
def test_unets_of_latent_diffusion(name: str, heads: dict[str, int], shared: Path) -> None:
    theirs = read_shapes(shared, name, "model.diffusion_model.")
    config = unet_config(theirs, **heads)
    ours = shapes_of(unet_to_original(config).inverse()(on_meta(theirs)))
    with torch.device("meta"):
        assert shapes_of(UNet(config).state_dict()) == ours
    assert shapes_of(unet_to_original(config)(on_meta(ours))) == theirs


@pytest.mark.parametrize("size", [256, 512])
def test_dit_of_the_release(size: int, shared: Path) -> None:
    theirs = read_shapes(shared, f"dit_xl2_{size}.single")
    config = dit_config(theirs)
    assert config == DiTConfig(sample_size=size // 8)
    with torch.device("meta"):
        assert shapes_of(DiT(config).state_dict()) == theirs


def test_heads_follow_from_the_projections(shared: Path) -> None:
    def heads(family: str) -> tuple[int, ...]:
        return unet_config(read_shapes(shared, f"{family}.single", "model.diffusion_model.")).num_heads

    assert heads("sd15") == (8, 8, 8, 8)
    assert heads("sd21") == (5, 10, 20, 20)
    assert heads("sdxl_base") == (5, 10, 20)
    assert heads("sdxl_refiner") == (6, 12, 24, 24)


OPENCLIP = [
    ("openclip_vit_h14_text", "", 1024, 24),
    ("openclip_vit_bigg14_text", "", 1280, 32),
    ("sd21.single", "cond_stage_model.model.", 1024, 24),
    ("sdxl_base.single", "conditioner.embedders.1.model.", 1280, 32),
    ("sdxl_refiner.single", "conditioner.embedders.0.model.", 1280, 32),
]


@pytest.mark.parametrize(("name", "prefix", "width", "layers"), OPENCLIP)
def test_openclip_of_the_releases(name: str, prefix: str, width: int, layers: int, shared: Path) -> None:
    theirs = read_shapes(shared, name, prefix)
    shapes = shapes_of(CLIP_TEXT_TO_OPENCLIP.inverse()(on_meta(theirs)))
    config = clip_config(shapes, openclip=True)
    assert (config.width, config.layers, config.projection_dim) == (width, layers, width)
    with torch.device("meta"):
        assert shapes_of(CLIPTextEncoder(config).state_dict()) == shapes
    back = shapes_of(CLIP_TEXT_TO_OPENCLIP(on_meta(shapes)))
    assert back == {n: s for n, s in theirs.items() if n not in ("logit_scale", "attn_mask")}


HUB = [
    ("te_clip_l.single", False),
    ("te_clip_g.single", True),
    ("sd15.diffusers.text_encoder", False),
    ("sd21.diffusers.text_encoder", True),
    ("sdxl.diffusers.text_encoder", False),
    ("sdxl.diffusers.text_encoder_2", True),
    ("sd3.diffusers.text_encoder", False),
    ("sd3.diffusers.text_encoder_2", True),
    ("flux.diffusers.text_encoder", False),
]


@pytest.mark.parametrize(("name", "openclip"), HUB)
def test_text_encoders_of_the_hub(name: str, openclip: bool, shared: Path) -> None:
    shapes = shapes_of(CLIP_TEXT_TO_HUB.inverse()(on_meta(read_shapes(shared, name))))
    with torch.device("meta"):
        encoder = CLIPTextEncoder(clip_config(shapes, openclip=openclip))
    assert shapes_of(encoder.state_dict()) == shapes


@pytest.mark.parametrize(
    "name", ["te_t5xxl.single", "sd3.diffusers.text_encoder_3", "flux.diffusers.text_encoder_2"]
)
def test_t5_is_xxl(name: str, shared: Path) -> None:
    assert t5_config(read_shapes(shared, name)) == T5Config()


def test_openclip_holds_its_queries_keys_and_values_in_one() -> None:
    config = CLIPTextConfig(vocab_size=40, context_length=9, width=64, layers=2, heads=1, projection_dim=48)
    ours = with_unit_gain(CLIPTextEncoder(config)).state_dict()
    theirs = CLIP_TEXT_TO_OPENCLIP(ours)
    block, attention = "transformer.resblocks.1.attn.in_proj_weight", "encoder.layers.1.self_attn."
    assert torch.equal(theirs[block][64:128], ours[attention + "k_proj.weight"])
    assert torch.equal(theirs["text_projection"], ours["text_projection.weight"].T)
    back = CLIP_TEXT_TO_OPENCLIP.inverse()(theirs)
    assert back.keys() == ours.keys() and all(torch.equal(back[n], ours[n]) for n in ours)
