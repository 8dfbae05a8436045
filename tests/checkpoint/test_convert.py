"""Models in another layout and back: the same names, dtypes and data."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoint.lists import LISTS, write_list
from torch import Tensor

from darkroom.checkpoint.convert import convert
from darkroom.checkpoint.formats.io import load_tensors, save_tensors
from darkroom.checkpoint.inspect import inspect
from darkroom.errors import InputError

# What has several layouts, and little enough data for the fast tests.
QUICK = (
    "sd15.single",
    "sd21.single",
    "sd15.diffusers.unet",
    "sd15.diffusers.vae.legacy_attn",
    "sdxl_refiner.single",
    "sd3_medium.single",
    "flux1_schnell.diffusers.transformer",
    "dit_xl2_256.diffusers.transformer",
    "ldm_cin256-v2.single",
    "ldm_vq-f4.single",
    "te_t5xxl.single",
    "openclip_vit_l14_text",
    "controlnet_sd15.single",
    "taesd.single.encoder",
    "taesd.single.decoder",
    "lora.kohya_sd15",
    "sd15.single.ema_extra",
)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Tokenizers that are not there are warned of, and scales that nothing says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Byte for byte, under the same names."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(a[n], b[n]) for n in a
    )


def check_round_trip(shared: Path, name: str, tmp_path: Path, to: Any) -> None:
    path, tensors = write_list(shared, name, tmp_path)
    if "taesd" in name:  # the other half lies beside it
        half, other = ("encoder", "decoder") if name.endswith("encoder") else ("decoder", "encoder")
        write_list(shared, name.replace(half, other), tmp_path)
    convert(path, tmp_path / "there", to=to)
    convert(tmp_path / "there", tmp_path / "back" / path.name, to="single")
    assert same(tensors, load_tensors(tmp_path / "back" / path.name)[0])


@pytest.mark.parametrize("to", ["diffusers", "parts"])
@pytest.mark.parametrize("name", QUICK)
def test_there_and_back(name: str, to: str, shared: Path, tmp_path: Path) -> None:
    (tmp_path / "back").mkdir()
    check_round_trip(shared, name, tmp_path, to)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["diffusers", "parts"])
@pytest.mark.parametrize("name", [name for name in LISTS if name not in QUICK])
def test_every_list_there_and_back(name: str, to: str, shared: Path, tmp_path: Path) -> None:
    (tmp_path / "back").mkdir()
    check_round_trip(shared, name, tmp_path, to)


def contents(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by file and name."""
    return {
        f"{file.relative_to(folder)}:{name}": tensor
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_tensors(file)[0].items()
    }


@pytest.mark.parametrize("name", ["sd15.single", "sdxl_refiner.single", "sd21.single"])
def test_a_folder_there_and_back(name: str, shared: Path, tmp_path: Path) -> None:
    """A folder of diffusers as a single file and as parts, and the folder again."""
    path, _ = write_list(shared, name, tmp_path)
    convert(path, tmp_path / "folder", to="diffusers")
    (tmp_path / "folder/darkroom_extra.safetensors").unlink()
    convert(tmp_path / "folder", tmp_path / "one.safetensors", to="single")
    convert(tmp_path / "one.safetensors", tmp_path / "again", to="diffusers")
    assert same(contents(tmp_path / "folder"), contents(tmp_path / "again"))
    convert(tmp_path / "folder", tmp_path / "parts", to="parts")
    convert(tmp_path / "parts", tmp_path / "third", to="diffusers")
    assert same(contents(tmp_path / "folder"), contents(tmp_path / "third"))


def test_what_has_no_room_travels_beside(shared: Path, tmp_path: Path) -> None:
    """Buffers, averaged copies, what nobody knows, and SD 2's last layer, which diffusers does without."""
    path, tensors = write_list(shared, "sd21.single", tmp_path)
    tensors |= {"model_ema.decay": torch.tensor(0.5), "what.is.it": torch.ones(3)}
    save_tensors(path, tensors, {"format": "pt", "note": "mine"})
    convert(path, tmp_path / "folder", to="diffusers")
    extra, _ = load_tensors(tmp_path / "folder/darkroom_extra.safetensors")
    assert {"betas", "model_ema.decay", "what.is.it"} <= extra.keys()
    assert any(".resblocks.23." in name for name in extra)
    assert not any(".layers.23." in name for name in contents(tmp_path / "folder"))
    convert(tmp_path / "folder", tmp_path / "back.safetensors", to="single")
    back, metadata = load_tensors(tmp_path / "back.safetensors")
    assert same(tensors, back) and metadata["note"] == "mine"
    assert not (tmp_path / "back.darkroom_extra.safetensors").exists()


