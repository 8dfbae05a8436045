"""Configs of DiT, SD 3 and FLUX.1 to diffusers' fields and back."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.checkpoint.configs.helpers import in_file, meta, meta_shapes, published
from tests.networks import read_shapes, shapes_of

from darkroom.checkpoint.build import NetworkConfig, build_network
from darkroom.checkpoint.configs.transformers import (
    dit_config_to_diffusers,
    flux_config_to_diffusers,
    mmdit_config_to_diffusers,
    transformer_config_from_diffusers,
)
from darkroom.checkpoint.layouts import layout_table
from darkroom.errors import InputError
from darkroom.nn.dit import DiTConfig
from darkroom.nn.flux import FluxConfig
from darkroom.nn.mmdit import MMDiTConfig

DIT = {
    "_class_name": "Transformer2DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "cross_attention_dim": None,
    "double_self_attention": False,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_zero",
    "num_embeds_ada_norm": 1000,
    "num_vector_embeds": None,
    "out_channels": 8,
    "sample_size": 32,
    "upcast_attention": False,
}
SD3 = {"_class_name": "SD3Transformer2DModel", "num_layers": 24, "num_attention_heads": 24} | {
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
    "sample_size": 128,
}
FLUX = {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True, "patch_size": 1}

PUBLISHED = [
    *((f"dit_xl2_{size}", "DiTTransformer2DModel") for size in (256, 512)),
    *((name, "SD3Transformer2DModel") for name in ("sd3_medium", "sd35_medium", "sd35_large")),
    *((f"flux1_{name}", "FluxTransformer2DModel") for name in ("dev", "schnell")),
]


def their_shapes(config: NetworkConfig) -> dict[str, tuple[int, ...]]:
    """Those of our network of this config under diffusers' names."""
    table = layout_table(config.kind, "diffusers", config)
    return shapes_of(table(meta(lambda: build_network(config)).state_dict()))


def written(config: NetworkConfig) -> dict[str, Any]:
    """The config as diffusers' file has it."""
    writers = {
        "dit": dit_config_to_diffusers,
        "mmdit": mmdit_config_to_diffusers,
        "flux": flux_config_to_diffusers,
    }
    return in_file(writers[config.kind](config))


@pytest.mark.parametrize(("name", "kind"), PUBLISHED)
def test_published_configs(name: str, kind: str, shared: Path) -> None:
    list_name = f"{name}.diffusers.transformer"
    config = transformer_config_from_diffusers(published(shared, list_name) | {"_class_name": kind})
    assert their_shapes(config) == read_shapes(shared, list_name)


def test_reads_the_released_ones() -> None:
    assert transformer_config_from_diffusers(DIT) == DiTConfig(frequency_shift=1)
    assert transformer_config_from_diffusers(SD3) == MMDiTConfig()
    dual = SD3 | {"qk_norm": "rms_norm", "dual_attention_layers": list(range(13))}
    assert transformer_config_from_diffusers(dual) == MMDiTConfig(qk_norm=True, dual_layers=13)
    assert transformer_config_from_diffusers(FLUX) == FluxConfig()
    fill = FLUX | {"in_channels": 384, "out_channels": 64}
    assert transformer_config_from_diffusers(fill) == FluxConfig(in_channels=96)
    control = FLUX | {"in_channels": 128, "out_channels": 64}
    assert transformer_config_from_diffusers(control) == FluxConfig(in_channels=32)


CONFIGS = [
    DiTConfig(frequency_shift=1),
    DiTConfig(frequency_shift=1, width=24, depth=2, num_heads=2, num_classes=7, sample_size=6),
    DiTConfig(frequency_shift=1, patch_size=1, width=16, num_heads=4, depth=1, out_channels=4, sample_size=3),
    MMDiTConfig(depth=3, num_heads=3, head_width=16, context_dim=24, pooled_dim=20, positions=12),
    MMDiTConfig(depth=2, num_heads=2, head_width=8, qk_norm=True, dual_layers=1, out_channels=8, positions=9),
    MMDiTConfig(depth=1, num_heads=1, head_width=12, dual_layers=1, patch_size=1, in_channels=4),
    FluxConfig(double_blocks=2, single_blocks=1, num_heads=2, axes=(4, 6, 6), context_dim=24, pooled_dim=12),
    FluxConfig(double_blocks=1, single_blocks=2, num_heads=3, axes=(2, 4, 2), guidance=False),
    FluxConfig(double_blocks=1, single_blocks=1, num_heads=1, in_channels=96, axes=(8, 12, 12)),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_there_and_back(config: NetworkConfig) -> None:
    assert transformer_config_from_diffusers(written(config)) == config


@pytest.mark.parametrize("config", CONFIGS)
def test_diffusers_builds_the_same_network(config: NetworkConfig) -> None:
    diffusers = pytest.importorskip("diffusers")
    fields = written(config)
    kind = getattr(diffusers, fields["_class_name"])
    assert meta_shapes(lambda: kind.from_config(fields)) == their_shapes(config)


UNSUPPORTED = [
    (DIT, "norm_type", "ada_norm_single"),
    (DIT, "activation_fn", "geglu"),
    (DIT, "num_embeds_ada_norm", None),
    (DIT, "norm_eps", 1e-3),
    (DIT, "cross_attention_dim", 768),
    (SD3, "caption_projection_dim", 4096),
    (SD3, "qk_norm", "layer_norm"),
    (SD3, "dual_attention_layers", [0, 2]),
    (SD3, "pos_embed_max_size", None),
    (SD3, "pos_embed_type", "sincos"),
    (FLUX, "attention_head_dim", 64),
    (FLUX, "axes_dims_rope", [64, 64]),
    (FLUX, "in_channels", 66),
    (FLUX, "out_channels", 2),
    (FLUX, "patch_size", 2),
]


@pytest.mark.parametrize(("fields", "field", "value"), UNSUPPORTED)
def test_unsupported_fields_are_named(fields: dict[str, Any], field: str, value: object) -> None:
    with pytest.raises(InputError, match=f"`{field}` = "):
        transformer_config_from_diffusers(fields | {field: value})


def test_the_older_class_must_say_that_it_is_a_dit() -> None:
    with pytest.raises(InputError, match="`norm_type` = None"):
        transformer_config_from_diffusers({n: v for n, v in DIT.items() if n != "norm_type"})


@pytest.mark.parametrize("name", [None, "PixArtTransformer2DModel"])
def test_other_classes_are_refused(name: str | None) -> None:
    with pytest.raises(InputError, match="Known: DiTTransformer2DModel"):
        transformer_config_from_diffusers({"_class_name": name})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("frequency_shift", 0),
        ("context_dim", 8),
        ("pooled_dim", 8),
        ("qk_norm", True),
        ("positions", "rope"),
        ("mlp_ratio", 2.0),
        ("num_classes", None),
    ],
)
def test_what_diffusers_cannot_hold(field: str, value: object) -> None:
    with pytest.raises(InputError, match=f"`{field}`"):
        dit_config_to_diffusers(replace(DiTConfig(frequency_shift=1), **{field: value}))
