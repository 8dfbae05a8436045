"""Configs of U-Nets to diffusers' fields and back, and what can't be expressed on either side."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoint.configs.helpers import in_file, meta_shapes, published
from tests.closeness import assert_parity
from tests.networks import read_shapes, with_unit_gain

from darkroom.checkpoint import detect
from darkroom.checkpoint.configs.unet import unet_config_from_diffusers, unet_config_to_diffusers
from darkroom.errors import InputError
from darkroom.nn.extra import Extra
from darkroom.nn.unet import UNet, UNetConfig

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
UPSCALER = {
    "_class_name": "UNet2DConditionModel",
    "attention_head_dim": 8,
    "block_out_channels": [256, 512, 512, 1024],
    "cross_attention_dim": 1024,
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3,
    "dual_cross_attention": False,
    "in_channels": 7,
    "num_class_embeds": 1000,
    "only_cross_attention": [True, True, True, False],
    "sample_size": 128,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"],
    "use_linear_projection": True,
}
CELEBA = {
    "_class_name": "UNet2DModel",
    "act_fn": "silu",
    "attention_head_dim": 32,
    "block_out_channels": [224, 448, 672, 896],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D"] + ["AttnDownBlock2D"] * 3,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 3,
    "resnet_time_scale_shift": "default",
    "sample_size": 64,
    "time_embedding_type": "positional",
    "up_block_types": ["AttnUpBlock2D"] * 3 + ["UpBlock2D"],
}
PLAIN = UNetConfig(
    in_channels=3,
    out_channels=3,
    channels=(16, 32),
    res_blocks=1,
    attention_depth=(0, 1),
    num_heads=(2, 4),
    context_dim=None,
    groups=8,
    plain_attention=True,
)


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


def test_reads_the_upscaler() -> None:
    assert unet_config_from_diffusers(UPSCALER) == UNetConfig(
        in_channels=7,
        channels=(256, 512, 512, 1024),
        attention_depth=(0, 1, 1, 1),
        self_attention=(True, False, False, True),  # without attention there is none to leave out
        context_dim=1024,
        linear_projection=True,
        num_classes=1000,
    )


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl_base", "sdxl_refiner", "playground_v25"])
def test_published_configs(family: str, shared: Path) -> None:
    config = unet_config_from_diffusers(published(shared, f"{family}.diffusers.unet"))
    assert meta_shapes(lambda: UNet(config)) == read_shapes(shared, f"{family}.diffusers.unet")
    single = read_shapes(shared, f"{family}.single", "model.diffusion_model.")
    assert config == detect.unet_config(single)


def test_reads_an_unconditional_model(shared: Path) -> None:
    config = unet_config_from_diffusers(CELEBA)
    assert config == detect.unet_config(
        read_shapes(shared, "ldm_celeba256.single.unet", "model.diffusion_model."), head_width=32
    )


@pytest.mark.parametrize("fields", [UPSCALER, CELEBA], ids=["upscaler", "celeba"])
def test_diffusers_builds_the_same_network(fields: dict[str, Any]) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = unet_config_from_diffusers(fields)
    for written in (fields, unet_config_to_diffusers(config)):
        reference = getattr(diffusers, written["_class_name"])
        theirs = meta_shapes(lambda made=reference, fields=written: made.from_config(fields))
        assert meta_shapes(lambda: UNet(config)) == theirs


@pytest.mark.parametrize(
    "config",
    [
        UNetConfig(),
        UNetConfig(in_channels=9, num_classes=1000, self_attention=(False, True, True, True)),
        UNetConfig(attention_depth=(0, 4, 4, 0), mid_depth=4, linear_projection=True, pooled_dim=2560),
        UNetConfig(attention_depth=(0, 0, 1, 2), mid_depth=2, res_blocks=1, groups=16, scale_shift_norm=True),
        UNetConfig(attention_depth=(0, 0, 0, 1), mid_depth=0),
        UNetConfig(attention_depth=(0, 0, 0, 0), mid_depth=0, context_dim=None),
        PLAIN,
        UNetConfig(
            channels=(64, 64, 96),
            attention_depth=(1, 0, 0),
            num_heads=(1, 1, 1),
            context_dim=None,
            num_classes=10,
            plain_attention=True,
            scale_shift_norm=True,
            resblock_updown=True,
        ),
    ],
)
def test_there_and_back(config: UNetConfig) -> None:
    assert unet_config_from_diffusers(in_file(unet_config_to_diffusers(config))) == config


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, (8, 6)),
        ({"num_heads": (4, 8), "scale_shift_norm": True, "num_classes": 5}, (6, 10)),
        ({"num_heads": (1, 1), "resblock_updown": True, "attention_depth": (0, 0)}, (4, 8)),
    ],
)
def test_unconditional_networks_compute_the_same(changes: dict[str, Any], size: tuple[int, int]) -> None:
    diffusers = pytest.importorskip("diffusers")
    fields = {name: getattr(PLAIN, name) for name in PLAIN.__dataclass_fields__} | changes
    config = UNetConfig(**fields)
    network = with_unit_gain(UNet(config))
    reference = diffusers.UNet2DModel.from_config(unet_config_to_diffusers(config)).eval()
    reference.load_state_dict(network.state_dict(), strict=True)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    timestep = torch.tensor([3.0, 812.0])
    labels = torch.tensor([1, 4]) if config.num_classes else None
    with torch.no_grad():
        ours = network(x, timestep, None, extra=Extra(class_labels=labels))
        assert_parity(ours, reference(x, timestep, class_labels=labels).sample)


IMPOSSIBLE = [
    ({"attention_depth": (1, 1, 1, 1), "mid_depth": 3}, "`mid_depth` = 3 must equal"),
    ({"context_dim": None}, "context_dim"),
    ({"resblock_updown": True}, "`resblock_updown` = True needs"),
    ({"plain_attention": True, "context_dim": None, "mid_depth": 0}, "`mid_depth` must be 1"),
    ({"plain_attention": True, "context_dim": None, "pooled_dim": 8}, "`pooled_dim` must be None"),
    ({"plain_attention": True, "context_dim": None}, "equally wide"),
]


@pytest.mark.parametrize(("changes", "message"), IMPOSSIBLE)
def test_what_diffusers_cannot_hold(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        unet_config_to_diffusers(UNetConfig(**changes))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("_class_name", "UNetSpatioTemporalConditionModel"),
        ("act_fn", "gelu"),
        ("class_embed_type", "projection"),
        ("addition_embed_type", "text"),
        ("mid_block_type", None),
        ("down_block_types", ["AttnDownBlock2D"] * 3),
        ("up_block_types", ["UpBlock2D"] * 3),
        ("up_block_types", ["UpBlock2D"] * 2),
        ("block_out_channels", 320),
        ("in_channels", "4"),
        ("layers_per_block", [1, 2, 2]),
        ("attention_head_dim", [1, 2]),
        ("transformer_layers_per_block", [[1, 1], [2, 2], [10, 10]]),
        ("resnet_time_scale_shift", "spatial"),
        ("timestep_post_act", "silu"),
        ("a_field_of_tomorrow", 1),
    ],
)
def test_unsupported_fields_are_named(field: str, value: object) -> None:
    with pytest.raises(InputError, match=f"`{field}` = "):
        unet_config_from_diffusers(SDXL | {field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attention_head_dim", 30),
        ("attn_norm_num_groups", 16),
        ("resnet_time_scale_shift", "spatial"),
        ("downsample_type", "avg"),
        ("upsample_type", "resnet"),
        ("down_block_types", ["ResnetDownsampleBlock2D"] + ["AttnDownBlock2D"] * 3),
        ("add_attention", False),
        ("downsample_padding", 0),
        ("flip_sin_to_cos", False),
        ("freq_shift", 1),
        ("norm_eps", 1e-6),
        ("cross_attention_dim", 768),
    ],
)
def test_unsupported_fields_of_unconditional_models(field: str, value: object) -> None:
    with pytest.raises(InputError, match=f"`{field}` = "):
        unet_config_from_diffusers(CELEBA | {field: value})


def test_the_middle_attends_where_its_level_does_not() -> None:
    names = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    with pytest.raises(InputError, match="a width that divides 96"):
        unet_config_from_diffusers(
            CELEBA | names | {"block_out_channels": [64, 96], "attention_head_dim": 64}
        )
    # Without attention of its own a level may be of any width.
    config = unet_config_from_diffusers(
        CELEBA | names | {"block_out_channels": [96, 64], "attention_head_dim": 64}
    )
    assert config.num_heads == (1, 1)


def test_the_middle_keeps_its_norm() -> None:
    with pytest.raises(InputError, match="`attn_norm_num_groups` = None"):
        unet_config_from_diffusers(CELEBA | {"resnet_time_scale_shift": "scale_shift"})
