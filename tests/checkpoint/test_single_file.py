"""Single files of the releases, by the names and shapes of the published ones."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.networks import on_meta, read_shapes, with_unit_gain
from torch import Tensor, nn

from darkroom.checkpoint.build import build_autoencoder, build_network, build_text_encoder
from darkroom.checkpoint.formats.io import save_tensors
from darkroom.checkpoint.formats.quantised import encode_fp8
from darkroom.checkpoint.layouts import (
    CLIP_TEXT_TO_HUB,
    autoencoder_to_original,
    ldm_text_to_original,
    tiny_from_original,
    unet_to_original,
)
from darkroom.checkpoint.single_file import Part, Parts, read_checkpoint, split_checkpoint
from darkroom.errors import InputError
from darkroom.families import FAMILIES
from darkroom.nn.autoencoder_kl import AutoencoderKLConfig
from darkroom.nn.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig
from darkroom.nn.unet import UNet, UNetConfig
from darkroom.text.clip import CLIPTextConfig
from darkroom.text.ldm import LDMTextConfig
from darkroom.text.t5 import T5Config

WHERE = Path("model.safetensors")
UNET, FIRST_STAGE, CONDITION = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
Shapes = dict[str, tuple[int, ...]]

CLIP_L, CLIP_G, OPENCLIP_H, T5_XXL = 123_060_480, 694_659_840, 354_032_640, 4_762_310_656
PROJECTED_L = CLIP_L + 768 * 768
KL, KL_16 = 83_653_863, 83_819_683

# Lists of whole files and of networks: family, parameters of the network, of the autoencoder, of the texts.
MODELS: dict[str, tuple[str, int, int, dict[str, int]]] = {
    "sd15.single": ("sd1", 859_520_964, KL, {"clip_l": CLIP_L}),
    "sd21.single": ("sd2", 865_910_724, KL, {"openclip_h": OPENCLIP_H}),
    "sdxl_base.single": ("sdxl", 2_567_463_684, KL, {"clip_l": CLIP_L, "clip_g": CLIP_G}),
    "sdxl_refiner.single": ("sdxl-refiner", 2_259_526_660, KL, {"clip_g": CLIP_G}),
    "playground_v25.single": ("playground-v2.5", 2_567_463_684, KL, {"clip_l": CLIP_L, "clip_g": CLIP_G}),
    "sd3_medium.single": ("sd3-medium", 2_028_328_000 + 192**2 * 1536, KL_16, {}),
    "sd3_medium.single_incl_clips_t5": (
        "sd3-medium",
        2_028_328_000 + 192**2 * 1536,
        KL_16,
        {"clip_l": PROJECTED_L, "clip_g": CLIP_G, "t5": T5_XXL},
    ),
    "sd35_medium.single": ("sd3.5-medium", 2_243_171_520 + 384**2 * 1536, KL_16, {}),
    "sd35_large.single": ("sd3.5-large", 8_056_627_520 + 192**2 * 2432, KL_16, {}),
    "flux1_dev.single": ("flux-dev", 11_901_408_320, 0, {}),
    "flux1_schnell.single": ("flux-schnell", 11_891_178_560, 0, {}),
    "dit_xl2_256.single": ("dit-xl-2-256", 675_129_632, 0, {}),
    "dit_xl2_512.single": ("dit-xl-2-512", 676_014_368, 0, {}),
    "ldm_cin256-v2.single": ("ldm-cin256", 400_920_579, 55_322_782, {"class_embedder": 1001 * 512}),
    "ldm_cin256.single.unet": ("ldm-cin256-f8", 394_984_196, 0, {}),
    "ldm_text2img256.single.unet": ("ldm-text2img256", 403_623_939, 0, {}),
    "ldm_celeba256.single.unet": ("ldm-unconditional", 274_056_163, 0, {}),
    "ldm_ffhq256.single.unet": ("ldm-unconditional", 274_056_163, 0, {}),
    "ldm_lsun_churches256.single.unet": ("ldm-churches256", 294_966_916, 0, {}),
}
AUTOENCODERS = (
    *(f"ldm_{name}.single" for name in ("vq-f4", "vq-f4-noattn", "vq-f8", "vq-f8-n256", "vq-f16")),
    *(f"ldm_kl-f{stride}.single" for stride in (4, 8, 16, 32)),
    *(f"{name}.single" for name in ("sd_vae_ft_mse", "sdxl_vae", "sd3_vae", "flux_ae")),
    *("sd15.diffusers.vae", "sd15.diffusers.vae.legacy_attn", "ldm_vq-f4.diffusers", "taesd.diffusers"),
)
# The OpenCLIP lists hold one more number, `logit_scale`; of T5's the embedding stands there twice.
TEXTS = {
    "te_clip_l.single": ("clip_l", PROJECTED_L),
    "te_clip_g.single": ("clip_g", CLIP_G),
    "te_t5xxl.single": ("t5", T5_XXL),
    "openclip_vit_l14_text": ("clip_l", 123_650_304),
    "openclip_vit_h14_text": ("openclip_h", OPENCLIP_H),
    "openclip_vit_bigg14_text": ("clip_g", CLIP_G),
    "sd21.diffusers.text_encoder": ("openclip_h", 340_387_840),
}


def under(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def split(shapes: Shapes) -> Parts:
    return split_checkpoint(on_meta(shapes), WHERE)


def strictly(part: Part[Any] | None, build: Any) -> nn.Module:
    """The network of a part, whose tensors must be exactly its own, as they must be in number."""
    assert part is not None
    with torch.device("meta"):
        network = build(part.config)
    network.load_state_dict(part.tensors, strict=True, assign=True)
    return network


def elements(part: Part[Any] | None, build: Any) -> int:
    return sum(tensor.numel() for tensor in strictly(part, build).state_dict().values())


def check(parts: Parts, family: str, network: int, autoencoder: int, texts: dict[str, int]) -> None:
    """Everything is of some part, and as large as was published."""
    assert (parts.family, parts.unknown) == (family, ())
    assert (parts.network is not None) == (network > 0)
    if network:
        assert elements(parts.network, build_network) == network
        assert parts.network is not None
        assert parts.network.config == FAMILIES[family].network
    assert (parts.autoencoder is not None) == (autoencoder > 0)
    if autoencoder:
        assert elements(parts.autoencoder, build_autoencoder) == autoencoder
    assert {role: elements(part, build_text_encoder) for role, part in parts.texts.items()} == texts


@pytest.mark.parametrize("name", MODELS)
def test_published_models(name: str, shared: Path) -> None:
    parts = split(read_shapes(shared, name))
    check(parts, *MODELS[name])
    assert (parts.ignored, parts.markers, parts.scale_factor, parts.latent_stats) == (
        (),
        frozenset(),
        None,
        None,
    )


@pytest.mark.parametrize("name", MODELS)
def test_networks_alone_with_and_without_their_prefix(name: str, shared: Path) -> None:
    family, parameters, _, _ = MODELS[name]
    shapes = read_shapes(shared, name)
    bare = read_shapes(shared, name, UNET) or shapes
    family = "sdxl" if family == "playground-v2.5" else family  # which only two other tensors tell apart
    check(split(bare), family, parameters, 0, {})
    check(split(under(UNET, bare)), family, parameters, 0, {})


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoders_alone(name: str, prefix: str, shared: Path) -> None:
    shapes = read_shapes(shared, name)
    parts = split(under(prefix, shapes))
    family = "tiny-autoencoder" if name.startswith("tae") else "autoencoder"
    check(parts, family, 0, sum(torch.Size(shape).numel() for shape in shapes.values()), {})


@pytest.mark.parametrize("name", ["taesd", "taesdxl", "taesd3", "taef1"])
def test_halves_of_tiny_autoencoders(name: str, shared: Path) -> None:
    halves = {half: read_shapes(shared, f"{name}.single.{half}") for half in ("encoder", "decoder")}
    joined = under("encoder.", halves["encoder"]) | under("decoder.", halves["decoder"])
    published = 2_458_899 if name in ("taesd3", "taef1") else 2_445_063
    check(split(joined), "tiny-autoencoder", 0, published, {})
    for shapes in halves.values():
        with pytest.raises(InputError, match=r"model\.safetensors: is half of a tiny autoencoder"):
            split(shapes)


@pytest.mark.parametrize("name", TEXTS)
def test_text_encoders_alone(name: str, shared: Path) -> None:
    role, parameters = TEXTS[name]
    parts = split(read_shapes(shared, name))
    check(parts, "text-encoder", 0, 0, {role: parameters})
    if isinstance(config := parts.texts[role].config, CLIPTextConfig):
        assert config.activation == ("quick_gelu" if name == "te_clip_l.single" else "gelu")


def test_activations_of_text_encoders(shared: Path) -> None:
    """CLIP's own has the approximate GELU, OpenCLIP's have the exact one, whatever names they come under."""

    def activations(name: str) -> dict[str, str]:
        return {role: part.config.activation for role, part in split(read_shapes(shared, name)).texts.items()
                if isinstance(part.config, CLIPTextConfig)}  # fmt: skip

    assert activations("sd15.single") == {"clip_l": "quick_gelu"}
    assert activations("sd21.single") == {"openclip_h": "gelu"}
    both = {"clip_l": "quick_gelu", "clip_g": "gelu"}
    assert activations("sdxl_base.single") == activations("sd3_medium.single_incl_clips_t5") == both


# Families without a list: those of another one with a wider first layer.
WIDER = [
    ("sd15.single", f"{UNET}input_blocks.0.0.weight", 9, "sd1-inpainting"),
    ("sd21.single", f"{UNET}input_blocks.0.0.weight", 9, "sd2-inpainting"),
    ("sd21.single", f"{UNET}input_blocks.0.0.weight", 5, "sd2-depth"),
    ("flux1_dev.single", "img_in.weight", 384, "flux-fill"),
    ("flux1_dev.single", "img_in.weight", 128, "flux-control"),
]


@pytest.mark.parametrize(("name", "first", "inputs", "family"), WIDER)
def test_wider_inputs(name: str, first: str, inputs: int, family: str, shared: Path) -> None:
    shapes = read_shapes(shared, name)
    width, before, *kernel = shapes[first]
    more = width * (inputs - before) * torch.Size(kernel).numel()
    parts = split(shapes | {first: (width, inputs, *kernel)})
    _, network, autoencoder, texts = MODELS[name]
    check(parts, family, network + more, autoencoder, texts)


def test_depth_model_is_known_but_not_used(shared: Path) -> None:
    shapes = read_shapes(shared, "sd21.single") | {f"{UNET}input_blocks.0.0.weight": (320, 5, 3, 3)}
    parts = split(shapes | {"depth_model.model.pretrained.model.cls_token": (1, 1, 768)})
    assert (parts.family, parts.unknown, parts.ignored) == ("sd2-depth", (), ("depth_model.",))


# U-Nets without a list, and the parameters in millions where they are known.
BY_CONFIG = {
    name: (FAMILIES[name].network, millions)
    for name, millions in {
        "ldm-unconditional": 274.06,  # LSUN beds
        "ldm-super-resolution": 113.62,
        "ldm-inpainting": 387.25,
        "ldm-text2img-large": 872.30,  # the 1.45B one
        "sd-x4-upscaler": 473.40,
    }.items()
}


def original_unet(config: UNetConfig, prefix: str = UNET) -> dict[str, Tensor]:
    """The tensors on `meta` of a U-Net's single file."""
    with torch.device("meta"):
        theirs = unet_to_original(config)(UNet(config).state_dict())
    return {prefix + name: tensor for name, tensor in theirs.items()}


