"""Which parts of a model a file's tensors belong to, by their names and shapes. No torch here."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from darkroom.checkpoint.formats.header import Shape, Shapes
from darkroom.checkpoint.known import likeliest

NETWORK, AUTOENCODER = "network", "autoencoder"
CLIP_TOKENS = "embeddings.token_embedding.weight"
CLIP_ROLES = {768: "clip_l", 1024: "openclip_h", 1280: "clip_g"}  # by width

# Prefixes, and the role of a CLIP text encoder under each; names without a prefix come last.
PREFIXES = {
    "model.diffusion_model.": None,
    "first_stage_model.": None,
    "vae.": None,
    "cond_stage_model.transformer.": "clip_l",
    "cond_stage_model.model.": "openclip_h",
    "cond_stage_model.": None,
    "conditioner.embedders.0.transformer.": "clip_l",
    "conditioner.embedders.0.model.": "clip_g",
    "conditioner.embedders.1.model.": "clip_g",
    "text_encoders.clip_l.transformer.": "clip_l",
    "text_encoders.clip_g.transformer.": "clip_g",
    "text_encoders.t5xxl.transformer.": None,
    "": None,
}

# Copies of the weights, losses, and what the 2021 inpainting holds twice: its first stage.
EMA = "model_ema."
IGNORED = (
    EMA,
    "loss.",
    "low_scale_model.",  # noise schedule of the x4 upscaler
    "depth_model.",  # MiDaS, which makes SD 2's depth maps out of pictures
    *(f"cond_stage_model.{p}." for p in ("encoder", "decoder", "quantize", "quant_conv", "post_quant_conv")),
)
# What follows from the config, and a temperature for comparing texts with pictures.
BUFFERS = re.compile(
    r"betas|alphas_cumprod|alphas_cumprod_prev|(sqrt|log_one_minus|posterior)_\w+|logvar|lvlb_weights"
    r"|denoiser\.sigmas|(.+\.)?(position_ids|logit_scale|attn_mask)"
)
SCALE, MEAN, STD = "scale_factor", "edm_mean", "edm_std"
V_PRED, ZERO_SNR, EDM_V = "v_pred", "ztsnr", "edm_vpred."
MARKERS = (V_PRED, ZERO_SNR, f"{EDM_V}sigma_max", f"{EDM_V}sigma_min")


@dataclass(frozen=True)
class Kind:
    """A network as files name it: no other has one of its `telltales`; without `role` it is a CLIP."""

    name: str
    layout: str
    telltales: tuple[str, ...]
    role: str | None = None


# The first kind that fits decides.
KINDS = (
    Kind("unet", "original", ("input_blocks.0.0.weight",), NETWORK),
    Kind("mmdit", "original", ("joint_blocks.0.x_block.attn.qkv.weight",), NETWORK),
    Kind("flux", "original", ("double_blocks.0.img_attn.qkv.weight",), NETWORK),
    Kind("dit", "original", ("y_embedder.embedding_table.weight",), NETWORK),
    Kind("unet", "diffusers", ("down_blocks.0.resnets.0.norm1.weight",), NETWORK),
    Kind(
        "flux",
        "diffusers",
        ("x_embedder.weight", "single_transformer_blocks.0.attn.to_q.weight"),
        NETWORK,
    ),
    Kind("mmdit", "diffusers", ("time_text_embed.text_embedder.linear_1.weight",), NETWORK),
    Kind(
        "dit",
        "diffusers",
        ("transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight",),
        NETWORK,
    ),
    Kind("autoencoder", "original", ("encoder.mid.block_1.norm1.weight",), AUTOENCODER),
    Kind("autoencoder", "legacy", ("encoder.mid_block.attentions.0.query.weight",), AUTOENCODER),
    Kind("autoencoder", "diffusers", ("encoder.mid_block.resnets.0.norm1.weight",), AUTOENCODER),
    Kind("tiny autoencoder", "original", ("encoder.0.weight",), AUTOENCODER),
    Kind("tiny autoencoder", "diffusers", ("encoder.layers.0.weight",), AUTOENCODER),
    Kind("clip", "hub", (f"text_model.{CLIP_TOKENS}",)),
    Kind("clip", "bare", (CLIP_TOKENS,)),  # as transformers 5 has it
    Kind("clip", "openclip", ("token_embedding.weight",)),
    Kind("t5", "hub", ("encoder.block.0.layer.0.SelfAttention.q.weight",), "t5"),
    Kind("ldm_text", "original", ("token_emb.weight",), "ldm_text"),
    Kind("ldm_text", "diffusers", ("model.embed_tokens.weight",), "ldm_text"),
    Kind("class embedder", "original", ("embedding.weight",), "class_embedder"),
)


@dataclass(frozen=True, kw_only=True)
class Component:
    """One network of a file.

    Its `role` is network, autoencoder, clip_l, clip_g, openclip_h, t5, ldm_text or class_embedder, its
    `layout` whose names it has (original, diffusers, legacy, hub, bare, openclip), `names` those in the file.
    """

    role: str
    kind: str
    layout: str
    prefix: str
    names: tuple[str, ...]

    def bare(self, shapes: Shapes) -> dict[str, Shape]:
        """Its part of a file's shapes, without the prefix."""
        return {name.removeprefix(self.prefix): shapes[name] for name in self.names}


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """A file's tensors by what they are for.

    `ignored` are copies and losses, by prefix; `buffers` follow from configs; `markers` are names that say
    something by being there, or numbers of the latent space; `unknown` are names that nothing explains.
    """

    components: dict[str, Component]
    ignored: dict[str, tuple[str, ...]]
    buffers: tuple[str, ...]
    markers: frozenset[str]
    unknown: tuple[str, ...]


