"""Models mixed, compared, pruned, and the LoRA of what they differ by."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoint.test_single_file import UNET, small_sd1
from torch import Tensor

from darkroom.checkpoint.convert import convert, write
from darkroom.checkpoint.diff import Difference, diff, notes, rows
from darkroom.checkpoint.extract import extract
from darkroom.checkpoint.formats.io import load_tensors, save_tensors
from darkroom.checkpoint.inspect import inspect
from darkroom.checkpoint.loose import take_apart
from darkroom.checkpoint.merge import Rule, merge
from darkroom.checkpoint.pairs import block_names
from darkroom.checkpoint.prune import ema_name, prune
from darkroom.errors import InputError

Tensors = dict[str, Tensor]
MATRIX = f"{UNET}middle_block.1.transformer_blocks.0.attn1.to_q.weight"


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def first() -> Tensors:
    return small_sd1()[1]


def saved(path: Path, tensors: Tensors, change: Callable[[str, Tensor], Tensor] | None = None) -> Path:
    """A file of tensors, changed one by one."""
    made = {name: tensor if change is None else change(name, tensor) for name, tensor in tensors.items()}
    save_tensors(path, made, {"format": "pt"})
    return path


def moved(amount: float, seed: int = 5) -> Callable[[str, Tensor], Tensor]:
    generator = noise(seed)

    def change(_: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor + amount * tensor.std(correction=0) * torch.randn(tensor.shape, generator=generator)

    return change


def low_rank(rank: int, amount: float = 0.3) -> Callable[[str, Tensor], Tensor]:
    """What merging a LoRA into the U-Net's attention does."""
    generator = noise(7)

    def change(name: str, tensor: Tensor) -> Tensor:
        if ".attn" not in name or not name.endswith("weight") or tensor.ndim != 2 or UNET not in name:
            return tensor
        up = torch.randn(tensor.shape[0], rank, generator=generator)
        down = torch.randn(rank, tensor.shape[1], generator=generator)
        return tensor + amount * tensor.std() / rank**0.5 * (up @ down)

    return change


def by_role(found: list[Difference]) -> dict[str, Difference]:
    return {d.role: d for d in found}


def test_equal_and_rounded(first: Tensors, tmp_path: Path) -> None:
    a = saved(tmp_path / "a.safetensors", first)
    assert {d.verdict for d in diff(a, a)} == {"equal"}
    convert(a, tmp_path / "half.safetensors", to="single", dtype="float16")
    assert {d.verdict for d in diff(a, tmp_path / "half.safetensors")} == {"rounded"}
    convert(a, tmp_path / "folder", to="diffusers")
    assert {d.verdict for d in diff(a, tmp_path / "folder")} == {"equal"}


def test_low_rank_merged_and_retrained(first: Tensors, tmp_path: Path) -> None:
    a = saved(tmp_path / "a.safetensors", first)
    b = saved(tmp_path / "lora.safetensors", first, low_rank(3))
    found = by_role(diff(a, b))
    assert (found["network"].verdict, found["network"].rank) == ("low-rank", 3)
    assert found["autoencoder"].verdict == found["clip_l"].verdict == "equal"
    tuned = saved(tmp_path / "tuned.safetensors", first, moved(0.2))
    assert {d.verdict for d in diff(a, tuned)} == {"merged"}
    other = saved(tmp_path / "other.safetensors", small_sd1()[1], moved(3.0))
    assert {d.verdict for d in diff(a, other)} == {"retrained"}
    table, lines = rows(diff(a, b)), list(notes(diff(a, b)))
    assert len(table) == 4 and table[0][:2] == ("part", "verdict")
    assert any(line.startswith("network: changed most in") and "IN" in line for line in lines)


def test_a_mixture_of_two_is_told_with_its_share(first: Tensors, tmp_path: Path) -> None:
    a = saved(tmp_path / "a.safetensors", first)
    c = saved(tmp_path / "c.safetensors", first, moved(0.5))
    mixed = merge(take_apart(a), [c], [0.3])
    write(mixed, tmp_path / "mixed.safetensors", to="single")
    for d in diff(a, tmp_path / "mixed.safetensors", base=c):
        assert d.verdict == "merged" and d.share == pytest.approx(0.7, abs=1e-3)
    other = saved(tmp_path / "other.safetensors", first, moved(0.5, seed=9))
    assert all(d.share is None for d in diff(a, other, base=c))


