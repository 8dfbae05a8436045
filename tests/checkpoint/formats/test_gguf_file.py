"""GGUF files are written as the `gguf` package writes and reads them, whole or not at all."""

import math
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from darkroom.checkpoint.formats import gguf_file, quantised
from darkroom.checkpoint.formats.gguf_file import Quant, save_gguf
from darkroom.checkpoint.formats.gguf_header import read_gguf
from darkroom.errors import InputError


def stored(path: Path, name: str) -> bytes:
    entry = read_gguf(path).entries[name]
    with path.open("rb") as file:
        file.seek(entry.offset)
        return file.read(entry.nbytes)


def loaded(path: Path) -> dict[str, torch.Tensor]:
    result = {}
    for name, entry in read_gguf(path).entries.items():
        raw = torch.frombuffer(bytearray(stored(path, name)), dtype=torch.uint8)
        result[name] = quantised.decode_gguf(raw, entry)
    return result


def test_file_types_are_those_of_llama() -> None:
    names = {"F32": "ALL_F32", "Q4_K": "MOSTLY_Q4_K_S", "Q5_K": "MOSTLY_Q5_K_S"}
    expected = {q: gguf.LlamaFileType[names.get(q, f"MOSTLY_{q}")] for q in gguf_file.FILE_TYPES}
    assert expected == gguf_file.FILE_TYPES


def model() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.05

    return {
        "in.weight": normal(16, 4, 3, 3),  # 576 values: small
        "conv.weight": normal(32, 32, 3, 3),  # rows of 3
        "attn.weight": normal(48, 256),
        "mlp.weight": normal(20, 64),  # whole blocks of 32, not of 256
        "odd.weight": normal(37, 53),
        "norm.bias": normal(2048),
        "scale": torch.tensor(4.6),
        "steps": torch.arange(9),
    }


SHAPES = {name: tuple(tensor.shape) for name, tensor in model().items()}
BLOCKS_OF_32 = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")


