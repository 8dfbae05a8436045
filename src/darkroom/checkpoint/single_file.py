"""An original release's single file as its parts, under our names.

Such a file holds tensors and no config: prefixes say which part a tensor belongs to, names and shapes which
network that is and of which family. What is known of the releases stands in the tables below.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from darkroom.checkpoint.build import (
    AutoencoderConfig,
    NetworkConfig,
    TextConfig,
    Unfilled,
    build_autoencoder,
    build_network,
    build_text_encoder,
    some,
)
from darkroom.checkpoint.detect import (
    Shapes,
    autoencoder_config,
    clip_config,
    count_blocks,
    dit_config,
    flux_config,
    ldm_text_config,
    mmdit_config,
    t5_config,
    tiny_config,
    unet_config,
)
from darkroom.checkpoint.io import cast, load_tensors
from darkroom.checkpoint.layouts import (
    AUTOENCODER_TO_LEGACY,
    CLIP_TEXT_TO_HUB,
    CLIP_TEXT_TO_OPENCLIP,
    autoencoder_to_original,
    ldm_text_to_original,
    t5_from_published,
    tiny_from_original,
    unet_to_original,
)
from darkroom.checkpoint.tables import Table, Tensors
from darkroom.errors import InputError
from darkroom.nn.autoencoder_tiny import AutoencoderTinyConfig
from darkroom.nn.class_embedder import ClassEmbedderConfig
from darkroom.text.ldm import LDMTextConfig

Config = TypeVar("Config", bound=NetworkConfig | AutoencoderConfig | TextConfig, covariant=True)


@dataclass(frozen=True, kw_only=True)
class Part(Generic[Config]):
    """One network of a file: its config, and exactly its tensors under our names."""

    config: Config
    tensors: Tensors


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a file holds.

    `texts` are text encoders by role: clip_l, clip_g, openclip_h, t5, ldm_text, class_embedder. `unknown` are
    names that no part takes, `ignored` prefixes of what is known but not used. `markers` are names that
    only by being there say something, `latent_stats` mean and deviation of each latent channel.
    """

    family: str
    network: Part[NetworkConfig] | None = None
    autoencoder: Part[AutoencoderConfig] | None = None
    texts: dict[str, Part[TextConfig]] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    markers: frozenset[str] = frozenset()
    scale_factor: float | None = None
    latent_stats: tuple[tuple[float, ...], tuple[float, ...]] | None = None


@dataclass(frozen=True)
class Row:
    """A family by facts about its network, others being free, and the heads, which shapes leave open."""

    family: str
    kind: str
    facts: dict[str, object]
    heads: dict[str, int] = field(default_factory=dict)


EIGHT, ONE = {"num_heads": 8}, {"num_heads": 1}
WIDE, NARROW = {"head_width": 64}, {"head_width": 32}


def _unet_row(family: str, heads: dict[str, int], inputs: int, context: int | None, **facts: object) -> Row:
    given = {"inputs": inputs, "context": context, "pooled": None, "labels": None}
    return Row(family, "unet", given | facts, heads)


# The first row that fits decides.
ROWS = (
    _unet_row("sd1", EIGHT, 4, 768),
    _unet_row("sd1-inpainting", EIGHT, 9, 768),
    _unet_row("sd2", WIDE, 4, 1024),
    _unet_row("sd2-inpainting", WIDE, 9, 1024),
    _unet_row("sd2-depth", WIDE, 5, 1024),
    _unet_row("sd-x4-upscaler", EIGHT, 7, 1024, labels=1000),
    _unet_row("playground-v2.5", WIDE, 4, 2048, pooled=2816, edm=True),
    _unet_row("sdxl", WIDE, 4, 2048, pooled=2816),
    _unet_row("sdxl-refiner", WIDE, 4, 1280, pooled=2560),
    _unet_row("ldm-cin256", ONE, 3, 512),
    _unet_row("ldm-cin256-f8", EIGHT, 4, 512),
    _unet_row("ldm-text2img256", NARROW, 3, 640),
    _unet_row("ldm-text2img-large", EIGHT, 4, 1280),  # the 1.45B one
    _unet_row("ldm-unconditional", NARROW, 3, None),
    _unet_row("ldm-churches256", EIGHT, 4, None),
    _unet_row("ldm-super-resolution", NARROW, 6, None),
    _unet_row("ldm-inpainting", EIGHT, 7, None),
    Row("sd3-medium", "mmdit", {"norm": False, "dual": False}),
    Row("sd3.5-medium", "mmdit", {"norm": True, "dual": True}),
    Row("sd3.5-large", "mmdit", {"norm": True, "dual": False}),
    Row("flux-dev", "flux", {"inputs": 64, "guidance": True}),
    Row("flux-schnell", "flux", {"inputs": 64, "guidance": False}),
    Row("flux-fill", "flux", {"inputs": 384}),
    Row("flux-control", "flux", {"inputs": 128}),
    Row("dit-xl-2-256", "dit", {"tokens": 256}),
    Row("dit-xl-2-512", "dit", {"tokens": 1024}),
)

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
CLIP_ROLES = {768: "clip_l", 1024: "openclip_h", 1280: "clip_g"}  # by width

