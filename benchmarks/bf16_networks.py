"""The networks of `bf16_families.py`: every family at real size, beside its reference."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from darkroom.checkpoint.configs.autoencoders import autoencoder_config_to_diffusers
from darkroom.checkpoint.configs.unet import unet_config_to_diffusers
from darkroom.checkpoint.layouts import (
    CLIP_TEXT_TO_HUB,
    dit_to_diffusers,
    flux_to_diffusers,
    mmdit_to_diffusers,
)
from darkroom.family_parts import CIN_UNET, CLIP_G, KL_16, OPENCLIP_H, REFINER_UNET, SD2_UNET, XL_UNET
from darkroom.nn.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from darkroom.nn.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig
from darkroom.nn.dit import DiT, DiTConfig
from darkroom.nn.extra import Extra
from darkroom.nn.flux import PATCH, Flux, FluxConfig, pack, positions, unpack
from darkroom.nn.mmdit import MMDiT, MMDiTConfig
from darkroom.nn.unet import UNet, UNetConfig, size_embedding
from darkroom.text.clip import CLIPTextConfig, CLIPTextEncoder
from darkroom.text.t5 import T5Config, T5Encoder

Tensors = dict[str, Tensor]
Call = Callable[[Any, Tensors], Tensor]

# These are given in float32 to every network, and are exact in bfloat16, to which diffusers rounds some.
EXACT = ("timestep", "guidance", "sizes", "places")
TIMESTEP, EDM_TIMESTEP, GUIDANCE = 500.0, 0.625, 4.0
STRIDE = 8
SIZES = (1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0)  # SDXL's, of which its refiner has 5
SIZE_DIM, POOLED_TEXT = 256, 1280
END = 20  # place of the end mark in a text of 77


@dataclass(frozen=True, kw_only=True)
class Family:
    """A network of ours and the reference's: how to build and call both, and what they are given.

    `normal` has the shapes of inputs drawn from a normal distribution, `given` the other inputs; `table`
    takes our weights to the reference's names; `gains` multiply the weights whose names end so.
    """

    name: str
    size: str
    network: Callable[[], nn.Module]
    reference: Callable[[], nn.Module]
    table: Callable[[Tensors], Tensors]
    normal: dict[str, tuple[int, ...]]
    given: Tensors
    ours: Call
    theirs: Call
    gains: dict[str, float] = field(default_factory=dict)


def unet(
    name: str,
    config: UNetConfig,
    pixels: int,
    *,
    tokens: int = 77,
    sizes: int = 0,
    stride: int = STRIDE,
    timestep: float = TIMESTEP,
) -> Family:
    """A U-Net; `sizes` counts the numbers that SDXL embeds beside the pooled text."""
    fields = unet_config_to_diffusers(config, SIZE_DIM)
    side, context_dim = pixels // stride, config.context_dim or 0
    given = {"timestep": torch.tensor([timestep]), "sizes": torch.tensor([SIZES[:sizes]])}
    text = (config.pooled_dim or 0) - SIZE_DIM * sizes

    def ours(network: UNet, v: Tensors) -> Tensor:
        pooled = torch.cat([v["pooled"].float(), size_embedding(v["sizes"])], dim=1) if sizes else None
        return network(v["x"], v["timestep"], v["context"], extra=Extra(pooled=pooled))

    def theirs(model: Any, v: Tensors) -> Tensor:
        added = {"text_embeds": v["pooled"], "time_ids": v["sizes"]}
        return model(v["x"], v["timestep"], v["context"], added_cond_kwargs=added).sample

    return Family(
        name=name,
        size=f"{pixels} px",
        network=partial(UNet, config),
        reference=lambda: _diffusers().UNet2DConditionModel.from_config(fields),
        table=dict,
        normal={
            "x": (1, config.in_channels, side, side),
            "context": (1, tokens, context_dim),
            "pooled": (1, text),
        },
        given=given,
        ours=ours,
        theirs=theirs,
    )


def mmdit(name: str, config: MMDiTConfig, pixels: int, *, tokens: int = 333) -> Family:
    """SD 3's network with two CLIP texts of 77 tokens side by side and one of T5's, 256 tokens."""
    side = pixels // STRIDE

    def ours(network: MMDiT, v: Tensors) -> Tensor:
        return network(v["x"], v["timestep"], v["context"], extra=Extra(pooled=v["pooled"]))

    def reference() -> nn.Module:
        return _diffusers().SD3Transformer2DModel(
            sample_size=128,
            patch_size=config.patch_size,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            num_layers=config.depth,
            attention_head_dim=config.head_width,
            num_attention_heads=config.num_heads,
            joint_attention_dim=config.context_dim,
            caption_projection_dim=config.width,
            pooled_projection_dim=config.pooled_dim,
            pos_embed_max_size=config.positions,
            qk_norm="rms_norm" if config.qk_norm else None,
            dual_attention_layers=tuple(range(config.dual_layers)),
        )

    return Family(
        name=name,
        size=f"{pixels} px, {tokens} tokens",
        network=partial(MMDiT, config),
        reference=reference,
        table=mmdit_to_diffusers(config),
        normal={
            "x": (1, config.in_channels, side, side),
            "context": (1, tokens, config.context_dim),
            "pooled": (1, config.pooled_dim),
        },
        given={"timestep": torch.tensor([TIMESTEP])},
        ours=ours,
        theirs=lambda model, v: model(v["x"], v["context"], v["pooled"], v["timestep"]).sample,
    )


def flux(name: str, config: FluxConfig, pixels: int, *, tokens: int) -> Family:
    """FLUX.1's network."""
    side = pixels // STRIDE
    rows = side // PATCH

    def ours(network: Flux, v: Tensors) -> Tensor:
        extra = Extra(pooled=v["pooled"], guidance=v["guidance"] if config.guidance else None)
        return network(v["x"], v["timestep"], v["context"], extra=extra)

    def theirs(model: Any, v: Tensors) -> Tensor:
        places = {"txt_ids": v["places"][:tokens], "img_ids": v["places"][tokens:]}
        t, guidance = v["timestep"] / 1000, v["guidance"] if config.guidance else None
        output = model(pack(v["x"]), v["context"], v["pooled"], t, guidance=guidance, **places)
        return unpack(output.sample, rows)

    def reference() -> nn.Module:
        return _diffusers().FluxTransformer2DModel(
            patch_size=1,
            in_channels=PATCH**2 * config.in_channels,
            num_layers=config.double_blocks,
            num_single_layers=config.single_blocks,
            attention_head_dim=config.head_width,
            num_attention_heads=config.num_heads,
            joint_attention_dim=config.context_dim,
            pooled_projection_dim=config.pooled_dim,
            guidance_embeds=config.guidance,
            axes_dims_rope=config.axes,
        )

    return Family(
        name=name,
        size=f"{pixels} px, {tokens} tokens",
        network=partial(Flux, config),
        reference=reference,
        table=flux_to_diffusers(config),
        normal={
            "x": (1, config.in_channels, side, side),
            "context": (1, tokens, config.context_dim),
            "pooled": (1, config.pooled_dim),
        },
        given={
            "timestep": torch.tensor([TIMESTEP]),
            "guidance": torch.tensor([GUIDANCE]),
            "places": positions(tokens, [(rows, rows)]).float(),
        },
        ours=ours,
        theirs=theirs,
    )


