"""Original files of small models that are real in everything that tells families apart."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.closeness import assert_parity
from tests.networks import with_unit_gain
from tests.tiny import CAPTIONS
from torch import Tensor

import darkroom
from darkroom.checkpoint.build import build_autoencoder, build_network, build_text_encoder
from darkroom.checkpoint.configs.text import clip_config_to_transformers, t5_config_to_transformers
from darkroom.checkpoint.family_rows import ROWS
from darkroom.checkpoint.formats.io import save_tensors
from darkroom.checkpoint.layouts import (
    CLIP_TEXT_TO_HUB,
    CLIP_TEXT_TO_OPENCLIP,
    autoencoder_to_original,
    unet_to_original,
)
from darkroom.checkpoint.load import load_any_autoencoder
from darkroom.checkpoint.model import Model, check_fit
from darkroom.diffusion.denoiser import Denoiser
from darkroom.errors import InputError
from darkroom.families import FAMILIES
from darkroom.nn.autoencoder_kl import AutoencoderKLConfig
from darkroom.nn.autoencoder_vq import AutoencoderVQConfig
from darkroom.nn.dit import DiTConfig
from darkroom.nn.flux import FluxConfig
from darkroom.nn.mmdit import MMDiTConfig
from darkroom.nn.unet import UNetConfig
from darkroom.pipeline import Pipeline
from darkroom.text.clip import CLIPTextConfig
from darkroom.text.conditioning import TextPart
from darkroom.text.find import find_tokenizer
from darkroom.text.t5 import T5Config
from darkroom.text.t5_tokenizer import train_unigram
from darkroom.text.tokenizer import train_bpe

VOCAB = 540
CLIP_L = CLIPTextConfig(vocab_size=VOCAB, layers=2, intermediate=32)
CLIP_G = CLIPTextConfig(
    vocab_size=VOCAB, layers=2, width=1280, heads=20, intermediate=32, activation="gelu", projection_dim=1280
)
OPENCLIP_H = replace(CLIP_G, width=1024, heads=16, projection_dim=1024, layers=3)
T5 = T5Config(vocab_size=80, layers=1, heads=1, intermediate=16)
KL = AutoencoderKLConfig(channels=(32, 32, 32, 32), res_blocks=1)
KL_16 = replace(KL, latent_channels=16, quant_conv=False)
VQ = AutoencoderVQConfig(channels=(32, 32, 32), res_blocks=1, codes=64)
UNET = UNetConfig(
    channels=(32, 64),
    res_blocks=1,
    attention_depth=(1, 1),
    num_heads=(8, 8),
    context_dim=768,
    linear_projection=False,
)
SD2 = replace(UNET, channels=(64, 128), num_heads=(1, 2), context_dim=1024, linear_projection=True)
XL = replace(SD2, context_dim=2048, pooled_dim=2816)

SMALL: dict[str, dict[str, Any]] = {
    "sd1": {"network": UNET, "autoencoder": KL, "texts": {"clip_l": CLIP_L}},
    "sd1-inpainting": {
        "network": replace(UNET, in_channels=9),
        "autoencoder": KL,
        "texts": {"clip_l": CLIP_L},
    },
    "sd2": {"network": SD2, "autoencoder": KL, "texts": {"openclip_h": OPENCLIP_H}},
    "sdxl": {"network": XL, "autoencoder": KL, "texts": {"clip_l": CLIP_L, "clip_g": CLIP_G}},
    "sdxl-refiner": {
        "network": replace(XL, context_dim=1280, pooled_dim=2560),
        "autoencoder": KL,
        "texts": {"clip_g": CLIP_G},
    },
    "playground-v2.5": {"network": XL, "autoencoder": KL, "texts": {"clip_l": CLIP_L, "clip_g": CLIP_G}},
    "sd3-medium": {
        "network": MMDiTConfig(depth=2, num_heads=1, positions=12),
        "autoencoder": KL_16,
        "texts": {"clip_l": CLIP_L, "clip_g": CLIP_G, "t5": T5},
    },
    "flux-dev": {
        "network": FluxConfig(double_blocks=1, single_blocks=1, num_heads=1),
        "autoencoder": KL_16,
        "texts": {"clip_l": CLIP_L, "t5": T5},
    },
    "flux-schnell": {
        "network": FluxConfig(double_blocks=1, single_blocks=1, num_heads=1, guidance=False),
        "autoencoder": KL_16,
        "texts": {"clip_l": CLIP_L, "t5": T5},
    },
    "dit-xl-2-256": {"network": DiTConfig(width=72, depth=1, num_heads=1), "autoencoder": KL, "texts": {}},
    "ldm-cin256": {
        "network": replace(UNET, in_channels=3, out_channels=3, num_heads=(1, 1), context_dim=512),
        "autoencoder": VQ,
        "texts": FAMILIES["ldm-cin256"].texts,
    },
}
PREFIX = {
    "sd1": {"clip_l": "cond_stage_model.transformer."},
    "sd2": {"openclip_h": "cond_stage_model.model."},
    "sdxl": {"clip_l": "conditioner.embedders.0.transformer.", "clip_g": "conditioner.embedders.1.model."},
    "sdxl-refiner": {"clip_g": "conditioner.embedders.0.model."},
    "sd3": {role: f"text_encoders.{name}.transformer." for role, name in
            {"clip_l": "clip_l", "clip_g": "clip_g", "t5": "t5xxl"}.items()},
    "ldm": {"class_embedder": "cond_stage_model."},
}  # fmt: skip


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    train_bpe(CAPTIONS * 2, VOCAB, 77).save(folder / "clip")
    train_unigram(CAPTIONS * 4, 80, 64).save(folder / "t5")
    return folder


def build(name: str, tokenizers: Path) -> Model:
    """A small model of a family with random weights."""
    shapes, spec = SMALL[name], FAMILIES[name].spec
    kinds = {"clip_l": "clip", "clip_g": "clip_g", "openclip_h": "openclip_h", "t5": "t5"}
    texts = tuple(
        TextPart(
            with_unit_gain(build_text_encoder(config), seed),
            find_tokenizer(kinds[role], [tokenizers]) if role in kinds else None,
        )
        for seed, (role, config) in enumerate(shapes["texts"].items())
    )
    ids = VOCAB if not texts or texts[0].tokenizer is None else texts[0].tokenizer.vocab_size
    assert ids == VOCAB, "the encoders above are made for so many"
    model = Model(
        autoencoder=with_unit_gain(build_autoencoder(shapes["autoencoder"], spec.latent_space), 8),
        denoiser=Denoiser(with_unit_gain(build_network(shapes["network"]), 9), spec.path, spec.prediction),
        texts=texts,
        spec=spec,
    )
    check_fit(model, name)
    return model


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def original(name: str, model: Model) -> dict[str, Tensor]:
    """The tensors of a model's single file."""
    network, autoencoder = model.network, model.autoencoder
    tensors = dict(network.state_dict())
    if isinstance(network.config, UNetConfig):
        tensors = unet_to_original(network.config)(tensors)
    bare = name.startswith(("flux", "dit"))
    whole = under("" if bare else "model.diffusion_model.", tensors)
    table = autoencoder_to_original(len(autoencoder.config.channels))
    whole |= {} if bare else under("first_stage_model.", table(autoencoder.state_dict()))
    for role, part in zip(SMALL[name]["texts"], model.texts, strict=True):
        whole |= {} if bare else under(prefix_of(name, role), text_tensors(name, role, part))
    if name == "playground-v2.5":
        space = model.spec.latent_space
        whole["edm_mean"] = torch.tensor(space.mean).reshape(1, 4, 1, 1)
        whole["edm_std"] = torch.tensor(space.std).reshape(1, 4, 1, 1) / 2
    return whole


