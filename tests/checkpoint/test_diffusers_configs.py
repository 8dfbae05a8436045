"""Configs to diffusers' fields and back, and what can't be expressed on either side."""

import json

import pytest

from darkroom.checkpoint.diffusers_configs import unet_config_from_diffusers, unet_config_to_diffusers
from darkroom.errors import InputError
from darkroom.nn.unet import UNetConfig

SDXL = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.19.0",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "center_input_sample": None,
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
    "use_linear_projection": True,
}


def test_reads_sdxl() -> None:
    assert unet_config_from_diffusers(SDXL) == UNetConfig(
        channels=(320, 640, 1280),
        attention_depth=(0, 2, 10),
        mid_depth=10,
        num_heads=(5, 10, 20),
        context_dim=2048,
        linear_projection=True,
        pooled_dim=2816,
    )


@pytest.mark.parametrize(
    "config",
    [
        UNetConfig(),
        UNetConfig(in_channels=9, num_classes=1000, self_attention=(False, True, True, True)),
        UNetConfig(attention_depth=(0, 4, 4, 0), mid_depth=4, linear_projection=True, pooled_dim=2560),
        UNetConfig(attention_depth=(0, 0, 1, 2), mid_depth=2, res_blocks=1, groups=16),
        UNetConfig(attention_depth=(0, 0, 0, 1), mid_depth=0),
        UNetConfig(attention_depth=(0, 0, 0, 0), mid_depth=0, context_dim=None),
    ],
)
def test_there_and_back(config: UNetConfig) -> None:
    written = json.loads(json.dumps(unet_config_to_diffusers(config)))
    assert unet_config_from_diffusers(written) == config


def test_a_middle_of_its_own_depth_has_no_name_in_diffusers() -> None:
    with pytest.raises(InputError, match="`mid_depth` = 3 must equal"):
        unet_config_to_diffusers(UNetConfig(attention_depth=(1, 1, 1, 1), mid_depth=3))


def test_attention_without_context_has_no_name_in_diffusers() -> None:
    with pytest.raises(InputError, match="context_dim"):
        unet_config_to_diffusers(UNetConfig(context_dim=None))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("act_fn", "gelu"),
        ("class_embed_type", "projection"),
        ("addition_embed_type", "text"),
        ("mid_block_type", None),
        ("down_block_types", ["AttnDownBlock2D"] * 3),
        ("up_block_types", ["UpBlock2D"] * 3),
        ("up_block_types", ["UpBlock2D"] * 2),
        ("layers_per_block", [1, 2, 2]),
        ("attention_head_dim", [1, 2]),
        ("transformer_layers_per_block", [[1, 1], [2, 2], [10, 10]]),
        ("time_cond_proj_dim", 256),
        ("a_field_of_tomorrow", 1),
    ],
)
def test_unsupported_fields_are_named(field: str, value: object) -> None:
    with pytest.raises(InputError, match=f"`{field}` = "):
        unet_config_from_diffusers(SDXL | {field: value})
