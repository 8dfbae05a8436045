"""Models that differ from each other in known ways, as files."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoint.test_single_file import UNET, small_sd1
from tests.networks import with_unit_gain
from torch import Tensor

from darkroom.checkpoint.formats.io import save_tensors

Tensors = dict[str, Tensor]
Change = Callable[[str, Tensor], Tensor]
MATRIX = f"{UNET}middle_block.1.transformer_blocks.0.attn1.to_q.weight"
STAGE = "first_stage_model.decoder.conv_in.weight"

LORA = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(4, 4)}


def small_model() -> Tensors:
    """The file of a small SD 1."""
    return small_sd1()[1]


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def saved(path: Path, tensors: Tensors, change: Change | None = None) -> Path:
    """A file of tensors, changed one by one."""
    made = {name: tensor if change is None else change(name, tensor) for name, tensor in tensors.items()}
    save_tensors(path, made, {"format": "pt"})
    return path


def moved(amount: float, seed: int = 5) -> Change:
    """Every number moved by noise of so much of its tensor's spread."""
    generator = noise(seed)

    def change(_: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor + amount * tensor.std(correction=0) * torch.randn(tensor.shape, generator=generator)

    return change


def is_attention(name: str) -> bool:
    return ".attn" in name and UNET in name


def low_rank(rank: int, amount: float = 0.3, where: Callable[[str], bool] = is_attention) -> Change:
    """What merging a LoRA into some layers does: `amount` is relative to the weights."""
    generator = noise(7)

    def change(name: str, tensor: Tensor) -> Tensor:
        if not (where(name) and name.endswith("weight") and tensor.ndim in (2, 4)):
            return tensor
        rows, columns = tensor.flatten(1).shape
        made = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
        made *= amount * tensor.float().norm() / made.norm()
        return (tensor.float() + made.reshape(tensor.shape)).to(tensor.dtype)

    return change


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def flux() -> Any:
    """A small FLUX of diffusers."""
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=40,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    return with_unit_gain(network)


def sd3() -> Any:
    """A small SD 3 of diffusers."""
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=8,
        joint_attention_dim=40,
        caption_projection_dim=64,
        pooled_projection_dim=32,
        pos_embed_max_size=12,
    )
    return with_unit_gain(network)


def sdxl() -> Any:
    """A small U-Net of diffusers with the blocks of SDXL."""
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 2, 2),
        cross_attention_dim=40,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=48 + 32,
    )
    return with_unit_gain(network)


def pair_of(network: Any, folder: Path, change: Change) -> tuple[Path, Path, Any, Any]:
    """A network of diffusers and what it becomes by a change: two folders, and both networks."""
    tuned = copy.deepcopy(network)
    tuned.load_state_dict({name: change(name, t) for name, t in network.state_dict().items()})
    for name, each in (("base", network), ("tuned", tuned)):
        each.save_pretrained(folder / name)
    return folder / "base", folder / "tuned", network, tuned
