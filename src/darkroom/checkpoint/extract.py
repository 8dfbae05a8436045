"""A LoRA out of the difference between two models, by singular values (Hu et al. 2021, run backwards)."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from darkroom.checkpoint.anatomy import NETWORK
from darkroom.checkpoint.layouts import layout_table
from darkroom.checkpoint.loose import Loose, Piece
from darkroom.checkpoint.low_rank import factors
from darkroom.checkpoint.pairs import both, check_alike, compare_pieces
from darkroom.checkpoint.rounding import rounded_to, same_bits
from darkroom.checkpoint.tables import Tensors
from darkroom.errors import InputError, some

# Of the transformers diffusers' own names are read everywhere.
TRANSFORMERS = ("mmdit", "flux", "dit")
EMBEDDINGS = ("token_embedding", "position_embedding", "pos_embed", "embedding_table", "shared.weight")
KOHYA = "lora_"  # with what prefixes in kohya's files begin


@dataclass(frozen=True)
class Naming:
    """How a LoRA names a network: by the names of a layout under a prefix."""

    prefix: str
    layout: str


# kohya names U-Nets as diffusers does, but SDXL's by the original release; text encoders by their number.
UNET, SDXL_UNET = Naming("lora_unet", "diffusers"), Naming("lora_unet", "original")
TEXTS = {role: Naming("lora_te", "hub") for role in ("clip_l", "openclip_h")}
SDXL_TEXTS = {"clip_l": Naming("lora_te1", "hub"), "clip_g": Naming("lora_te2", "hub")}
TRANSFORMER = Naming("transformer", "diffusers")
TRANSFORMER_TEXTS = {"clip_l": Naming("text_encoder", "hub"), "clip_g": Naming("text_encoder_2", "hub")}


@dataclass(frozen=True)
class Extracted:
    """A LoRA and its header, how many layers it changes, and what of their difference it holds, 0 to 1.

    `left` are tensors that changed and that a LoRA has no place for: biases, norms, embeddings, T5.
    """

    tensors: Tensors
    metadata: dict[str, str]
    layers: int
    energy: float
    left: tuple[str, ...]


def extract(
    tuned: str | Path,
    base: str | Path,
    *,
    rank: int = 32,
    share: float = 1.0,
    dtype: torch.dtype = torch.float16,
    smallest: float = 1e-6,
) -> Extracted:
    """Make a LoRA that turns `base` into `tuned`, as near as `rank` allows.

    Every layer gets the same rank; with `share` below 1 the fewest directions that hold so much of its
    difference's energy, at most `rank`, which not every loader understands. Layers that changed by less than
    `smallest` of their size, or by rounding alone, are left out. Linear layers and convolutions of a U-Net
    and its CLIP encoders are named as in kohya's files, those of SD 3, FLUX and DiT as in diffusers'. Raises
    InputError where the models do not go together, nothing changed, or a number is not finite.
    """
    if rank < 1 or not 0 < share <= 1:
        raise InputError(f"rank must be 1 or more and share within 0..1, not {rank} and {share}")
    first, second = both(base, tuned)
    namings = _namings(first.pieces)
    rank = min(rank, _most(first, namings))
    tensors: Tensors = {}
    left: list[str] = []
    held, energy, layers = 0.0, 0.0, 0
    for role, name, before, after in _changed(first, second, namings, (base, tuned), smallest):
        if role not in namings or not _is_layer(name, before):
            left.append(f"{role}.{name}")
            continue
        delta = _difference(f"{role}.{name}", before, after)
        made, part = _layer(delta, rank, share)
        tensors |= _tensors(namings[role].prefix, name.removesuffix(".weight"), made, dtype)
        held, energy, layers = held + part, energy + float(delta.double().square().sum()), layers + 1
    if not tensors:
        raise InputError(f"{tuned}: does not differ from {base} in any layer that a LoRA could change")
    metadata = _metadata(rank, first.family, Path(base).name)
    return Extracted(tensors, metadata, layers, held / energy, tuple(left))


def _namings(pieces: Mapping[str, Piece]) -> dict[str, Naming]:
    """How loaders want the networks of such a model named; a network that none loads has no name."""
    network = pieces.get(NETWORK)
    if network is not None and network.kind in TRANSFORMERS:
        named = {NETWORK: TRANSFORMER} | TRANSFORMER_TEXTS
    elif "clip_g" in pieces or (network is not None and getattr(network.config, "pooled_dim", None)):
        named = {NETWORK: SDXL_UNET} | SDXL_TEXTS
    else:
        named = {NETWORK: UNET} | TEXTS
    return {role: naming for role, naming in named.items() if role in pieces}


def _changed(
    first: Loose,
    second: Loose,
    namings: Mapping[str, Naming],
    paths: tuple[str | Path, str | Path],
    smallest: float,
) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """Tensors that differ by more than rounding: role, name in the LoRA's layout, before and after."""
    for role, piece in first.pieces.items():
        if role not in second.pieces or (role not in namings and piece.kind not in ("clip", "t5")):
            continue
        other = second.pieces[role]
        check_alike(compare_pieces(piece, other), role, *paths)
        before, after = (_named(each, namings.get(role)) for each in (piece, other))
        for name in tqdm(before, desc=role, unit=" tensors", delay=1, disable=None, leave=False):
            if _moved(before[name], after[name], smallest):
                yield role, name, before[name], after[name]


