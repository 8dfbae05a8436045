"""The layouts that published weights come in, as tables from ours."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from darkroom.checkpoint.tables import (
    AsConv,
    Concat,
    Copy,
    Drop,
    JoinHeads,
    Make,
    Rename,
    Rule,
    Split,
    Swap,
    Table,
    Transpose,
)
from darkroom.nn.dit import DiTConfig, square_positions
from darkroom.nn.flux import MLP_RATIO
from darkroom.nn.unet import UNetConfig
from darkroom.text.ldm import LDMTextConfig


def layout_table(kind: str, layout: str, config: Any) -> Table:
    """From our names to those of a layout, for a network of this kind and config.

    Kinds and layouts are those of `anatomy.KINDS`. Raises KeyError for a layout that the kind does not have.
    """
    return TABLES[kind, layout](config)


def _join_qkv(kind: str) -> Concat:
    sources = tuple(f"encoder.layers.*.self_attn.{letter}_proj.{kind}" for letter in "qkv")
    return Concat(sources, f"transformer.resblocks.*.attn.in_proj_{kind}")


# Ours to the files of transformers, whose version 5 holds its modules without the prefix: the inverse leaves
# such names as they are. Files of before version 4.31 also hold the numbers 0 to 76, which are dropped.
CLIP_TEXT_TO_HUB = Table(
    (
        Make("text_model.embeddings.position_ids"),
        Rename("text_projection.*", "text_projection.*"),
        Rename("**", "text_model.**"),
    )
)

# Ours to what version 5 writes.
CLIP_TEXT_TO_BARE = Table((Make("embeddings.position_ids"),))

# Ours to the files of OpenCLIP: SD 2's text encoder and SDXL's second in single files. `logit_scale` is for
# comparing with pictures, which nothing here does.
CLIP_TEXT_TO_OPENCLIP = Table(
    (
        Make("logit_scale"),
        Make("attn_mask"),
        Rename("embeddings.token_embedding.weight", "token_embedding.weight"),
        Rename("embeddings.position_embedding.weight", "positional_embedding"),
        Transpose("text_projection.weight", "text_projection"),
        Rename("final_layer_norm.*", "ln_final.*"),
        *(
            rule
            for kind in ("weight", "bias")
            for rule in (
                _join_qkv(kind),
                Rename(
                    f"encoder.layers.*.self_attn.out_proj.{kind}",
                    f"transformer.resblocks.*.attn.out_proj.{kind}",
                ),
                Rename(f"encoder.layers.*.layer_norm1.{kind}", f"transformer.resblocks.*.ln_1.{kind}"),
                Rename(f"encoder.layers.*.layer_norm2.{kind}", f"transformer.resblocks.*.ln_2.{kind}"),
                Rename(f"encoder.layers.*.mlp.fc1.{kind}", f"transformer.resblocks.*.mlp.c_fc.{kind}"),
                Rename(f"encoder.layers.*.mlp.fc2.{kind}", f"transformer.resblocks.*.mlp.c_proj.{kind}"),
            )
        ),
    )
)


LOGITS = ("to_logits.weight", "to_logits.bias")  # back to tokens, which no picture needs

# Our text encoder of the first latent diffusion models to diffusers' `LDMBertModel`.
LDM_TEXT_TO_DIFFUSERS = Table((*(Make(name) for name in LOGITS), Rename("**", "model.**")))


def ldm_text_to_original(config: LDMTextConfig) -> Table:
    """The same to the original release's, which counts attention and feed-forward as two layers.

    Its names are here without their prefix, `cond_stage_model.transformer.`.
    """
    attention = {f"{letter}_proj": f"to_{letter}" for letter in "qkv"} | {"out_proj": "to_out"}
    renames = {
        "embed_tokens.*": "token_emb.*",
        "embed_positions.*": "pos_emb.emb.*",
        "layer_norm.*": "norm.*",
    }
    for index in range(config.layers):
        ours, layers = f"layers.{index}", "attn_layers.layers"
        first, second = f"{layers}.{2 * index}", f"{layers}.{2 * index + 1}"
        renames |= {f"{ours}.self_attn.{a}.*": f"{first}.1.{b}.*" for a, b in attention.items()} | {
            f"{ours}.self_attn_layer_norm.*": f"{first}.0.*",
            f"{ours}.final_layer_norm.*": f"{second}.0.*",
            f"{ours}.fc1.*": f"{second}.1.net.0.0.*",
            f"{ours}.fc2.*": f"{second}.1.net.2.*",
        }
    return Table((*(Make(name) for name in LOGITS), *_rules(Rename, renames)))


def t5_from_published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """T5's published tensors, in which the embedding has one of two names or both, as ours, which has one."""
    own = dict(tensors)
    copy = own.pop("encoder.embed_tokens.weight", None)
    if copy is not None:
        own.setdefault("shared.weight", copy)
    return own


