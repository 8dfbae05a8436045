"""Which network a set of tensors is for: configs read from names and shapes alone."""

import math
import re
from collections.abc import Iterable

from darkroom.checkpoint.formats.header import Shapes
from darkroom.errors import InputError
from darkroom.nn.autoencoder_kl import AutoencoderKLConfig
from darkroom.nn.autoencoder_tiny import AutoencoderTinyConfig
from darkroom.nn.autoencoder_vq import AutoencoderVQConfig
from darkroom.nn.dit import DiTConfig
from darkroom.nn.flux import PATCH, FluxConfig
from darkroom.nn.mmdit import HEAD_WIDTH, MMDiTConfig
from darkroom.nn.unet import UNetConfig
from darkroom.text.clip import CLIPTextConfig
from darkroom.text.ldm import LDMTextConfig
from darkroom.text.t5 import T5Config

ATTENTION = "1.transformer_blocks.0."  # the first transformer after a residual block of the U-Net
DIT_HEAD_WIDTH = 72
TOLD_GUIDANCE = "time_embed.cond_proj.weight"  # of LCMs
SD1_HEADS = 8
FLUX_AXES = (16, 56, 56)


def dit_config(shapes: Shapes) -> DiTConfig:
    """The config of a DiT with classes under its original names, whose heads are 72 wide."""
    width, in_channels, patch, _ = _shape(shapes, "x_embedder.proj.weight")
    return DiTConfig(
        in_channels=in_channels,
        out_channels=_shape(shapes, "final_layer.linear.weight")[0] // patch**2,
        sample_size=math.isqrt(_shape(shapes, "pos_embed")[1]) * patch,
        patch_size=patch,
        width=width,
        depth=count_blocks(shapes, "blocks"),
        num_heads=width // DIT_HEAD_WIDTH,
        num_classes=_shape(shapes, "y_embedder.embedding_table.weight")[0] - 1,
    )


def mmdit_config(shapes: Shapes) -> MMDiTConfig:
    """The config of SD 3's network under its original names; widths of heads are 64 unless norms say more."""
    width, in_channels, patch, _ = _shape(shapes, "x_embedder.proj.weight")
    norm = shapes.get("joint_blocks.0.x_block.attn.ln_q.weight")
    head_width = norm[0] if norm else HEAD_WIDTH
    return MMDiTConfig(
        in_channels=in_channels,
        out_channels=_shape(shapes, "final_layer.linear.weight")[0] // patch**2,
        patch_size=patch,
        depth=count_blocks(shapes, "joint_blocks"),
        num_heads=width // head_width,
        head_width=head_width,
        context_dim=_shape(shapes, "context_embedder.weight")[1],
        pooled_dim=_shape(shapes, "y_embedder.mlp.0.weight")[1],
        positions=math.isqrt(_shape(shapes, "pos_embed")[1]),
        qk_norm=norm is not None,
        dual_layers=sum(name.endswith("attn2.qkv.weight") for name in shapes),
    )


def flux_config(shapes: Shapes) -> FluxConfig:
    """The config of FLUX.1's network under its original names, whose heads are 128 wide."""
    width, tokens = _shape(shapes, "img_in.weight")
    head_width = _shape(shapes, "double_blocks.0.img_attn.norm.query_norm.scale")[0]
    if head_width != sum(FLUX_AXES):
        raise InputError(f"FLUX's heads are {sum(FLUX_AXES)} wide, not {head_width}: give its config")
    return FluxConfig(
        in_channels=tokens // PATCH**2,
        out_channels=_shape(shapes, "final_layer.linear.weight")[0] // PATCH**2,
        double_blocks=count_blocks(shapes, "double_blocks"),
        single_blocks=count_blocks(shapes, "single_blocks"),
        num_heads=width // head_width,
        axes=FLUX_AXES,
        context_dim=_shape(shapes, "txt_in.weight")[1],
        pooled_dim=_shape(shapes, "vector_in.in_layer.weight")[1],
        guidance="guidance_in.in_layer.weight" in shapes,
    )