# Copies of the weights, losses, and what the 2021 inpainting holds twice: its first stage.
IGNORED = (
    "model_ema.",
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
MARKERS = ("v_pred", "ztsnr", "edm_vpred.sigma_max", "edm_vpred.sigma_min")

HALVES = {"encoder": "decoder", "decoder": "encoder"}
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
# What other files look like, by one of their names, and what to say.
REFUSED = {
    r"(^|[._])lora[_.A-Z\d]|^lycoris_|\.(hada_w|lokr_w|oft_)|\.diff$": (
        "looks like a LoRA, which changes a model and is none itself: give the file of a model"
    ),
    r"^control_model\.|controlnet_|^input_hint_block\.": (
        "looks like a ControlNet: ControlNets steer a model and are no models: give the file of a model"
    ),
    r"^(ip_adapter|image_proj|redux_up)\.": "makes prompts of pictures and is no model: give the file of one",
    r"^(emb_params|clip_l|clip_g)$": "is a textual inversion, a word and no model: give the file of a model",
    r"(^|\.)(scaled_fp8|scale_weight|absmax)$": "holds quantised weights, which are not read: give full ones",
    r"^(down_blocks|transformer_blocks|single_transformer_blocks)\.": (
        "holds one network under diffusers' names: give the folder of the whole model"
    ),
    r"^cond_stage_model\.channel_mapper\.": "is the 2021 model that paints segmentations: it is not known",
    r"\A(\d+\.(conv\.\d+\.)?(weight|bias)(\n|\Z))+\Z": (
        "is half of a tiny autoencoder: the other half must lie beside it, named the same but for "
        "`encoder` or `decoder`"
    ),
}


def read_checkpoint(path: Path, dtype: torch.dtype | None = None) -> Parts:
    """Read an original release's safetensors file as its parts, floating-point tensors in `dtype` if given.

    A tiny autoencoder comes as two files: either is enough where the other lies beside it. Raises InputError,
    which names the file, where it is a pickle, no model (a LoRA, a ControlNet, ...), nothing known, or lacks
    tensors.
    """
    path = Path(path)
    if path.suffix.lower() in PICKLES:
        raise InputError(f"{path}: a pickle, which can run code and is not read: convert it to safetensors")
    parts = split_checkpoint(_joined_halves(path), path)
    if dtype is None:
        return parts
    texts = {role: _converted(part, dtype) for role, part in parts.texts.items()}
    network = parts.network and _converted(parts.network, dtype)
    autoencoder = parts.autoencoder and _converted(parts.autoencoder, dtype)
    return replace(parts, network=network, autoencoder=autoencoder, texts=texts)


def split_checkpoint(tensors: Mapping[str, Tensor], where: Path) -> Parts:
    """The parts of an original release's file, whose tensors may be on `meta`.

    Raises InputError, which starts with `where`, as `read_checkpoint` does.
    """
    names = "\n".join(tensors)
    for pattern, message in REFUSED.items():
        if re.search(pattern, names, re.MULTILINE):
            raise InputError(f"{where}: {message}")
    try:
        return _split(tensors)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _split(tensors: Mapping[str, Tensor]) -> Parts:
    single = {name for name in (SCALE, MEAN, STD, *MARKERS) if name in tensors}
    used = {n: t for n, t in tensors.items() if n not in single and not n.startswith(IGNORED)}
    found: dict[str, Part[Any]] = {}
    family, unknown = None, []
    for prefix, group in _by_prefix(used).items():
        kind = next((k for k in KINDS if any(name in group for name in k.telltales)), None)
        if kind is None or (role := kind.role or _clip_role(group, prefix)) in found:
            unknown += [prefix + name for name in group]
            continue
        if role == NETWORK:
            family = _row(kind.name, _shapes(group), edm=MEAN in single).family
        found[role], extra = _part(kind, role, prefix, group)
        unknown += extra
    if not found:
        raise InputError(f"no part of a model that is known; it holds {some(tensors)}")
    scale, mean, std = (_numbers(tensors.get(name)) for name in (SCALE, MEAN, STD))
    network, autoencoder = found.pop(NETWORK, None), found.pop(AUTOENCODER, None)
    return Parts(
        family=family or _family_of_part(autoencoder),
        network=network,
        autoencoder=autoencoder,
        texts=found,
        unknown=tuple(unknown),
        ignored=tuple(p for p in IGNORED if any(name.startswith(p) for name in tensors)),
        markers=frozenset(single & set(MARKERS)),
        scale_factor=scale[0] if scale else None,
        latent_stats=(mean, std) if mean and std else None,
    )


def _by_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensors]:
    """The tensors of each prefix without it; those that follow from the config are left out."""
    groups: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        if not BUFFERS.fullmatch(name):
            prefix = next(p for p in PREFIXES if name.startswith(p))
            groups.setdefault(prefix, {})[name.removeprefix(prefix)] = tensor
    return groups


