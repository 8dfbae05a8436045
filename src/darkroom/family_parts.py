"""The networks, text encoders and latent spaces that the open models are made of."""

from dataclasses import replace

from darkroom.nn.autoencoder_kl import AutoencoderKLConfig
from darkroom.nn.autoencoder_tiny import AutoencoderTinyConfig
from darkroom.nn.autoencoder_vq import AutoencoderVQConfig
from darkroom.nn.class_embedder import ClassEmbedderConfig
from darkroom.nn.latent_space import LatentSpace
from darkroom.nn.unet import UNetConfig
from darkroom.text.clip import CLIPTextConfig
from darkroom.text.ldm import LDMTextConfig
from darkroom.text.t5 import T5Config


def scaled(channels: int, stride: int, scale: float, shift: float = 0.0) -> LatentSpace:
    """The latent space (raw - shift) * scale, the same for all channels."""
    return LatentSpace(
        channels=channels, stride=stride, mean=(shift,) * channels, std=(1 / scale,) * channels
    )


CLIP_L = CLIPTextConfig()
OPENCLIP_H = CLIPTextConfig(width=1024, layers=24, heads=16, activation="gelu", projection_dim=1024)
CLIP_G = CLIPTextConfig(width=1280, layers=32, heads=20, activation="gelu", projection_dim=1280)
T5_XXL = T5Config()

KL_F8 = AutoencoderKLConfig()
KL_F4 = AutoencoderKLConfig(channels=(128, 256, 512))
KL_16 = AutoencoderKLConfig(latent_channels=16, quant_conv=False)
VQ_F4 = AutoencoderVQConfig()
VQ_F8 = AutoencoderVQConfig(
    latent_channels=4, channels=(128, 256, 256, 512), codes=16384, attention_levels=(3,)
)
# Small stand-ins for the large autoencoders, by the families that they decode for.
TINY_AUTOENCODERS = {
    "taesd": ("Stable Diffusion 1, 2", AutoencoderTinyConfig()),
    "taesdxl": ("SDXL, Playground v2", AutoencoderTinyConfig()),
    "taesd3": ("Stable Diffusion 3, 3.5", AutoencoderTinyConfig(latent_channels=16)),
    "taef1": ("FLUX.1", AutoencoderTinyConfig(latent_channels=16)),
    "taef2": ("FLUX.2", AutoencoderTinyConfig(latent_channels=32, pooled_blocks=True)),
}

SD1_SPACE = scaled(4, 8, 0.18215)
XL_SPACE = scaled(4, 8, 0.13025)
SD3_SPACE = scaled(16, 8, 1.5305, 0.0609)
FLUX_SPACE = scaled(16, 8, 0.3611, 0.1159)
# Published as (raw - mean) * 0.5 / std.
PLAYGROUND_SPACE = LatentSpace(
    channels=4,
    stride=8,
    mean=(-1.6574, 1.886, -1.383, 2.5155),
    std=tuple(2 * std for std in (8.4927, 5.9022, 6.5498, 5.2299)),
)
VQ_SPACE = LatentSpace.identity(3, 4)

SD1_UNET = UNetConfig()
SD2_UNET = UNetConfig(num_heads=(5, 10, 20, 20), context_dim=1024, linear_projection=True)
XL_UNET = UNetConfig(
    channels=(320, 640, 1280),
    attention_depth=(0, 2, 10),
    mid_depth=10,
    num_heads=(5, 10, 20),
    context_dim=2048,
    linear_projection=True,
    pooled_dim=2816,
)
REFINER_UNET = UNetConfig(
    channels=(384, 768, 1536, 1536),
    attention_depth=(0, 4, 4, 0),
    mid_depth=4,
    num_heads=(6, 12, 24, 24),
    context_dim=1280,
    linear_projection=True,
    pooled_dim=2560,
)
UPSCALER_UNET = UNetConfig(
    in_channels=7,
    channels=(256, 512, 512, 1024),
    attention_depth=(0, 1, 1, 1),
    num_heads=(8, 8, 8, 8),
    self_attention=(True, False, False, True),  # the first level has no attention at all
    context_dim=1024,
    linear_projection=True,
    num_classes=1000,
)
CIN_UNET = UNetConfig(
    in_channels=3,
    out_channels=3,
    channels=(192, 384, 576, 960),
    attention_depth=(0, 1, 1, 1),
    num_heads=(1, 1, 1, 1),
    context_dim=512,
)