def dit_to_diffusers(config: DiTConfig) -> Table:
    """The original DiT, which is ours, to diffusers' `DiTTransformer2DModel`.

    diffusers repeats the embedders of timestep and class in every block, splits q, k and v, and computes the
    fixed positions instead of storing them.
    """
    embedders = {
        "t_embedder.mlp.0.*": "timestep_embedder.linear_1.*",
        "t_embedder.mlp.2.*": "timestep_embedder.linear_2.*",
        "y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight",
    }
    renames = {
        "x_embedder.proj.*": "pos_embed.proj.*",
        "blocks.*.attn.proj.*": "transformer_blocks.*.attn1.to_out.0.*",
        "blocks.*.mlp.fc1.*": "transformer_blocks.*.ff.net.0.proj.*",
        "blocks.*.mlp.fc2.*": "transformer_blocks.*.ff.net.2.*",
        "blocks.*.adaLN_modulation.1.*": "transformer_blocks.*.norm1.linear.*",
        "final_layer.adaLN_modulation.1.*": "proj_out_1.*",
        "final_layer.linear.*": "proj_out_2.*",
    }
    blocks = [f"transformer_blocks.{index}.norm1.emb." for index in range(config.depth)]
    return Table(
        (
            Drop("pos_embed", lambda: square_positions(config)),
            *(Copy(ours, tuple(block + theirs for block in blocks)) for ours, theirs in embedders.items()),
            Split("blocks.*.attn.qkv.*", _qkv("transformer_blocks.*.attn1.to_{}.*")),
            *_rules(Rename, renames),
        )
    )


# Ours to the names that diffusers' autoencoders had in their middle before 2023.
AUTOENCODER_TO_LEGACY = Table(
    tuple(
        Rename(f"**.attentions.0.{ours}.*", f"**.attentions.0.{theirs}.*")
        for ours, theirs in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items()
    )
)


def autoencoder_to_original(levels: int) -> Table:
    """Our autoencoders, whose names are diffusers', to the original release's, which counts levels from the
    picture on in the decoder too.
    """
    rules: list[Rule] = []
    for level in range(levels):
        rules += _autoencoder_level(f"encoder.down_blocks.{level}", f"encoder.down.{level}", "downsample")
        rules += _autoencoder_level(
            f"decoder.up_blocks.{levels - 1 - level}", f"decoder.up.{level}", "upsample"
        )
    for half in ("encoder", "decoder"):
        ours, theirs = f"{half}.mid_block", f"{half}.mid"
        rules += _autoencoder_attention(f"{ours}.attentions.0", f"{theirs}.attn_1")
        rules += [
            Rename(f"{ours}.resnets.0.**", f"{theirs}.block_1.**"),
            Rename(f"{ours}.resnets.1.**", f"{theirs}.block_2.**"),
            Rename(f"{half}.conv_norm_out.*", f"{half}.norm_out.*"),
        ]
    return Table(tuple(rules))


def _autoencoder_level(ours: str, theirs: str, sampling: str) -> list[Rule]:
    return [
        Rename(f"{ours}.resnets.*.conv_shortcut.*", f"{theirs}.block.*.nin_shortcut.*"),
        Rename(f"{ours}.resnets.**", f"{theirs}.block.**"),
        Rename(f"{ours}.{sampling}rs.0.conv.*", f"{theirs}.{sampling}.conv.*"),
        *_autoencoder_attention(f"{ours}.attentions.*", f"{theirs}.attn.*"),
    ]


def _autoencoder_attention(ours: str, theirs: str) -> list[Rule]:
    names = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    rules: list[Rule] = [Rename(f"{ours}.group_norm.*", f"{theirs}.norm.*")]
    for mine, other in names.items():
        rules += [
            AsConv(f"{ours}.{mine}.weight", f"{theirs}.{other}.weight"),
            Rename(f"{ours}.{mine}.bias", f"{theirs}.{other}.bias"),
        ]
    return rules