def unet_config(shapes: Shapes, *, num_heads: int | None = None, head_width: int | None = None) -> UNetConfig:
    """The config of a U-Net under the original release's names, whose norms have 32 groups.

    Names and shapes do not tell how many heads there are: `num_heads` at every level, or as many as are
    `head_width` wide. With neither, linear projections mean SD 2's and SDXL's heads of 64, convs SD 1's 8,
    and attention without transformers is an InputError, since those models differ.
    """
    levels = _unet_levels(shapes)
    widths = tuple(_shape(shapes, blocks[0] + "0.out_layers.3.weight")[0] for blocks in levels)
    depths = tuple(_unet_depth(shapes, blocks[0]) for blocks in levels)
    plain = any(name.endswith(".1.qkv.weight") for name in shapes)
    first = next((blocks[0] for blocks, depth in zip(levels, depths, strict=True) if depth), "middle_block.")
    linear = not plain and len(_shape(shapes, first + "1.proj_in.weight")) == 2
    if num_heads is None and head_width is None and plain:
        raise InputError("a U-Net without transformers: give `num_heads` or `head_width`, one is needed")
    if num_heads is None and head_width is None and not linear:
        num_heads = SD1_HEADS
    own = tuple(
        plain or not depth or _shape(shapes, blocks[0] + ATTENTION + "attn1.to_k.weight")[1] == width
        for blocks, width, depth in zip(levels, widths, depths, strict=True)
    )
    return UNetConfig(
        in_channels=_shape(shapes, "input_blocks.0.0.weight")[1],
        out_channels=_shape(shapes, "out.2.weight")[0],
        channels=widths,
        res_blocks=len(levels[0]),
        attention_depth=depths,
        mid_depth=_unet_depth(shapes, "middle_block."),
        num_heads=tuple(num_heads or width // (head_width or HEAD_WIDTH) for width in widths),
        self_attention=None if all(own) else own,
        context_dim=None if plain else _shape(shapes, first + ATTENTION + "attn2.to_k.weight")[1],
        linear_projection=linear,
        pooled_dim=shapes["label_emb.0.0.weight"][1] if "label_emb.0.0.weight" in shapes else None,
        num_classes=shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else None,
        guidance_dim=shapes[TOLD_GUIDANCE][1] if TOLD_GUIDANCE in shapes else None,
        plain_attention=plain,
        scale_shift_norm=_shape(shapes, "input_blocks.1.0.emb_layers.1.weight")[0] == 2 * widths[0],
        resblock_updown=len(levels) > 1 and not any(name.endswith(".op.weight") for name in shapes),
    )


def _unet_depth(shapes: Shapes, block: str) -> int:
    """How many transformer blocks follow a residual block, or 1 for attention without a transformer."""
    return count_blocks(shapes, block + "1.transformer_blocks") or int(block + "1.qkv.weight" in shapes)


def _unet_levels(shapes: Shapes) -> list[list[str]]:
    """The prefixes of the residual blocks on the way down, level by level."""
    ends = _unet_level_ends(shapes)
    levels: list[list[str]] = [[]]
    for number in range(1, count_blocks(shapes, "input_blocks")):
        if number in ends:
            levels.append([])
        else:
            levels[-1].append(f"input_blocks.{number}.")
    if not all(levels):
        raise InputError("the tensors input_blocks.* are not those of a U-Net: a level has no block")
    return levels


def _unet_level_ends(shapes: Shapes) -> set[int]:
    """The numbers of what halves the size on the way down: strided convs, or residual blocks.

    Such a residual block looks like any other, so the first one on the way up that follows another in its
    place says how many blocks a level has.
    """
    down, up = count_blocks(shapes, "input_blocks"), count_blocks(shapes, "output_blocks")
    convs = {number for number in range(1, down) if f"input_blocks.{number}.0.op.weight" in shapes}
    if convs:
        return convs
    doubling = (
        number + 1
        for number in range(up)
        for place in (1, 2)
        if f"output_blocks.{number}.{place}.in_layers.0.weight" in shapes
    )
    row = next(doubling, down)
    return set(range(row, down, row))


def autoencoder_config(shapes: Shapes) -> AutoencoderKLConfig | AutoencoderVQConfig:
    """The config of a KL or VQ autoencoder under diffusers' names; norms have 32 groups everywhere."""
    levels = count_blocks(shapes, "encoder.down_blocks")
    blocks = [f"encoder.down_blocks.{level}." for level in range(levels)]
    shape = {
        "in_channels": _shape(shapes, "encoder.conv_in.weight")[1],
        "latent_channels": _shape(shapes, "decoder.conv_in.weight")[1],
        "channels": tuple(_shape(shapes, block + "resnets.0.conv1.weight")[0] for block in blocks),
        "res_blocks": count_blocks(shapes, "encoder.down_blocks.0.resnets"),
        "mid_attention": "encoder.mid_block.attentions.0.to_q.weight" in shapes,
        "attention_levels": tuple(
            k for k, b in enumerate(blocks) if b + "attentions.0.to_q.weight" in shapes
        ),
    }
    if "quantize.embedding.weight" in shapes:
        return AutoencoderVQConfig(**shape, codes=_shape(shapes, "quantize.embedding.weight")[0])
    return AutoencoderKLConfig(**shape, quant_conv="quant_conv.weight" in shapes)


def tiny_config(shapes: Shapes) -> AutoencoderTinyConfig:
    """The config of a tiny autoencoder under diffusers' names."""
    width, in_channels, _, _ = _shape(shapes, "encoder.layers.0.weight")
    return AutoencoderTinyConfig(
        in_channels=in_channels,
        latent_channels=_shape(shapes, "decoder.layers.0.weight")[1],
        channels=width,
        pooled_blocks=any(".pool." in name for name in shapes),
    )


def clip_config(shapes: Shapes, *, openclip: bool) -> CLIPTextConfig:
    """The config of a CLIP text encoder under our names; OpenCLIP has heads of 64 and exact GELU too.

    CLIP's own encoders are all with the approximate one.
    """
    vocab_size, width = _shape(shapes, "embeddings.token_embedding.weight")
    projection = shapes.get("text_projection.weight")
    return CLIPTextConfig(
        vocab_size=vocab_size,
        context_length=_shape(shapes, "embeddings.position_embedding.weight")[0],
        width=width,
        layers=count_blocks(shapes, "encoder.layers"),
        heads=max(width // HEAD_WIDTH, 1),
        intermediate=_shape(shapes, "encoder.layers.0.mlp.fc1.weight")[0],
        activation="gelu" if openclip else "quick_gelu",
        projection_dim=projection[0] if projection else None,
    )


def t5_config(shapes: Shapes) -> T5Config:
    """The config of a T5 1.1 encoder, whose heads are 64 wide."""
    vocab_size, width = _shape(shapes, "shared.weight")
    first = "encoder.block.0.layer."
    buckets, heads = _shape(shapes, first + "0.SelfAttention.relative_attention_bias.weight")
    return T5Config(
        vocab_size=vocab_size,
        width=width,
        layers=count_blocks(shapes, "encoder.block"),
        heads=heads,
        head_width=_shape(shapes, first + "0.SelfAttention.q.weight")[0] // heads,
        intermediate=_shape(shapes, first + "1.DenseReluDense.wi_0.weight")[0],
        buckets=buckets,
    )


def ldm_text_config(shapes: Shapes) -> LDMTextConfig:
    """The config of a text encoder of the first latent diffusion models under our names, with heads of 64."""
    vocab_size, width = _shape(shapes, "embed_tokens.weight")
    return LDMTextConfig(
        vocab_size=vocab_size,
        context_length=_shape(shapes, "embed_positions.weight")[0],
        width=width,
        layers=count_blocks(shapes, "layers"),
        heads=_shape(shapes, "layers.0.self_attn.q_proj.weight")[0] // HEAD_WIDTH,
        intermediate=_shape(shapes, "layers.0.fc1.weight")[0],
    )


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """How many blocks `prefix.0`, `prefix.1`, ... the names know."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return len({match[1] for match in map(pattern.match, names) if match})


def _shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise InputError(f"the tensor {name} is missing, which says what shape the network has")
    return shapes[name]