def _part(kind: "Kind", role: str, prefix: str, group: Tensors) -> tuple[Part[Any], list[str]]:
    """A network out of the tensors of a prefix, and the names that it has no use for."""
    reading = kind.read(group, role)
    with torch.device("meta"), Unfilled():
        expected = BUILDERS.get(role, build_text_encoder)(reading.config).state_dict()
    if missing := {name: tensor for name, tensor in expected.items() if name not in reading.tensors}:
        names = [prefix + name for name in reading.table(missing)]
        raise InputError(f"its {kind.name} lacks {len(names)} tensors: {some(names)}")
    own = {name: reading.tensors[name] for name in expected}
    originals = {id(tensor): prefix + name for name, tensor in group.items()}
    extra = [originals.get(id(t), prefix + n) for n, t in reading.tensors.items() if n not in expected]
    return Part(config=reading.config, tensors=own), extra


@dataclass(frozen=True)
class Reading:
    """A network's config, what tensors have become under our names, and the table from ours to theirs."""

    config: Any
    tensors: Tensors
    table: Table


@dataclass(frozen=True)
class Kind:
    """A network as releases name it: no other has one of its `telltales`; without `role` it is a CLIP."""

    name: str
    telltales: tuple[str, ...]
    read: Callable[[Tensors, str], Reading]
    role: str | None = None


def _by(table: Table, config: Callable[[Shapes], Any]) -> Callable[[Tensors, str], Reading]:
    """Reading by the table from our names, and a config from shapes under ours."""

    def read(tensors: Tensors, _: str) -> Reading:
        ours = table.inverse()(tensors)
        return Reading(config(_shapes(ours)), ours, table)

    return read


def _unet(tensors: Tensors, _: str) -> Reading:
    shapes = _shapes(tensors)
    config = unet_config(shapes, **_row("unet", shapes).heads)
    table = unet_to_original(config)
    return Reading(config, table.inverse()(tensors), table)


def _autoencoder(tensors: Tensors, role: str) -> Reading:
    table = autoencoder_to_original(count_blocks(tensors, "encoder.down"))
    return _by(table, autoencoder_config)(tensors, role)


def _clip(tensors: Tensors, role: str) -> Reading:
    return _by(CLIP_TEXT_TO_HUB, partial(clip_config, openclip=role != "clip_l"))(tensors, role)


def _t5(tensors: Tensors, role: str) -> Reading:
    return _by(SAME, t5_config)(t5_from_published(tensors), role)


def _ldm_text(tensors: Tensors, role: str) -> Reading:
    # The original counts attention and feed-forward as two layers; the table wants nothing else of a config.
    layers = count_blocks(tensors, "attn_layers.layers") // 2
    return _by(ldm_text_to_original(LDMTextConfig(layers=layers)), ldm_text_config)(tensors, role)


def _class_embedder(tensors: Tensors, _: str) -> Reading:
    num_classes, width = tensors["embedding.weight"].shape
    return Reading(ClassEmbedderConfig(num_classes=num_classes, width=width), tensors, SAME)


