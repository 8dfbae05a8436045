"""Quantised blocks are ggml's to the bit, their errors what their bits allow; float8 keeps its scales."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from darkroom.checkpoint.formats import quantised
from darkroom.checkpoint.formats.fp8_names import fp8_companions
from darkroom.checkpoint.formats.gguf_blocks import DECODERS
from darkroom.checkpoint.formats.gguf_encode import ENCODERS
from darkroom.checkpoint.formats.gguf_types import BY_NAME
from darkroom.checkpoint.formats.header import Entry, Shape
from darkroom.checkpoint.formats.quantised import decode_fp8, decode_gguf, encode_fp8
from darkroom.errors import InputError

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# Where the float16 numbers of a block lie.
HALVES = {
    "Q8_0": (0,), "Q4_0": (0,), "Q5_0": (0,), "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2),
    "Q6_K": (208,), "Q2_K": (80, 82), "Q3_K": (108,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip


def random_blocks(kind: str, count: int) -> Tensor:
    """Blocks of random bytes whose float16 numbers are finite."""
    generator = torch.Generator().manual_seed(len(kind) + count)
    blocks = torch.randint(0, 256, (count, BY_NAME[kind].size), dtype=torch.uint8, generator=generator)
    for start in HALVES[kind]:
        number = torch.randn(count, 1, generator=generator).half()
        blocks[:, start : start + 2] = number.view(torch.uint8)
    return blocks


def entry_of(kind: str, shape: Shape) -> Entry:
    numel = int(np.prod(shape))
    nbytes = numel // BY_NAME[kind].block * BY_NAME[kind].size
    return Entry(dtype=kind, shape=shape, file=Path("model.gguf"), offset=0, nbytes=nbytes)


def by_package(blocks: Tensor, kind: str) -> Tensor:
    return torch.from_numpy(quants.dequantize(blocks.numpy(), GGMLQuantizationType[kind]))


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("kind", DECODERS)
def test_decoded_to_the_bit_as_by_the_package(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        quantised, "piece_numel", lambda device: 2048
    )  # several pieces, the last a shorter one
    blocks = random_blocks(kind, 203)
    shape = (203 // 7, 7 * BY_NAME[kind].block)
    values = decode_gguf(blocks.flatten(), entry_of(kind, shape))
    assert values.shape == shape
    assert values.dtype == torch.float32
    assert same_bits(values.flatten(), by_package(blocks, kind).flatten())


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_K", "IQ4_NL"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decoded_to_another_dtype(kind: str, dtype: torch.dtype) -> None:
    blocks = random_blocks(kind, 8)
    values = decode_gguf(blocks, entry_of(kind, (8, BY_NAME[kind].block)), dtype)
    assert values.dtype == dtype
    assert torch.equal(values, by_package(blocks, kind).to(dtype))


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS"])
def test_other_types_go_through_the_package(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, entry = random_blocks(kind, 4), entry_of(kind, (4, BY_NAME[kind].block))
    assert same_bits(decode_gguf(blocks, entry), by_package(blocks, kind))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=rf"model\.gguf: {kind} .*pip install 'darkroom\[quant\]'"):
        decode_gguf(blocks, entry)


def test_types_that_nobody_decodes_are_named() -> None:
    with pytest.raises(InputError, match=r"model\.gguf: Q8_K cannot be decoded; Q8_0"):
        decode_gguf(torch.zeros(292, dtype=torch.uint8), entry_of("Q8_K", (256,)))


def test_bytes_of_another_length_are_refused() -> None:
    with pytest.raises(InputError, match="expected 34 bytes of Q8_0, got 33"):
        decode_gguf(torch.zeros(33, dtype=torch.uint8), entry_of("Q8_0", (32,)))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"])
def test_plain_types_and_bytes_at_an_odd_place(kind: str) -> None:
    stored = quantised.PLAIN[kind]
    values = torch.tensor([[1, -2, 3], [4, 5, -6]]).to(stored)
    raw = torch.cat([torch.zeros(3, dtype=torch.uint8), values.view(torch.uint8).flatten()])[3:]
    found = decode_gguf(raw, entry_of(kind, (2, 3)))
    assert found.dtype == stored
    assert torch.equal(found, values)
    assert decode_gguf(raw, entry_of(kind, (2, 3)), torch.bfloat16).dtype == (
        torch.bfloat16 if stored.is_floating_point else stored
    )


def test_no_values_at_all() -> None:
    empty = torch.zeros(0, dtype=torch.uint8)
    assert decode_gguf(empty, entry_of("Q4_K", (0, 256))).shape == (0, 256)
    assert decode_gguf(empty, entry_of("F32", (3, 0))).shape == (3, 0)


def awkward() -> Tensor:
    """Rows of 256 values: of every size, zeros, all the same, ties of both signs, halves, an outlier."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(64, 256, generator=generator) * torch.logspace(-6, 3, 64)[:, None]
    values[0] = 0
    values[1] = 0.3
    values[2] = -0.3
    values[3, 1::2] = -values[3, ::2]
    values[4] = torch.randint(-253, 254, (256,), generator=generator) / 2
    values[4, ::32] = 127
    values[5] = 0
    values[5, 100] = -7
    values[6] = values[6].abs()
    values[7] = -values[7].abs()
    return values


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
def test_encoded_to_the_bit_as_by_the_package(kind: str) -> None:
    values = awkward()
    expected = quants.quantize(values.numpy(), GGMLQuantizationType[kind])
    assert np.array_equal(ENCODERS[kind](values.view(-1, 32)).view(64, -1).numpy(), expected)


