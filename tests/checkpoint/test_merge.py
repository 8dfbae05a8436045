"""Models mixed: weighted sums, added differences, other weights by network and block."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoint.relatives import LORA, MATRIX, STAGE, Tensors, moved, noise, same, saved, small_model
from tests.checkpoint.test_single_file import UNET

from darkroom.checkpoint.convert import write
from darkroom.checkpoint.formats.io import load_tensors
from darkroom.checkpoint.loose import take_apart
from darkroom.checkpoint.merge import Rule, block_rules, merge
from darkroom.checkpoint.pairs import block_names
from darkroom.errors import InputError


@pytest.fixture(scope="module")
def first() -> Tensors:
    return small_model()


def merged(a: Path, others: list[Path], weights: list[float], out: Path, **options: Any) -> Tensors:
    write(merge(take_apart(a), others, weights, **options), out, to="single")
    return load_tensors(out)[0]


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


def test_of_rules_that_fit_the_last_decides(first: Tensors, tmp_path: Path) -> None:
    a = saved(tmp_path / "a.safetensors", first)
    b = saved(tmp_path / "b.safetensors", first, moved(0.5))
    other, inside = load_tensors(b)[0], f"{UNET}input_blocks.1.0.in_layers.2.weight"
    for texts, wanted in (("IN*=1", "IN01=0"), first), (("IN01=0", "IN*=1"), other):
        rules = [Rule.parse(text, 1) for text in texts]
        made = merged(a, [b], [0.5], tmp_path / "made.safetensors", rules=rules)
        assert torch.equal(made[inside], wanted[inside])


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


def test_blocks_have_their_usual_numbers(first: Tensors, tmp_path: Path) -> None:
    piece = take_apart(saved(tmp_path / "a.safetensors", first)).pieces["network"]
    names = block_names(piece)
    assert names["conv_in.weight"] == "IN00" and names["mid_block.resnets.1.conv1.weight"] == "M00"
    assert names["down_blocks.0.resnets.0.conv1.weight"] == "IN01"
    assert names["up_blocks.1.resnets.1.conv1.weight"] == "OUT03"
    assert names["time_embedding.linear_1.weight"] == "TIME" and names["conv_out.bias"] == "OUT"


def test_an_average_is_the_same_whichever_model_comes_first(first: Tensors, tmp_path: Path) -> None:
    for name, dtype in (("full", torch.float32), ("half", torch.float16)):
        tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in first.items()}
        a = saved(tmp_path / f"{name}.safetensors", tensors)
        b = saved(tmp_path / f"{name}2.safetensors", tensors, lambda n, t: moved(0.5)(n, t).to(t.dtype))
        made = merged(a, [b], [0.5], tmp_path / f"{name}3.safetensors")
        assert same(made, merged(b, [a], [0.5], tmp_path / f"{name}4.safetensors"))
        assert made[MATRIX].dtype == dtype and not torch.equal(made[MATRIX], tensors[MATRIX])


def test_what_is_equal_in_all_models_stays_as_it_is(first: Tensors, tmp_path: Path) -> None:
    a = saved(tmp_path / "a.safetensors", first)
    b = saved(tmp_path / "b.safetensors", first | {MATRIX: first[MATRIX] + 1})
    made = merged(a, [b, b], [0.3, 0.1], tmp_path / "made.safetensors")
    assert same(
        {n: t for n, t in made.items() if n != MATRIX}, {n: t for n, t in first.items() if n != MATRIX}
    )


def test_a_model_at_no_weight_has_no_part(first: Tensors, tmp_path: Path) -> None:
    """Not even where it holds what no sum survives, and the other's bits are copied."""
    a = saved(tmp_path / "a.safetensors", first)
    b = saved(tmp_path / "b.safetensors", first, moved(0.5))
    c = saved(tmp_path / "c.safetensors", first | {MATRIX: torch.full_like(first[MATRIX], torch.inf)})
    assert same(merged(a, [b, c], [1.0, 0.0], tmp_path / "1.safetensors"), load_tensors(b)[0])
    assert same(merged(a, [b, c], [0.0, 0.0], tmp_path / "0.safetensors"), first)
    d = saved(tmp_path / "d.safetensors", first | {MATRIX: torch.full_like(first[MATRIX], torch.nan)})
    for broken in (c, d):
        with pytest.raises(InputError, match=r"attn1\.to_q\.weight: is not finite after merging"):
            merge(take_apart(a), [b, broken], [0.5, 0.1])


def test_the_result_in_another_precision(first: Tensors, tmp_path: Path) -> None:
    half = {n: t.half() if t.is_floating_point() else t for n, t in first.items()}
    a = saved(tmp_path / "a.safetensors", half)
    b = saved(tmp_path / "b.safetensors", half, lambda n, t: moved(0.5)(n, t).to(t.dtype))
    made = merged(a, [b], [0.3], tmp_path / "made.safetensors", dtype=torch.float32)
    other = load_tensors(b)[0]
    wanted = 0.7 * half[MATRIX].double() + 0.3 * other[MATRIX].double()
    assert torch.equal(made[MATRIX], wanted.float())  # without a stop at float16
    assert made[STAGE].dtype == torch.float32
    large = saved(tmp_path / "large.safetensors", first | {MATRIX: first[MATRIX] + 1e6})
    for weight in (0.0, 0.5, 1.0):
        with pytest.raises(InputError, match=r"attn1\.to_q\.weight: is not finite"):
            merge(take_apart(large), [large], [weight], dtype=torch.float16)


