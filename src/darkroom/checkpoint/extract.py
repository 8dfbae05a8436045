"""A LoRA out of the difference between two models, by singular values (Hu et al. 2021, run backwards)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from darkroom.checkpoint.anatomy import NETWORK
from darkroom.checkpoint.layouts import layout_table
from darkroom.checkpoint.loose import Piece
from darkroom.checkpoint.low_rank import factors
from darkroom.checkpoint.pairs import both, check_alike, compare_pieces
from darkroom.checkpoint.tables import Tensors
from darkroom.errors import InputError, some

# Prefixes of kohya's files: the U-Net, and text encoders where there is one or two of them.
UNET, ONE_TEXT, TWO_TEXTS = "lora_unet", "lora_te", ("lora_te1", "lora_te2")
TEXTS = ("clip_l", "openclip_h", "clip_g")
# Of the transformers diffusers' own names are read everywhere.
TRANSFORMERS = ("mmdit", "flux")
EMBEDDINGS = ("token_embedding", "position_embedding", "pos_embed", "shared.weight")


@dataclass(frozen=True)
class Extracted:
    """A LoRA and its header, how many layers it changes, and what of the difference it holds, 0 to 1.

    `left` are tensors that changed and that a LoRA has no place for: biases, norms, embeddings.
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
    `smallest` of their size are left out. Linear layers and convolutions of the U-Net and of CLIP encoders
    are named as kohya's files name them, those of SD 3 and FLUX as diffusers does. Raises InputError where
    the models do not go together, or nothing changed.
    """
    if rank < 1 or not 0 < share <= 1:
        raise InputError(f"rank must be 1 or more and share within 0..1, not {rank} and {share}")
    first, second = both(base, tuned)
    tensors: Tensors = {}
    left: list[str] = []
    energies = [0.0, 0.0]
    layers = 0
    for role, prefix in _prefixes(first.pieces).items():
        if role not in second.pieces:
            continue
        before, after = _named(first.pieces[role]), _named(second.pieces[role])
        check_alike(compare_pieces(first.pieces[role], second.pieces[role]), role, base, tuned)
        layers_ = [t for n, t in before.items() if _is_layer(n, t)]
        most = min(rank, max((min(t.flatten(1).shape) for t in layers_), default=1))
        bar = tqdm(before, desc=role, unit=" tensors", delay=1, disable=None, leave=False)
        for name in bar:
            delta = after[name].float() - before[name].float()
            if not bool(delta.isfinite().all()):
                raise InputError(f"{role}.{name}: is not finite in one of the two")
            if float(delta.norm()) <= smallest * float(before[name].float().norm()):
                continue
            if not _is_layer(name, delta):
                left.append(f"{role}.{name}")
                continue
            made, held = _layer(delta, most, share)
            tensors |= _tensors(prefix, name.removesuffix(".weight"), made, dtype)
            energies = [energies[0] + held, energies[1] + float(delta.double().square().sum())]
            layers += 1
    if not tensors:
        raise InputError(f"{tuned}: does not differ from {base} in any layer that a LoRA could change")
    metadata = _metadata(rank, first.family, Path(base).name)
    return Extracted(tensors, metadata, layers, energies[0] / energies[1], tuple(left))


def _prefixes(pieces: Mapping[str, Piece]) -> dict[str, str]:
    texts = [role for role in TEXTS if role in pieces]
    names = (ONE_TEXT,) if len(texts) == 1 else TWO_TEXTS
    network = pieces.get(NETWORK)
    prefixes = dict(zip(texts, names, strict=False))
    if network is None:
        return prefixes
    if network.kind in TRANSFORMERS:  # which loaders take with their own text encoders' LoRAs alone
        return {NETWORK: "transformer"}
    return {NETWORK: UNET} | prefixes


def _named(piece: Piece) -> Tensors:
    """Tensors under the names that LoRAs know: diffusers', and those of transformers."""
    layout = "hub" if piece.kind == "clip" else "diffusers"
    return layout_table(piece.kind, layout, piece.config)(piece.ours())


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
    if prefix == "transformer":
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
