"""The open models, one entry a family: data about them, and how their parts are used.

Files of the original releases hold weights and little else; what they leave out stands here. Figures come
from the releases' configs and papers.
"""

from dataclasses import dataclass, replace

from darkroom.checkpoint.build import AutoencoderConfig, NetworkConfig, TextConfig
from darkroom.checkpoint.model import Defaults, DenoiserSpec
from darkroom.diffusion.path import DiscretePath, EDMPath, FlowPath, SizeShift
from darkroom.family_parts import (
    CHURCHES_UNET,
    CIN_F8_UNET,
    CIN_UNET,
    CLIP_G,
    CLIP_L,
    FACES_UNET,
    FLUX_SPACE,
    INPAINTING_UNET,
    KL_16,
    KL_F4,
    KL_F8,
    OPENCLIP_H,
    PLAYGROUND_SPACE,
    REFINER_UNET,
    SD1_SPACE,
    SD1_UNET,
    SD2_UNET,
    SD3_SPACE,
    SUPER_RESOLUTION_UNET,
    T5_XXL,
    UPSCALER_UNET,
    VQ_F4,
    VQ_F8,
    VQ_SPACE,
    XL_SPACE,
    XL_UNET,
    scaled,
)
from darkroom.nn.autoencoder_vq import AutoencoderVQConfig
from darkroom.nn.class_embedder import ClassEmbedderConfig
from darkroom.nn.dit import DiTConfig
from darkroom.nn.flux import FluxConfig
from darkroom.nn.latent_space import LatentSpace
from darkroom.nn.mmdit import MMDiTConfig
from darkroom.text.conditioning import (
    ClassConditioning,
    FluxConditioning,
    NoConditioning,
    SD3Conditioning,
    TextConditioning,
    XLConditioning,
)
from darkroom.text.ldm import LDMTextConfig


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model that people have on their disks.

    `texts` are its text encoders by role, in the order in which its conditioning takes them; those named in
    `optional` may be left out. `note` says where common figures differ.
    """

    title: str
    year: int
    licence: str
    network: NetworkConfig
    autoencoder: AutoencoderConfig
    texts: dict[str, TextConfig]
    spec: DenoiserSpec
    optional: tuple[str, ...] = ()
    note: str = ""


SD_SPEC = DenoiserSpec(
    prediction="eps",
    # Stable Diffusion's own sampler ends at the first trained level, which lacks 0.04 % of the latents.
    path=DiscretePath(final="first_level"),
    latent_space=SD1_SPACE,
    defaults=Defaults(
        width=512, height=512, steps=50, guidance_scale=7.5, sampler="ddim", schedule="leading"
    ),
)
V_SPEC = replace(
    SD_SPEC,
    prediction="v",
    conditioning=TextConditioning(layer=-2),
    defaults=replace(SD_SPEC.defaults, width=768, height=768),
)
SD2_SPEC = replace(SD_SPEC, conditioning=TextConditioning(layer=-2))
XL_SPEC = DenoiserSpec(
    prediction="eps",
    path=DiscretePath(),
    latent_space=XL_SPACE,
    conditioning=XLConditioning(),
    defaults=Defaults(
        width=1024,
        height=1024,
        steps=50,
        guidance_scale=5.0,
        sampler="euler",
        schedule="leading",
        strength=0.3,
    ),
)
SD3_SPEC = DenoiserSpec(
    prediction="flow",
    path=FlowPath(shift=3.0),
    latent_space=SD3_SPACE,
    conditioning=SD3Conditioning(),
    defaults=Defaults(
        width=1024,
        height=1024,
        steps=28,
        guidance_scale=7.0,
        sampler="euler",
        schedule="linspace",
        strength=0.6,
    ),
)
FLUX_SPEC = DenoiserSpec(
    prediction="flow",
    path=FlowPath(size_shift=SizeShift()),
    latent_space=FLUX_SPACE,
    conditioning=FluxConditioning(),
    defaults=Defaults(
        width=1024,
        height=1024,
        steps=28,
        guidance_scale=3.5,
        sampler="euler",
        schedule="flow",
        strength=0.6,
    ),
)
LDM_SPEC = DenoiserSpec(
    prediction="eps",
    path=DiscretePath(beta_start=0.0015, beta_end=0.0195, final="first_level"),
    latent_space=VQ_SPACE,
    defaults=Defaults(
        width=256, height=256, steps=200, guidance_scale=1.0, sampler="ddim", schedule="leading"
    ),
    conditioning=NoConditioning(),
)
DIT_SPEC = DenoiserSpec(
    prediction="eps",
    path=DiscretePath(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
    latent_space=SD1_SPACE,
    conditioning=ClassConditioning(),
    defaults=Defaults(
        width=256, height=256, steps=250, guidance_scale=4.0, sampler="ddim", schedule="linspace"
    ),
)


def _drawing(spec: DenoiserSpec, **defaults: float | str) -> DenoiserSpec:
    """The spec with other defaults of generation."""
    return replace(spec, defaults=replace(spec.defaults, **defaults))


OPENRAIL, STABILITY = "CreativeML OpenRAIL-M", "Stability AI Community License"
OPENRAIL_PP = "CreativeML Open RAIL++-M"
FLUX_NC = "FLUX.1 [dev] Non-Commercial License: no commercial use"

SD1 = Family(
    title="Stable Diffusion 1.5",
    year=2022,
    licence=OPENRAIL,
    network=SD1_UNET,
    autoencoder=KL_F8,
    texts={"clip_l": CLIP_L},
    spec=SD_SPEC,
)
SD2 = Family(
    title="Stable Diffusion 2.1",
    year=2022,
    licence=OPENRAIL_PP,
    network=SD2_UNET,
    autoencoder=KL_F8,
    texts={"openclip_h": OPENCLIP_H},
    spec=V_SPEC,
    note="the 768 px model predicts v, the 512 px one (sd2-base) eps, with the same names and shapes",
)
XL = Family(
    title="Stable Diffusion XL 1.0 base",
    year=2023,
    licence=OPENRAIL_PP,
    network=XL_UNET,
    autoencoder=KL_F8,
    texts={"clip_l": CLIP_L, "clip_g": CLIP_G},
    spec=XL_SPEC,
    note="the often quoted 3.5B counts the text encoders and the autoencoder",
)
SD3 = Family(
    title="Stable Diffusion 3 medium",
    year=2024,
    licence=STABILITY,
    network=MMDiTConfig(),
    autoencoder=KL_16,
    texts={"clip_l": CLIP_L, "clip_g": CLIP_G, "t5": T5_XXL},
    spec=SD3_SPEC,
    optional=("t5",),
    note="the 2B of its name are the network's; T5-XXL, which may be left out, is larger",
)
FLUX = Family(
    title="FLUX.1 [dev]",
    year=2024,
    licence=FLUX_NC,
    network=FluxConfig(),
    autoencoder=KL_16,
    texts={"clip_l": CLIP_L, "t5": T5_XXL},
    spec=FLUX_SPEC,
    note="distilled: guidance is an input of the network",
)
LDM = Family(
    title="LDM CelebA-HQ, FFHQ, LSUN beds 256",
    year=2021,
    licence="MIT",
    network=FACES_UNET,
    autoencoder=VQ_F4,
    texts={},
    spec=LDM_SPEC,
)
DIT = Family(
    title="DiT-XL/2 256",
    year=2022,
    licence="CC BY-NC 4.0: no commercial use",
    network=DiTConfig(),
    autoencoder=KL_F8,
    texts={},
    spec=DIT_SPEC,
    note="often given as 675.1M, with its fixed positions, which are not learned",
)

FAMILIES: dict[str, Family] = {
    "ldm-unconditional": LDM,
    "ldm-cin256": replace(
        LDM,
        title="LDM class-conditional ImageNet 256",
        network=CIN_UNET,
        texts={"class_embedder": ClassEmbedderConfig()},
        spec=_drawing(replace(LDM_SPEC, conditioning=ClassConditioning()), steps=50, guidance_scale=3.0),
    ),
    "ldm-cin256-f8": replace(
        LDM,
        title="LDM class-conditional ImageNet 256, of VQ-f8",
        network=CIN_F8_UNET,
        autoencoder=VQ_F8,
        texts={"class_embedder": ClassEmbedderConfig()},
        spec=replace(
            _drawing(LDM_SPEC, steps=50, guidance_scale=3.0),
            conditioning=ClassConditioning(),
            latent_space=LatentSpace.identity(4, 8),
        ),
    ),
    "sd1": SD1,
    "sd1-inpainting": replace(
        SD1,
        title="Stable Diffusion 1.5 inpainting",
        network=replace(SD1_UNET, in_channels=9),
        spec=replace(SD_SPEC, beside="inpaint"),
    ),
    "sd2": SD2,
    "sd2-base": replace(SD2, title="Stable Diffusion 2.1 base", spec=SD2_SPEC),
    "sd2-inpainting": replace(
        SD2,
        title="Stable Diffusion 2 inpainting",
        network=replace(SD2_UNET, in_channels=9),
        spec=replace(SD2_SPEC, beside="inpaint"),
        note="",
    ),
    "sd2-depth": replace(
        SD2,
        title="Stable Diffusion 2 depth",
        network=replace(SD2_UNET, in_channels=5),
        spec=replace(SD2_SPEC, beside="depth"),
        note="takes a depth map; the network that estimates one is not part of it here",
    ),
    "sd-x4-upscaler": replace(
        SD2,
        title="Stable Diffusion x4 upscaler",
        network=UPSCALER_UNET,
        autoencoder=KL_F4,
        spec=replace(
            _drawing(V_SPEC, steps=75, guidance_scale=9.0, width=2048, height=2048),
            latent_space=scaled(4, 4, 0.08333),
            path=DiscretePath(beta_start=0.0001, beta_end=0.02, final="first_level"),
            beside="upscale",
        ),
        note="",
    ),
    "dit-xl-2-256": DIT,
    "dit-xl-2-512": replace(
        DIT,
        title="DiT-XL/2 512",
        network=DiTConfig(sample_size=64),
        spec=_drawing(DIT_SPEC, width=512, height=512),
    ),
    "sdxl": XL,
    "sdxl-refiner": replace(
        XL,
        title="Stable Diffusion XL 1.0 refiner",
        network=REFINER_UNET,
        texts={"clip_g": CLIP_G},
        spec=replace(XL_SPEC, conditioning=XLConditioning(aesthetic=True, zero_blank=False)),
        note="draws the last fifth of the steps of the base, or goes over finished pictures",
    ),
    "playground-v2": replace(
        XL,
        title="Playground v2 1024",
        licence="Playground v2 Community License",
        spec=_drawing(XL_SPEC, sampler="euler_ancestral", guidance_scale=3.0),
        note="SDXL's names and shapes: files do not tell it from SDXL, which then only differs in defaults",
    ),
    "playground-v2.5": replace(
        XL,
        title="Playground v2.5 1024",
        year=2024,
        licence="Playground v2.5 Community License",
        spec=replace(
            _drawing(XL_SPEC, sampler="dpmpp_2m", schedule="karras", guidance_scale=3.0),
            prediction="edm",
            path=EDMPath(),
            latent_space=PLAYGROUND_SPACE,
        ),
        note="SDXL's network, trained as EDM",
    ),
    "sd3-medium": SD3,
    "sd3.5-medium": replace(
        SD3,
        title="Stable Diffusion 3.5 medium",
        network=MMDiTConfig(positions=384, qk_norm=True, dual_layers=13),
        spec=_drawing(SD3_SPEC, steps=40, guidance_scale=4.5),
        note="the 2.5B of its name are 2.2B of learned weights and positions",
    ),
    "sd3.5-large": replace(
        SD3,
        title="Stable Diffusion 3.5 large",
        network=MMDiTConfig(depth=38, num_heads=38, qk_norm=True),
        spec=_drawing(SD3_SPEC, steps=40, guidance_scale=4.5),
        note="",
    ),
    "sd3.5-large-turbo": replace(
        SD3,
        title="Stable Diffusion 3.5 large turbo",
        network=MMDiTConfig(depth=38, num_heads=38, qk_norm=True),
        spec=_drawing(SD3_SPEC, steps=4, guidance_scale=1.0),
        note="names and shapes of 3.5 large: say 4 steps and guidance 1 with a single file",
    ),
    "flux-dev": FLUX,
    "flux-schnell": replace(
        FLUX,
        title="FLUX.1 [schnell]",
        licence="Apache-2.0",
        network=FluxConfig(guidance=False),
        spec=replace(
            _drawing(FLUX_SPEC, steps=4, guidance_scale=1.0),
            path=FlowPath(),
            conditioning=FluxConditioning(t5_length=256, distilled=False),
        ),
        note="drawn in 1 to 4 steps",
    ),
    "flux-fill": replace(
        FLUX,
        title="FLUX.1 Fill [dev]",
        network=FluxConfig(in_channels=96),
        spec=replace(_drawing(FLUX_SPEC, steps=50, guidance_scale=30.0), beside="fill"),
    ),
    "flux-control": replace(
        FLUX,
        title="FLUX.1 Canny, Depth [dev]",
        network=FluxConfig(in_channels=32),
        spec=replace(_drawing(FLUX_SPEC, steps=50, guidance_scale=30.0), beside="control"),
        note="takes a picture of edges (guidance 30) or depth (guidance 10)",
    ),
    "flux-kontext": replace(
        FLUX,
        title="FLUX.1 Kontext [dev]",
        year=2025,
        spec=replace(_drawing(FLUX_SPEC, guidance_scale=2.5), beside="reference"),
        note="names and shapes of dev: say the family with a single file",
    ),
    "ldm-churches256": replace(
        LDM,
        title="LDM LSUN churches 256",
        autoencoder=KL_F8,
        network=CHURCHES_UNET,
        spec=replace(
            LDM_SPEC,
            path=DiscretePath(beta_start=0.0015, beta_end=0.0155, final="first_level"),
            latent_space=LatentSpace.identity(4, 8),
        ),
        note="its latents are scaled by a number in its file",
    ),
    "ldm-text2img256": replace(
        LDM,
        title="LDM text to image 256, small",
        network=replace(CIN_UNET, num_heads=(6, 12, 18, 30), context_dim=640),
        texts={"ldm_text": LDMTextConfig(width=640)},
        spec=_drawing(replace(LDM_SPEC, conditioning=TextConditioning()), steps=50, guidance_scale=5.0),
    ),
    "ldm-text2img-large": replace(
        LDM,
        title="LDM text to image 256, 1.45B",
        network=replace(SD1_UNET, context_dim=1280),
        autoencoder=KL_F8,
        texts={"ldm_text": LDMTextConfig(width=1280)},
        spec=replace(SD_SPEC, defaults=replace(SD_SPEC.defaults, width=256, height=256, guidance_scale=5.0)),
    ),
    "ldm-super-resolution": replace(
        LDM,
        title="LDM super-resolution x4",
        network=SUPER_RESOLUTION_UNET,
        spec=replace(
            _drawing(LDM_SPEC, steps=100),
            path=DiscretePath(beta_start=0.0015, beta_end=0.0155, final="first_level"),
            beside="enlarge",
        ),
    ),
    "ldm-inpainting": replace(
        LDM,
        title="LDM inpainting",
        network=INPAINTING_UNET,
        autoencoder=AutoencoderVQConfig(mid_attention=False),
        spec=replace(
            _drawing(LDM_SPEC, steps=50, width=512, height=512),
            path=DiscretePath(beta_start=0.0015, beta_end=0.0205, final="first_level"),
            beside="masked_inpaint",
        ),
    ),
}
