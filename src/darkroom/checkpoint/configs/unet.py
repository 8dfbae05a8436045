"""The configs of diffusers' U-Nets, `UNet2DConditionModel` and `UNet2DModel`, as ours, and back."""

from collections.abc import Mapping, Sequence
from typing import Any

from darkroom.checkpoint.configs.fields import Fields
from darkroom.errors import InputError
from darkroom.nn.unet import EPS, UNetConfig

# What every U-Net of ours has.
SHARED: dict[str, Any] = {
    "act_fn": "silu",
    "center_input_sample": False,
    "class_embed_type": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "norm_eps": EPS,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
}

CONDITIONAL = Fields(
    owner="diffusers U-Net",
    classes=("UNet2DConditionModel",),
    read={
        "addition_embed_type": None,
        "attention_head_dim": 8,
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 1280,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_num_groups": 32,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "out_channels": 4,
        "projection_class_embeddings_input_dim": None,
        "resnet_time_scale_shift": "default",
        "time_cond_proj_dim": None,
        "transformer_layers_per_block": 1,
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "use_linear_projection": False,
    },
    fixed=SHARED
    | {
        "attention_type": "default",
        "class_embeddings_concat": False,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "cross_attention_norm": None,
        "dual_cross_attention": False,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "mid_block_only_cross_attention": None,
        "num_attention_heads": None,
        "resnet_out_scale_factor": 1.0,
        "resnet_skip_time_act": False,
        "reverse_transformer_layers_per_block": None,
        "time_embedding_act_fn": None,
        "timestep_post_act": None,
    },
    # Such as the precision that attention once had to run in.
    ignored=("sample_size", "upcast_attention", "addition_time_embed_dim", "addition_embed_type_num_heads"),
    per_level=(
        "attention_head_dim",
        "cross_attention_dim",
        "layers_per_block",
        "only_cross_attention",
        "transformer_layers_per_block",
    ),
)

PLAIN = Fields(
    owner="diffusers U-Net",
    classes=("UNet2DModel",),
    read={
        "attention_head_dim": 8,
        "attn_norm_num_groups": None,
        "block_out_channels": (224, 448, 672, 896),
        "down_block_types": ("DownBlock2D",) + ("AttnDownBlock2D",) * 3,
        "downsample_type": "conv",
        "in_channels": 3,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "num_class_embeds": None,
        "out_channels": 3,
        "resnet_time_scale_shift": "default",
        "up_block_types": ("AttnUpBlock2D",) * 3 + ("UpBlock2D",),
        "upsample_type": "conv",
    },
    fixed=SHARED | {"add_attention": True, "mid_block_type": "UNetMidBlock2D"},
    ignored=("sample_size", "num_train_timesteps"),
    nullable=("attention_head_dim",),
)


def unet_config_from_diffusers(config: Mapping[str, Any]) -> UNetConfig:
    """Read the config of diffusers' `UNet2DConditionModel`, or of the `UNet2DModel` that has no context.

    Raises InputError naming the field where the config asks for a variant that our U-Net doesn't have.
    """
    if config.get("_class_name") == "UNet2DModel":
        return _plain_from_diffusers(PLAIN.of(config))
    return _conditional_from_diffusers(CONDITIONAL.of(config))


def unet_config_to_diffusers(config: UNetConfig, size_embedding_dim: int = 256) -> dict[str, Any]:
    """Write the config under which diffusers' `UNet2DConditionModel` is the same network.

    A network with plain attention is its `UNet2DModel`. Where the U-Net takes a pooled vector, diffusers
    embeds its sizes itself, each as `size_embedding_dim` numbers. Raises InputError naming the field that
    diffusers can't express.
    """
    shared = {
        "act_fn": "silu",
        "block_out_channels": list(config.channels),
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": config.in_channels,
        "layers_per_block": config.res_blocks,
        "norm_eps": EPS,
        "norm_num_groups": config.groups,
        "num_class_embeds": config.num_classes,
        "out_channels": config.out_channels,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift_norm else "default",
    }
    return shared | (
        _plain_to_diffusers(config)
        if config.plain_attention
        else _conditional_to_diffusers(config, size_embedding_dim)
    )