@pytest.mark.parametrize("prefix", [UNET, ""])
@pytest.mark.parametrize("family", BY_CONFIG)
def test_unets_by_their_configs(family: str, prefix: str) -> None:
    config, millions = BY_CONFIG[family]
    parts = split_checkpoint(original_unet(config, prefix), WHERE)
    assert (parts.family, parts.unknown) == (family, ())
    assert parts.network is not None and parts.network.config == config
    assert round(elements(parts.network, build_network) / 1e6, 2) == millions


HEADS = {
    "sd15.single": (8, 8, 8, 8),
    "sd21.single": (5, 10, 20, 20),
    "sdxl_base.single": (5, 10, 20),
    "sdxl_refiner.single": (6, 12, 24, 24),
    "playground_v25.single": (5, 10, 20),
    "ldm_cin256-v2.single": (1, 1, 1, 1),
    "ldm_cin256.single.unet": (8, 8, 8),
    "ldm_text2img256.single.unet": (6, 12, 18, 30),
    "ldm_celeba256.single.unet": (7, 14, 21, 28),
    "ldm_ffhq256.single.unet": (7, 14, 21, 28),
    "ldm_lsun_churches256.single.unet": (8, 8, 8, 8, 8),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_follow_from_the_family(name: str, shared: Path) -> None:
    network = split(read_shapes(shared, name)).network
    assert network is not None and isinstance(network.config, UNetConfig)
    assert network.config.num_heads == HEADS[name]


def test_what_is_beside_the_weights(shared: Path) -> None:
    """Averaged copies, losses and schedules are left out; only what nobody knows is told."""
    shapes = read_shapes(shared, "sd15.single") | read_shapes(shared, "sd15.single.ema_extra")
    shapes |= {"loss.discriminator.main.0.weight": (64, 3, 4, 4), "logvar": (1000,), "lvlb_weights": (1000,)}
    shapes |= {
        "low_scale_model.betas": (1000,),
        f"{CONDITION}transformer.logit_scale": (),
        "what.is.it": (3,),
    }
    shapes |= {f"{UNET}input_blocks.0.0.surplus": (2,), "v_pred": (), "ztsnr": ()}
    parts = split(shapes)
    assert set(parts.unknown) == {"what.is.it", f"{UNET}input_blocks.0.0.surplus"}
    assert parts.ignored == ("model_ema.", "loss.", "low_scale_model.")
    assert parts.markers == {"v_pred", "ztsnr"}
    check(replace(parts, unknown=()), *MODELS["sd15.single"])


def test_inpainting_of_2021_holds_its_first_stage_twice(shared: Path) -> None:
    first_stage = read_shapes(shared, "ldm_vq-f4-noattn.single")
    copies = on_meta(under(FIRST_STAGE, first_stage) | under(CONDITION, first_stage))
    parts = split_checkpoint(original_unet(BY_CONFIG["ldm-inpainting"][0]) | copies, WHERE)
    assert (parts.family, parts.unknown, parts.texts) == ("ldm-inpainting", (), {})
    assert parts.ignored and elements(parts.autoencoder, build_autoencoder) == 53_219_486


@pytest.mark.parametrize("lacking", ["shared.weight", "encoder.embed_tokens.weight", ""])
def test_t5_names_its_embedding_once_or_twice(lacking: str, shared: Path) -> None:
    shapes = {
        name: shape for name, shape in read_shapes(shared, "te_t5xxl.single").items() if name != lacking
    }
    parts = split(shapes)
    check(parts, "text-encoder", 0, 0, {"t5": T5_XXL})
    assert parts.texts["t5"].config == T5Config()


def test_clip_with_and_without_prefix_and_positions(shared: Path) -> None:
    whole = read_shapes(shared, "sd15.single")
    positions = f"{CONDITION}transformer.text_model.embeddings.position_ids"
    assert positions in whole
    check(split({n: s for n, s in whole.items() if n != positions}), *MODELS["sd15.single"])
    check(split({n.replace("text_model.", ""): s for n, s in whole.items()}), *MODELS["sd15.single"])


def test_text_encoder_of_latent_diffusion() -> None:
    config = LDMTextConfig(width=640, layers=3, intermediate=2560)
    with torch.device("meta"):
        tensors = ldm_text_to_original(config)(build_text_encoder(config).state_dict())
    tensors |= on_meta({"to_logits.weight": (30522, 640), "to_logits.bias": (30522,)})
    whole = original_unet(BY_CONFIG["ldm-text2img-large"][0])
    parts = split_checkpoint(whole | {f"{CONDITION}transformer.{n}": t for n, t in tensors.items()}, WHERE)
    assert (parts.family, parts.unknown) == ("ldm-text2img-large", ())
    assert parts.texts["ldm_text"].config == config
    strictly(parts.texts["ldm_text"], build_text_encoder)


def lists(shared: Path, kind: str) -> list[str]:
    return sorted(path.stem for path in (shared / "reference/keys").glob(f"{kind}*.json"))


def test_loras_and_controlnets_are_no_models(shared: Path) -> None:
    for kind, message in (
        ("lora.", "looks like a LoRA"),
        ("controlnet_", "ControlNets steer a model and are no"),
    ):
        names = lists(shared, kind)
        assert len(names) >= 8
        for name in names:
            with pytest.raises(InputError, match=rf"^model\.safetensors: .*{message}"):
                split(read_shapes(shared, name))


NO_MODELS = {
    "ip_adapter.1.to_k_ip.weight": "makes prompts of pictures",
    "emb_params": "a textual inversion",
    "model.diffusion_model.input_blocks.1.0.in_layers.2.weight.absmax": "quantised to 4 bits",
    "down_blocks.0.resnets.0.norm1.weight": "give the folder with its config.json",
    "conv_first.weight": "an upscaler",
    "cond_stage_model.channel_mapper.weight": "paints segmentations",
}


@pytest.mark.parametrize("name", NO_MODELS)
def test_other_files_are_told_apart(name: str) -> None:
    with pytest.raises(InputError, match=rf"^model\.safetensors: .*{NO_MODELS[name]}"):
        split({name: (8, 8)})


def test_a_file_of_unknown_names_lists_ten() -> None:
    names = [f"backbone.{index:02d}.weight" for index in range(14)]
    with pytest.raises(InputError) as error:
        split(dict.fromkeys(names, (2,)))
    assert str(error.value).startswith("model.safetensors: no part of a model that is known")
    assert f"{', '.join(names[:10])} and 4 more" in str(error.value)
    with pytest.raises(InputError, match="no part of a model"):
        split({})


def test_missing_tensors_are_named_as_the_file_would(shared: Path) -> None:
    whole = read_shapes(shared, "sd15.single")
    gone = [f"{UNET}output_blocks.{index}.0.in_layers.0.weight" for index in range(12)]
    with pytest.raises(InputError) as error:
        split({name: shape for name, shape in whole.items() if name not in gone})
    message = f"its unet lacks 12 tensors: {', '.join(sorted(gone)[:10])} and 2 more"
    assert str(error.value) == f"model.safetensors: {message}"
    qkv = "cond_stage_model.model.transformer.resblocks.7.attn.in_proj_weight"
    whole = {name: shape for name, shape in read_shapes(shared, "sd21.single").items() if name != qkv}
    with pytest.raises(InputError, match=f"its text encoder lacks 1 tensors: {qkv}"):
        split(whole)


def test_a_network_of_no_known_family_is_described() -> None:
    config = UNetConfig(in_channels=8, channels=(32, 32), attention_depth=(1, 1), num_heads=(8, 8))
    with pytest.raises(InputError, match=r"its unet \(inputs 8, context 768, .*of no family that is known"):
        split_checkpoint(original_unet(config), WHERE)


SMALL_UNET = UNetConfig(channels=(32, 64), res_blocks=1, attention_depth=(1, 1), num_heads=(8, 8))
SMALL_KL = AutoencoderKLConfig(channels=(32, 64), res_blocks=1)
SMALL_CLIP = CLIPTextConfig(vocab_size=49, layers=2, intermediate=32)


def small_sd1() -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
    """The networks of a small SD 1, and its single file."""
    networks = {
        "network": with_unit_gain(UNet(SMALL_UNET)),
        "autoencoder": with_unit_gain(build_autoencoder(SMALL_KL)),
        "clip_l": with_unit_gain(build_text_encoder(SMALL_CLIP)),
    }
    files = {
        UNET: unet_to_original(SMALL_UNET)(networks["network"].state_dict()),
        FIRST_STAGE: autoencoder_to_original(2)(networks["autoencoder"].state_dict()),
        f"{CONDITION}transformer.": CLIP_TEXT_TO_HUB(networks["clip_l"].state_dict()),
    }
    tensors = {prefix + name: tensor for prefix, group in files.items() for name, tensor in group.items()}
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return networks, tensors


def same(part: Part[Any] | None, network: nn.Module) -> bool:
    assert part is not None and part.config == network.config
    ours = network.state_dict()
    return part.tensors.keys() == ours.keys() and all(
        torch.equal(t, ours[n]) for n, t in part.tensors.items()
    )


def test_a_file_gives_the_weights_that_were_put_in(tmp_path: Path) -> None:
    networks, tensors = small_sd1()
    save_tensors(tmp_path / "sd.safetensors", tensors | {"scale_factor": torch.tensor(0.18215)}, {})
    parts = read_checkpoint(tmp_path / "sd.safetensors")
    assert (parts.family, parts.unknown) == ("sd1", ())
    assert parts.scale_factor == pytest.approx(0.18215)
    assert same(parts.network, networks["network"])
    assert same(parts.autoencoder, networks["autoencoder"])
    assert same(parts.texts["clip_l"], networks["clip_l"])


def test_files_are_converted_on_request(tmp_path: Path) -> None:
    networks, tensors = small_sd1()
    save_tensors(tmp_path / "sd.safetensors", tensors, {})
    half = read_checkpoint(tmp_path / "sd.safetensors", torch.float16)
    for part in (half.network, half.autoencoder, half.texts["clip_l"]):
        assert part is not None and {tensor.dtype for tensor in part.tensors.values()} == {torch.float16}
    name = "conv_in.weight"
    assert half.network is not None
    assert torch.equal(half.network.tensors[name], networks["network"].state_dict()[name].half())


@pytest.mark.parametrize("shape", [(4,), (1, 4, 1, 1)])
def test_playgrounds_statistics_of_latents(shape: tuple[int, ...]) -> None:
    config = replace(SMALL_UNET, context_dim=2048, pooled_dim=2816, linear_projection=True, channels=(64, 64))
    mean, std = (-1.5, 1.75, -1.25, 2.5), (8.5, 5.75, 6.5, 5.25)
    stats = {"edm_mean": torch.tensor(mean).reshape(shape), "edm_std": torch.tensor(std).reshape(shape)}
    parts = split_checkpoint(original_unet(config) | stats, WHERE)
    assert (parts.family, parts.latent_stats) == ("playground-v2.5", (mean, std))
    assert split_checkpoint(original_unet(config), WHERE).family == "sdxl"


@pytest.mark.parametrize("given", ["encoder", "decoder"])
def test_either_half_of_a_tiny_autoencoder_finds_the_other(given: str, tmp_path: Path) -> None:
    tiny = with_unit_gain(AutoencoderTiny(AutoencoderTinyConfig(channels=8)))
    theirs = tiny_from_original().inverse()(tiny.state_dict())
    for half in ("encoder", "decoder"):
        own = {n.removeprefix(f"{half}."): t for n, t in theirs.items() if n.startswith(half)}
        save_tensors(tmp_path / f"taesd_{half}.safetensors", own, {})
    parts = read_checkpoint(tmp_path / f"taesd_{given}.safetensors")
    assert parts.family == "tiny-autoencoder" and same(parts.autoencoder, tiny)
    (tmp_path / f"taesd_{'encoder' if given == 'decoder' else 'decoder'}.safetensors").unlink()
    with pytest.raises(InputError, match=rf"taesd_{given}\.safetensors: is half .* must lie beside it"):
        read_checkpoint(tmp_path / f"taesd_{given}.safetensors")


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
def test_pickles_are_read_and_nothing_in_them_is_run(suffix: str, tmp_path: Path) -> None:
    networks, tensors = small_sd1()
    saved = {"state_dict": tensors, "callbacks": Evil(tmp_path / "ran"), "global_step": 7}
    torch.save(saved, tmp_path / f"sd{suffix}")
    parts = read_checkpoint(tmp_path / f"sd{suffix}")
    assert (parts.family, parts.unknown) == ("sd1", ())
    assert same(parts.network, networks["network"]) and same(parts.autoencoder, networks["autoencoder"])
    assert not (tmp_path / "ran").exists()


class Evil:
    """What would make a folder if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_scaled_float8_is_read_as_full_weights(tmp_path: Path) -> None:
    networks, tensors = small_sd1()
    scaled = encode_fp8(tensors, scaled=True)
    assert any(name.endswith("scale_weight") for name in scaled)
    save_tensors(tmp_path / "sd.safetensors", scaled, {})
    parts = read_checkpoint(tmp_path / "sd.safetensors", torch.float32)
    assert (parts.family, parts.unknown) == ("sd1", ()) and parts.network is not None
    for name, tensor in networks["network"].state_dict().items():
        found = parts.network.tensors[name]
        assert found.dtype == torch.float32
        assert (found - tensor).norm() <= 0.05 * tensor.norm()


def test_files_that_are_not_there_or_cut_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"sd\.safetensors: no such file"):
        read_checkpoint(tmp_path / "sd.safetensors")
    (tmp_path / "sd.safetensors").write_bytes(b"half of it")
    with pytest.raises(InputError, match=r"sd\.safetensors: truncated"):
        read_checkpoint(tmp_path / "sd.safetensors")
