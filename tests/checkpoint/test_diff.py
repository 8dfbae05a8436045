"""How models differ: equal, rounded, low-rank, merged, retrained."""

from pathlib import Path

import pytest
import torch
from tests.checkpoint.relatives import (
    LORA,
    MATRIX,
    Tensors,
    flux,
    low_rank,
    moved,
    noise,
    pair_of,
    saved,
    small_model,
)
from tests.checkpoint.test_single_file import UNET

from darkroom.checkpoint.convert import convert, write
from darkroom.checkpoint.diff import Difference, diff, notes, rows
from darkroom.checkpoint.loose import take_apart
from darkroom.checkpoint.low_rank import factors
from darkroom.checkpoint.merge import Rule, merge
from darkroom.checkpoint.rounding import rounded_to, same_bits, ulps
from darkroom.errors import InputError

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def first() -> Tensors:
    return small_model()


def by_role(found: list[Difference]) -> dict[str, Difference]:
    return {d.role: d for d in found}


def test_equal_in_any_layout(first: Tensors, tmp_path: Path) -> None:
    a = saved(tmp_path / "a.safetensors", first)
    assert {d.verdict for d in diff(a, a)} == {"equal"}
    convert(a, tmp_path / "parts", to="parts")
    assert {d.verdict for d in diff(a, tmp_path / "parts")} == {"equal"}


def test_equal_is_equal_in_all_bits(first: Tensors, tmp_path: Path) -> None:
    """A NaN is the same NaN, and minus zero is not zero."""
    broken, zero = first[MATRIX].clone(), first[MATRIX].clone()
    broken[0, 0], zero[0, 0] = torch.nan, 0.0
    a = saved(tmp_path / "a.safetensors", first | {MATRIX: broken})
    assert {d.verdict for d in diff(a, a)} == {"equal"}
    b = saved(tmp_path / "b.safetensors", first | {MATRIX: zero})
    zero[0, 0] = -0.0
    found = by_role(diff(b, saved(tmp_path / "c.safetensors", first | {MATRIX: zero})))["network"]
    assert (found.changed, found.relative) == (1, 0.0) and found.verdict != "equal"


def test_values_that_are_not_finite_are_named(first: Tensors, tmp_path: Path) -> None:
    a = saved(tmp_path / "a.safetensors", first)
    b = saved(tmp_path / "b.safetensors", first | {MATRIX: torch.full_like(first[MATRIX], float("nan"))})
    for pair in ((a, b), (b, a)):
        with pytest.raises(InputError, match=r"network\.mid_block.*to_q\.weight: is not finite"):
            diff(*pair)


def test_large_numbers_are_finite(first: Tensors, tmp_path: Path) -> None:
    """Though their squares are not, in float32."""
    a = saved(tmp_path / "a.safetensors", first | {MATRIX: 1e30 * first[MATRIX]})
    b = saved(tmp_path / "b.safetensors", first | {MATRIX: 1.5e30 * first[MATRIX]})
    found = by_role(diff(a, b))["network"]
    assert found.relative == pytest.approx(0.5)


@pytest.mark.parametrize("name", HALVES)
def test_rounded_and_to_what(first: Tensors, tmp_path: Path, name: str) -> None:
    a = saved(tmp_path / "a.safetensors", first)
    half = saved(
        tmp_path / "half.safetensors", first, lambda _, t: t.to(HALVES[name]) if t.is_floating_point() else t
    )
    back = saved(tmp_path / "back.safetensors", first, lambda _, t: t.to(HALVES[name]).to(t.dtype))
    for pair in ((a, half), (half, a), (a, back), (back, a)):
        found = diff(*pair)
        assert {(d.verdict, d.rounded) for d in found} == {("rounded", (name,))}
        assert all(row[1] == f"rounded to {name}" for row in rows(found)[1:])


