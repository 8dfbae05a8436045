"""Tiny random pipelines of diffusers, one a family, with everything in them that the real ones have."""

from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tests.networks import with_unit_gain
from tests.tiny import CAPTIONS
from torch import Tensor

from darkroom.text.t5_tokenizer import train_unigram
from darkroom.text.tokenizer import train_bpe

WIDTH = 16  # of text encoders
LENGTH = 20  # tokens of CLIP


def clip_tokenizer(folder: Path, pad: str | None = None) -> Any:
    """A CLIP tokenizer of a few hundred tokens."""
    train_bpe(CAPTIONS * 2, 540, LENGTH).save(folder)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    if pad is not None:
        tokenizer.pad_token = pad
    return tokenizer


def t5_tokenizer(folder: Path) -> Any:
    """A T5 tokenizer of a few dozen pieces."""
    train_unigram(CAPTIONS * 4, 80, 64).save(folder)
    return transformers.T5TokenizerFast.from_pretrained(folder)


def clip(tokenizer: Any, *, projected: bool = False, seed: int = 0, **fields: Any) -> Any:
    """A CLIP text encoder of three layers."""
    shape = {"hidden_size": WIDTH, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3}
    marks = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        **{"projection_dim": WIDTH, "hidden_act": "quick_gelu"} | shape | marks | fields,
    )
    cls = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return with_unit_gain(cls(config), seed)


def t5(tokenizer: Any, width: int = 40) -> Any:
    """A T5 encoder of two layers."""
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return with_unit_gain(transformers.T5EncoderModel(config), 7)


def vae(channels: int = 4, quant: bool = True, **fields: Any) -> Any:
    """A KL autoencoder of stride 8, or of 4 with `levels` 3."""
    levels = fields.pop("levels", 4)
    network = diffusers.AutoencoderKL(
        block_out_channels=(8, 16, 16, 16)[:levels],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=64,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        **fields,
    )
    return with_unit_gain(network, 3)


def unet(context: int, *, xl: bool = False, **fields: Any) -> Any:
    """A U-Net of two levels."""
    shape: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": context,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    if xl:
        shape |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2),
        }
    return with_unit_gain(diffusers.UNet2DConditionModel(**shape | fields), 5)


SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def sd15(folder: Path, network: Any = None, pipeline: str = "StableDiffusionPipeline", **extra: Any) -> Any:
    tokenizer = clip_tokenizer(folder / "bpe")
    scheduler = diffusers.DDIMScheduler(
        **SD_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading"
    )
    parts = {
        "vae": vae(scaling_factor=0.18215),
        "text_encoder": clip(tokenizer),
        "tokenizer": tokenizer,
        "unet": network or unet(WIDTH),
        "scheduler": scheduler,
    }
    checker = {} if "Depth" in pipeline else {"safety_checker": None, "feature_extractor": None}
    return getattr(diffusers, pipeline)(**parts | checker | extra)


def sd21_v(folder: Path) -> Any:
    tokenizer = clip_tokenizer(folder / "bpe", pad="!")
    scheduler = diffusers.DDIMScheduler(
        **SD_BETAS,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )
    return diffusers.StableDiffusionPipeline(
        vae=vae(scaling_factor=0.18215),
        text_encoder=clip(tokenizer, hidden_act="gelu"),
        tokenizer=tokenizer,
        unet=unet(WIDTH, use_linear_projection=True, attention_head_dim=(2, 4)),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
    )


def xl_parts(folder: Path) -> dict[str, Any]:
    first, second = clip_tokenizer(folder / "bpe"), clip_tokenizer(folder / "bpe2", pad="!")
    return {
        "vae": vae(scaling_factor=0.13025),
        "text_encoder": clip(first),
        "text_encoder_2": clip(second, projected=True, seed=1, hidden_act="gelu", projection_dim=12),
        "tokenizer": first,
        "tokenizer_2": second,
        "scheduler": diffusers.EulerDiscreteScheduler(
            **SD_BETAS, timestep_spacing="leading", steps_offset=1, interpolation_type="linear"
        ),
    }


