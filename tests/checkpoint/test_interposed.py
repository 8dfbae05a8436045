"""A model folder with an interposer: it loads, draws and is saved again; what does not fit it is named."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.tiny import SPACE, randomised, tiny_parts

import darkroom
from darkroom.checkpoint.load import load_any_autoencoder
from darkroom.checkpoint.model import (
    INTERPOSER,
    load_autoencoder,
    load_model,
    save_denoiser,
    save_model,
)
from darkroom.errors import InputError
from darkroom.nn.interposer import Interposed, Interposer, InterposerConfig

OWN = replace(SPACE, mean=(1.0, 2.0, 3.0, 4.0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "tiny", interposed_parts())
    return tmp_path / "tiny"


def interposed_parts():
    model = tiny_parts()
    torch.manual_seed(1)
    interposer = randomised(Interposer(InterposerConfig(latent_channels=4, width=8, blocks=1)))
    model.autoencoder.latent_space = OWN
    return replace(model, autoencoder=Interposed(model.autoencoder, interposer, SPACE))


@torch.no_grad()
def test_it_comes_back_as_it_was_saved(folder):
    before, after = interposed_parts().autoencoder, load_model(folder).autoencoder
    assert isinstance(after, Interposed)
    assert after.latent_space == SPACE and after.autoencoder.latent_space == OWN
    assert not any(module.training for module in after.modules())
    image, latents = torch.rand(1, 3, 16, 16) * 2 - 1, torch.randn(1, 4, 4, 4)
    assert torch.equal(before.encode(image), after.encode(image))
    assert torch.equal(before.decode(latents), after.decode(latents))
    assert torch.equal(after.encode(image), load_any_autoencoder(folder).encode(image))
    plain = load_autoencoder(folder)
    expected = before.interposer.to_denoiser(plain.encode(image))
    assert torch.equal(after.encode(image), expected)


def test_a_pipeline_draws_through_it(folder):
    pipe = darkroom.load(folder, device="cpu")
    drawn = pipe("red apple", seed=1, steps=2)
    with torch.no_grad():
        inner = pipe.model.autoencoder.autoencoder
        expected = inner.decode(pipe.model.autoencoder.interposer.to_decoder(drawn.latents))
    assert torch.allclose(pipe.decode(drawn.latents), expected, atol=1e-5)
    assert pipe("red apple", seed=1, steps=2, image=drawn.images[0]).images[0].size == (32, 32)


def test_saved_again_it_gives_the_same_bytes_and_plain_leaves_nothing_behind(folder, tmp_path):
    save_model(tmp_path / "again", load_model(folder))
    for path in folder.rglob("*"):
        if path.is_file():
            assert (tmp_path / "again" / path.relative_to(folder)).read_bytes() == path.read_bytes(), path
    save_model(folder, tiny_parts())
    assert not (folder / INTERPOSER).exists()
    assert not isinstance(load_model(folder).autoencoder, Interposed)


def test_another_denoisers_latent_space_is_refused(folder):
    parts = tiny_parts()
    spec = replace(parts.spec, latent_space=replace(SPACE, mean=(0.0,) * 4))
    save_denoiser(folder, parts.network, spec)
    with pytest.raises(InputError, match="interposer was trained for another latent space"):
        load_model(folder)


def test_a_damaged_one_is_named(folder):
    path = folder / INTERPOSER
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"interposer\.safetensors: truncated"):
        load_model(folder)