def test_rounding_of_pairs_of_precisions() -> None:
    w = torch.randn(64, 64, generator=noise(0))
    assert rounded_to(w.half(), w.bfloat16()) is torch.bfloat16
    assert rounded_to(w, w.to(torch.float8_e4m3fn)) is torch.float8_e4m3fn
    assert rounded_to(w, 1.0001 * w) is None
    assert rounded_to(w, (1.001 * w).half()) is None
    assert rounded_to(w.half(), (1.01 * w).bfloat16()) is None
    assert not same_bits(w, w.half()) and not same_bits(torch.zeros(2), -torch.zeros(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_ulp_is_the_distance_to_the_next_number(dtype: torch.dtype) -> None:
    infinity = int(torch.tensor(torch.inf, dtype=dtype).view(torch.int16))
    every = torch.arange(1, infinity, dtype=torch.int16).view(dtype)
    assert torch.equal(ulps(every)[:-1], every.float().diff())


def test_low_rank_merged_and_retrained(first: Tensors, tmp_path: Path) -> None:
    a = saved(tmp_path / "a.safetensors", first)
    b = saved(tmp_path / "lora.safetensors", first, low_rank(3))
    found = by_role(diff(a, b))
    assert (found["network"].verdict, found["network"].rank) == ("low-rank", 3)
    assert found["autoencoder"].verdict == found["clip_l"].verdict == "equal"
    tuned = saved(tmp_path / "tuned.safetensors", first, moved(0.2))
    assert {d.verdict for d in diff(a, tuned)} == {"merged"}
    other = saved(tmp_path / "other.safetensors", first, moved(3.0))
    assert {d.verdict for d in diff(a, other)} == {"retrained"}
    table, lines = rows(diff(a, b)), list(notes(diff(a, b)))
    assert len(table) == 4 and table[0][:2] == ("part", "verdict")
    assert any(line.startswith("network: changed most in") and "IN" in line for line in lines)


def test_a_bias_beside_matrices_of_low_rank_is_no_lora(first: Tensors, tmp_path: Path) -> None:
    a = saved(tmp_path / "a.safetensors", first)
    bias = f"{UNET}out.2.bias"
    b = saved(tmp_path / "b.safetensors", first | {bias: first[bias] + 1}, low_rank(3))
    assert by_role(diff(a, b))["network"].verdict == "merged"


@pytest.mark.parametrize("amount", [0.02, 0.006])
@pytest.mark.parametrize("name", HALVES)
def test_rounding_hides_no_lora(first: Tensors, tmp_path: Path, name: str, amount: float) -> None:
    """A merged LoRA is small: in bfloat16 rounding is a good part of the change, in every direction alike."""
    half = {n: t.to(HALVES[name]) if t.is_floating_point() else t for n, t in first.items()}
    a = saved(tmp_path / "a.safetensors", half)
    found = by_role(diff(a, saved(tmp_path / "b.safetensors", half, low_rank(3, amount))))["network"]
    assert (found.verdict, found.rank) == ("low-rank", 3)
    noisy = saved(
        tmp_path / "c.safetensors", half, lambda n, t: moved(amount)(n, t).to(t.dtype) if n == MATRIX else t
    )
    assert by_role(diff(a, noisy))["network"].verdict == "merged"


def test_directions_of_large_matrices_are_found_alike_every_time() -> None:
    """Beyond 512 rows and columns the decomposition is a randomised one."""
    up, down = torch.randn(700, 5, generator=noise(0)), torch.randn(5, 600, generator=noise(1))
    found, again = factors(up @ down, 8), factors(up @ down, 8)
    made = (found.u * found.values) @ found.v.T
    assert (made - up @ down).norm() <= 1e-5 * (up @ down).norm()
    assert torch.equal(found.values, again.values) and torch.equal(found.u, again.u)
    assert found.rank(0.9999) == 5


def test_queries_keys_and_values_have_loras_of_their_own(tmp_path: Path) -> None:
    """FLUX's fused matrices change by three LoRAs of rank 2, which is told, not 6."""
    base, tuned, *_ = pair_of(flux(), tmp_path, low_rank(2, where=lambda name: "attn.to_" in name))
    found = by_role(diff(base, tuned))["network"]
    assert (found.verdict, found.rank) == ("low-rank", 2)


def test_a_mixture_of_two_is_told_with_its_share(first: Tensors, tmp_path: Path) -> None:
    a = saved(tmp_path / "a.safetensors", first)
    c = saved(tmp_path / "c.safetensors", first, moved(0.5))
    write(merge(take_apart(a), [c], [0.3]), tmp_path / "mixed.safetensors", to="single")
    found = diff(a, tmp_path / "mixed.safetensors", base=c)
    for d in found:
        assert d.verdict == "merged" and d.share == pytest.approx(0.7, abs=1e-3)
        assert d.mixture is not None and d.mixture.off < 1e-3 and not d.mixture.by_block
    assert all(row[5] == "0.700" for row in rows(found)[1:])
    other = saved(tmp_path / "other.safetensors", first, moved(0.5, seed=9))
    assert all(d.mixture is None and d.verdict == "merged" for d in diff(a, other, base=c))


def test_a_mixture_is_seen_through_rounding(first: Tensors, tmp_path: Path) -> None:
    half = {n: t.bfloat16() if t.is_floating_point() else t for n, t in first.items()}
    a = saved(tmp_path / "a.safetensors", half)
    shake = moved(0.02)
    c = saved(tmp_path / "c.safetensors", half, lambda n, t: shake(n, t).to(t.dtype))
    write(merge(take_apart(a), [c], [0.5]), tmp_path / "mixed.safetensors", to="single")
    found = by_role(diff(a, tmp_path / "mixed.safetensors", base=c))["network"]
    assert found.share == pytest.approx(0.5, abs=0.02)


def test_a_mixture_by_block_is_told_block_by_block(first: Tensors, tmp_path: Path) -> None:
    a = saved(tmp_path / "a.safetensors", first)
    c = saved(tmp_path / "c.safetensors", first, moved(0.5))
    rules = [Rule("M00", (0.9,)), Rule("OUT*", (0.2,))]
    write(merge(take_apart(a), [c], [0.5], rules=rules), tmp_path / "mixed.safetensors", to="single")
    found = by_role(diff(a, tmp_path / "mixed.safetensors", base=c))["network"]
    assert found.verdict == "merged" and found.share is None and found.mixture is not None
    shares = found.mixture.by_block
    assert shares["M00"] == pytest.approx(0.1, abs=1e-3) and shares["OUT01"] == pytest.approx(0.8, abs=1e-3)
    assert shares["IN01"] == pytest.approx(0.5, abs=1e-3)
    assert rows([found])[1][5] == "by block"
    assert any("M00 0.10" in line for line in notes([found]))


def test_a_base_of_nothing_in_common_is_refused(first: Tensors, tmp_path: Path) -> None:
    unet = {n: t for n, t in first.items() if n.startswith(UNET)}
    rest = {n: t for n, t in first.items() if not n.startswith(UNET)}
    a, c = saved(tmp_path / "a.safetensors", unet), saved(tmp_path / "c.safetensors", rest)
    with pytest.raises(InputError, match=r"c\.safetensors: has no network .* in common"):
        diff(a, a, base=c)


def test_names_shapes_and_networks_that_differ(first: Tensors, tmp_path: Path) -> None:
    a = saved(tmp_path / "a.safetensors", first)
    wider = first | {f"{UNET}input_blocks.0.0.weight": torch.randn(32, 9, 3, 3)}
    b = saved(tmp_path / "b.safetensors", wider)
    found = by_role(diff(a, b))["network"]
    assert found.verdict == "other shapes" and found.reshaped == ("conv_in.weight",)
    with pytest.raises(InputError, match="have no network in common"):
        diff(a, saved(tmp_path / "lora.safetensors", LORA))


def test_networks_and_tensors_of_one_side_are_told(first: Tensors, tmp_path: Path) -> None:
    a = saved(tmp_path / "a.safetensors", first)
    stage = {n: t for n, t in first.items() if n.startswith("first_stage_model.")}
    b = saved(tmp_path / "b.safetensors", stage | {"what.is.this": torch.ones(1)})
    for pair, side in (((a, b), "only_first"), ((b, a), "only_second")):
        found = by_role(diff(*pair))
        assert found["autoencoder"].verdict == "equal"
        for role in ("clip_l", "network"):
            assert found[role].verdict == "on one side only" and getattr(found[role], side) == (role,)
        strange = found["of no network"]
        assert "what.is.this" in (strange.only_second if side == "only_first" else strange.only_first)