@pytest.mark.parametrize("quant", gguf_file.FILE_TYPES)
def test_the_package_reads_what_we_write(quant: Quant, tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.gguf", model()
    metadata = {"modelspec.title": "Ä 東京", "empty": "", "general.alignment": "64", "general.file_type": "x"}
    save_gguf(path, tensors, architecture="sd1", quant=quant, metadata=metadata)
    reader = gguf.GGUFReader(path)
    assert [tensor.name for tensor in reader.tensors] == list(tensors)
    assert reader.fields["general.architecture"].contents() == "sd1"
    assert reader.fields["general.file_type"].contents() == gguf_file.FILE_TYPES[quant]
    assert reader.fields["general.quantization_version"].contents() == 2
    assert reader.fields["modelspec.title"].contents() == "Ä 東京"
    found = loaded(path)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == SHAPES
    for tensor in reader.tensors:
        if tensor.tensor_type.name not in ("I64",):
            values = quants.dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(values.reshape(SHAPES[tensor.name]), found[tensor.name].float().numpy())
    assert read_gguf(path).metadata["empty"] == ""
    assert torch.equal(found["steps"], tensors["steps"])


@pytest.mark.parametrize("quant", gguf_file.FILE_TYPES)
def test_what_is_quantised_and_what_stays(quant: Quant, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    save_gguf(path, model(), architecture="sd1", quant=quant, metadata={})
    kinds = {name: entry.dtype for name, entry in read_gguf(path).entries.items()}
    plain = quant in ("F32", "F16", "BF16")
    assert kinds == {
        "in.weight": "F32",
        "conv.weight": quant,
        "attn.weight": quant,
        "mlp.weight": quant,  # of K types in rows of 256
        "odd.weight": quant if plain else "F32",
        "norm.bias": "F32",
        "scale": "F32",
        "steps": "I64",
    }
    rows = {tensor.name: tuple(tensor.shape) for tensor in gguf.GGUFReader(path).tensors}
    assert rows["conv.weight"] == ((3, 3, 32, 32) if plain else (256, 36))
    assert rows["attn.weight"] == (256, 48)
    assert rows["mlp.weight"] == ((256, 5) if quant.endswith("_K") else (64, 20))


@pytest.mark.parametrize("quant", BLOCKS_OF_32)
def test_bytes_are_those_of_the_package(quant: Quant, tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.gguf", model()
    save_gguf(path, tensors, architecture="sd1", quant=quant, metadata={})
    for name, rows in (("attn.weight", (48, 256)), ("mlp.weight", (20, 64)), ("conv.weight", (36, 256))):
        values = tensors[name].reshape(rows).numpy()
        assert stored(path, name) == quants.quantize(values, GGMLQuantizationType[quant]).tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plain_types_are_lossless(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in model().items()}
    tensors["attn.weight"][0, :3] = torch.tensor([math.inf, -math.inf, 0.0])
    tensors["attn.weight"][1, 0] = 2.0**-14
    names: dict[torch.dtype, Quant] = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    save_gguf(path, tensors, architecture="flux", quant=names[dtype], metadata={})
    found = loaded(path)
    assert found["attn.weight"].dtype == dtype
    assert all(torch.equal(found[name].to(tensor.dtype), tensor) for name, tensor in tensors.items())


def test_pieces_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, pieces = tmp_path / "a.gguf", tmp_path / "b.gguf"
    save_gguf(whole, model(), architecture="sd1", quant="Q4_K", metadata={"a": "b"})
    monkeypatch.setattr(gguf_file, "piece_numel", lambda device: 512)
    save_gguf(pieces, model(), architecture="sd1", quant="Q4_K", metadata={"a": "b"})
    assert whole.read_bytes() == pieces.read_bytes()


def test_more_dimensions_than_gguf_has(tmp_path: Path) -> None:
    path, video = tmp_path / "a.gguf", torch.randn(8, 4, 2, 3, 64)
    save_gguf(path, {"a": video, "b": video.transpose(0, 4)}, architecture="x", quant="F32", metadata={})
    found = loaded(path)
    assert torch.equal(found["a"], video)
    assert torch.equal(found["b"], video.transpose(0, 4))
    assert max(len(tensor.shape) for tensor in gguf.GGUFReader(path).tensors) == 2


def test_scaled_float8_is_decoded_first(tmp_path: Path) -> None:
    path, weight = tmp_path / "a.gguf", torch.randn(64, 64)
    tensors = quantised.encode_fp8({"a.weight": weight, "a.bias": weight[0]}, scaled=True)
    save_gguf(path, tensors, architecture="flux", quant="F32", metadata={})
    expected = quantised.decode_fp8(tensors, torch.float32)
    found = loaded(path)
    assert found.keys() == {"a.weight", "a.bias"} == expected.keys()
    assert torch.equal(found["a.weight"], expected["a.weight"])


def test_names_of_up_to_127_bytes(tmp_path: Path) -> None:
    path, tensor = tmp_path / "a.gguf", torch.ones(3)
    save_gguf(path, {"ä" * 63 + "a": tensor}, architecture="x", quant="F32", metadata={})
    assert list(read_gguf(path).entries) == ["ä" * 63 + "a"]
    with pytest.raises(InputError, match="at most 127 bytes"):
        save_gguf(path, {"ä" * 64: tensor}, architecture="x", quant="F32", metadata={})


BAD: dict[str, tuple[str, torch.Tensor, Quant]] = {
    "bool": ("a is torch.bool", torch.ones(3, dtype=torch.bool), "F32"),
    "NaN": ("a has values that Q8_0 cannot hold", torch.full((64, 64), math.nan), "Q8_0"),
    "infinite": ("a has values that Q4_K cannot hold", torch.full((64, 256), math.inf), "Q4_K"),
    "too large": ("a has values that F16 cannot hold", torch.full((64, 64), 1e5), "F16"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_and_the_old_file_stays(case: str, tmp_path: Path) -> None:
    message, tensor, quant = BAD[case]
    path = tmp_path / "a.gguf"
    path.write_text("old")
    with pytest.raises(InputError, match=message):
        save_gguf(path, {"first": torch.ones(99), "a": tensor}, architecture="x", quant=quant, metadata={})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_unknown_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="IQ2_XS; known are F32, F16"):
        save_gguf(tmp_path / "a", {}, architecture="x", quant="IQ2_XS", metadata={})  # pyright: ignore[reportArgumentType]


def test_no_tensors_at_all(tmp_path: Path) -> None:
    save_gguf(tmp_path / "a", {}, architecture="x", quant="Q8_0", metadata={})
    assert read_gguf(tmp_path / "a").entries == {}
