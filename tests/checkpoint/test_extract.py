"""The LoRA of what two models differ by."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoint.lists import write_list
from tests.checkpoint.relatives import (
    MATRIX,
    Tensors,
    flux,
    low_rank,
    moved,
    noise,
    pair_of,
    saved,
    sd3,
    sdxl,
    small_model,
)
from tests.checkpoint.test_single_file import UNET
from torch import Tensor

from darkroom.checkpoint.convert import convert
from darkroom.checkpoint.extract import extract, lines
from darkroom.checkpoint.formats.io import load_tensors, save_tensors
from darkroom.checkpoint.inspect import inspect
from darkroom.checkpoint.loose import take_apart
from darkroom.errors import InputError


@pytest.fixture(scope="module")
def first() -> Tensors:
    return small_model()


def applied(name: str, tensor: Tensor, lora: Tensors, prefix: str) -> Tensor:
    """A layer with its LoRA, by plain matrices."""
    layer = f"{prefix}_{name.removesuffix('.weight').replace('.', '_')}"
    if f"{layer}.lora_up.weight" not in lora:
        return tensor
    up, down = (lora[f"{layer}.lora_{half}.weight"].float() for half in ("up", "down"))
    assert lora[f"{layer}.alpha"] == down.shape[0]
    return tensor + (up.flatten(1) @ down.flatten(1)).reshape(tensor.shape)


def test_a_lora_of_an_exact_difference(first: Tensors, tmp_path: Path) -> None:
    a = saved(tmp_path / "a.safetensors", first)
    b = saved(tmp_path / "b.safetensors", first, low_rank(3))
    found = extract(b, a, rank=4, dtype=torch.float32)
    assert found.energy == pytest.approx(1.0, abs=1e-5) and found.left == ()
    before, after = (take_apart(path).pieces["network"].ours() for path in (a, b))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == found.layers > 8
    for name in changed:
        made = applied(name, before[name], found.tensors, "lora_unet")
        error = (made - after[name]).norm() / (after[name] - before[name]).norm()
        assert error <= 1e-5
    save_tensors(tmp_path / "lora.safetensors", found.tensors, found.metadata)
    report = inspect(tmp_path / "lora.safetensors")
    assert (report.kind, report.family, report.unknown) == ("LoRA", "sd1", ())
    assert found.metadata["ss_network_dim"] == "4" and found.metadata["ss_base_model_version"] == "sd1"


def test_a_lora_holds_less_with_less_rank(first: Tensors, tmp_path: Path) -> None:
    a = saved(tmp_path / "a.safetensors", first)
    b = saved(tmp_path / "b.safetensors", first, moved(0.1))
    little, much = (extract(b, a, rank=rank) for rank in (1, 16))
    assert 0 < little.energy < much.energy < 1
    assert any(name.startswith("lora_te_") for name in much.tensors)
    assert any(t.ndim == 4 and t.shape[2:] == (3, 3) for n, t in much.tensors.items() if "down" in n)
    assert much.left and not any(name.startswith("autoencoder") for name in much.left)
    fewer = extract(b, a, rank=16, share=0.5)
    sizes = [sum(t.numel() for t in found.tensors.values()) for found in (fewer, much)]
    assert sizes[0] < sizes[1] and 0.25 < fewer.energy < much.energy


def test_a_lora_of_nothing_is_refused(first: Tensors, tmp_path: Path) -> None:
    a = saved(tmp_path / "a.safetensors", first)
    with pytest.raises(InputError, match="does not differ"):
        extract(a, a)
    with pytest.raises(InputError, match="rank must be"):
        extract(a, a, rank=0)


def test_diffusers_applies_the_lora(first: Tensors, tmp_path: Path) -> None:
    """A U-Net of diffusers with the file loaded computes what the tuned one does."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    a = saved(tmp_path / "a.safetensors", first)
    b = saved(tmp_path / "b.safetensors", first, low_rank(3))
    found = extract(b, a, rank=4, dtype=torch.float32)
    unets = []
    for path in (a, b):
        convert(path, tmp_path / path.stem, to="diffusers")
        unets.append(diffusers.UNet2DConditionModel.from_pretrained(tmp_path / path.stem / "unet"))
    plain, tuned = unets
    converted, alphas = diffusers.StableDiffusionPipeline.lora_state_dict(dict(found.tensors))
    diffusers.StableDiffusionPipeline.load_lora_into_unet(converted, alphas, plain)
    x, context = torch.randn(1, 4, 8, 8, generator=noise(0)), torch.randn(1, 5, 768, generator=noise(1))
    with torch.no_grad():
        made, wanted = (unet(x, 500, context).sample for unet in (plain, tuned))
    assert (made - wanted).norm() <= 1e-4 * wanted.norm()


def test_rounding_is_no_change(first: Tensors, tmp_path: Path) -> None:
    a = saved(tmp_path / "a.safetensors", first)
    half = saved(tmp_path / "half.safetensors", first, lambda _, t: t.half() if t.is_floating_point() else t)
    with pytest.raises(InputError, match="does not differ"):
        extract(half, a)
    one = {n: t.half() if t.is_floating_point() else t for n, t in first.items()}
    b = saved(tmp_path / "b.safetensors", one | {MATRIX: one[MATRIX] + 1})
    assert extract(b, a).layers == 1


def test_values_that_are_not_finite_are_named(first: Tensors, tmp_path: Path) -> None:
    a = saved(tmp_path / "a.safetensors", first)
    b = saved(tmp_path / "b.safetensors", first | {MATRIX: torch.full_like(first[MATRIX], float("nan"))})
    for pair in ((a, b), (b, a)):
        with pytest.raises(InputError, match=r"network\.mid_block.*to_q\.weight: is not finite"):
            extract(*pair)