def dissect(shapes: Shapes) -> Anatomy:
    """Tell which network each tensor of a file belongs to, if any; nothing is required to be whole."""
    markers = frozenset(name for name in (SCALE, MEAN, STD, *MARKERS) if name in shapes)
    ignored = {p: tuple(name for name in shapes if name.startswith(p)) for p in IGNORED}
    left_out = markers.union(*ignored.values())
    buffers = tuple(name for name in shapes if name not in left_out and BUFFERS.fullmatch(name))
    rest = [name for name in shapes if name not in left_out and not BUFFERS.fullmatch(name)]
    components: dict[str, Component] = {}
    unknown: list[str] = []
    for prefix, names in _by_prefix(rest).items():
        component = _component(prefix, names, shapes)
        if component is None or component.role in components:
            unknown += names
        else:
            components[component.role] = component
    return Anatomy(
        components=components,
        ignored={prefix: names for prefix, names in ignored.items() if names},
        buffers=buffers,
        markers=markers,
        unknown=tuple(unknown),
    )


def _by_prefix(names: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(next(p for p in PREFIXES if name.startswith(p)), []).append(name)
    return groups


def _component(prefix: str, names: list[str], shapes: Shapes) -> Component | None:
    bare = {name.removeprefix(prefix) for name in names}
    kind = next((k for k in KINDS if not bare.isdisjoint(k.telltales)), None) or _by_most_names(bare)
    if kind is None:
        return None
    role = kind.role or _clip_role(names, prefix, shapes)
    return Component(role=role, kind=kind.name, layout=kind.layout, prefix=prefix, names=tuple(names))


def _by_most_names(bare: set[str]) -> Kind | None:
    """The kind of network that shares most of these names, where the one that tells it apart is missing."""
    found = likeliest(bare)
    return next((kind for kind in KINDS if (kind.name, kind.layout) == found), None)


def _clip_role(names: list[str], prefix: str, shapes: Shapes) -> str:
    """Widths tell the published encoders apart; of others the prefix says which one it is, or the depth."""
    tokens = (shapes[name] for name in names if name.endswith("token_embedding.weight"))
    width = next((shape[-1] for shape in tokens if shape), 0)
    depth = len({m[1] for m in (re.search(r"\.(?:layers|resblocks)\.(\d+)\.", name) for name in names) if m})
    deep = "clip_g" if depth > 24 else "openclip_h" if depth > 12 else "clip_l"
    return CLIP_ROLES.get(width) or PREFIXES[prefix] or deep
