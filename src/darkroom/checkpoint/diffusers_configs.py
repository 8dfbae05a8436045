"""The `config.json` of diffusers' networks as ours, and back."""

from collections.abc import Mapping
from typing import Any

from darkroom.diffusion.denoiser import Prediction
from darkroom.diffusion.path import DiscretePath, FlowPath, NoisePath
from darkroom.errors import InputError
from darkroom.nn.autoencoder_kl import AutoencoderKLConfig
from darkroom.nn.unet import UNetConfig
from darkroom.text.clip import CLIPTextConfig
from darkroom.text.tokenizer import Tokenizer

# Fields that change no number here, such as the precision that attention once had to run in.
UNET_IGNORED = {"sample_size", "upcast_attention", "addition_time_embed_dim", "addition_embed_type_num_heads"}

# Fields for variants of the network that ours doesn't have, with the value that leaves them out.
UNET_FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "num_attention_heads": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}

# diffusers cuts sigma * 1000 to a whole timestep, and 924.9999 to 924: this much more shift keeps it 925.
WHOLE_TIMESTEPS = 1 + 1e-6

# Fields that we read, with diffusers' defaults: a config may leave any of them out.
UNET_READ: dict[str, Any] = {
    "addition_embed_type": None,
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 1280,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_num_groups": 32,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": None,
    "transformer_layers_per_block": 1,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "use_linear_projection": False,
}


def unet_config_from_diffusers(config: Mapping[str, Any]) -> UNetConfig:
    """Read the config of diffusers' `UNet2DConditionModel`.

    Raises InputError naming the field where the config asks for a variant that our U-Net doesn't have.
    """
    for name, value in config.items():
        fixed = UNET_FIXED.get(name)
        if (
            name in UNET_FIXED and value != fixed and (value or fixed)
        ):  # releases write None for False and back
            raise _unsupported(name, value, repr(fixed))
        if not (name in UNET_FIXED or name in UNET_READ or name in UNET_IGNORED or name.startswith("_")):
            raise _unsupported(name, value, "no such field")
    fields = UNET_READ | dict(config)
    levels = len(fields["block_out_channels"])
    attention, depth = _unet_attention(fields), _per_level(fields, "transformer_layers_per_block", levels)
    mid_depth = depth[-1] if fields["mid_block_type"] == "UNetMidBlock2DCrossAttn" else 0
    context_dim = _same_everywhere(fields, "cross_attention_dim", levels)
    self_attention = tuple(not only for only in _per_level(fields, "only_cross_attention", levels))
    return UNetConfig(
        in_channels=fields["in_channels"],
        out_channels=fields["out_channels"],
        channels=tuple(fields["block_out_channels"]),
        res_blocks=_same_everywhere(fields, "layers_per_block", levels),
        attention_depth=tuple(d if has else 0 for d, has in zip(depth, attention, strict=True)),
        mid_depth=mid_depth,
        # diffusers names the number of heads after their width.
        num_heads=_per_level(fields, "attention_head_dim", levels),
        self_attention=None if all(self_attention) else self_attention,
        context_dim=context_dim if mid_depth or any(attention) else None,
        linear_projection=fields["use_linear_projection"],
        groups=fields["norm_num_groups"],
        pooled_dim=_unet_pooled_dim(fields),
        num_classes=fields["num_class_embeds"],
    )


def unet_config_to_diffusers(config: UNetConfig, size_embedding_dim: int = 256) -> dict[str, Any]:
    """Write the config under which diffusers' `UNet2DConditionModel` is the same network.

    Where the U-Net takes a pooled vector, diffusers embeds its sizes itself, each as `size_embedding_dim`
    numbers. Raises InputError for what diffusers can't express: attention without a context, and a middle of
    another depth than the last level's.
    """
    down, up = _unet_block_types([depth > 0 for depth in config.attention_depth])
    pooled = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": size_embedding_dim,
        "projection_class_embeddings_input_dim": config.pooled_dim,
    }
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": list(config.num_heads),
        "block_out_channels": list(config.channels),
        "cross_attention_dim": _unet_context_dim(config),
        "down_block_types": down,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": config.in_channels,
        "layers_per_block": config.res_blocks,
        "mid_block_type": "UNetMidBlock2DCrossAttn" if config.mid_depth else "UNetMidBlock2D",
        "norm_eps": 1e-5,
        "norm_num_groups": config.groups,
        "num_class_embeds": config.num_classes,
        "only_cross_attention": [not has for has in config.self_attentions],
        "out_channels": config.out_channels,
        "transformer_layers_per_block": _unet_depths(config),
        "up_block_types": up,
        "use_linear_projection": config.linear_projection,
    } | (pooled if config.pooled_dim is not None else {})


def _unet_attention(fields: Mapping[str, Any]) -> list[bool]:
    """Which levels have attention, from the names of the blocks, which must be the same on both ways."""
    levels = len(fields["block_out_channels"])
    for name in ("down_block_types", "up_block_types"):
        if len(fields[name]) != levels:
            raise _unsupported(name, fields[name], f"{levels} names, as many as `block_out_channels`")
    attention = [name == "CrossAttnDownBlock2D" for name in fields["down_block_types"]]
    down, up = _unet_block_types(attention)
    for name, expected in (("down_block_types", down), ("up_block_types", up)):
        if list(fields[name]) != expected:
            raise _unsupported(name, fields[name], repr(expected))
    if fields["mid_block_type"] not in ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"):
        expected = "'UNetMidBlock2DCrossAttn' or 'UNetMidBlock2D'"
        raise _unsupported("mid_block_type", fields["mid_block_type"], expected)
    return attention