def _conditional_from_diffusers(fields: Mapping[str, Any]) -> UNetConfig:
    levels = len(fields["block_out_channels"])
    attention = _attention(CONDITIONAL, fields, "CrossAttn", ("", ""))
    depth = _per_level(fields, "transformer_layers_per_block", levels)
    if fields["mid_block_type"] not in ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"):
        expected = "'UNetMidBlock2DCrossAttn' or 'UNetMidBlock2D'"
        raise CONDITIONAL.unsupported("mid_block_type", fields["mid_block_type"], expected)
    mid_depth = depth[-1] if fields["mid_block_type"] == "UNetMidBlock2DCrossAttn" else 0
    context_dim = _same_everywhere(fields, "cross_attention_dim", levels)
    # Where nothing attends it says nothing.
    only = _per_level(fields, "only_cross_attention", levels)
    own = tuple(not (has and alone) for has, alone in zip(attention, only, strict=True))
    return UNetConfig(
        **_shared_from_diffusers(CONDITIONAL, fields),
        res_blocks=_same_everywhere(fields, "layers_per_block", levels),
        attention_depth=tuple(d if has else 0 for d, has in zip(depth, attention, strict=True)),
        mid_depth=mid_depth,
        # diffusers names the number of heads after their width.
        num_heads=_per_level(fields, "attention_head_dim", levels),
        self_attention=None if all(own) else own,
        context_dim=context_dim if mid_depth or any(attention) else None,
        linear_projection=bool(fields["use_linear_projection"]),
        pooled_dim=_pooled_dim(fields),
        guidance_dim=fields["time_cond_proj_dim"],
    )


def _plain_from_diffusers(fields: Mapping[str, Any]) -> UNetConfig:
    resampling = fields["downsample_type"]
    if resampling not in ("conv", "resnet"):
        raise PLAIN.unsupported("downsample_type", resampling, "'conv' or 'resnet'")
    if fields["upsample_type"] != resampling:
        raise PLAIN.unsupported(
            "upsample_type", fields["upsample_type"], f"{resampling!r}, as on the way down"
        )
    attention = _attention(PLAIN, fields, "Attn", PLAIN_RESAMPLING[resampling])
    groups, own = fields["norm_num_groups"], fields["attn_norm_num_groups"]
    if own != groups and (own is not None or fields["resnet_time_scale_shift"] == "scale_shift"):
        expected = f"{groups}, the `norm_num_groups`, since the middle's attention would have no norm"
        raise PLAIN.unsupported("attn_norm_num_groups", own, expected)
    return UNetConfig(
        **_shared_from_diffusers(PLAIN, fields),
        res_blocks=fields["layers_per_block"],
        attention_depth=tuple(int(has) for has in attention),
        num_heads=_heads(fields, attention),
        context_dim=None,
        plain_attention=True,
        resblock_updown=resampling == "resnet",
    )


def _shared_from_diffusers(kind: Fields, fields: Mapping[str, Any]) -> dict[str, Any]:
    scaling = fields["resnet_time_scale_shift"]
    if scaling not in ("default", "scale_shift"):
        raise kind.unsupported("resnet_time_scale_shift", scaling, "'default' or 'scale_shift'")
    return {
        "in_channels": fields["in_channels"],
        "out_channels": fields["out_channels"],
        "channels": tuple(fields["block_out_channels"]),
        "groups": fields["norm_num_groups"],
        "num_classes": fields["num_class_embeds"],
        "scale_shift_norm": scaling == "scale_shift",
    }


def _conditional_to_diffusers(config: UNetConfig, size_embedding_dim: int) -> dict[str, Any]:
    if config.resblock_updown:
        raise _impossible("`resblock_updown` = True needs `plain_attention`")
    down, up = _block_types(config.attention_depth, "CrossAttn", ("", ""))
    pooled = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": size_embedding_dim,
        "projection_class_embeddings_input_dim": config.pooled_dim,
    }
    return {
        "_class_name": "UNet2DConditionModel",
        "attention_head_dim": list(config.num_heads),
        "cross_attention_dim": _context_dim(config),
        "down_block_types": down,
        "mid_block_type": "UNetMidBlock2DCrossAttn" if config.mid_depth else "UNetMidBlock2D",
        "only_cross_attention": [not has for has in config.self_attentions],
        "time_cond_proj_dim": config.guidance_dim,
        "transformer_layers_per_block": _depths(config),
        "up_block_types": up,
        "use_linear_projection": config.linear_projection,
    } | (pooled if config.pooled_dim is not None else {})


def _plain_to_diffusers(config: UNetConfig) -> dict[str, Any]:
    if not config.mid_depth:
        raise _impossible("with `plain_attention` its `mid_depth` must be 1")
    if config.pooled_dim is not None:
        raise _impossible("with `plain_attention` its `pooled_dim` must be None")
    if config.guidance_dim is not None:
        raise _impossible("with `plain_attention` its `guidance_dim` must be None")
    resampling = "resnet" if config.resblock_updown else "conv"
    down, up = _block_types(config.attention_depth, "Attn", PLAIN_RESAMPLING[resampling])
    return {
        "_class_name": "UNet2DModel",
        "attention_head_dim": _head_width(config),
        "attn_norm_num_groups": config.groups,
        "down_block_types": down,
        "downsample_type": resampling,
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": up,
        "upsample_type": resampling,
    }