def test_no_rank_is_larger_than_a_layer(first: Tensors, tmp_path: Path) -> None:
    a = saved(tmp_path / "a.safetensors", {n: t for n, t in first.items() if n.startswith(UNET)})
    found = extract(saved(tmp_path / "b.safetensors", load_tensors(a)[0], moved(0.1)), a, rank=2000)
    most = {t.shape[0] for n, t in found.tensors.items() if "lora_down" in n}
    assert most == {int(found.metadata["ss_network_dim"])} and max(most) < 1000
    assert found.energy == pytest.approx(1.0, abs=1e-5)


def test_what_is_left_out_is_told(first: Tensors, tmp_path: Path) -> None:
    a = saved(tmp_path / "a.safetensors", first)
    bias = f"{UNET}out.2.bias"
    b = saved(tmp_path / "b.safetensors", first | {bias: first[bias] + 1, MATRIX: first[MATRIX] + 1})
    found = extract(b, a)
    assert found.left == ("network.conv_out.bias",) and found.layers == 1
    assert list(lines(found)) == [
        "1 layers, 100.00% of their difference",
        "1 changed tensors have no place in a LoRA: network.conv_out.bias",
    ]


# Lists of models, and those of LoRAs of them, whose layers must all be named as there.
NAMES = {
    "lora.kohya_sd15": "sd15.single",
    "lora.kohya_sd15_locon": "sd15.single",
    "lora.kohya_sdxl": "sdxl_base.single",
    "lora.kohya_sdxl_locon": "sdxl_base.single",
    "lora.peft_sd3": "sd3_medium.single_incl_clips_t5",
}


@pytest.mark.slow
@pytest.mark.parametrize("lora", NAMES)
def test_layers_are_named_as_published_files_name_them(shared: Path, tmp_path: Path, lora: str) -> None:
    a, tensors = write_list(shared, NAMES[lora], tmp_path)
    b = saved(tmp_path / "b.safetensors", tensors, lambda _, t: 1.5 * t if t.is_floating_point() else t)
    found = extract(b, a, rank=1)
    listed = json.loads((shared / f"reference/keys/{lora}.json").read_text())["tensors"]
    assert listed.keys() <= found.tensors.keys()
    for name, shape in listed.items():
        assert len(shape) == found.tensors[name].ndim
        if len(shape) == 4:  # kernels
            assert tuple(shape[2:]) == tuple(found.tensors[name].shape[2:])


def test_transformers_have_their_text_encoders_beside_them(shared: Path, tmp_path: Path) -> None:
    a, tensors = write_list(shared, "sd3_medium.single_incl_clips_t5", tmp_path)
    changed = [n for n in tensors if n.endswith(("fc1.weight", "layer.0.SelfAttention.q.weight"))]
    b = saved(tmp_path / "b.safetensors", tensors, lambda n, t: 1.5 * t if n in changed else t)
    found = extract(b, a, rank=1)
    starts = {name.split(".")[0] for name in found.tensors}
    assert starts == {"transformer", "text_encoder", "text_encoder_2"}
    assert "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight" in found.tensors
    assert found.left and all(name.startswith("t5.") for name in found.left)
    save_tensors(tmp_path / "lora.safetensors", found.tensors, found.metadata)
    assert inspect(tmp_path / "lora.safetensors").kind == "LoRA"


def loaded(kind: str, network: Any, tensors: Tensors) -> None:
    """What diffusers' pipeline does with the file of a LoRA."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    if kind == "sdxl":
        pipeline = diffusers.StableDiffusionXLPipeline
        state, alphas, *_ = pipeline.lora_state_dict(dict(tensors), unet_config=network.config)
        pipeline.load_lora_into_unet(state, alphas, network)
        return
    pipeline = diffusers.StableDiffusion3Pipeline if kind == "sd3" else diffusers.FluxPipeline
    state = pipeline.lora_state_dict(dict(tensors))
    assert isinstance(state, dict)
    if kind == "sd3":
        pipeline.load_lora_into_transformer(state, network)
    else:
        pipeline.load_lora_into_transformer(state, None, network)


def is_layer(name: str) -> bool:
    """Not what a LoRA has no place for, nor what diffusers finds no layer for."""
    return "pos_embed" not in name and "norm_" not in name.rpartition(".weight")[0][-8:]


@pytest.mark.parametrize(("kind", "make"), [("sdxl", sdxl), ("sd3", sd3), ("flux", flux)])
def test_diffusers_makes_the_tuned_network_of_it(kind: str, make: Any, tmp_path: Path) -> None:
    """Every linear layer and convolution is changed, and gets the tuned weights from the LoRA alone."""
    base, tuned, network, wanted = pair_of(make(), tmp_path, low_rank(3, 0.3, is_layer))
    found = extract(tuned, base, rank=4, dtype=torch.float32)
    assert found.left == () and found.energy == pytest.approx(1.0, abs=1e-5)
    layers = [n for n, t in network.state_dict().items() if t.ndim in (2, 4) and is_layer(n)]
    assert found.layers == len(layers)
    loaded(kind, network, found.tensors)
    network.fuse_lora()
    network.unload_lora() if hasattr(network, "unload_lora") else None
    made = {n.replace(".base_layer", ""): t for n, t in network.state_dict().items() if "lora_" not in n}
    for name in layers:
        error = (made[name] - wanted.state_dict()[name]).norm() / wanted.state_dict()[name].norm()
        assert error <= 1e-5, name