def test_through_a_third_layout_and_back(shared: Path, tmp_path: Path) -> None:
    path, tensors = write_list(shared, "sd15.single", tmp_path)
    convert(path, tmp_path / "folder", to="diffusers")
    convert(tmp_path / "folder", tmp_path / "parts", to="parts")
    convert(tmp_path / "parts", tmp_path / "back.safetensors", to="single")
    assert same(tensors, load_tensors(tmp_path / "back.safetensors")[0])


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", "BF16"), ("float32", "F32"), ("fp8", "F8_E4M3")])
def test_other_precisions(dtype: str, stored: str, shared: Path, tmp_path: Path) -> None:
    path, tensors = write_list(shared, "sd15.single", tmp_path)
    convert(path, tmp_path / "out.safetensors", to="single", dtype=dtype)
    assert inspect(tmp_path / "out.safetensors").components["network"].dtype == stored
    made, _ = load_tensors(tmp_path / "out.safetensors")
    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    assert torch.allclose(made[name].float(), tensors[name].float(), rtol=0.08, atol=0.02)


def test_quantised_parts_are_read_again(shared: Path, tmp_path: Path) -> None:
    path, tensors = write_list(shared, "flux1_schnell.single", tmp_path)
    convert(path, tmp_path / "parts", to="parts", dtype="q8_0")
    file = tmp_path / "parts/flux.gguf"
    found = inspect(file)
    assert (found.family, found.unknown) == ("flux-schnell", ())
    assert found.components["network"].dtypes.keys() >= {"Q8_0"}
    convert(path, tmp_path / "one.gguf", to="single", dtype="q4_0")
    made, _ = load_tensors(file)
    assert made.keys() == tensors.keys()
    name = "single_blocks.0.linear2.weight"
    assert torch.allclose(made[name].float(), tensors[name].float(), atol=0.05)


def test_shards_of_a_size(shared: Path, tmp_path: Path) -> None:
    path, tensors = write_list(shared, "sd15.single", tmp_path)
    convert(path, tmp_path / "out.safetensors", to="single", max_bytes=10_000_000)
    assert len(list(tmp_path.glob("out-*-of-*.safetensors"))) >= 3
    assert same(tensors, load_tensors(tmp_path / "out.safetensors")[0])


def test_what_cannot_be_is_named(shared: Path, tmp_path: Path) -> None:
    path, _ = write_list(shared, "taesd.diffusers", tmp_path)
    with pytest.raises(InputError, match=r"unknown dtype 'q8'.*did you mean"):
        convert(path, tmp_path / "out", to="parts", dtype="q8")
    with pytest.raises(InputError, match="is there already"):
        convert(path, path, to="single")
    whole, _ = write_list(shared, "sd15.single", tmp_path)
    with pytest.raises(InputError, match="q8_0 is for GGUF"):
        convert(whole, tmp_path / "out.safetensors", to="single", dtype="q8_0")
    with pytest.raises(InputError, match="convert to single or parts"):
        convert(whole, tmp_path / "out", to="diffusers", dtype="fp8_scaled")
    with pytest.raises(InputError, match="unknown family 'nonsense'"):
        convert(whole, tmp_path / "out", to="diffusers", family="nonsense")
    with pytest.raises(InputError, match=r"sd15\.single\.safetensors: is not sdxl: unet: inputs 4"):
        convert(whole, tmp_path / "out", to="diffusers", family="sdxl")
    with pytest.raises(InputError, match="a GGUF file holds one network"):
        convert(whole, tmp_path / "out.gguf", to="single")
    with pytest.raises(InputError, match="no file of weights"):
        (tmp_path / "empty").mkdir()
        convert(tmp_path / "empty", tmp_path / "out", to="parts")
    assert not (tmp_path / "out").exists()


def test_a_header_cannot_lead_out_of_the_folder(shared: Path, tmp_path: Path) -> None:
    path, _ = write_list(shared, "taesd.diffusers", tmp_path)
    origin = '{"form": "parts", "pieces": {"autoencoder": ["original", "../../evil.safetensors/"]}}'
    save_tensors(tmp_path / "taesd.diffusers.darkroom_extra.safetensors", {}, {"darkroom.origin": origin})
    with pytest.raises(InputError, match="must lie in its folder"):
        convert(path, tmp_path / "out", to="parts")
    assert not list(tmp_path.parent.glob("evil*"))