def test_names_and_shapes_that_differ(first: Tensors, tmp_path: Path) -> None:
    a = saved(tmp_path / "a.safetensors", first)
    wider = first | {f"{UNET}input_blocks.0.0.weight": torch.randn(32, 9, 3, 3)}
    b = saved(tmp_path / "b.safetensors", wider)
    found = by_role(diff(a, b))["network"]
    assert found.verdict == "other shapes" and found.reshaped == ("conv_in.weight",)
    with pytest.raises(InputError, match=r"has in other shapes conv_in\.weight"):
        merge(take_apart(a), [b], [0.5])


def merged(a: Path, others: list[Path], weights: list[float], out: Path, **options: Any) -> Tensors:
    write(merge(take_apart(a), others, weights, **options), out, to="single")
    return load_tensors(out)[0]


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_weights_of_nothing_and_of_all(first: Tensors, tmp_path: Path) -> None:
    a = saved(tmp_path / "a.safetensors", first)
    b = saved(tmp_path / "b.safetensors", first, moved(0.5))
    assert same(merged(a, [b], [0.0], tmp_path / "0.safetensors"), first)
    assert same(merged(a, [b], [1.0], tmp_path / "1.safetensors"), load_tensors(b)[0])
    half = merged(a, [b], [0.5], tmp_path / "half.safetensors")
    back = merged(b, [a], [0.5], tmp_path / "back.safetensors")
    other = load_tensors(b)[0]
    for name, tensor in half.items():
        assert torch.allclose(tensor.float(), (first[name].float() + other[name].float()) / 2, atol=1e-6)
        assert torch.allclose(tensor.float(), back[name].float(), atol=1e-6)


def test_differences_from_a_base_are_added(first: Tensors, tmp_path: Path) -> None:
    a, b, c = (saved(tmp_path / f"{n}.safetensors", first, moved(0.3, seed=n)) for n in (1, 2, 3))
    made = merged(a, [b], [0.8], tmp_path / "made.safetensors", base=c)
    x, y, z = (load_tensors(path)[0] for path in (a, b, c))
    assert torch.allclose(made[MATRIX], x[MATRIX] + 0.8 * (y[MATRIX] - z[MATRIX]), atol=1e-6)
    third = merged(a, [b, c], [0.2, 0.3], tmp_path / "third.safetensors")
    assert torch.allclose(third[MATRIX], 0.5 * x[MATRIX] + 0.2 * y[MATRIX] + 0.3 * z[MATRIX], atol=1e-6)


def test_inpainting_gets_a_style_and_keeps_its_own_channels(first: Tensors, tmp_path: Path) -> None:
    conv = f"{UNET}input_blocks.0.0.weight"
    painting = first | {conv: torch.randn(32, 9, 3, 3, generator=noise(1))}
    a = saved(tmp_path / "a.safetensors", painting)
    b, c = (saved(tmp_path / f"{n}.safetensors", first, moved(0.3, seed=n)) for n in (2, 3))
    made = merged(a, [b], [1.0], tmp_path / "made.safetensors", base=c)[conv]
    y, z = (load_tensors(path)[0][conv] for path in (b, c))
    assert torch.equal(made[:, 4:], painting[conv][:, 4:])
    assert torch.allclose(made[:, :4], painting[conv][:, :4] + y - z, atol=1e-6)


def test_rules_by_part_by_block_and_by_name(first: Tensors, tmp_path: Path) -> None:
    a = saved(tmp_path / "a.safetensors", first)
    b = saved(tmp_path / "b.safetensors", first, moved(0.5))
    other = load_tensors(b)[0]
    rules = [Rule.parse(text, 1) for text in ("autoencoder=0", "IN*=1", "network.M00=0", "clip_l*bias=1")]
    made = merged(a, [b], [0.5], tmp_path / "made.safetensors", rules=rules)
    assert torch.equal(made[MATRIX], first[MATRIX])
    inside = f"{UNET}input_blocks.1.0.in_layers.2.weight"
    assert torch.equal(made[inside], other[inside])
    stage = "first_stage_model.decoder.conv_in.weight"
    assert torch.equal(made[stage], first[stage])
    bias = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    assert torch.equal(made[bias], other[bias])
    out = f"{UNET}output_blocks.0.0.in_layers.2.weight"
    assert torch.allclose(made[out], (first[out] + other[out]) / 2, atol=1e-6)


@pytest.mark.parametrize("text", ["IN00", "=1", "IN00=x", "IN00=1,2", "IN00=inf"])
def test_rules_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="must be pattern=weight"):
        Rule.parse(text, 1)