def _named(piece: Piece, naming: Naming | None) -> Tensors:
    if naming is None:
        return piece.ours()
    return layout_table(piece.kind, naming.layout, piece.config)(piece.ours())


def _moved(before: Tensor, after: Tensor, smallest: float) -> bool:
    if not before.is_floating_point() or same_bits(before, after) or rounded_to(before, after) is not None:
        return False
    delta, size = after.float() - before.float(), float(before.float().norm())
    return not float(delta.norm()) <= smallest * size  # also where it is NaN


def _difference(where: str, before: Tensor, after: Tensor) -> Tensor:
    delta = after.float() - before.float()
    if not bool(delta.isfinite().all()):
        raise InputError(f"{where}: is not finite in one of the two")
    return delta


def _most(loose: Loose, namings: Mapping[str, Naming]) -> int:
    """The largest rank that a layer can have."""
    named = ((n, t) for role in namings for n, t in _named(loose.pieces[role], namings[role]).items())
    return max((min(t.flatten(1).shape) for n, t in named if _is_layer(n, t)), default=1)


def _is_layer(name: str, tensor: Tensor) -> bool:
    return name.endswith(".weight") and tensor.ndim in (2, 4) and not any(part in name for part in EMBEDDINGS)


def _layer(delta: Tensor, rank: int, share: float) -> tuple[tuple[Tensor, Tensor], float]:
    """Down (r, in, ...) and up (out, r, ...) of a layer, and the energy that they hold."""
    found = factors(delta.flatten(1), rank)
    kept = min(found.rank(share), len(found.values)) if share < 1 else len(found.values)
    root = found.values[:kept].sqrt()
    up, down = found.u[:, :kept] * root, (found.v[:, :kept] * root).T
    if share == 1:  # one rank for all: some loaders scale layers of another wrongly
        up, down = F.pad(up, (0, rank - kept)), F.pad(down, (0, 0, 0, rank - kept))
    if delta.ndim == 4:
        up, down = up[:, :, None, None], down.unflatten(1, delta.shape[1:])
    return (down, up), float(found.values[:kept].double().square().sum())


def _tensors(prefix: str, layer: str, made: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensors:
    down, up = (tensor.contiguous().to(dtype) for tensor in made)
    if not prefix.startswith(KOHYA):
        return {f"{prefix}.{layer}.lora_A.weight": down, f"{prefix}.{layer}.lora_B.weight": up}
    name = f"{prefix}_{layer.replace('.', '_')}"
    alpha = torch.tensor(float(down.shape[0]))
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}


def _metadata(rank: int, family: str | None, base: str) -> dict[str, str]:
    """What loaders and people look for in the header."""
    return {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_base_model_version": family or "unknown",
        "ss_sd_model_name": base,
    }


def lines(found: Extracted) -> Iterable[str]:
    """What was made, in words."""
    yield f"{found.layers} layers, {found.energy:.2%} of their difference"
    if found.left:
        yield f"{len(found.left)} changed tensors have no place in a LoRA: {some(found.left)}"