def _unet_block_types(attention: list[bool]) -> tuple[list[str], list[str]]:
    """diffusers' names of the levels, in its order: down from the first level, up from the last."""
    down = ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention]
    up = ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)]
    return down, up


def _unet_context_dim(config: UNetConfig) -> int:
    """diffusers wants a width even where nothing attends."""
    if config.context_dim is None and (config.mid_depth or any(config.attention_depth)):
        raise InputError("diffusers can't hold this U-Net: it has attention, so it needs a `context_dim`")
    return config.context_dim or UNET_READ["cross_attention_dim"]


def _unet_depths(config: UNetConfig) -> list[int]:
    """One transformer depth per level, where diffusers gives the middle the last level's."""
    last, middle = config.attention_depth[-1], config.mid_depth
    if last and middle and last != middle:
        raise InputError(
            f"diffusers can't hold this U-Net: `mid_depth` = {middle} must equal the last "
            f"`attention_depth` = {last}, or one of them must be 0"
        )
    depths = [depth or 1 for depth in config.attention_depth]
    return [*depths[:-1], last or middle or 1]


def _unet_pooled_dim(fields: Mapping[str, Any]) -> int | None:
    kind = fields["addition_embed_type"]
    if kind not in (None, "text_time"):
        raise _unsupported("addition_embed_type", kind, "None or 'text_time'")
    return fields["projection_class_embeddings_input_dim"] if kind else None


def _per_level(fields: Mapping[str, Any], name: str, levels: int) -> tuple[Any, ...]:
    """A field that may be written once for all levels, as one value per level."""
    value = fields[name]
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * levels
    if len(values) != levels or any(isinstance(v, list | tuple) for v in values):
        raise _unsupported(name, value, f"one value, or {levels}, as many as `block_out_channels`")
    return values


def _same_everywhere(fields: Mapping[str, Any], name: str, levels: int) -> Any:
    values = _per_level(fields, name, levels)
    if len(set(values)) != 1:
        raise _unsupported(name, fields[name], "the same value at every level")
    return values[0]


def _unsupported(name: str, value: object, expected: str) -> InputError:
    return InputError(
        f"the diffusers U-Net config has `{name}` = {value!r}, which isn't supported: expected {expected}"
    )


def autoencoder_config_to_diffusers(config: AutoencoderKLConfig, sample_size: int) -> dict[str, Any]:
    """Write the config under which diffusers' `AutoencoderKL` is the same network, with its 1x1 convs.

    Its latents are normalised by those convs, so that `scaling_factor` is 1; `sample_size` is in pixels.
    """
    attention = [level in config.attention_levels for level in range(len(config.channels))]
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(config.channels),
        "down_block_types": [f"{'Attn' * has}DownEncoderBlock2D" for has in attention],
        "force_upcast": False,
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.res_blocks,
        "mid_block_add_attention": config.mid_attention,
        "norm_num_groups": config.groups,
        "out_channels": config.in_channels,
        "sample_size": sample_size,
        "scaling_factor": 1.0,
        "up_block_types": [f"{'Attn' * has}UpDecoderBlock2D" for has in reversed(attention)],
        "use_post_quant_conv": True,
        "use_quant_conv": True,
    }


def clip_config_to_transformers(config: CLIPTextConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Write the config under which transformers' `CLIPTextModel` is the same network."""
    return {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": config.end_token,
        "hidden_act": config.activation,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": config.context_length,
        "model_type": "clip_text_model",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": config.projection_dim or config.width,
        "vocab_size": config.vocab_size,
    }


def scheduler_config_to_diffusers(
    prediction: Prediction, path: NoisePath, sampler: str, schedule: str
) -> dict[str, Any]:
    """Write the config of diffusers' scheduler for a path: DDIM where `sampler` is ddim, else DPM-Solver++.

    The solver is of second order, or of first order, which is Euler's method, where `sampler` is euler.
    Raises InputError for a path or a prediction on it that diffusers' schedulers don't have.
    """
    if isinstance(path, FlowPath) and prediction == "flow":
        return _dpm_solver(sampler) | {
            "flow_shift": path.shift * WHOLE_TIMESTEPS,
            "num_train_timesteps": path.num_timesteps,
            "prediction_type": "flow_prediction",
            "steps_offset": 1,
            "use_flow_sigmas": True,
        }
    names = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
    if not isinstance(path, DiscretePath) or prediction not in names:
        raise InputError(f"diffusers has no scheduler for prediction {prediction!r} on a {path.kind!r} path")
    trained = {
        "beta_end": path.beta_end,
        "beta_schedule": "squaredcos_cap_v2" if path.beta_schedule == "cosine" else path.beta_schedule,
        "beta_start": path.beta_start,
        "num_train_timesteps": path.num_timesteps,
        "prediction_type": names[prediction],
        "rescale_betas_zero_snr": path.zero_terminal_snr,
        "steps_offset": 1,
        "timestep_spacing": schedule if schedule in ("leading", "trailing") else "linspace",
    }
    if sampler != "ddim":
        return _dpm_solver(sampler) | trained | {"use_karras_sigmas": schedule == "karras"}
    ddim = {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": path.final == "zero"}
    return ddim | trained


def _dpm_solver(sampler: str) -> dict[str, Any]:
    return {
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": "dpmsolver++",
        "final_sigmas_type": "zero",
        "solver_order": 1 if sampler in ("euler", "ddim") else 2,
    }
