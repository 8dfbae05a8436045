"""The configs of diffusers' denoising transformers, of DiT, SD 3 and FLUX.1, as ours, and back."""

from collections.abc import Mapping
from typing import Any

from darkroom.checkpoint.configs.fields import Fields
from darkroom.errors import InputError, unknown
from darkroom.nn.dit import DiTConfig
from darkroom.nn.flux import PATCH, FluxConfig
from darkroom.nn.mmdit import MMDiTConfig

DIT = Fields(
    owner="diffusers DiT",
    # The published files are older than the class of their own.
    classes=("DiTTransformer2DModel", "Transformer2DModel"),
    read={
        "attention_head_dim": 72,
        "in_channels": 4,
        "norm_eps": 1e-5,
        "num_attention_heads": 16,
        "num_embeds_ada_norm": 1000,
        "num_layers": 28,
        "out_channels": None,
        "patch_size": 2,
        "sample_size": 32,
    },
    fixed={
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_type": "default",
        "caption_channels": None,
        "cross_attention_dim": None,
        "double_self_attention": False,
        "dropout": 0.0,
        "interpolation_scale": None,
        "norm_elementwise_affine": False,
        "norm_type": "ada_norm_zero",
        "num_vector_embeds": None,
        "only_cross_attention": False,
        "use_additional_conditions": None,
        "use_linear_projection": False,
    },
    ignored=("norm_num_groups", "upcast_attention"),
)
# Of one of the two norms of a block. The original's is the first, diffusers' default the second.
DIT_EPS = (1e-6, 1e-5)

MMDIT = Fields(
    owner="diffusers SD 3",
    classes=("SD3Transformer2DModel",),
    read={
        "attention_head_dim": 64,
        "caption_projection_dim": 1152,
        "dual_attention_layers": (),
        "in_channels": 16,
        "joint_attention_dim": 4096,
        "num_attention_heads": 18,
        "num_layers": 18,
        "out_channels": 16,
        "patch_size": 2,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 96,
        "qk_norm": None,
    },
    # Positions are counted by it, but they are in the file.
    ignored=("sample_size",),
    nullable=("out_channels",),
)

FLUX = Fields(
    owner="diffusers FLUX",
    classes=("FluxTransformer2DModel",),
    read={
        "attention_head_dim": 128,
        "axes_dims_rope": (16, 56, 56),
        "guidance_embeds": False,
        "in_channels": 64,
        "joint_attention_dim": 4096,
        "num_attention_heads": 24,
        "num_layers": 19,
        "num_single_layers": 38,
        "out_channels": None,
        "pooled_projection_dim": 768,
    },
    fixed={"patch_size": 1},
)
CLASSES = {name: kind for kind in (DIT, MMDIT, FLUX) for name in kind.classes}


def transformer_config_from_diffusers(config: Mapping[str, Any]) -> DiTConfig | MMDiTConfig | FluxConfig:
    """Read the config of diffusers' `DiTTransformer2DModel`, `SD3Transformer2DModel` or
    `FluxTransformer2DModel`.

    Raises InputError for other classes, and naming the field where the config asks for a variant that our
    network doesn't have.
    """
    name = config.get("_class_name")
    if name not in CLASSES:
        raise unknown("transformer `_class_name`", str(name), CLASSES)
    kind = CLASSES[name]
    if kind is DIT:
        return dit_config_from_diffusers(config)
    return mmdit_config_from_diffusers(config) if kind is MMDIT else flux_config_from_diffusers(config)


def dit_config_from_diffusers(config: Mapping[str, Any]) -> DiTConfig:
    """Read that of `DiTTransformer2DModel`; raises as `transformer_config_from_diffusers` does."""
    fields = DIT.of(config)
    if config.get("_class_name") == "Transformer2DModel" and "norm_type" not in config:
        raise DIT.unsupported("norm_type", None, repr(DIT.fixed["norm_type"]))
    if fields["norm_eps"] not in DIT_EPS:
        raise DIT.unsupported("norm_eps", fields["norm_eps"], " or ".join(map(str, DIT_EPS)))
    if fields["num_embeds_ada_norm"] is None:
        raise DIT.unsupported("num_embeds_ada_norm", None, "the number of classes")
    return DiTConfig(
        in_channels=fields["in_channels"],
        out_channels=_or(fields["out_channels"], fields["in_channels"]),
        sample_size=fields["sample_size"],
        patch_size=fields["patch_size"],
        width=fields["num_attention_heads"] * fields["attention_head_dim"],
        depth=fields["num_layers"],
        num_heads=fields["num_attention_heads"],
        num_classes=fields["num_embeds_ada_norm"],
        frequency_shift=1,
    )


