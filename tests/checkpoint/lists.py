"""The lists of published checkpoints, and small files of random data under their names."""

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from darkroom.checkpoint.formats.io import save_tensors

Shapes = dict[str, tuple[int, ...]]

# What each list is: its kind, and the family, or what stands there for parts alone.
LISTS: dict[str, tuple[str, str | None]] = {
    "controlnet_flux_canny_instantx.diffusers": ("ControlNet", "flux-dev"),
    "controlnet_flux_union_instantx.diffusers": ("ControlNet", "flux-dev"),
    "controlnet_sd15.diffusers": ("ControlNet", "sd1"),
    "controlnet_sd15.single": ("ControlNet", "sd1"),
    "controlnet_sd21.diffusers": ("ControlNet", "sd2"),
    "controlnet_sd21.single": ("ControlNet", "sd2"),
    "controlnet_sd3_instantx.diffusers": ("ControlNet", "sd3-medium"),
    "controlnet_sdxl_canny.diffusers": ("ControlNet", "sdxl"),
    "dit_xl2_256.diffusers.transformer": ("network", "dit-xl-2-256"),
    "dit_xl2_256.single": ("network", "dit-xl-2-256"),
    # Names and shapes of both sizes are the same there: the first is told.
    "dit_xl2_512.diffusers.transformer": ("network", "dit-xl-2-256"),
    "dit_xl2_512.single": ("network", "dit-xl-2-512"),
    "flux1_dev.diffusers.transformer": ("network", "flux-dev"),
    "flux1_dev.single": ("network", "flux-dev"),
    "flux1_schnell.diffusers.transformer": ("network", "flux-schnell"),
    "flux1_schnell.single": ("network", "flux-schnell"),
    "ldm_celeba256.single.unet": ("network", "ldm-unconditional"),
    "ldm_cin256-v2.single": ("model", "ldm-cin256"),
    "ldm_cin256.single.unet": ("network", "ldm-cin256-f8"),
    "ldm_ffhq256.single.unet": ("network", "ldm-unconditional"),
    "ldm_lsun_churches256.single.unet": ("network", "ldm-churches256"),
    "ldm_text2img256.single.unet": ("network", "ldm-text2img256"),
    "lora.diffusers_legacy_sd15": ("LoRA", "sd1"),
    "lora.flux_ai_toolkit": ("LoRA", "flux-dev"),
    "lora.flux_bfl_control": ("LoRA", "flux-dev"),
    "lora.flux_comfy_bfl": ("LoRA", "flux-dev"),
    "lora.flux_fal_kontext": ("LoRA", "flux-dev"),
    "lora.flux_kohya": ("LoRA", "flux-dev"),
    "lora.flux_xlabs": ("LoRA", "flux-dev"),
    "lora.kohya_sd15": ("LoRA", "sd1"),
    "lora.kohya_sd15_locon": ("LoRA", "sd1"),
    "lora.kohya_sdxl": ("LoRA", "sdxl"),
    "lora.kohya_sdxl_locon": ("LoRA", "sdxl"),
    "lora.lycoris_dora": ("LoRA", "sd1"),
    "lora.lycoris_dora_wd_on_out_false": ("LoRA", "sd1"),
    "lora.lycoris_full": ("LoRA", "sd1"),
    "lora.lycoris_locon": ("LoRA", "sd1"),
    "lora.lycoris_locon_tucker": ("LoRA", "sd1"),
    "lora.lycoris_loha": ("LoRA", "sd1"),
    "lora.lycoris_loha_dora": ("LoRA", "sd1"),
    "lora.lycoris_loha_tucker": ("LoRA", "sd1"),
    "lora.lycoris_lokr": ("LoRA", "sd1"),
    "lora.lycoris_lokr_decompose_both": ("LoRA", "sd1"),
    "lora.lycoris_lokr_full_w2": ("LoRA", "sd1"),
    "lora.lycoris_lokr_tucker": ("LoRA", "sd1"),
    "lora.peft_raw_adapter_model": ("LoRA", "sd1"),
    "lora.peft_sd15": ("LoRA", "sd1"),
    "lora.peft_sd15.text_encoder": ("LoRA", "sd1"),
    "lora.peft_sd15_dora": ("LoRA", "sd1"),
    "lora.peft_sd3": ("LoRA", "sd3-medium"),
    "lora.peft_sdxl": ("LoRA", "sdxl"),
    "lora.sd3_kohya": ("LoRA", "sd3-medium"),
    "playground_v25.diffusers.unet": ("network", "sdxl"),  # whose scheduler alone tells it apart
    "playground_v25.single": ("model", "playground-v2.5"),
    "sd15.diffusers.unet": ("network", "sd1"),
    "sd15.single": ("model", "sd1"),
    "sd15.single.ema_extra": ("averaged copy", None),
    "sd21.diffusers.unet": ("network", "sd2"),
    "sd21.single": ("model", "sd2"),
    "sd3_medium.diffusers.transformer": ("network", "sd3-medium"),
    "sd3_medium.single": ("model", "sd3-medium"),
    "sd3_medium.single_incl_clips_t5": ("model", "sd3-medium"),
    "sd35_large.diffusers.transformer": ("network", "sd3.5-large"),
    "sd35_large.single": ("model", "sd3.5-large"),
    "sd35_medium.diffusers.transformer": ("network", "sd3.5-medium"),
    "sd35_medium.single": ("model", "sd3.5-medium"),
    "sdxl_base.diffusers.unet": ("network", "sdxl"),
    "sdxl_base.single": ("model", "sdxl"),
    "sdxl_refiner.diffusers.unet": ("network", "sdxl-refiner"),
    "sdxl_refiner.single": ("model", "sdxl-refiner"),
    "taesd.diffusers": ("autoencoder", "tiny-autoencoder"),
    "taesd3.diffusers": ("autoencoder", "tiny-autoencoder"),
    **{
        f"{name}.single.{half}": ("half of a tiny autoencoder", None)
        for name in ("taesd", "taesdxl", "taesd3", "taef1")
        for half in ("encoder", "decoder")
    },
    **dict.fromkeys(
        (
            *(f"ldm_kl-f{stride}.single" for stride in (4, 8, 16, 32)),
            *(f"ldm_vq-{name}.single" for name in ("f4", "f4-noattn", "f8", "f8-n256", "f16")),
            *(f"ldm_{name}.diffusers" for name in ("kl-f4", "kl-f8", "vq-f4", "vq-f8")),
            *(f"{name}.diffusers.vae" for name in ("flux", "sd15", "sd21", "sd3", "sdxl")),
            *("sd15.diffusers.vae.legacy_attn", "sd_vae_ft_mse.single", "sdxl_vae.single"),
            *("sd3_vae.single", "flux_ae.single"),
        ),
        ("autoencoder", "autoencoder"),
    ),
    **dict.fromkeys(
        (
            *(f"{name}.diffusers.text_encoder" for name in ("flux", "sd15", "sd21", "sd3", "sdxl")),
            *("sd3.diffusers.text_encoder_2", "sdxl.diffusers.text_encoder_2"),
            *("openclip_vit_bigg14_text", "openclip_vit_h14_text", "openclip_vit_l14_text"),
            *("te_clip_g.single", "te_clip_l.single"),
        ),
        ("text encoder", "clip"),
    ),
    **dict.fromkeys(
        ("flux.diffusers.text_encoder_2", "sd3.diffusers.text_encoder_3", "te_t5xxl.single"),
        ("text encoder", "t5"),
    ),
}
DIVISOR = 8  # keeps widths that divide into heads
NARROWED = 64  # from which dims are divided
HEAVY = 1.5e9  # values of lists that are made narrower still


