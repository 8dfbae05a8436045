"""The KL and VQ autoencoders against diffusers with random small weights, and against stored cases."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tests.conftest import relative_error
from torch import Tensor, nn

from darkroom.errors import InputError
from darkroom.nn.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from darkroom.nn.autoencoder_vq import AutoencoderVQ, AutoencoderVQConfig

TOLERANCE = 1e-5

KL_CONFIGS = {
    "stable diffusion": AutoencoderKLConfig(channels=(16, 32, 64, 64), res_blocks=2, groups=8),
    "no quant convs, 16 channels": AutoencoderKLConfig(
        latent_channels=16, channels=(32, 32, 48), res_blocks=1, groups=16, quant_conv=False
    ),
    "no attention": AutoencoderKLConfig(
        latent_channels=3, channels=(16, 64), res_blocks=1, groups=4, mid_attention=False
    ),
    "attention at the last levels, as KL-f32": AutoencoderKLConfig(
        latent_channels=8, channels=(8, 16, 24), res_blocks=2, groups=8, attention_levels=(1, 2)
    ),
    "grey pictures, 3 blocks": AutoencoderKLConfig(in_channels=1, channels=(8, 24), res_blocks=3, groups=8),
}
VQ_CONFIGS = {
    "three levels": AutoencoderVQConfig(channels=(16, 32, 32), res_blocks=1, groups=8, codes=64),
    "attention at the last level, as VQ-f8": AutoencoderVQConfig(
        channels=(16, 24), res_blocks=2, groups=8, codes=50, attention_levels=(1,)
    ),
    "no attention": AutoencoderVQConfig(
        latent_channels=4, channels=(16, 48), res_blocks=2, groups=8, mid_attention=False, codes=100
    ),
}


def reference_fields(config: AutoencoderKLConfig | AutoencoderVQConfig) -> dict:
    attention = ["Attn" * (level in config.attention_levels) for level in range(len(config.channels))]
    return {
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "block_out_channels": config.channels,
        "layers_per_block": config.res_blocks,
        "norm_num_groups": config.groups,
        "mid_block_add_attention": config.mid_attention,
        "down_block_types": tuple(f"{kind}DownEncoderBlock2D" for kind in attention),
        "up_block_types": tuple(f"{kind}UpDecoderBlock2D" for kind in reversed(attention)),
    }


def randomise(module: nn.Module) -> nn.Module:
    """Give every weight and bias its own values, so that none hides a mistake by being 0 or 1."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1)
    return module.eval().requires_grad_(False)


