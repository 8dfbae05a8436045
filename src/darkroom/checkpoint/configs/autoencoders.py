"""The configs of diffusers' `AutoencoderKL`, `VQModel` and `AutoencoderTiny` as ours, and back."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from darkroom.checkpoint.build import AutoencoderConfig
from darkroom.checkpoint.configs.fields import Fields
from darkroom.errors import InputError, unknown
from darkroom.nn.autoencoder_kl import AutoencoderKLConfig, AutoencoderShape
from darkroom.nn.autoencoder_tiny import BLOCKS, CLAMP, HALVINGS, AutoencoderTinyConfig
from darkroom.nn.autoencoder_vq import AutoencoderVQConfig
from darkroom.nn.latent_space import LatentSpace

SHAPE: dict[str, Any] = {
    "block_out_channels": (64,),
    "down_block_types": ("DownEncoderBlock2D",),
    "in_channels": 3,
    "layers_per_block": 1,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "up_block_types": ("UpDecoderBlock2D",),
}
# What pictures are made at and in which precision.
IGNORED = ("sample_size", "force_upcast")

KL = Fields(
    owner="diffusers AutoencoderKL",
    classes=("AutoencoderKL",),
    read=SHAPE
    | {
        "latent_channels": 4,
        "latents_mean": None,
        "latents_std": None,
        "scaling_factor": 0.18215,
        "shift_factor": None,
        "use_post_quant_conv": True,
        "use_quant_conv": True,
    },
    fixed={"act_fn": "silu"},
    ignored=IGNORED,
)
# The published files are older than `scaling_factor`. Theirs is 1 as in the original release; diffusers by
# now takes 0.18215 for them, and so decodes latents that are too large.
VQ = Fields(
    owner="diffusers VQModel",
    classes=("VQModel",),
    read=SHAPE
    | {"latent_channels": 3, "num_vq_embeddings": 256, "scaling_factor": 1.0, "vq_embed_dim": None},
    fixed={"act_fn": "silu", "lookup_from_codebook": False, "norm_type": "group"},
    ignored=IGNORED,
)
TINY = Fields(
    owner="diffusers AutoencoderTiny",
    classes=("AutoencoderTiny",),
    read={
        "decoder_block_out_channels": (64,) * (HALVINGS + 1),
        "encoder_block_out_channels": (64,) * (HALVINGS + 1),
        "in_channels": 3,
        "latent_channels": 4,
        "out_channels": 3,
    },
    fixed={
        "act_fn": "relu",
        "latent_magnitude": CLAMP,
        "latent_shift": 0.5,
        "num_decoder_blocks": (*(BLOCKS,) * HALVINGS, 1),
        "num_encoder_blocks": (1, *(BLOCKS,) * HALVINGS),
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
        "upsample_fn": "nearest",
        "upsampling_scaling_factor": 2,
    },
    ignored=("block_out_channels", "force_upcast"),
)
CLASSES = {"AutoencoderKL": KL, "VQModel": VQ, "AutoencoderTiny": TINY}


def autoencoder_from_diffusers(config: Mapping[str, Any]) -> AutoencoderConfig:
    """Read the config of diffusers' `AutoencoderKL`, which is meant without a class, `VQModel` or
    `AutoencoderTiny`.

    Raises InputError for other classes, and naming the field where the config asks for a variant that our
    autoencoder doesn't have.
    """
    kind = _class(config)
    fields = kind.of(config)
    if fields["out_channels"] != fields["in_channels"]:
        raise kind.unsupported(
            "out_channels", fields["out_channels"], f"{fields['in_channels']}, as many as `in_channels`"
        )
    if kind is TINY:
        return _tiny(fields)
    if kind is KL:
        return _kl(fields)
    width = fields["vq_embed_dim"]
    if width not in (None, fields["latent_channels"]):
        expected = f"{fields['latent_channels']}, as many as `latent_channels`"
        raise kind.unsupported("vq_embed_dim", width, expected)
    return AutoencoderVQConfig(**_shape(kind, fields), codes=fields["num_vq_embeddings"])


def latent_space_from_diffusers(config: Mapping[str, Any]) -> LatentSpace:
    """Read the latent space of such a config.

    diffusers' pipelines decode `latents / scaling_factor + shift_factor`, or where the config has means
    `latents * latents_std / scaling_factor + latents_mean`. Those of a VQModel only divide, and a tiny
    autoencoder's latents are normalised already. Raises InputError as `autoencoder_from_diffusers` does, and
    for means that don't fit the channels.
    """
    kind, shape = _class(config), autoencoder_from_diffusers(config)
    fields, channels = kind.of(config), shape.latent_channels
    if kind is TINY:
        return LatentSpace.identity(channels, shape.stride)
    factor, shift = fields["scaling_factor"], fields.get("shift_factor") or 0.0
    if not factor > 0:
        raise kind.unsupported("scaling_factor", factor, "a number above 0")
    mean, std = fields.get("latents_mean"), fields.get("latents_std")
    if mean is None and std is None:
        mean, std = (shift,) * channels, (1.0,) * channels
    elif shift:
        raise kind.unsupported("shift_factor", shift, "null beside `latents_mean`")
    for name, values in (("latents_mean", mean), ("latents_std", std)):
        if not isinstance(values, list | tuple) or len(values) != channels:
            raise kind.unsupported(name, values, f"{channels} numbers, as many as `latent_channels`")
    assert mean is not None and std is not None
    return LatentSpace(
        channels=channels,
        stride=shape.stride,
        mean=tuple(float(m) for m in mean),
        std=tuple(s / factor for s in std),
    )


def autoencoder_to_diffusers(
    config: AutoencoderConfig, space: LatentSpace, sample_size: int
) -> dict[str, Any]:
    """Write the config under which diffusers' class for it is the same autoencoder with these latents.

    `sample_size` is in pixels. A tiny autoencoder's latents are normalised whatever `space` says. Raises
    InputError naming what diffusers can't express: pooled blocks of a tiny autoencoder, and means of a VQ
    autoencoder or standard deviations that differ among its channels.
    """
    if isinstance(config, AutoencoderTinyConfig):
        return _tiny_to_diffusers(config)
    shape = _shape_to_diffusers(config) | {"sample_size": sample_size}
    if isinstance(config, AutoencoderKLConfig):
        return shape | {
            "_class_name": "AutoencoderKL",
            "use_post_quant_conv": config.quant_conv,
            "use_quant_conv": config.quant_conv,
            **latent_space_to_diffusers(space),
        }
    if any(space.mean) or len(set(space.std)) > 1:
        raise InputError(
            "diffusers can't hold this VQ autoencoder: the `mean` of its latent space must be 0 and its "
            "`std` the same for all channels"
        )
    return shape | {
        "_class_name": "VQModel",
        "num_vq_embeddings": config.codes,
        "scaling_factor": _inverse(space.std[0]),
        "vq_embed_dim": config.latent_channels,
    }


def autoencoder_config_to_diffusers(config: AutoencoderKLConfig, sample_size: int) -> dict[str, Any]:
    """The same for a KL autoencoder that has 1x1 convs, and its latents normalised by them.

    The shift is written though it is 0: the pipelines of SD 3 and FLUX take no null.
    """
    space = LatentSpace.identity(config.latent_channels, config.stride)
    written = autoencoder_to_diffusers(replace(config, quant_conv=True), space, sample_size)
    return written | {"shift_factor": 0.0}


def latent_space_to_diffusers(space: LatentSpace) -> dict[str, Any]:
    """The fields of an `AutoencoderKL` that say this: one factor and shift where all channels share them."""
    if len(set(space.mean)) == len(set(space.std)) == 1:
        return {"scaling_factor": _inverse(space.std[0]), "shift_factor": space.mean[0] or None}
    return {"scaling_factor": 1.0, "latents_mean": list(space.mean), "latents_std": list(space.std)}


def _class(config: Mapping[str, Any]) -> Fields:
    name = config.get("_class_name", "AutoencoderKL")
    if name not in CLASSES:
        raise unknown("autoencoder `_class_name`", str(name), CLASSES)
    return CLASSES[name]


def _kl(fields: Mapping[str, Any]) -> AutoencoderKLConfig:
    before, after = bool(fields["use_quant_conv"]), bool(fields["use_post_quant_conv"])
    if before != after:
        raise KL.unsupported("use_post_quant_conv", after, f"{before}, as `use_quant_conv`")
    return AutoencoderKLConfig(**_shape(KL, fields), quant_conv=before)


def _tiny(fields: Mapping[str, Any]) -> AutoencoderTinyConfig:
    width = fields["encoder_block_out_channels"][0]
    for name in ("encoder_block_out_channels", "decoder_block_out_channels"):
        if list(fields[name]) != [width] * (HALVINGS + 1):
            raise TINY.unsupported(name, fields[name], f"{width}, {HALVINGS + 1} times")
    return AutoencoderTinyConfig(
        in_channels=fields["in_channels"], latent_channels=fields["latent_channels"], channels=width
    )


def _tiny_to_diffusers(config: AutoencoderTinyConfig) -> dict[str, Any]:
    if config.pooled_blocks:
        raise InputError("diffusers can't hold this tiny autoencoder: `pooled_blocks` must be False")
    widths = [config.channels] * (HALVINGS + 1)
    return {name: list(v) if isinstance(v, tuple) else v for name, v in TINY.fixed.items()} | {
        "_class_name": "AutoencoderTiny",
        "decoder_block_out_channels": widths,
        "encoder_block_out_channels": widths,
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "out_channels": config.in_channels,
    }


def _shape(kind: Fields, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What KL and VQ autoencoders share."""
    down = list(fields["down_block_types"])
    attention = [name.startswith("Attn") for name in down]
    for name, expected in zip(("down_block_types", "up_block_types"), _block_types(attention), strict=True):
        if list(fields[name]) != expected:
            raise kind.unsupported(name, fields[name], repr(expected))
    if len(down) != len(fields["block_out_channels"]):
        expected = f"{len(fields['block_out_channels'])} names, as many as `block_out_channels`"
        raise kind.unsupported("down_block_types", down, expected)
    return {
        "in_channels": fields["in_channels"],
        "latent_channels": fields["latent_channels"],
        "channels": tuple(fields["block_out_channels"]),
        "res_blocks": fields["layers_per_block"],
        "groups": fields["norm_num_groups"],
        "mid_attention": bool(fields["mid_block_add_attention"]),
        "attention_levels": tuple(level for level, has in enumerate(attention) if has),
    }


def _shape_to_diffusers(config: AutoencoderShape) -> dict[str, Any]:
    down, up = _block_types([level in config.attention_levels for level in range(len(config.channels))])
    return {
        "act_fn": "silu",
        "block_out_channels": list(config.channels),
        "down_block_types": down,
        "force_upcast": False,
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.res_blocks,
        "mid_block_add_attention": config.mid_attention,
        "norm_num_groups": config.groups,
        "out_channels": config.in_channels,
        "up_block_types": up,
    }


def _block_types(attention: list[bool]) -> tuple[list[str], list[str]]:
    """diffusers' names of the levels: down from the picture, up to it."""
    down = [f"{'Attn' * has}DownEncoderBlock2D" for has in attention]
    return down, [f"{'Attn' * has}UpDecoderBlock2D" for has in reversed(attention)]


def _inverse(std: float) -> float:
    """The factor for a standard deviation, as short as it was published: 0.18215 survives two inversions."""
    return float(f"{1 / std:.15g}")