def prefix_of(name: str, role: str) -> str:
    key = next(key for key in (name, "sdxl" if "play" in name else name.split("-")[0]) if key in PREFIX)
    return PREFIX[key][role]


def text_tensors(name: str, role: str, part: TextPart) -> dict[str, Tensor]:
    """A text encoder's tensors as a single file of the family holds them."""
    tensors = dict(part.encoder.state_dict())
    if role == "openclip_h" or (role == "clip_g" and not name.startswith("sd3")):
        return CLIP_TEXT_TO_OPENCLIP(tensors)
    return CLIP_TEXT_TO_HUB(tensors) if role.startswith("clip") else tensors


def stats(model: Model) -> Tensor:
    return torch.tensor([model.spec.latent_space.mean, model.spec.latent_space.std])


def asked(name: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "prompt": "red apple, 3d style",
        "seed": 1,
        "steps": 2,
        "width": 48,
        "height": 64,
    }
    if name.startswith(("dit", "ldm")):
        options["prompt"] = 7
    if name == "sd1-inpainting":
        generator = torch.Generator().manual_seed(0)
        options |= {"image": torch.rand(1, 3, 64, 48, generator=generator) * 2 - 1}
        options |= {"mask": torch.rand(1, 1, 64, 48, generator=generator)}
    return options