def tiny_from_original(layers: int = 20) -> Table:
    """The tiny autoencoder's two original files, joined as `encoder.` and `decoder.`, to ours and diffusers'.

    The original counts the clamp in front of the decoder as layer 0; its last number is below `layers`.
    """
    decoder = (
        Rename(f"decoder.{number}.**", f"decoder.layers.{number - 1}.**") for number in range(1, layers)
    )
    return Table((*decoder, Rename("encoder.**", "encoder.layers.**")))


RES_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_to_original(config: UNetConfig) -> Table:
    """Our U-Net, whose names are diffusers', to the original release's, which numbers all its blocks."""
    rules = _rules(
        Rename,
        {
            "conv_in.*": "input_blocks.0.0.*",
            "time_embedding.linear_1.*": "time_embed.0.*",
            "time_embedding.linear_2.*": "time_embed.2.*",
            "time_embedding.cond_proj.*": "time_embed.cond_proj.*",
            "add_embedding.linear_1.*": "label_emb.0.0.*",
            "add_embedding.linear_2.*": "label_emb.0.2.*",
            "class_embedding.*": "label_emb.*",
            "conv_norm_out.*": "out.0.*",
            "conv_out.*": "out.2.*",
        },
    )
    level = len(config.channels) - 1
    rules += _unet_block(config, level, "mid_block", 0, "middle_block", attention=config.mid_depth > 0)
    rules += _unet_res_block("mid_block.resnets.1", "middle_block.2")
    return Table((*rules, *_unet_down(config), *_unet_up(config)))


def _unet_down(config: UNetConfig) -> list[Rule]:
    rules: list[Rule] = []
    number = 1  # number 0 is the first conv
    for level, depth in enumerate(config.attention_depth):
        ours = f"down_blocks.{level}"
        for index in range(config.res_blocks):
            theirs = f"input_blocks.{number}"
            rules += _unet_block(config, level, ours, index, theirs, attention=depth > 0)
            number += 1
        if level < len(config.channels) - 1:
            ours, theirs = f"{ours}.downsamplers.0", f"input_blocks.{number}.0"
            strided: list[Rule] = [Rename(f"{ours}.conv.*", f"{theirs}.op.*")]
            rules += _unet_res_block(ours, theirs) if config.resblock_updown else strided
            number += 1
    return rules


def _unet_up(config: UNetConfig) -> list[Rule]:
    rules: list[Rule] = []
    number = 0
    for position, depth in enumerate(reversed(config.attention_depth)):
        level, ours = len(config.channels) - 1 - position, f"up_blocks.{position}"
        for index in range(config.res_blocks + 1):
            theirs = f"output_blocks.{number}"
            rules += _unet_block(config, level, ours, index, theirs, attention=depth > 0)
            number += 1
        if level:
            # The doubling belongs to the level's last block, after its attention.
            ours, theirs = f"{ours}.upsamplers.0", f"output_blocks.{number - 1}.{2 if depth else 1}"
            conv: list[Rule] = [Rename(f"{ours}.conv.*", f"{theirs}.conv.*")]
            rules += _unet_res_block(ours, theirs) if config.resblock_updown else conv
    return rules


def _unet_block(
    config: UNetConfig, level: int, ours: str, index: int, theirs: str, *, attention: bool
) -> list[Rule]:
    """A residual block and the attention after it."""
    rules = _unet_res_block(f"{ours}.resnets.{index}", f"{theirs}.0")
    if not attention:
        return rules
    ours, theirs = f"{ours}.attentions.{index}", f"{theirs}.1"
    if config.plain_attention:
        return rules + _unet_attention(ours, theirs, config.num_heads[level])
    return [*rules, Rename(f"{ours}.**", f"{theirs}.**")]


def _unet_attention(ours: str, theirs: str, heads: int) -> list[Rule]:
    """Attention without a transformer, which the original computes by 1-D convs."""
    return [
        Rename(f"{ours}.group_norm.*", f"{theirs}.norm.*"),
        JoinHeads(_qkv(ours + ".to_{}.*"), f"{theirs}.qkv.*", heads),
        AsConv(f"{ours}.to_out.0.weight", f"{theirs}.proj_out.weight", 1),
        Rename(f"{ours}.to_out.0.bias", f"{theirs}.proj_out.bias"),
    ]


def _unet_res_block(ours: str, theirs: str) -> list[Rule]:
    return _rules(Rename, {f"{ours}.{a}.*": f"{theirs}.{b}.*" for a, b in RES_BLOCK.items()})