def sdxl(folder: Path, scheduler: Any = None, **vae_fields: Any) -> Any:
    network = unet(2 * WIDTH, xl=True, projection_class_embeddings_input_dim=12 + 6 * 256)
    parts = xl_parts(folder)
    parts |= {"vae": vae(**vae_fields)} if vae_fields else {}
    parts |= {"scheduler": scheduler} if scheduler is not None else {}
    return diffusers.StableDiffusionXLPipeline(unet=network, **parts)


def sdxl_refiner(folder: Path) -> Any:
    network = unet(WIDTH, xl=True, projection_class_embeddings_input_dim=12 + 5 * 256)
    parts = xl_parts(folder) | {"text_encoder": None, "tokenizer": None}
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        unet=network, requires_aesthetics_score=True, force_zeros_for_empty_prompt=False, **parts
    )


def playground(folder: Path) -> Any:
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(
        sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, final_sigmas_type="zero"
    )
    stats = {
        "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
        "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
    }
    return sdxl(folder, scheduler, scaling_factor=0.5, **stats)


def sd3(folder: Path, *, t5_too: bool = True, **fields: Any) -> Any:
    first, second = clip_tokenizer(folder / "bpe"), clip_tokenizer(folder / "bpe2", pad="!")
    third = t5_tokenizer(folder / "unigram")
    network = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=40,
        caption_projection_dim=32,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=12,
        **fields,
    )
    return diffusers.StableDiffusion3Pipeline(
        vae=vae(16, quant=False, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=clip(first, projected=True),
        text_encoder_2=clip(second, projected=True, seed=1, hidden_act="gelu"),
        text_encoder_3=t5(third) if t5_too else None,
        tokenizer=first,
        tokenizer_2=second,
        tokenizer_3=third if t5_too else None,
        transformer=with_unit_gain(network, 5),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux(folder: Path, *, guided: bool, pipeline: str = "FluxPipeline", in_channels: int = 64) -> Any:
    first, second = clip_tokenizer(folder / "bpe"), t5_tokenizer(folder / "unigram")
    network = diffusers.FluxTransformer2DModel(
        in_channels=in_channels,
        out_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=40,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guided,
        axes_dims_rope=(4, 6, 6),
    )
    shift: dict[str, Any] = {"shift": 3.0, "use_dynamic_shifting": True} if guided else {"shift": 1.0}
    return getattr(diffusers, pipeline)(
        vae=vae(16, quant=False, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=clip(first),
        text_encoder_2=t5(second),
        tokenizer=first,
        tokenizer_2=second,
        transformer=with_unit_gain(network, 5),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**shift),
    )


def dit(folder: Path) -> Any:
    network = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
    )
    with_unit_gain(network, 5)
    for block in network.transformer_blocks[1:]:  # all blocks of a real one have the same embedders
        block.norm1.emb.load_state_dict(network.transformer_blocks[0].norm1.emb.state_dict())
    scheduler = diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False)
    return diffusers.DiTPipeline(transformer=network, vae=vae(scaling_factor=0.18215), scheduler=scheduler)


PIPELINES: dict[str, Callable[[Path], Any]] = {
    "sd15": sd15,
    "sd21_v": sd21_v,
    "sdxl": sdxl,
    "playground": playground,
    "sd3": sd3,
    "sd3_without_t5": partial(sd3, t5_too=False),
    "sd35_large": partial(sd3, qk_norm="rms_norm"),
    "sd35_medium": partial(sd3, qk_norm="rms_norm", dual_attention_layers=(0,)),
    "flux_dev": partial(flux, guided=True),
    "flux_schnell": partial(flux, guided=False),
}


def random_image(height: int, width: int, *, count: int = 1, seed: int = 2) -> Tensor:
    """Images (count, 3, height, width) in −1..1."""
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def recorded(pipe: Any) -> list[Any]:
    """The list into which a pipeline's scheduler will put the latents after each of its steps."""
    latents, step = [], pipe.scheduler.step

    @wraps(step)  # pipelines look at what the method takes
    def recording(*args: Any, **kwargs: Any) -> Any:
        out = step(*args, **kwargs)
        latents.append(out[0] if isinstance(out, tuple) else out.prev_sample)
        return out

    pipe.scheduler.step = recording
    pipe.set_progress_bar_config(disable=True)
    return latents