def test_mistakes_in_merging_are_named(first: Tensors, tmp_path: Path) -> None:
    a = saved(tmp_path / "a.safetensors", first)
    b = saved(tmp_path / "b.safetensors", first, moved(0.5))
    with pytest.raises(InputError, match="rules that fit nothing: IN99"):
        merge(take_apart(a), [b], [0.5], rules=[Rule("IN99", (1.0,))])
    with pytest.raises(InputError, match="each model beside the first needs a weight"):
        merge(take_apart(a), [b], [0.5, 0.5])
    with pytest.raises(InputError, match="is not finite after merging"):
        merge(take_apart(a), [b], [1e39])


def test_what_has_nothing_in_common_is_refused(first: Tensors, tmp_path: Path) -> None:
    a = saved(tmp_path / "a.safetensors", first)
    lora = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(4, 4)}
    b = saved(tmp_path / "lora.safetensors", lora)
    with pytest.raises(InputError, match="has no network in common with the first model: it holds LoRA"):
        merge(take_apart(a), [b], [0.5])
    with pytest.raises(InputError, match="have no network in common"):
        diff(a, b)
    half = {n: t for n, t in first.items() if n.startswith("first_stage_model.")}
    vae = saved(tmp_path / "vae.safetensors", half)
    with pytest.warns(UserWarning, match="has no clip_l, network: stays"):
        merge(take_apart(a), [vae], [0.5])
    found = by_role(diff(a, vae))
    assert found["autoencoder"].verdict == "equal" and found["network"].verdict == "on one side only"


def test_values_that_are_not_finite_are_named(first: Tensors, tmp_path: Path) -> None:
    a = saved(tmp_path / "a.safetensors", first)
    b = saved(tmp_path / "b.safetensors", first | {MATRIX: torch.full_like(first[MATRIX], float("nan"))})
    for tool in (diff, extract):
        with pytest.raises(InputError, match=r"network\.mid_block.*to_q\.weight: is not finite"):
            tool(b, a)


def test_averages_of_the_first_are_not_those_of_the_mixture(first: Tensors, tmp_path: Path) -> None:
    a = saved(tmp_path / "a.safetensors", first | {"model_ema.decay": torch.tensor(0.5)})
    b = saved(tmp_path / "b.safetensors", first, moved(0.5))
    with pytest.warns(UserWarning, match="averaged copies"):
        assert "model_ema.decay" not in merge(take_apart(a), [b], [0.5]).extra


def test_blocks_have_their_usual_numbers(first: Tensors, tmp_path: Path) -> None:
    piece = take_apart(saved(tmp_path / "a.safetensors", first)).pieces["network"]
    names = block_names(piece)
    assert names["conv_in.weight"] == "IN00" and names["mid_block.resnets.1.conv1.weight"] == "M00"
    assert names["down_blocks.0.resnets.0.conv1.weight"] == "IN01"
    assert names["up_blocks.1.resnets.1.conv1.weight"] == "OUT03"
    assert names["time_embedding.linear_1.weight"] == "TIME" and names["conv_out.bias"] == "OUT"


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


def test_pruning_drops_uses_or_keeps_averages(first: Tensors) -> None:
    copies = {ema_name(n): t + 1 for n, t in first.items() if n.startswith("model.")}
    whole = first | copies | {"model_ema.decay": torch.tensor(0.9), "loss.logvar": torch.zeros(1)}
    assert ema_name(f"{UNET}out.2.bias") == "model_ema.diffusion_modelout2bias"
    dropped = prune(whole)
    assert same(dropped.tensors, first) and set(dropped.dropped) == {"averaged copies", "losses"}
    assert dropped.after < dropped.before
    used = prune(whole, ema="use").tensors
    assert used.keys() == first.keys() and torch.equal(used[MATRIX], first[MATRIX] + 1)
    stage = "first_stage_model.decoder.conv_in.weight"
    assert torch.equal(used[stage], first[stage])
    assert copies.keys() <= prune(whole, ema="keep").tensors.keys()
    half = prune(whole, dtype=torch.float16, full_autoencoder=True).tensors
    assert half[MATRIX].dtype == torch.float16 and half[stage].dtype == torch.float32
    positions = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    assert half[positions].dtype == torch.int64


def test_averages_that_are_not_the_models(first: Tensors) -> None:
    with pytest.raises(InputError, match="there are no averaged weights"):
        prune(first, ema="use")
    with pytest.raises(InputError, match="are not those of the model"):
        prune(first | {"model_ema.what": torch.zeros(1)}, ema="use")