FACES_UNET = UNetConfig(
    in_channels=3,
    out_channels=3,
    channels=(224, 448, 672, 896),
    attention_depth=(0, 1, 1, 1),
    num_heads=(7, 14, 21, 28),
    context_dim=None,
    plain_attention=True,
)
CHURCHES_UNET = UNetConfig(
    channels=(192, 384, 384, 768, 768),
    attention_depth=(1, 1, 1, 1, 0),
    num_heads=(8,) * 5,
    context_dim=None,
    plain_attention=True,
    scale_shift_norm=True,
    resblock_updown=True,
)
SUPER_RESOLUTION_UNET = replace(
    FACES_UNET,
    in_channels=6,
    channels=(160, 320, 320, 640),
    attention_depth=(0, 0, 0, 1),
    num_heads=(5, 10, 10, 20),
)
INPAINTING_UNET = replace(
    FACES_UNET, in_channels=7, channels=(256, 512, 768, 1024), num_heads=(8,) * 4, resblock_updown=True
)
CIN_F8_UNET = replace(
    CIN_UNET,
    in_channels=4,
    out_channels=4,
    channels=(256, 512, 1024),
    attention_depth=(1, 1, 1),
    num_heads=(8, 8, 8),
)

# Networks beside those that denoise, by the names under which they are recognised in files.
KNOWN_PARTS: dict[
    str,
    AutoencoderKLConfig
    | AutoencoderVQConfig
    | AutoencoderTinyConfig
    | CLIPTextConfig
    | T5Config
    | LDMTextConfig
    | ClassEmbedderConfig,
] = {
    "KL f8 (SD 1, 2, XL)": KL_F8,
    "KL f8, 16 channels (SD 3, FLUX.1)": KL_16,
    "KL f4": replace(KL_F4, latent_channels=3),
    "KL f4 (x4 upscaler)": KL_F4,
    "KL f16": AutoencoderKLConfig(
        latent_channels=16, channels=(128, 128, 256, 256, 512), attention_levels=(4,)
    ),
    "KL f32": AutoencoderKLConfig(
        latent_channels=64, channels=(128, 128, 256, 256, 512, 512), attention_levels=(4, 5)
    ),
    "VQ f4": VQ_F4,
    "VQ f4 without attention": AutoencoderVQConfig(mid_attention=False),
    "VQ f8": VQ_F8,
    "VQ f8, 256 codes": replace(VQ_F8, codes=256),
    "VQ f16": AutoencoderVQConfig(
        latent_channels=8, channels=(128, 128, 256, 256, 512), codes=16384, attention_levels=(4,)
    ),
    **{f"tiny, {families}": config for families, config in dict(TINY_AUTOENCODERS.values()).items()},
    "clip_l": CLIP_L,
    "clip_l with projection": replace(CLIP_L, projection_dim=768),
    "openclip_h": OPENCLIP_H,
    "openclip_h, 23 layers": replace(OPENCLIP_H, layers=23, projection_dim=None),
    "clip_g": CLIP_G,
    "clip_g without projection": replace(CLIP_G, projection_dim=None),
    "t5": T5_XXL,
    "ldm_text, 640 wide": LDMTextConfig(width=640),
    "ldm_text, 1280 wide": LDMTextConfig(width=1280),
    "class_embedder": ClassEmbedderConfig(num_classes=1001, width=512),
}