def dit(name: str, config: DiTConfig) -> Family:
    """A DiT with classes, its timestep's frequencies spaced as diffusers spaces them."""
    config = replace(config, frequency_shift=1)
    side = config.sample_size

    def ours(network: DiT, v: Tensors) -> Tensor:
        return network(v["x"], v["timestep"], None, extra=Extra(class_labels=v["labels"]))

    def reference() -> nn.Module:
        return _diffusers().DiTTransformer2DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.width // config.num_heads,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            num_layers=config.depth,
            sample_size=side,
            patch_size=config.patch_size,
            num_embeds_ada_norm=config.num_classes,
            norm_eps=1e-6,
        )

    return Family(
        name=name,
        size=f"{side * STRIDE} px",
        network=partial(DiT, config),
        reference=reference,
        table=dit_to_diffusers(config),
        normal={"x": (1, config.in_channels, side, side)},
        given={"timestep": torch.tensor([TIMESTEP]), "labels": torch.tensor([3])},
        ours=ours,
        theirs=lambda model, v: model(v["x"], v["timestep"], v["labels"]).sample,
    )


def autoencoders(name: str, config: AutoencoderKLConfig, pixels: int) -> list[Family]:
    """A KL autoencoder's encoder, up to the mean of its Gaussian, and its decoder."""
    quant = {"use_quant_conv": config.quant_conv, "use_post_quant_conv": config.quant_conv}
    fields = autoencoder_config_to_diffusers(config, pixels) | quant
    side = pixels // config.stride
    shared = Family(
        name=f"{name} encode",
        size=f"{pixels} px",
        network=partial(AutoencoderKL, config),
        reference=lambda: _diffusers().AutoencoderKL.from_config(fields),
        table=dict,
        normal={"image": (1, 3, pixels, pixels), "z": (1, config.latent_channels, side, side)},
        given={},
        ours=lambda network, v: network.posterior(v["image"]).mean,
        theirs=lambda model, v: model.encode(v["image"]).latent_dist.mean,
    )
    decoder = replace(
        shared,
        name=f"{name} decode",
        ours=lambda network, v: network.decode_raw(v["z"]),
        theirs=lambda model, v: model.decode(v["z"]).sample,
    )
    return [shared, decoder]


