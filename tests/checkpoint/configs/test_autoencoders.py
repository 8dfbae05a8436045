"""Configs of autoencoders and their latent spaces to diffusers' fields and back."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoint.configs.helpers import in_file, meta_shapes, published
from tests.networks import on_meta, read_shapes, shapes_of

from darkroom.checkpoint.build import build_autoencoder
from darkroom.checkpoint.configs.autoencoders import (
    AutoencoderConfig,
    autoencoder_config_to_diffusers,
    autoencoder_from_diffusers,
    autoencoder_to_diffusers,
    latent_space_from_diffusers,
    latent_space_to_diffusers,
)
from darkroom.checkpoint.detect import autoencoder_config
from darkroom.checkpoint.layouts import AUTOENCODER_TO_LEGACY
from darkroom.errors import InputError
from darkroom.nn.autoencoder_kl import AutoencoderKLConfig
from darkroom.nn.autoencoder_tiny import AutoencoderTinyConfig
from darkroom.nn.autoencoder_vq import AutoencoderVQConfig
from darkroom.nn.latent_space import LatentSpace

KL = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.6.0"} | {
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
PLAYGROUND = KL | {
    "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
    "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
    "scaling_factor": 0.5,
}
VQ = {"_class_name": "VQModel"} | {
    "block_out_channels": [128, 256, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "layers_per_block": 2,
    "latent_channels": 3,
    "num_vq_embeddings": 8192,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "vq_embed_dim": 3,
}
TINY = {"_class_name": "AutoencoderTiny"} | {
    "act_fn": "relu",
    "block_out_channels": [64, 64, 64, 64],
    "decoder_block_out_channels": [64, 64, 64, 64],
    "encoder_block_out_channels": [64, 64, 64, 64],
    "force_upcast": False,
    "latent_channels": 16,
    "latent_magnitude": 3,
    "latent_shift": 0.5,
    "num_decoder_blocks": [3, 3, 3, 1],
    "num_encoder_blocks": [1, 3, 3, 3],
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
    "upsample_fn": "nearest",
    "upsampling_scaling_factor": 2,
}

PUBLISHED = [
    *((f"{family}.diffusers.vae", "AutoencoderKL") for family in ("sd15", "sd21", "sdxl", "sd3", "flux")),
    *((f"ldm_kl-f{stride}.diffusers", "AutoencoderKL") for stride in (4, 8)),
    *((f"ldm_vq-f{stride}.diffusers", "VQModel") for stride in (4, 8)),
    *((f"{name}.diffusers", "AutoencoderTiny") for name in ("taesd", "taesd3")),
]


@pytest.mark.parametrize(("name", "kind"), PUBLISHED)
def test_published_configs(name: str, kind: str, shared: Path) -> None:
    config = autoencoder_from_diffusers(published(shared, name) | {"_class_name": kind})
    theirs = shapes_of(AUTOENCODER_TO_LEGACY.inverse()(on_meta(read_shapes(shared, name))))
    assert meta_shapes(lambda: build_autoencoder(config)) == theirs
    if not isinstance(config, AutoencoderTinyConfig):
        assert config == autoencoder_config(theirs)


CONFIGS = [
    AutoencoderKLConfig(),
    AutoencoderKLConfig(latent_channels=16, quant_conv=False, res_blocks=1, groups=16),
    AutoencoderKLConfig(
        in_channels=1, channels=(64, 32, 64), mid_attention=False, attention_levels=(0, 2), latent_channels=3
    ),
    AutoencoderVQConfig(),
    AutoencoderVQConfig(channels=(32, 64), attention_levels=(1,), codes=50, latent_channels=4),
    AutoencoderVQConfig(channels=(32,), mid_attention=False, res_blocks=3, groups=8),
    AutoencoderTinyConfig(),
    AutoencoderTinyConfig(in_channels=1, latent_channels=16, channels=32),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_there_and_back(config: AutoencoderConfig) -> None:
    space = LatentSpace.identity(config.latent_channels, config.stride)
    written = in_file(autoencoder_to_diffusers(config, space, 256))
    assert autoencoder_from_diffusers(written) == config
    assert latent_space_from_diffusers(written) == space


@pytest.mark.parametrize("config", CONFIGS)
def test_diffusers_builds_the_same_network(config: AutoencoderConfig) -> None:
    diffusers = pytest.importorskip("diffusers")
    space = LatentSpace.identity(config.latent_channels, config.stride)
    written = autoencoder_to_diffusers(config, space, 256)
    kind = getattr(diffusers, written["_class_name"])
    assert meta_shapes(lambda: kind.from_config(written)) == meta_shapes(lambda: build_autoencoder(config))


def test_the_written_scale_is_the_published_one() -> None:
    for factor, shift in ((0.18215, None), (0.13025, None), (1.5305, 0.0609), (0.3611, 0.1159)):
        fields = {"scaling_factor": factor, "shift_factor": shift}
        assert latent_space_to_diffusers(latent_space_from_diffusers(KL | fields)) == fields


def test_files_of_before_the_factor() -> None:
    assert latent_space_from_diffusers(KL).std == (1 / 0.18215,) * 4
    assert latent_space_from_diffusers(VQ) == LatentSpace.identity(3, 4)
    assert latent_space_from_diffusers(VQ | {"scaling_factor": 0.5}).std == (2.0,) * 3


def test_latents_as_pipelines_decode_them() -> None:
    latents = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shifted = latent_space_from_diffusers(KL | {"scaling_factor": 1.5305, "shift_factor": 0.0609})
    torch.testing.assert_close(shifted.denormalise(latents), latents / 1.5305 + 0.0609)
    mean, std = (torch.tensor(PLAYGROUND[name])[:, None, None] for name in ("latents_mean", "latents_std"))
    spread = latent_space_from_diffusers(PLAYGROUND)
    torch.testing.assert_close(spread.denormalise(latents), latents * std.double() / 0.5 + mean.double())
    torch.testing.assert_close(spread.normalise(spread.denormalise(latents)), latents)


@pytest.mark.parametrize(
    "space",
    [
        LatentSpace.identity(4, 8),
        LatentSpace(channels=4, stride=8, mean=(0.5,) * 4, std=(1.7,) * 4),
        LatentSpace(channels=4, stride=8, mean=(0.5,) * 4, std=(1.0, 2.0, 3.0, 4.0)),
        LatentSpace(channels=4, stride=8, mean=(0.0, 0.1, 0.0, 0.0), std=(0.3,) * 4),
    ],
)
def test_latent_spaces_there_and_back(space: LatentSpace) -> None:
    read = latent_space_from_diffusers(in_file(KL | latent_space_to_diffusers(space)))
    assert replace(read, std=space.std) == space
    assert read.std == pytest.approx(space.std, rel=1e-14)


def test_latents_that_the_convs_normalise() -> None:
    written = autoencoder_config_to_diffusers(AutoencoderKLConfig(quant_conv=False), 64)
    assert autoencoder_from_diffusers(written) == AutoencoderKLConfig(quant_conv=True)
    assert latent_space_from_diffusers(written) == LatentSpace.identity(4, 8)


UNSUPPORTED = [
    (KL, "act_fn", "relu"),
    (KL, "out_channels", 4),
    (KL, "use_post_quant_conv", False),
    (KL, "up_block_types", ["AttnUpDecoderBlock2D"] * 4),
    (KL, "down_block_types", ["AttnSkipDownBlock2D"] * 4),
    (KL, "temporal_compression_ratio", 4),
    (VQ, "norm_type", "spatial"),
    (VQ, "vq_embed_dim", 256),
    (VQ, "lookup_from_codebook", True),
    (VQ, "scaling_factor", 0.0),
    (TINY, "act_fn", "silu"),
    (TINY, "upsample_fn", "bilinear"),
    (TINY, "latent_magnitude", 4),
    (TINY, "num_encoder_blocks", [1, 2, 2, 2]),
    (TINY, "decoder_block_out_channels", [64, 64, 64, 32]),
    (TINY, "encoder_block_out_channels", [64, 64, 64]),
    (TINY, "scaling_factor", 0.18215),
]


@pytest.mark.parametrize(("fields", "field", "value"), UNSUPPORTED)
def test_unsupported_fields_are_named(fields: dict[str, Any], field: str, value: object) -> None:
    with pytest.raises(InputError, match=f"`{field}` = "):
        latent_space_from_diffusers(fields | {field: value})


DISAGREEING = [
    ({"down_block_types": ["DownEncoderBlock2D"] * 3}, "up_block_types"),
    ({"block_out_channels": [128, 256]}, "down_block_types"),
    ({"latents_mean": [0.0] * 4}, "latents_std"),
    ({"latents_std": [1.0] * 4}, "latents_mean"),
    ({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 4}, "latents_mean"),
    ({"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "shift_factor": 0.1}, "shift_factor"),
]


@pytest.mark.parametrize(("changes", "field"), DISAGREEING)
def test_fields_that_disagree(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=f"`{field}` = "):
        latent_space_from_diffusers(KL | changes)


def test_other_classes_are_refused() -> None:
    with pytest.raises(InputError, match=r"'AutoencoderDC'.*Known: AutoencoderKL"):
        autoencoder_from_diffusers(KL | {"_class_name": "AutoencoderDC"})


def test_what_diffusers_cannot_hold() -> None:
    with pytest.raises(InputError, match="`pooled_blocks`"):
        autoencoder_to_diffusers(
            AutoencoderTinyConfig(pooled_blocks=True), LatentSpace.identity(4, 8), sample_size=8
        )
    space = LatentSpace(channels=3, stride=4, mean=(0.0,) * 3, std=(1.0, 1.0, 2.0))
    for wrong in (space, replace(space, mean=(1.0,) * 3, std=(1.0,) * 3)):
        with pytest.raises(InputError, match="`mean` of its latent space must be 0"):
            autoencoder_to_diffusers(AutoencoderVQConfig(), wrong, sample_size=8)