def round_trip(kind: str, values: Tensor) -> Tensor:
    blocks = values.reshape(-1, BY_NAME[kind].block)
    raw = ENCODERS[kind](blocks)
    assert raw.dtype == torch.uint8
    assert raw.shape == (len(blocks), BY_NAME[kind].size)
    return by_package(raw, kind).view(values.shape)


# Error of weights drawn from a normal distribution, relative to their norm: measured, and 2 % more.
ERRORS = {
    "Q8_0": 0.00546, "Q6_K": 0.0177, "Q5_K": 0.0367, "Q5_1": 0.0386, "Q5_0": 0.0436,
    "Q4_K": 0.0732, "Q4_1": 0.0799, "Q4_0": 0.0877,
}  # fmt: skip


@pytest.mark.parametrize("kind", ENCODERS)
def test_errors_are_what_the_bits_allow(kind: str) -> None:
    values = torch.randn(512, 256, generator=torch.Generator().manual_seed(2)) * 0.02
    error = (round_trip(kind, values) - values).norm() / values.norm()
    assert 0.9 * ERRORS[kind] < error < ERRORS[kind]


def test_q8_0_errs_by_half_a_step() -> None:
    values = torch.randn(4096, 32, generator=torch.Generator().manual_seed(3))
    error = (round_trip("Q8_0", values) - values).abs().amax(dim=1) / values.abs().amax(dim=1)
    # half of 1 / 127, and the rounding of the scale to float16
    assert error.max() < 0.5 / 127 + 2**-11


@pytest.mark.parametrize(("kind", "worst"), [("Q6_K", 0.033), ("Q5_K", 0.08), ("Q4_K", 0.14)])
def test_k_types_of_awkward_weights(kind: str, worst: float) -> None:
    values = awkward()
    found = round_trip(kind, values)
    # float16 holds the scales of a block, 63 or 128 steps of them: below 1e-5 nothing is left
    normal = values.abs().amax(dim=1) > 0.01
    error = (found - values).abs().amax(dim=1) / values.abs().amax(dim=1)
    assert error[normal].max() < worst
    assert torch.isfinite(found).all()
    assert torch.equal(found[0], values[0])
    assert (found.abs().amax(dim=1) <= 1.2 * values.abs().amax(dim=1) + 1e-5).all()


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("size", [1e-45, 1e-39, 1e-30, 1e-8, 6e4])
def test_no_size_of_weights_becomes_infinite(kind: str, size: float) -> None:
    values = torch.zeros(2, 256)
    values[0, :3] = torch.tensor([size, -size, size / 3])
    values[1] = size
    found = round_trip(kind, values)
    assert torch.isfinite(found).all()
    assert (found - values).abs().max() <= 0.13 * size + 1e-7


# float8


def scaled_layer(name: str = "a", old: bool = True, shape: Shape = (8, 6)) -> dict[str, Tensor]:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(E4M3)
    scale, inputs = ("scale_weight", "scale_input") if old else ("weight_scale", "input_scale")
    return {
        f"{name}.weight": weight,
        f"{name}.bias": torch.ones(shape[0]),
        f"{name}.{scale}": torch.tensor(0.37),
        f"{name}.{inputs}": torch.tensor(1.0),
    }


