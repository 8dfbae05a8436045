"""The tables of published layouts on the names and shapes of the real checkpoints."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.networks import on_meta, read_shapes, shapes_of, with_unit_gain
from torch import Tensor

from darkroom.checkpoint.detect import (
    autoencoder_config,
    clip_config,
    count_blocks,
    dit_config,
    ldm_text_config,
    t5_config,
    unet_config,
)
from darkroom.checkpoint.layouts import (
    AUTOENCODER_TO_LEGACY,
    CLIP_TEXT_TO_HUB,
    CLIP_TEXT_TO_OPENCLIP,
    LDM_TEXT_TO_DIFFUSERS,
    autoencoder_to_original,
    ldm_text_to_original,
    unet_to_original,
)
from darkroom.errors import InputError
from darkroom.family_parts import (
    CHURCHES_UNET,
    CIN_UNET,
    FACES_UNET,
    INPAINTING_UNET,
    SUPER_RESOLUTION_UNET,
    UPSCALER_UNET,
)
from darkroom.nn.autoencoder_kl import AutoencoderKL
from darkroom.nn.autoencoder_vq import AutoencoderVQ, AutoencoderVQConfig
from darkroom.nn.dit import DiT, DiTConfig
from darkroom.nn.layers import SpatialAttention
from darkroom.nn.unet import UNet, UNetConfig
from darkroom.text.clip import CLIPTextConfig, CLIPTextEncoder
from darkroom.text.ldm import LDMTextConfig, LDMTextEncoder
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


# Models with a list of their names and shapes, and what the published config says of each.
LDM_UNETS = {
    "ldm_celeba256.single.unet": FACES_UNET,
    "ldm_ffhq256.single.unet": FACES_UNET,
    "ldm_cin256-v2.single": CIN_UNET,
    "ldm_cin256.single.unet": replace(
        CIN_UNET,
        in_channels=4,
        out_channels=4,
        channels=(256, 512, 1024),
        attention_depth=(1, 1, 1),
        num_heads=(8, 8, 8),
    ),
    "ldm_text2img256.single.unet": replace(CIN_UNET, num_heads=(6, 12, 18, 30), context_dim=640),
    "ldm_lsun_churches256.single.unet": CHURCHES_UNET,
}
# Models without such a list, and their millions of parameters where they were published.
LDM_UNETS_BY_HAND = {
    "lsun_beds256": (FACES_UNET, 274.06),
    "bsr_sr": (SUPER_RESOLUTION_UNET, 113.62),
    "inpainting_big": (INPAINTING_UNET, 387.25),
    "semantic_synthesis256": (
        replace(
            FACES_UNET,
            in_channels=6,
            channels=(128, 512, 1024),
            attention_depth=(0, 0, 0),
            num_heads=(8, 8, 8),
        ),
        None,
    ),
    "txt2img-1p4B": (UNetConfig(context_dim=1280, attention_depth=(1, 1, 1, 0)), 872.30),
    "x4-upscaler": (UPSCALER_UNET, 473.40),
}


def heads_of(config: UNetConfig) -> dict[str, int]:
    """What names and shapes don't tell: as many heads at every level, or as wide ones."""
    first, width = config.num_heads[0], config.channels[0]
    return {"num_heads": first} if len(set(config.num_heads)) == 1 else {"head_width": width // first}


@pytest.mark.parametrize("name", LDM_UNETS)
def test_unets_of_latent_diffusion(name: str, shared: Path) -> None:
    theirs = read_shapes(shared, name, "model.diffusion_model.")
    config = unet_config(theirs, **heads_of(LDM_UNETS[name]))
    assert config == LDM_UNETS[name]
    ours = shapes_of(unet_to_original(config).inverse()(on_meta(theirs)))
    with torch.device("meta"):
        assert shapes_of(UNet(config).state_dict()) == ours
    assert shapes_of(unet_to_original(config)(on_meta(ours))) == theirs


@pytest.mark.parametrize("name", LDM_UNETS_BY_HAND)
def test_unets_of_latent_diffusion_without_a_list(name: str) -> None:
    config, millions = LDM_UNETS_BY_HAND[name]
    with torch.device("meta"):
        network = UNet(config)
    ours = shapes_of(network.state_dict())
    theirs = shapes_of(unet_to_original(config)(on_meta(ours)))
    assert not any(name.startswith(("down_blocks", "mid_block", "up_blocks")) for name in theirs)
    assert unet_config(theirs, **heads_of(config)) == config
    assert shapes_of(unet_to_original(config).inverse()(on_meta(theirs))) == ours
    if millions:
        assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == millions


def test_a_unet_without_transformers_does_not_tell_its_heads() -> None:
    with torch.device("meta"):
        theirs = shapes_of(unet_to_original(FACES_UNET)(UNet(FACES_UNET).state_dict()))
    with pytest.raises(InputError, match="`num_heads` or `head_width`"):
        unet_config(theirs)


def test_plain_attention_has_the_originals_heads() -> None:
    """The original cuts its queries, keys and values head by head, from the channels of one conv."""
    config = UNetConfig(
        channels=(24,),
        res_blocks=1,
        attention_depth=(1,),
        num_heads=(3,),
        context_dim=None,
        groups=8,
        plain_attention=True,
    )
    unet = with_unit_gain(UNet(config))
    theirs = unet_to_original(config)(unet.state_dict())
    again = unet_to_original(config).inverse()(theirs)
    assert all(torch.equal(again[name], tensor) for name, tensor in unet.state_dict().items())

    def conv(name: str, x: Tensor) -> Tensor:
        return F.conv1d(x, theirs[f"middle_block.1.{name}.weight"], theirs[f"middle_block.1.{name}.bias"])

    attention = unet.get_submodule("mid_block.attentions.0")
    assert isinstance(attention, SpatialAttention)
    x = torch.randn(2, 24, 5, 3)
    q, k, v = conv("qkv", attention.group_norm(x).flatten(2)).reshape(2 * 3, 24, 15).split(8, dim=1)
    weights = (q.transpose(1, 2) @ k / 8**0.5).softmax(dim=-1)  # (B·H, queries, keys)
    h = conv("proj_out", (v @ weights.transpose(1, 2)).reshape(2, 24, 15))
    torch.testing.assert_close(attention(x), x + h.reshape(x.shape))


LDM_TEXT_LAYER = {
    "0.0.weight": (640,),
    "0.0.bias": (640,),
    "0.1.to_q.weight": (512, 640),
    "0.1.to_k.weight": (512, 640),
    "0.1.to_v.weight": (512, 640),
    "0.1.to_out.weight": (640, 512),
    "0.1.to_out.bias": (640,),
    "1.0.weight": (640,),
    "1.0.bias": (640,),
    "1.1.net.0.0.weight": (2560, 640),
    "1.1.net.0.0.bias": (2560,),
    "1.1.net.2.weight": (640, 2560),
    "1.1.net.2.bias": (640,),
}
LDM_TEXT_REST = {
    "token_emb.weight": (30522, 640),
    "pos_emb.emb.weight": (77, 640),
    "norm.weight": (640,),
    "norm.bias": (640,),
}


def test_text_encoder_of_latent_diffusion() -> None:
    config = LDMTextConfig(width=640, intermediate=2560)
    with torch.device("meta"):
        ours = shapes_of(LDMTextEncoder(config).state_dict())
    theirs = shapes_of(ldm_text_to_original(config)(on_meta(ours)))
    layers = {
        f"attn_layers.layers.{2 * index + int(name[0])}{name[1:]}": shape
        for index in range(32)
        for name, shape in LDM_TEXT_LAYER.items()
    }
    assert theirs == LDM_TEXT_REST | layers
    whole = theirs | {"to_logits.weight": (30522, 640), "to_logits.bias": (30522,)}
    assert shapes_of(ldm_text_to_original(config).inverse()(on_meta(whole))) == ours
    assert ldm_text_config(ours) == config


def test_text_encoder_of_latent_diffusion_in_diffusers() -> None:
    ours = LDMTextEncoder(LDMTextConfig(vocab_size=30, width=16, layers=2, heads=1)).state_dict()
    theirs = LDM_TEXT_TO_DIFFUSERS(ours)
    assert set(theirs) == {f"model.{name}" for name in ours}
    again = LDM_TEXT_TO_DIFFUSERS.inverse()(theirs | {"to_logits.weight": torch.ones(30, 16)})
    assert again.keys() == ours.keys() and all(torch.equal(again[n], ours[n]) for n in ours)


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