def tiny_autoencoder(name: str, config: AutoencoderTinyConfig, pixels: int) -> Family:
    """The decoder of a tiny autoencoder."""
    side = pixels // STRIDE

    def reference() -> nn.Module:
        widths = (config.channels,) * 4
        return _diffusers().AutoencoderTiny(
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            latent_channels=config.latent_channels,
        )

    return Family(
        name=name,
        size=f"{pixels} px",
        network=partial(AutoencoderTiny, config),
        reference=reference,
        table=dict,
        normal={"z": (1, config.latent_channels, side, side)},
        given={},
        ours=lambda network, v: network.decode(v["z"]),
        theirs=lambda model, v: model.decode(v["z"]).sample,
        gains={"weight": 1.2},  # makes up for the half that ReLU takes
    )


def clip(name: str, config: CLIPTextConfig) -> Family:
    """A CLIP text encoder; its output is all that pipelines read: two layers' states and the pooled one."""
    ids = _tokens(config.vocab_size - 2, config.context_length)
    ids[:, END:] = config.end_token
    projected = config.projection_dim is not None

    def ours(network: CLIPTextEncoder, v: Tensors) -> Tensor:
        states = network(v["ids"])
        return torch.cat([t.flatten() for t in (states.hidden[-2], states.last, states.pooled)])

    def theirs(model: Any, v: Tensors) -> Tensor:
        output = model(v["ids"], output_hidden_states=True)
        pooled = output.text_embeds if projected else output.pooler_output
        return torch.cat([t.flatten() for t in (output.hidden_states[-2], output.last_hidden_state, pooled)])

    def reference() -> nn.Module:
        import transformers

        fields = transformers.CLIPTextConfig(
            vocab_size=config.vocab_size,
            max_position_embeddings=config.context_length,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.mlp_width,
            hidden_act=config.activation,
            projection_dim=config.projection_dim or config.width,
            eos_token_id=config.end_token,
            bos_token_id=0,
            pad_token_id=1,
        )
        kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
        return kind(fields)

    return Family(
        name=name,
        size=f"{config.context_length} tokens",
        network=partial(CLIPTextEncoder, config),
        reference=reference,
        table=lambda ours: ours | CLIP_TEXT_TO_HUB(ours),  # version 5 has no prefix: both are offered
        normal={},
        given={"ids": ids},
        ours=ours,
        theirs=theirs,
    )


def t5(name: str, config: T5Config, tokens: int) -> Family:
    """T5's encoder, its queries drawn as small as T5's own, which no root of the width divides."""

    def reference() -> nn.Module:
        import transformers

        fields = transformers.T5Config(
            vocab_size=config.vocab_size,
            d_model=config.width,
            d_kv=config.head_width,
            d_ff=config.intermediate,
            num_layers=config.layers,
            num_heads=config.heads,
            relative_attention_num_buckets=config.buckets,
            relative_attention_max_distance=config.max_distance,
            feed_forward_proj="gated-gelu",
        )
        return transformers.T5EncoderModel(fields)

    return Family(
        name=name,
        size=f"{tokens} tokens",
        network=partial(T5Encoder, config),
        reference=reference,
        table=lambda ours: ours | {"encoder.embed_tokens.weight": ours["shared.weight"]},
        normal={},
        given={"ids": _tokens(config.vocab_size, tokens)},
        ours=lambda network, v: network(v["ids"]),
        theirs=lambda model, v: model(v["ids"]).last_hidden_state,
        gains={"SelfAttention.q.weight": config.head_width**-0.5},
    )