@pytest.mark.parametrize("old", [True, False])
def test_weights_times_their_scale_and_nothing_beside_them(old: bool) -> None:
    tensors = scaled_layer("model.diffusion_model.a", old)
    marker = {"model.diffusion_model.scaled_fp8": torch.zeros(2, dtype=E4M3), "scaled_fp8": torch.zeros(0)}
    found = decode_fp8(tensors | marker, torch.float32)
    assert found.keys() == {"model.diffusion_model.a.weight", "model.diffusion_model.a.bias"}
    expected = tensors["model.diffusion_model.a.weight"].float() * 0.37
    assert torch.equal(found["model.diffusion_model.a.weight"], expected)
    assert found["model.diffusion_model.a.bias"] is tensors["model.diffusion_model.a.bias"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_of_any_dtype_and_shape(dtype: torch.dtype, shape: Shape) -> None:
    tensors = scaled_layer() | {"a.scale_weight": torch.full(shape, 0.25, dtype=dtype)}
    found = decode_fp8(tensors, torch.bfloat16)["a.weight"]
    assert torch.equal(found, (tensors["a.weight"].float() / 4).bfloat16())


@pytest.mark.parametrize("weight", [(8, 8), (8, 6), (8, 4, 3, 3)])
@pytest.mark.parametrize("column", [True, False])
def test_one_scale_for_each_output_channel(weight: Shape, column: bool) -> None:
    scales = torch.rand(8) + 0.5
    stored = scales.reshape(8, *[1] * (len(weight) - 1)) if column else scales
    tensors = scaled_layer(shape=weight) | {"a.scale_weight": stored}
    found = decode_fp8(tensors, torch.float32)["a.weight"]
    for channel in range(8):
        assert torch.equal(found[channel], tensors["a.weight"][channel].float() * scales[channel])


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_float8_without_scales_is_cast(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 5).to(dtype)
    found = decode_fp8({"a.weight": weight, "b": torch.arange(3)}, torch.bfloat16)
    assert torch.equal(found["a.weight"], weight.to(torch.bfloat16))
    assert torch.equal(found["b"], torch.arange(3))


def test_a_weight_that_is_scaled_but_not_float8_is_not_changed_in_place() -> None:
    weight = torch.ones(2, 3)
    found = decode_fp8({"a.weight": weight, "a.scale_weight": torch.tensor(0.5)}, torch.float32)
    assert torch.equal(found["a.weight"], torch.full((2, 3), 0.5))
    assert torch.equal(weight, torch.ones(2, 3))


def layer_format(form: str) -> Tensor:
    return torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)


def test_the_format_of_a_layer() -> None:
    tensors = scaled_layer(old=False) | {"a.comfy_quant": layer_format("float8_e4m3fn")}
    assert decode_fp8(tensors, torch.float32).keys() == {"a.weight", "a.bias"}
    with pytest.raises(InputError, match=r"a\.weight is in the format nvfp4"):
        decode_fp8(tensors | {"a.comfy_quant": layer_format("nvfp4")}, torch.float32)
    with pytest.raises(InputError, match=r"a\.comfy_quant is not JSON"):
        decode_fp8(tensors | {"a.comfy_quant": torch.zeros(3, dtype=torch.uint8)}, torch.float32)


@pytest.mark.parametrize("shape", [(6,), (1, 6), (8, 3), (2,)])
def test_scales_of_another_shape_are_refused(shape: Shape) -> None:
    with pytest.raises(
        InputError, match=r"a\.scale_weight is .* for a weight of \[8, 6\]; one number, or .* 8,"
    ):
        decode_fp8(scaled_layer() | {"a.scale_weight": torch.ones(shape)}, torch.float32)


def test_scaled_integers_are_refused() -> None:
    with pytest.raises(InputError, match=r"a\.weight has a scale, but is torch\.int8"):
        decode_fp8(scaled_layer() | {"a.weight": torch.ones(8, 6, dtype=torch.int8)}, torch.float32)


def test_meta_tensors_keep_names_and_shapes() -> None:
    tensors = scaled_layer(old=False) | {"a.comfy_quant": layer_format("float8_e4m3fn")}
    found = decode_fp8({name: tensor.to("meta") for name, tensor in tensors.items()}, torch.bfloat16)
    assert {name: (t.shape, t.dtype, t.device.type) for name, t in found.items()} == {
        "a.weight": ((8, 6), torch.bfloat16, "meta"),
        "a.bias": ((8,), torch.float32, "meta"),
    }


def test_which_names_are_companions() -> None:
    names = ["a.weight", "a.scale_weight", "a.input_scale", "a.comfy_quant", "p.scaled_fp8", "scaled_fp8"]
    others = ["logit_scale", "b.scale_weight", "a.weight_scale.weight", "not_scaled_fp8", "scale_weight"]
    assert fp8_companions([*names, *others]) == set(names) - {"a.weight"}