SAME = Table(())  # our names are the release's
CLIP_TOKENS = "embeddings.token_embedding.weight"
NETWORK, AUTOENCODER = "network", "autoencoder"
OPENCLIP = _by(CLIP_TEXT_TO_OPENCLIP, partial(clip_config, openclip=True))
DIFFUSERS_AUTOENCODER = _by(AUTOENCODER_TO_LEGACY, autoencoder_config)
KINDS = (
    Kind("unet", ("input_blocks.0.0.weight",), _unet, NETWORK),
    Kind("mmdit", ("joint_blocks.0.x_block.attn.qkv.weight",), _by(SAME, mmdit_config), NETWORK),
    Kind("flux", ("double_blocks.0.img_attn.qkv.weight",), _by(SAME, flux_config), NETWORK),
    Kind("dit", ("y_embedder.embedding_table.weight",), _by(SAME, dit_config), NETWORK),
    Kind("autoencoder", ("encoder.mid.block_1.norm1.weight",), _autoencoder, AUTOENCODER),
    Kind("autoencoder", ("encoder.mid_block.resnets.0.norm1.weight",), DIFFUSERS_AUTOENCODER, AUTOENCODER),
    Kind("autoencoder", ("encoder.0.weight",), _by(tiny_from_original().inverse(), tiny_config), AUTOENCODER),
    Kind("autoencoder", ("encoder.layers.0.weight",), _by(SAME, tiny_config), AUTOENCODER),
    Kind("text encoder", (f"text_model.{CLIP_TOKENS}", CLIP_TOKENS), _clip),
    Kind("text encoder", ("token_embedding.weight",), OPENCLIP),
    Kind("text encoder", ("encoder.block.0.layer.0.SelfAttention.q.weight",), _t5, "t5"),
    Kind("text encoder", ("token_emb.weight",), _ldm_text, "ldm_text"),
    Kind("class embedder", ("embedding.weight",), _class_embedder, "class_embedder"),
)
BUILDERS: dict[str, Callable[[Any], nn.Module]] = {NETWORK: build_network, AUTOENCODER: build_autoencoder}


def _row(kind: str, shapes: Shapes, *, edm: bool = False) -> Row:
    """What is known of the family whose network has such shapes."""
    facts = FACTS[kind](shapes) | {"edm": edm}
    for row in ROWS:
        if row.kind == kind and row.facts.items() <= facts.items():
            return row
    seen = ", ".join(f"{name} {value}" for name, value in facts.items() if name != "edm")
    raise InputError(f"its {kind} ({seen}) is of no family that is known")


def _unet_facts(shapes: Shapes) -> dict[str, object]:
    context = next((s[1] for name, s in shapes.items() if name.endswith("attn2.to_k.weight")), None)
    return {
        "inputs": shapes["input_blocks.0.0.weight"][1],
        "context": context,
        "pooled": shapes.get("label_emb.0.0.weight", (0, None))[1],
        "labels": shapes.get("label_emb.weight", (None,))[0],
    }


def _mmdit_facts(shapes: Shapes) -> dict[str, object]:
    first = "joint_blocks.0.x_block."
    return {"norm": first + "attn.ln_q.weight" in shapes, "dual": first + "attn2.qkv.weight" in shapes}


def _flux_facts(shapes: Shapes) -> dict[str, object]:
    inputs = shapes.get("img_in.weight", (None, None))[1]
    return {"inputs": inputs, "guidance": "guidance_in.in_layer.weight" in shapes}


FACTS: dict[str, Callable[[Shapes], dict[str, object]]] = {
    "unet": _unet_facts,
    "mmdit": _mmdit_facts,
    "flux": _flux_facts,
    "dit": lambda shapes: {"tokens": shapes.get("pos_embed", (None, None))[1]},
}


def _family_of_part(autoencoder: Part[AutoencoderConfig] | None) -> str:
    if autoencoder is None:
        return "text-encoder"
    return "tiny-autoencoder" if isinstance(autoencoder.config, AutoencoderTinyConfig) else "autoencoder"


def _clip_role(group: Tensors, prefix: str) -> str:
    """Widths tell the published encoders apart; of others the prefix says which one it is."""
    width = next(t.shape[1] for name, t in group.items() if name.endswith("token_embedding.weight"))
    if role := CLIP_ROLES.get(width, PREFIXES[prefix]):
        return role
    raise InputError(f"a CLIP text encoder {width} wide: those known are {some(map(str, CLIP_ROLES))} wide")


def _numbers(tensor: Tensor | None) -> tuple[float, ...]:
    """The values of a tensor; on `meta` there are none."""
    return () if tensor is None or tensor.is_meta else tuple(tensor.double().flatten().tolist())


def _shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _converted(part: Part[Config], dtype: torch.dtype) -> Part[Config]:
    return replace(part, tensors={name: cast(tensor, dtype) for name, tensor in part.tensors.items()})


def _joined_halves(path: Path) -> Tensors:
    """The tensors of a file; with those of the other half where it is half of a tiny autoencoder."""
    tensors = load_tensors(path)[0]
    if not all(name[0].isdigit() for name in tensors):
        return tensors
    half = "encoder" if "0.weight" in tensors else "decoder"
    beside = path.with_name(path.name.replace(half, HALVES[half]))
    if beside == path or not beside.exists():
        return tensors
    halves = {half: tensors, HALVES[half]: load_tensors(beside)[0]}
    return {f"{half}.{name}": tensor for half, group in halves.items() for name, tensor in group.items()}