def controlnet_to_original(config: UNetConfig) -> Table:
    """A ControlNet under diffusers' names, which are its U-Net's on the way down, to the original release's.

    `config` is that of the U-Net. The picture that controls goes through eight convs, and what is added to
    the U-Net through one each (Zhang et al. 2023, figure 3).
    """
    embedding, hint = "controlnet_cond_embedding", "input_hint_block"
    convs = {f"{embedding}.conv_in.*": f"{hint}.0.*", f"{embedding}.conv_out.*": f"{hint}.14.*"}
    convs |= {f"{embedding}.blocks.{number}.*": f"{hint}.{2 * number + 2}.*" for number in range(6)}
    zeros = {
        "controlnet_down_blocks.*.**": "zero_convs.*.0.**",
        "controlnet_mid_block.*": "middle_block_out.0.*",
    }
    return Table((*_rules(Rename, convs | zeros), *unet_to_original(config).rules))


def mmdit_to_diffusers(depth: int) -> Table:
    """The original SD 3, which is ours, to diffusers' `SD3Transformer2DModel`.

    diffusers splits q, k and v, and has scale before shift where it modulates by those two alone.
    """
    last, block = depth - 1, "transformer_blocks.*."
    swaps = {
        "final_layer.adaLN_modulation.1.*": "norm_out.linear.*",
        f"joint_blocks.{last}.context_block.adaLN_modulation.1.*": (
            f"transformer_blocks.{last}.norm1_context.linear.*"
        ),
    }
    renames = {
        "pos_embed": "pos_embed.pos_embed",
        "x_embedder.proj.*": "pos_embed.proj.*",
        "t_embedder.mlp.0.*": "time_text_embed.timestep_embedder.linear_1.*",
        "t_embedder.mlp.2.*": "time_text_embed.timestep_embedder.linear_2.*",
        "y_embedder.mlp.0.*": "time_text_embed.text_embedder.linear_1.*",
        "y_embedder.mlp.2.*": "time_text_embed.text_embedder.linear_2.*",
        "joint_blocks.*.x_block.adaLN_modulation.1.*": block + "norm1.linear.*",
        "joint_blocks.*.context_block.adaLN_modulation.1.*": block + "norm1_context.linear.*",
        "joint_blocks.*.x_block.attn.proj.*": block + "attn.to_out.0.*",
        "joint_blocks.*.x_block.attn2.proj.*": block + "attn2.to_out.0.*",
        "joint_blocks.*.context_block.attn.proj.*": block + "attn.to_add_out.*",
        "joint_blocks.*.x_block.attn.ln_q.weight": block + "attn.norm_q.weight",
        "joint_blocks.*.x_block.attn.ln_k.weight": block + "attn.norm_k.weight",
        "joint_blocks.*.x_block.attn2.ln_q.weight": block + "attn2.norm_q.weight",
        "joint_blocks.*.x_block.attn2.ln_k.weight": block + "attn2.norm_k.weight",
        "joint_blocks.*.context_block.attn.ln_q.weight": block + "attn.norm_added_q.weight",
        "joint_blocks.*.context_block.attn.ln_k.weight": block + "attn.norm_added_k.weight",
        "joint_blocks.*.x_block.mlp.fc1.*": block + "ff.net.0.proj.*",
        "joint_blocks.*.x_block.mlp.fc2.*": block + "ff.net.2.*",
        "joint_blocks.*.context_block.mlp.fc1.*": block + "ff_context.net.0.proj.*",
        "joint_blocks.*.context_block.mlp.fc2.*": block + "ff_context.net.2.*",
        "final_layer.linear.*": "proj_out.*",
    }
    splits = (
        Split("joint_blocks.*.x_block.attn.qkv.*", _qkv(block + "attn.to_{}.*")),
        Split("joint_blocks.*.x_block.attn2.qkv.*", _qkv(block + "attn2.to_{}.*")),
        Split("joint_blocks.*.context_block.attn.qkv.*", _qkv(block + "attn.add_{}_proj.*")),
    )
    return Table((*splits, *_rules(Swap, swaps), *_rules(Rename, renames)))