def dit_config_to_diffusers(config: DiTConfig) -> dict[str, Any]:
    """Write the config under which diffusers' `DiTTransformer2DModel` is the same network.

    Raises InputError naming the field that diffusers can't express, as only networks of classes are there.
    """
    held = {
        "context_dim": None,
        "pooled_dim": None,
        "qk_norm": False,
        "positions": "sincos",
        "mlp_ratio": 4.0,
        "frequency_shift": 1,
    }
    for name, value in held.items():
        if getattr(config, name) != value:
            raise _impossible("DiT", f"`{name}` = {getattr(config, name)!r} must be {value!r}")
    if config.num_classes is None:
        raise _impossible("DiT", "`num_classes` must be a number")
    return {
        "_class_name": "DiTTransformer2DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": config.width // config.num_heads,
        "in_channels": config.in_channels,
        "norm_elementwise_affine": False,
        "norm_eps": DIT_EPS[0],
        "norm_type": "ada_norm_zero",
        "num_attention_heads": config.num_heads,
        "num_embeds_ada_norm": config.num_classes,
        "num_layers": config.depth,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "sample_size": config.sample_size,
    }


def mmdit_config_from_diffusers(config: Mapping[str, Any]) -> MMDiTConfig:
    """Read that of `SD3Transformer2DModel`; raises as `transformer_config_from_diffusers` does."""
    fields = MMDIT.of(config)
    width = fields["num_attention_heads"] * fields["attention_head_dim"]
    if fields["caption_projection_dim"] != width:
        expected = f"{width}, `num_attention_heads` times `attention_head_dim`"
        raise MMDIT.unsupported("caption_projection_dim", fields["caption_projection_dim"], expected)
    if fields["qk_norm"] not in (None, "rms_norm"):
        raise MMDIT.unsupported("qk_norm", fields["qk_norm"], "null or 'rms_norm'")
    dual = list(fields["dual_attention_layers"])
    if dual != list(range(len(dual))):
        raise MMDIT.unsupported("dual_attention_layers", dual, "the first layers, as [0, 1, 2]")
    return MMDiTConfig(
        in_channels=fields["in_channels"],
        out_channels=_or(fields["out_channels"], fields["in_channels"]),
        patch_size=fields["patch_size"],
        depth=fields["num_layers"],
        num_heads=fields["num_attention_heads"],
        head_width=fields["attention_head_dim"],
        context_dim=fields["joint_attention_dim"],
        pooled_dim=fields["pooled_projection_dim"],
        positions=fields["pos_embed_max_size"],
        qk_norm=fields["qk_norm"] is not None,
        dual_layers=len(dual),
    )


def mmdit_config_to_diffusers(config: MMDiTConfig) -> dict[str, Any]:
    """Write the config under which diffusers' `SD3Transformer2DModel` is the same network."""
    return {
        "_class_name": "SD3Transformer2DModel",
        "attention_head_dim": config.head_width,
        "caption_projection_dim": config.width,
        "dual_attention_layers": list(range(config.dual_layers)),
        "in_channels": config.in_channels,
        "joint_attention_dim": config.context_dim,
        "num_attention_heads": config.num_heads,
        "num_layers": config.depth,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "pooled_projection_dim": config.pooled_dim,
        "pos_embed_max_size": config.positions,
        "qk_norm": "rms_norm" if config.qk_norm else None,
    }


def flux_config_from_diffusers(config: Mapping[str, Any]) -> FluxConfig:
    """Read that of `FluxTransformer2DModel`, whose channels are those of a token of 2 x 2 cells; raises as
    `transformer_config_from_diffusers` does.
    """
    fields = FLUX.of(config)
    axes = tuple(fields["axes_dims_rope"])
    if len(axes) != 3:
        raise FLUX.unsupported("axes_dims_rope", axes, "three numbers")
    if fields["attention_head_dim"] != sum(axes):
        expected = f"{sum(axes)}, the sum of `axes_dims_rope`"
        raise FLUX.unsupported("attention_head_dim", fields["attention_head_dim"], expected)
    for name in ("in_channels", "out_channels"):
        if (fields[name] or 0) % PATCH**2:
            raise FLUX.unsupported(name, fields[name], f"a multiple of {PATCH**2}, the cells of a token")
    return FluxConfig(
        in_channels=fields["in_channels"] // PATCH**2,
        out_channels=_or(fields["out_channels"], fields["in_channels"]) // PATCH**2,
        double_blocks=fields["num_layers"],
        single_blocks=fields["num_single_layers"],
        num_heads=fields["num_attention_heads"],
        axes=axes,
        context_dim=fields["joint_attention_dim"],
        pooled_dim=fields["pooled_projection_dim"],
        guidance=bool(fields["guidance_embeds"]),
    )


def flux_config_to_diffusers(config: FluxConfig) -> dict[str, Any]:
    """Write the config under which diffusers' `FluxTransformer2DModel` is the same network."""
    return {
        "_class_name": "FluxTransformer2DModel",
        "attention_head_dim": config.head_width,
        "axes_dims_rope": list(config.axes),
        "guidance_embeds": config.guidance,
        "in_channels": config.in_channels * PATCH**2,
        "joint_attention_dim": config.context_dim,
        "num_attention_heads": config.num_heads,
        "num_layers": config.double_blocks,
        "num_single_layers": config.single_blocks,
        "out_channels": config.out_channels * PATCH**2,
        "patch_size": 1,
        "pooled_projection_dim": config.pooled_dim,
    }


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _impossible(network: str, why: str) -> InputError:
    return InputError(f"diffusers can't hold this {network}: {why}")