# How levels without attention are called: their blocks on the way down and up say how sizes change.
PLAIN_RESAMPLING = {"conv": ("", ""), "resnet": ("ResnetDownsample", "ResnetUpsample")}


def _attention(
    kind: Fields, fields: Mapping[str, Any], prefix: str, resampling: tuple[str, str]
) -> list[bool]:
    """Which levels have attention, from the names of the blocks, which must be the same on both ways."""
    levels = len(fields["block_out_channels"])
    for name in ("down_block_types", "up_block_types"):
        if len(fields[name]) != levels:
            raise kind.unsupported(name, fields[name], f"{levels} names, as many as `block_out_channels`")
    attention = [name == f"{prefix}DownBlock2D" for name in fields["down_block_types"]]
    down, up = _block_types(attention, prefix, resampling)
    for name, expected in (("down_block_types", down), ("up_block_types", up)):
        if list(fields[name]) != expected:
            raise kind.unsupported(name, fields[name], repr(expected))
    return attention


def _block_types(
    attention: Sequence[object], prefix: str, resampling: tuple[str, str]
) -> tuple[list[str], list[str]]:
    """diffusers' names of the levels, in its order: down from the first level, up from the last."""
    down, up = (name or way for name, way in zip(resampling, ("Down", "Up"), strict=True))
    return (
        [f"{prefix}DownBlock2D" if has else f"{down}Block2D" for has in attention],
        [f"{prefix}UpBlock2D" if has else f"{up}Block2D" for has in reversed(attention)],
    )


def _heads(fields: Mapping[str, Any], attention: Sequence[bool]) -> tuple[int, ...]:
    """How many heads each level has of the width that diffusers gives, or one each where it gives none."""
    widths, head = fields["block_out_channels"], fields["attention_head_dim"]
    # The middle attends with the last level's heads.
    for width, has in zip(widths, [*attention[:-1], True], strict=True):
        if has and head is not None and (head < 1 or width % head):
            raise PLAIN.unsupported("attention_head_dim", head, f"null, or a width that divides {width}")
    return tuple(1 if head is None or width % head else width // head for width in widths)


def _head_width(config: UNetConfig) -> int | None:
    """The width of heads at all levels that attend, or None where each has one head."""
    attention = [*config.attention_depth[:-1], True]
    heads = [n for n, has in zip(config.num_heads, attention, strict=True) if has]
    widths = [w // n for w, n, has in zip(config.channels, config.num_heads, attention, strict=True) if has]
    if len(set(widths)) == 1:
        return widths[0]
    if set(heads) == {1}:
        return None
    raise _impossible(f"heads of `num_heads` = {config.num_heads} must be equally wide, or one a level")


def _context_dim(config: UNetConfig) -> int:
    """diffusers wants a width even where nothing attends."""
    if config.context_dim is None and (config.mid_depth or any(config.attention_depth)):
        raise _impossible("it has attention, so it needs a `context_dim`, or `plain_attention`")
    return config.context_dim or CONDITIONAL.read["cross_attention_dim"]


def _depths(config: UNetConfig) -> list[int]:
    """One transformer depth per level, where diffusers gives the middle the last level's."""
    last, middle = config.attention_depth[-1], config.mid_depth
    if last and middle and last != middle:
        raise _impossible(
            f"`mid_depth` = {middle} must equal the last `attention_depth` = {last}, or one of them must be 0"
        )
    depths = [depth or 1 for depth in config.attention_depth]
    return [*depths[:-1], last or middle or 1]


def _pooled_dim(fields: Mapping[str, Any]) -> int | None:
    kind = fields["addition_embed_type"]
    if kind not in (None, "text_time"):
        raise CONDITIONAL.unsupported("addition_embed_type", kind, "None or 'text_time'")
    return fields["projection_class_embeddings_input_dim"] if kind else None


def _per_level(fields: Mapping[str, Any], name: str, levels: int) -> tuple[Any, ...]:
    """A field that may be written once for all levels, as one value per level."""
    value = fields[name]
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * levels
    if len(values) != levels:
        raise CONDITIONAL.unsupported(name, value, f"one value, or {levels}, as many as `block_out_channels`")
    return values


def _same_everywhere(fields: Mapping[str, Any], name: str, levels: int) -> Any:
    values = _per_level(fields, name, levels)
    if len(set(values)) != 1:
        raise CONDITIONAL.unsupported(name, fields[name], "the same value at every level")
    return values[0]


def _impossible(why: str) -> InputError:
    return InputError(f"diffusers can't hold this U-Net: {why}")