@pytest.mark.parametrize("name", SMALL)
def test_an_original_file_draws_what_its_model_draws(name: str, tokenizers: Path, tmp_path: Path) -> None:
    model = build(name, tokenizers)
    save_tensors(tmp_path / "model.safetensors", original(name, model), {})
    parts = []
    if name.startswith(("flux", "dit")):  # files of the network alone
        table = autoencoder_to_original(len(model.autoencoder.config.channels))
        save_tensors(tmp_path / "ae.safetensors", table(model.autoencoder.state_dict()), {})
        parts.append(tmp_path / "ae.safetensors")
    if name.startswith("flux"):
        for role, part in zip(SMALL[name]["texts"], model.texts, strict=True):
            save_tensors(tmp_path / f"{role}.safetensors", text_tensors(name, role, part), {})
            parts.append(tmp_path / f"{role}.safetensors")
    loaded = darkroom.load(tmp_path / "model.safetensors", parts=parts, tokenizers=tokenizers, device="cpu")
    space = loaded.model.spec.latent_space  # Playground's file holds it in float32
    torch.testing.assert_close(torch.tensor([space.mean, space.std]), stats(model))
    assert replace(loaded.model.spec, latent_space=model.spec.latent_space) == model.spec
    assert loaded.model.network.config == model.network.config
    first, second = Pipeline(model)(**asked(name)), loaded(**asked(name))
    assert np.asarray(first.images[0]).std() > 10
    assert_parity(second.latents, first.latents)


def test_clip_l_is_used_without_its_projection(tokenizers: Path, tmp_path: Path) -> None:
    """Its files hold one, and SD 3's and FLUX's code leaves it out."""
    model = build("sd3-medium", tokenizers)
    tensors = original("sd3-medium", model)
    plain, projected = tmp_path / "plain.safetensors", tmp_path / "projected.safetensors"
    save_tensors(plain, tensors, {})
    prefix = PREFIX["sd3"]["clip_l"]
    save_tensors(projected, tensors | {f"{prefix}text_projection.weight": torch.randn(768, 768)}, {})
    a, b = (darkroom.load(path, tokenizers=tokenizers, device="cpu") for path in (plain, projected))
    assert torch.equal(a(**asked("sd3-medium")).latents, b(**asked("sd3-medium")).latents)