def test_inpainting_models_are_mixed_with_a_base_that_is_none(first: Tensors, tmp_path: Path) -> None:
    conv = f"{UNET}input_blocks.0.0.weight"
    painting = first | {conv: torch.randn(32, 9, 3, 3, generator=noise(1))}
    a, b = (saved(tmp_path / f"{n}.safetensors", painting, moved(0.3, seed=n)) for n in (2, 3))
    c = saved(tmp_path / "c.safetensors", first)
    x, y, z = (load_tensors(path)[0][conv] for path in (a, b, c))
    made = merged(a, [b], [0.5], tmp_path / "made.safetensors", base=c)[conv]
    assert torch.equal(made[:, 4:], x[:, 4:])
    assert torch.allclose(made[:, :4], x[:, :4] + 0.5 * (y[:, :4] - z), atol=1e-6)
    made = merged(a, [c, b], [0.2, 0.3], tmp_path / "three.safetensors")[conv]
    assert torch.allclose(made[:, :4], 0.5 * x[:, :4] + 0.2 * z + 0.3 * y[:, :4], atol=1e-6)


def test_patterns_with_ranges() -> None:
    for pattern, block, fits in (
        ("IN03-05", "IN04", True),
        ("IN03-05", "IN06", False),
        ("double00-11", "double11", True),
        ("double00-11", "double12", False),
        ("IN0[3-5]", "IN04", True),
        ("IN0[!3-5]", "IN06", True),
        ("IN0[!3-5]", "IN04", False),
    ):
        assert Rule(pattern, (1.0,)).fits("network", block, "x.weight") is fits
    by_name = Rule.parse("network.joint_blocks.0-11.*=0.3", 1)
    assert by_name.fits("network", "joint07", "joint_blocks.7.x_block.attn.qkv.weight")
    assert not by_name.fits("network", "joint12", "joint_blocks.12.x_block.attn.qkv.weight")


def weight_of(rules: list[Rule], role: str, block: str) -> tuple[float, ...] | None:
    fitting = [rule.weights for rule in rules if rule.fits(role, block, "x.weight")]
    return fitting[-1] if fitting else None


@pytest.mark.parametrize(("count", "depth"), [(25, 12), (26, 12), (19, 9), (20, 9)])
def test_the_numbers_that_people_share(count: int, depth: int) -> None:
    rules = block_rules(",".join(str(index / 100) for index in range(count)), 2)
    start = (count % 5 == 1) or count == 20
    numbers = [rules[-1 - back].weights[0] for back in range(2 * depth + 1)][::-1]
    blocks = [*(f"IN{i:02d}" for i in range(depth)), "M00", *(f"OUT{i:02d}" for i in range(depth))]
    for block, number in zip(blocks, numbers, strict=True):
        assert weight_of(rules, "network", block) == (number, number)
    assert numbers == [(index + start) / 100 for index in range(2 * depth + 1)]
    base = (0.0, 0.0) if start else None
    assert weight_of(rules, "clip_l", "layer00") == weight_of(rules, "network", "TIME") == base
    assert weight_of(rules, "network", "OUT") == base


@pytest.mark.parametrize(
    "text", ["", "0.5", ",".join(["0"] * 24), ",".join(["0"] * 24 + ["x"]), ",".join(["inf"] * 25)]
)
def test_numbers_that_are_of_no_network(text: str) -> None:
    with pytest.raises(InputError, match="must be 25 or 19"):
        block_rules(text)


def test_shared_numbers_are_merged_by(first: Tensors, tmp_path: Path) -> None:
    """Those for blocks that a smaller network lacks are told."""
    a = saved(tmp_path / "a.safetensors", first)
    b = saved(tmp_path / "b.safetensors", first, moved(0.5))
    with pytest.raises(InputError, match=r"rules that fit nothing: network\.IN04"):
        merge(take_apart(a), [b], [0.5], rules=block_rules(",".join(["0"] * 25)))


def test_what_has_nothing_in_common_is_refused(first: Tensors, tmp_path: Path) -> None:
    a = saved(tmp_path / "a.safetensors", first)
    b = saved(tmp_path / "lora.safetensors", LORA)
    with pytest.raises(InputError, match="has no network in common with the first model: it holds LoRA"):
        merge(take_apart(a), [b], [0.5])
    half = {n: t for n, t in first.items() if n.startswith("first_stage_model.")}
    vae = saved(tmp_path / "vae.safetensors", half)
    with pytest.warns(UserWarning, match="has no clip_l, network: stays"):
        merge(take_apart(a), [vae], [0.5])


def test_averages_of_the_first_are_not_those_of_the_mixture(first: Tensors, tmp_path: Path) -> None:
    a = saved(tmp_path / "a.safetensors", first | {"model_ema.decay": torch.tensor(0.5)})
    b = saved(tmp_path / "b.safetensors", first, moved(0.5))
    with pytest.warns(UserWarning, match="averaged copies"):
        assert "model_ema.decay" not in merge(take_apart(a), [b], [0.5]).extra