def picture(config: AutoencoderKLConfig | AutoencoderVQConfig, cells: tuple[int, int]) -> Tensor:
    size = [config.stride * n for n in cells]
    return torch.rand(2, config.in_channels, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def latent(config: AutoencoderKLConfig | AutoencoderVQConfig, cells: tuple[int, int]) -> Tensor:
    return torch.randn(2, config.latent_channels, *cells, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("cells", [(4, 4), (3, 5)], ids=str)
@pytest.mark.parametrize("config", KL_CONFIGS.values(), ids=KL_CONFIGS)
def test_kl_equals_diffusers(config: AutoencoderKLConfig, cells: tuple[int, int]) -> None:
    diffusers = pytest.importorskip("diffusers")
    quant = {"use_quant_conv": config.quant_conv, "use_post_quant_conv": config.quant_conv}
    reference = randomise(diffusers.AutoencoderKL(**reference_fields(config), **quant))
    model = AutoencoderKL(config)
    model.load_state_dict(reference.state_dict())
    x, z = picture(config, cells), latent(config, cells)
    expected = reference.encode(x).latent_dist
    with torch.no_grad():
        posterior = model.posterior(x)
        assert relative_error(posterior.mean, expected.mean) <= TOLERANCE
        assert relative_error(posterior.logvar, expected.logvar) <= TOLERANCE
        assert relative_error(posterior.kl(), expected.kl()) <= TOLERANCE
        assert relative_error(model.decode(z), reference.decode(z).sample) <= TOLERANCE
        assert relative_error(posterior.sample(z), expected.mean + expected.std * z) <= TOLERANCE


@pytest.mark.parametrize("cells", [(6, 6), (3, 5)], ids=str)
@pytest.mark.parametrize("config", VQ_CONFIGS.values(), ids=VQ_CONFIGS)
def test_vq_equals_diffusers(config: AutoencoderVQConfig, cells: tuple[int, int]) -> None:
    diffusers = pytest.importorskip("diffusers")
    reference = randomise(diffusers.VQModel(**reference_fields(config), num_vq_embeddings=config.codes))
    reference.quantize.legacy = False
    model = AutoencoderVQ(config)
    model.load_state_dict(reference.state_dict())
    x, z = picture(config, cells), 0.2 * latent(config, cells)
    with torch.no_grad():
        raw = reference.encode(x).latents
        assert relative_error(model.encode(x), raw) <= TOLERANCE
        quantised, loss, (_, _, indices) = reference.quantize(z)
        ours = model.quantize(z)
        assert torch.equal(ours.indices.flatten(), indices)
        assert indices.unique().numel() > 5
        assert relative_error(ours.latents, quantised) <= TOLERANCE
        assert relative_error(ours.loss, loss) <= TOLERANCE
        assert relative_error(model.decode(z), reference.decode(z).sample) <= TOLERANCE
        assert relative_error(model.quantised_reconstruction(x).image, reference(x).sample) <= TOLERANCE


@pytest.mark.parametrize(
    "config", [*KL_CONFIGS.values(), *VQ_CONFIGS.values()], ids=[*KL_CONFIGS, *VQ_CONFIGS]
)
def test_every_weight_and_pixel_matters(config: AutoencoderKLConfig | AutoencoderVQConfig) -> None:
    model = AutoencoderVQ(config) if isinstance(config, AutoencoderVQConfig) else AutoencoderKL(config)
    randomise(model).requires_grad_(True)
    x = picture(config, (3, 4)).requires_grad_(True)
    if isinstance(model, AutoencoderVQ):
        output = model.quantised_reconstruction(x)
        loss = output.image.square().sum() + output.codebook_loss
    else:
        posterior = model.posterior(x)
        loss = model.decode(posterior.sample(latent(config, (3, 4)))).square().sum() + posterior.kl().sum()
    loss.backward()
    # A key's bias adds the same to every score of a row, which softmax ignores.
    idle = [n for n, p in model.named_parameters() if p.grad.norm() == 0 and not n.endswith("to_k.bias")]
    assert idle == []
    assert (x.grad != 0).all()


def read_case(path: Path) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    """The reference's config, its weights, and everything else by name."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    weights = {n.removeprefix("weights/"): v.float() for n, v in tensors.items() if n.startswith("weights/")}
    return config, weights, {n: v for n, v in tensors.items() if not n.startswith("weights/")}


def shape_fields(config: dict) -> dict:
    return {
        "latent_channels": config["latent_channels"],
        "channels": tuple(config["block_out_channels"]),
        "res_blocks": config["layers_per_block"],
        "groups": config["norm_num_groups"],
    }


@pytest.mark.parametrize("name", ["autoencoder_kl_4ch_quant", "autoencoder_kl_16ch_noquant"])
def test_kl_equals_stored_case(shared: Path, name: str) -> None:
    config, weights, case = read_case(shared / f"reference/cases/{name}.safetensors")
    quant_conv = config.get("use_quant_conv", True)
    model = AutoencoderKL(AutoencoderKLConfig(**shape_fields(config), quant_conv=quant_conv))
    model.load_state_dict(weights)
    with torch.no_grad():
        posterior = model.posterior(case["inputs/image"])
        decoded = model.decode_raw(case["inputs/latent"])
        reconstruction = model.decode_raw(posterior.mean)
    assert relative_error(posterior.mean, case["outputs/mean"]) <= TOLERANCE
    assert relative_error((0.5 * posterior.logvar).exp(), case["outputs/std"]) <= TOLERANCE
    assert relative_error(decoded, case["outputs/decoded"]) <= TOLERANCE
    assert relative_error(reconstruction, case["outputs/reconstruction_mode"]) <= TOLERANCE


def test_vq_equals_stored_case(shared: Path) -> None:
    config, weights, case = read_case(shared / "reference/cases/vq_model.safetensors")
    model = AutoencoderVQ(AutoencoderVQConfig(**shape_fields(config), codes=config["num_vq_embeddings"]))
    model.load_state_dict(weights)
    with torch.no_grad():
        raw = model.encode(case["inputs/image"])
        output = model.quantised_reconstruction(case["inputs/image"])
        decoded = model.decode(case["inputs/latent"])
        stored = model.quantize(case["outputs/latents"])
    assert relative_error(raw, case["outputs/latents"]) <= TOLERANCE
    assert torch.equal(stored.indices.flatten(), case["outputs/indices"])
    assert relative_error(stored.latents, case["outputs/quantized"]) <= TOLERANCE
    assert relative_error(output.image, case["outputs/reconstruction"]) <= TOLERANCE
    assert relative_error(decoded, case["outputs/decoded"]) <= TOLERANCE


def test_a_level_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match="`attention_levels` has 3, but levels are 0 to 2"):
        AutoencoderVQConfig(attention_levels=(2, 3))