def test_parts_may_be_folders_of_diffusers(tokenizers: Path, tmp_path: Path) -> None:
    """As FLUX's own repository has its autoencoder and its text encoders."""
    pytest.importorskip("diffusers")
    from tests.parity.pipelines import vae

    model = build("flux-dev", tokenizers)
    path = tmp_path / "flux1-dev.safetensors"
    save_tensors(path, original("flux-dev", model), {})
    their_vae = vae(16, quant=False, scaling_factor=0.3611, shift_factor=0.1159)
    their_vae.save_pretrained(tmp_path / "vae")
    clip, t5 = model.texts
    for name, config, tensors in (
        (
            "text_encoder",
            clip_config_to_transformers(CLIP_L, clip.tokenizer),
            text_tensors("", "clip_l", clip),
        ),
        ("text_encoder_2", t5_config_to_transformers(T5), text_tensors("", "t5", t5)),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        save_tensors(tmp_path / name / "model.safetensors", tensors, {})
    parts = [tmp_path / name for name in ("vae", "text_encoder", "text_encoder_2")]
    loaded = darkroom.load(path, parts=parts, tokenizers=tokenizers, device="cpu")
    assert loaded.model.autoencoder.latent_space == model.spec.latent_space
    result = loaded("red apple, 3d style", seed=1, steps=2, width=48, height=64)
    expected = Pipeline(model)("red apple, 3d style", seed=1, steps=2, width=48, height=64)
    assert_parity(result.latents, expected.latents)


def test_every_family_that_a_file_can_be_is_known() -> None:
    assert {row.family for row in ROWS} <= FAMILIES.keys()


def test_a_network_alone_says_what_it_lacks(tokenizers: Path, tmp_path: Path) -> None:
    model = build("flux-dev", tokenizers)
    path = tmp_path / "flux1-dev.safetensors"
    save_tensors(path, original("flux-dev", model), {})
    with pytest.raises(
        InputError, match=r"flux1-dev\.safetensors: holds no autoencoder: give its file or folder"
    ):
        darkroom.load(path)
    ae = tmp_path / "ae.safetensors"
    save_tensors(ae, autoencoder_to_original(4)(model.autoencoder.state_dict()), {})
    with pytest.raises(InputError, match=r"no text encoder 'clip_l' in it: give its file .*clip_l, t5"):
        darkroom.load(path, parts=[ae], tokenizers=tokenizers)
    with pytest.raises(InputError, match=r"ae\.safetensors: holds an autoencoder but no denoising network"):
        darkroom.load(ae)
    with pytest.raises(InputError, match="unknown family 'flux-deb': did you mean 'flux-dev'"):
        darkroom.load(path, family="flux-deb")


def test_a_tokenizer_that_is_nowhere_is_named(
    tokenizers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tensors(tmp_path / "sd.safetensors", original("sd1", build("sd1", tokenizers)), {})
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no cache"))
    monkeypatch.delenv("DARKROOM_TOKENIZERS", raising=False)
    with pytest.raises(InputError, match="tokenizer") as error:
        darkroom.load(tmp_path / "sd.safetensors")
    assert str(tmp_path) in str(error.value) and "DARKROOM_TOKENIZERS" in str(error.value)


def test_parts_of_two_families_are_told_apart(tokenizers: Path, tmp_path: Path) -> None:
    """An SD 3 network with SD 1's autoencoder, and SDXL's network with the text encoder of SD 2."""
    sd3 = original("sd3-medium", build("sd3-medium", tokenizers))
    no_vae = {name: t for name, t in sd3.items() if not name.startswith("first_stage_model.")}
    save_tensors(tmp_path / "sd3.safetensors", no_vae, {})
    sd1 = build("sd1", tokenizers)
    save_tensors(tmp_path / "vae.safetensors", autoencoder_to_original(4)(sd1.autoencoder.state_dict()), {})
    with pytest.raises(InputError, match="latent channels is 4 in the autoencoder, 16 in the denoiser's"):
        darkroom.load(
            tmp_path / "sd3.safetensors", parts=[tmp_path / "vae.safetensors"], tokenizers=tokenizers
        )
    model = build("sd2", tokenizers)
    narrow = replace(model, denoiser=build("sd1", tokenizers).denoiser)
    with pytest.raises(InputError, match="context width is 1024 in the text encoder, 768 in the denoiser"):
        check_fit(narrow, "mixed")


def test_another_autoencoder_takes_the_models_place(tokenizers: Path, tmp_path: Path) -> None:
    model = build("sd1", tokenizers)
    save_tensors(tmp_path / "sd.safetensors", original("sd1", model), {})
    other = with_unit_gain(build_autoencoder(KL), 77)
    save_tensors(tmp_path / "better.safetensors", autoencoder_to_original(4)(other.state_dict()), {})
    loaded = darkroom.load(
        tmp_path / "sd.safetensors",
        parts=[tmp_path / "better.safetensors"],
        tokenizers=tokenizers,
        device="cpu",
    )
    assert loaded.model.autoencoder.latent_space == model.spec.latent_space
    latents = torch.randn(1, 4, 4, 4)
    other.latent_space = model.spec.latent_space
    assert_parity(loaded.decode(latents), other.decode(latents))
    alone = load_any_autoencoder(tmp_path / "sd.safetensors")
    assert alone.latent_space == model.spec.latent_space
    assert_parity(alone.decode(latents), model.autoencoder.decode(latents))