SD35_MEDIUM = MMDiTConfig(positions=384, qk_norm=True, dual_layers=13)
SD35_LARGE = MMDiTConfig(depth=38, num_heads=38, qk_norm=True)


def families(*, tiny: bool) -> list[Family]:
    """Every family, or all of them shrunk to a few thousand weights."""

    def config(real: Any) -> Any:
        return _shrunk(real) if tiny else real

    def px(pixels: int) -> int:
        return pixels // 8 if tiny else pixels

    return [
        clip("CLIP-L text encoder", config(CLIPTextConfig())),
        clip("OpenCLIP-H text encoder", config(OPENCLIP_H)),
        clip("OpenCLIP-bigG text encoder", config(CLIP_G)),
        t5("T5-XXL encoder", config(T5Config()), 256),
        tiny_autoencoder("TAESD decode", config(AutoencoderTinyConfig()), px(512)),
        *autoencoders("SD autoencoder (f8, 4 ch)", config(AutoencoderKLConfig()), px(512)),
        *autoencoders("SDXL autoencoder (f8, 4 ch)", config(AutoencoderKLConfig()), px(1024)),
        *autoencoders("SD3, FLUX autoencoder (f8, 16 ch)", config(KL_16), px(1024)),
        unet("LDM cin256-v2 U-Net", config(CIN_UNET), px(256), tokens=1, stride=4),
        unet("SD 1.5 U-Net", config(UNetConfig()), px(512)),
        unet("SD 2.1 U-Net", config(SD2_UNET), px(768)),
        unet("SDXL base U-Net", config(XL_UNET), px(1024), sizes=6),
        unet("Playground v2.5 U-Net", config(XL_UNET), px(1024), sizes=6, timestep=EDM_TIMESTEP),
        unet("SDXL refiner U-Net", config(REFINER_UNET), px(1024), sizes=5),
        dit("DiT-XL/2 256", config(DiTConfig(sample_size=32))),
        dit("DiT-XL/2 512", config(DiTConfig(sample_size=64))),
        mmdit("SD3 medium", config(MMDiTConfig()), px(1024)),
        mmdit("SD3.5 medium", config(SD35_MEDIUM), px(1024)),
        mmdit("SD3.5 large", config(SD35_LARGE), px(1024)),
        flux("FLUX.1 dev", config(FluxConfig()), px(1024), tokens=512),
        flux("FLUX.1 schnell", config(FluxConfig(guidance=False)), px(1024), tokens=256),
    ]


def _shrunk(real: Any) -> Any:
    """The same network with a few narrow layers."""
    match real:
        case UNetConfig():
            levels = len(real.channels)
            return replace(
                real,
                channels=(64,) * levels,
                attention_depth=tuple(min(depth, 1) for depth in real.attention_depth),
                mid_depth=1,
                num_heads=(2,) * levels,
                context_dim=16,
                pooled_dim=real.pooled_dim and real.pooled_dim - POOLED_TEXT + 16,
            )
        case DiTConfig():
            return replace(real, sample_size=real.sample_size // 8, width=64, depth=3, num_heads=4)
        case MMDiTConfig():
            small = {"context_dim": 48, "pooled_dim": 24, "positions": 16}
            return replace(
                real, depth=3, num_heads=3, head_width=16, dual_layers=min(real.dual_layers, 2), **small
            )
        case FluxConfig():
            small = {"double_blocks": 2, "single_blocks": 3, "axes": (8, 12, 12)}
            return replace(real, num_heads=2, context_dim=48, pooled_dim=24, **small)
        case AutoencoderKLConfig():
            return replace(real, channels=(32,) * len(real.channels), res_blocks=1)
        case AutoencoderTinyConfig():
            return replace(real, channels=16)
        case CLIPTextConfig():
            projection = real.projection_dim and 32
            return replace(real, vocab_size=99, width=64, layers=3, heads=4, projection_dim=projection)
        case T5Config():
            return replace(real, vocab_size=99, width=64, layers=3, heads=4, head_width=16, intermediate=96)
    raise TypeError(type(real).__name__)


def _tokens(vocab_size: int, length: int) -> Tensor:
    """Random ids (1, length)."""
    return torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


def _diffusers() -> Any:
    """Imported late: a machine without it still measures ours."""
    import diffusers

    return diffusers
