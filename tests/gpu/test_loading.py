"""Weights go straight from disk to the device, in the precision asked for."""

from pathlib import Path

import pytest
import torch
from tests.checkpoint.test_single_file import small_sd1

from darkroom.checkpoint.convert import convert
from darkroom.checkpoint.formats.io import load_tensors, save_tensors
from darkroom.checkpoint.load import load_any
from darkroom.checkpoint.single_file import read_checkpoint
from darkroom.presets import bundled

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator"),
]


def device() -> torch.device:
    found = torch.accelerator.current_accelerator()
    assert found is not None
    return found


@pytest.mark.parametrize("name", bundled())
def test_models_load_onto_the_device(name: str) -> None:
    there, here = load_any(name, dtype=torch.bfloat16, device=device()), load_any(name, dtype=torch.bfloat16)
    for theirs, ours in ((there.network, here.network), (there.autoencoder, here.autoencoder)):
        for parameter, wanted in zip(theirs.parameters(), ours.parameters(), strict=True):
            assert parameter.device.type == device().type and torch.equal(parameter.cpu(), wanted)


def test_a_single_file_loads_onto_the_device(tmp_path: Path) -> None:
    networks, tensors = small_sd1()
    save_tensors(tmp_path / "sd.safetensors", tensors, {})
    parts = read_checkpoint(tmp_path / "sd.safetensors", torch.float16, device())
    assert parts.network is not None
    for name, tensor in networks["network"].state_dict().items():
        found = parts.network.tensors[name]
        assert found.device.type == device().type and torch.equal(found.cpu(), tensor.half())


@pytest.mark.parametrize("quant", ["q8_0", "q4_0", "q4_k", "q5_k", "q6_k"])
def test_blocks_are_decoded_on_the_device(quant: str, tmp_path: Path) -> None:
    _, tensors = small_sd1()
    network = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    save_tensors(tmp_path / "unet.safetensors", network, {})
    convert(tmp_path / "unet.safetensors", tmp_path / "unet.gguf", to="single", dtype=quant)
    here, _ = load_tensors(tmp_path / "unet.gguf", dtype=torch.float32)
    there, _ = load_tensors(tmp_path / "unet.gguf", device(), torch.float32)
    for name, tensor in here.items():
        assert there[name].device.type == device().type and torch.equal(there[name].cpu(), tensor)