def narrowed(shapes: Shapes, divisor: int = DIVISOR) -> Shapes:
    """The shapes of the same network made narrower: dims from 64 on are divided."""
    return {
        name: tuple(dim // divisor if dim >= NARROWED else dim for dim in shape)
        for name, shape in shapes.items()
    }


def random_data(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Random half-precision tensors, but for positions and for what is a copy of another tensor."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        first = "transformer_blocks.0.norm1.emb."
        _, embedder, rest = name.partition(".norm1.emb.")
        if embedder and not name.startswith(first):  # which diffusers repeats in every block
            tensors[name] = tensors[first + rest].clone()
        elif name.endswith("position_ids"):
            tensors[name] = torch.arange(shape[-1])[None]
        else:
            tensors[name] = torch.randn(shape, generator=generator).half()
    return tensors


def write_list(shared: Path, name: str, folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """A file with the names of a list and random data, in `folder`, and what it holds."""
    listed = json.loads((shared / f"reference/keys/{name}.json").read_text())["tensors"]
    heavy = sum(math.prod(shape) for shape in listed.values()) > HEAVY
    shapes = narrowed({n: tuple(shape) for n, shape in listed.items()}, 4 * DIVISOR if heavy else DIVISOR)
    tensors = random_data(shapes)
    path = folder / f"{name}.safetensors"
    save_tensors(path, tensors, {"format": "pt"})
    return path, tensors