def model(scale: float = 0.02) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    return {
        "model.diffusion_model.mlp.weight": normal(64, 96),
        "model.diffusion_model.mlp.bias": normal(8192),
        "model.diffusion_model.conv.weight": normal(32, 16, 3, 3),
        "model.diffusion_model.small.weight": normal(8, 8),
        "model.diffusion_model.pos_embed": normal(1, 64, 96),
        "text_encoders.t5xxl.transformer.shared.weight": normal(64, 96),
        "text_encoders.t5xxl.transformer.token_embedding.weight": normal(64, 96),
        "text_encoders.t5xxl.transformer.q.weight": normal(96, 96).bfloat16(),
        "kept.weight": normal(64, 96),
    }


MATRICES = ("model.diffusion_model.mlp.weight", "text_encoders.t5xxl.transformer.q.weight")
CONV = "model.diffusion_model.conv.weight"


def test_plain_float8_takes_matrices_and_convolutions() -> None:
    tensors = model()
    found = encode_fp8(tensors, scaled=False, keep=["kept.weight"])
    assert found.keys() == tensors.keys()
    assert {name for name, tensor in found.items() if tensor.dtype == E4M3} == {*MATRICES, CONV}
    assert all(found[name] is tensors[name] for name in tensors if found[name].dtype != E4M3)
    assert torch.equal(found[CONV].float(), tensors[CONV].to(E4M3).float())


def test_scaled_float8_takes_matrices_and_says_how() -> None:
    tensors = model()
    found = encode_fp8(tensors, scaled=True, keep=["kept.weight"])
    assert {name for name, tensor in found.items() if tensor.dtype == E4M3 and tensor.ndim > 1} == {*MATRICES}
    markers = {"model.diffusion_model.scaled_fp8", "text_encoders.t5xxl.transformer.scaled_fp8"}
    scales = {name.replace(".weight", ".scale_weight") for name in MATRICES}
    assert found.keys() - tensors.keys() == markers | scales == fp8_companions(found)
    for name in MATRICES:
        scale = found[name.replace(".weight", ".scale_weight")]
        assert (scale.shape, scale.dtype) == ((), torch.float32)
        assert found[name].float().abs().max() == 448
    assert all(found[name].shape == (2,) for name in markers)


@pytest.mark.parametrize("per_channel", [False, True])
def test_scaled_float8_comes_back(per_channel: bool) -> None:
    tensors = model(scale=2e-4)
    found = decode_fp8(encode_fp8(tensors, scaled=True, per_channel=per_channel), torch.float32)
    assert found.keys() == tensors.keys()
    for name in MATRICES:
        error = (found[name] - tensors[name]).norm() / tensors[name].norm()
        assert 0.02 < error < 0.03  # three bits of mantissa
    plain = decode_fp8(encode_fp8(tensors, scaled=False), torch.float32)[MATRICES[0]]
    assert (plain - tensors[MATRICES[0]]).norm() / tensors[MATRICES[0]].norm() > 0.9  # below its smallest


def test_a_scale_for_each_channel_helps_uneven_ones() -> None:
    weight = (
        torch.randn(64, 96, generator=torch.Generator().manual_seed(6)) * torch.logspace(-7, 0, 64)[:, None]
    )
    errors = []
    for per_channel in (False, True):
        found = decode_fp8(encode_fp8({"a.weight": weight}, True, per_channel=per_channel), torch.float32)
        errors.append(((found["a.weight"] - weight).norm(dim=1) / weight.norm(dim=1)).max())
    assert errors[1] < 0.04 < 0.9 < errors[0]


@pytest.mark.parametrize("scaled", [False, True])
def test_large_values_saturate_and_zeros_stay(scaled: bool) -> None:
    large = torch.full((64, 64), 300.0)
    large[0, 0], large[1, 1] = 1e6, -1e6
    found = decode_fp8(encode_fp8({"a.weight": large, "b.weight": large * 0}, scaled), torch.float32)
    top = 1e6 if scaled else 448
    assert (found["a.weight"][0, 0], found["a.weight"][1, 1]) == (pytest.approx(top), pytest.approx(-top))
    assert torch.equal(found["b.weight"], large * 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("scaled", [False, True])
def test_weights_that_are_not_finite_are_refused(value: float, scaled: bool) -> None:
    weight = torch.ones(64, 64)
    weight[3, 4] = value
    with pytest.raises(InputError, match=r"a\.weight has values that are not finite"):
        encode_fp8({"a.weight": weight}, scaled)


def test_half_precision_is_divided_in_float32() -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(7)).bfloat16()
    same = [encode_fp8({"a.weight": w}, scaled=True)["a.weight"].float() for w in (weight, weight.float())]
    assert torch.equal(*same)