def flux_to_diffusers() -> Table:
    """The original FLUX.1, which is ours, to diffusers' `FluxTransformer2DModel`; as for SD 3."""
    double, single = "transformer_blocks.*.", "single_transformer_blocks.*."
    shares = (1, 1, 1, MLP_RATIO)
    renames = {
        "img_in.*": "x_embedder.*",
        "txt_in.*": "context_embedder.*",
        **_embedder("time_in", "timestep_embedder"),
        **_embedder("vector_in", "text_embedder"),
        **_embedder("guidance_in", "guidance_embedder"),
        "double_blocks.*.img_mod.lin.*": double + "norm1.linear.*",
        "double_blocks.*.txt_mod.lin.*": double + "norm1_context.linear.*",
        "double_blocks.*.img_attn.proj.*": double + "attn.to_out.0.*",
        "double_blocks.*.txt_attn.proj.*": double + "attn.to_add_out.*",
        "double_blocks.*.img_attn.norm.query_norm.scale": double + "attn.norm_q.weight",
        "double_blocks.*.img_attn.norm.key_norm.scale": double + "attn.norm_k.weight",
        "double_blocks.*.txt_attn.norm.query_norm.scale": double + "attn.norm_added_q.weight",
        "double_blocks.*.txt_attn.norm.key_norm.scale": double + "attn.norm_added_k.weight",
        "double_blocks.*.img_mlp.0.*": double + "ff.net.0.proj.*",
        "double_blocks.*.img_mlp.2.*": double + "ff.net.2.*",
        "double_blocks.*.txt_mlp.0.*": double + "ff_context.net.0.proj.*",
        "double_blocks.*.txt_mlp.2.*": double + "ff_context.net.2.*",
        "single_blocks.*.modulation.lin.*": single + "norm.linear.*",
        "single_blocks.*.linear2.*": single + "proj_out.*",
        "single_blocks.*.norm.query_norm.scale": single + "attn.norm_q.weight",
        "single_blocks.*.norm.key_norm.scale": single + "attn.norm_k.weight",
        "final_layer.linear.*": "proj_out.*",
    }
    splits = (
        Split("double_blocks.*.img_attn.qkv.*", _qkv(double + "attn.to_{}.*")),
        Split("double_blocks.*.txt_attn.qkv.*", _qkv(double + "attn.add_{}_proj.*")),
        Split("single_blocks.*.linear1.*", (*_qkv(single + "attn.to_{}.*"), single + "proj_mlp.*"), shares),
    )
    swap = Swap("final_layer.adaLN_modulation.1.*", "norm_out.linear.*")
    return Table((*splits, swap, *_rules(Rename, renames)))


def _embedder(ours: str, theirs: str) -> dict[str, str]:
    prefix = f"time_text_embed.{theirs}"
    return {f"{ours}.in_layer.*": f"{prefix}.linear_1.*", f"{ours}.out_layer.*": f"{prefix}.linear_2.*"}


def _qkv(pattern: str) -> tuple[str, ...]:
    """The names of queries, keys and values."""
    return tuple(pattern.format(letter) for letter in "qkv")


def _rules(kind: type[Rename] | type[Swap], names: dict[str, str]) -> list[Rule]:
    return [kind(ours, theirs) for ours, theirs in names.items()]


SAME = Table(())
TABLES: dict[tuple[str, str], Callable[[Any], Table]] = {
    ("unet", "original"): unet_to_original,
    ("unet", "diffusers"): lambda _: SAME,
    ("mmdit", "original"): lambda _: SAME,
    ("mmdit", "diffusers"): lambda config: mmdit_to_diffusers(config.depth),
    ("flux", "original"): lambda _: SAME,
    ("flux", "diffusers"): lambda _: flux_to_diffusers(),
    ("dit", "original"): lambda _: SAME,
    ("dit", "diffusers"): dit_to_diffusers,
    ("controlnet", "original"): controlnet_to_original,
    ("controlnet", "diffusers"): lambda _: SAME,
    ("autoencoder", "original"): lambda config: autoencoder_to_original(len(config.channels)),
    ("autoencoder", "legacy"): lambda _: AUTOENCODER_TO_LEGACY,
    ("autoencoder", "diffusers"): lambda _: SAME,
    ("tiny autoencoder", "original"): lambda _: tiny_from_original().inverse(),
    ("tiny autoencoder", "diffusers"): lambda _: SAME,
    ("clip", "hub"): lambda _: CLIP_TEXT_TO_HUB,
    ("clip", "bare"): lambda _: CLIP_TEXT_TO_BARE,
    ("clip", "openclip"): lambda _: CLIP_TEXT_TO_OPENCLIP,
    ("t5", "hub"): lambda _: SAME,
    ("ldm_text", "original"): ldm_text_to_original,
    ("ldm_text", "diffusers"): lambda _: LDM_TEXT_TO_DIFFUSERS,
    ("class embedder", "original"): lambda _: SAME,
}
