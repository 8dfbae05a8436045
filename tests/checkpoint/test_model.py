"""A model folder comes back as it was saved; parts that are missing, damaged or do not fit are named."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny import SPACE, randomised, tiny_model, tiny_parts

from darkroom.checkpoint.formats.io import load_tensors, read_metadata, save_tensors, tensor_files
from darkroom.checkpoint.model import (
    load_autoencoder,
    load_model,
    load_model_autoencoder,
    save_autoencoder,
    save_denoiser,
    save_model,
)
from darkroom.checkpoint.summary import summarise
from darkroom.errors import InputError
from darkroom.nn.autoencoder_vq import AutoencoderVQ, AutoencoderVQConfig
from darkroom.nn.dit import DiT, DiTConfig
from darkroom.nn.latent_space import LatentSpace
from darkroom.pipeline import Pipeline


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "tiny")


def networks(model) -> list[torch.nn.Module]:
    return [model.autoencoder, model.denoiser.network, model.texts[0].encoder]


def test_round_trip(saved: Path) -> None:
    before, after = tiny_parts(), load_model(saved)
    assert after.spec == before.spec
    assert after.autoencoder.latent_space == SPACE
    for a, b in zip(networks(before), networks(after), strict=True):
        assert b.config == a.config
        assert not b.training
        assert a.state_dict().keys() == b.state_dict().keys()
        for name, tensor in a.state_dict().items():
            assert torch.equal(tensor, b.state_dict()[name]), name
        assert not any(t.is_meta for t in (*b.parameters(), *b.buffers()))
    assert torch.equal(
        before.texts[0].tokenizer.encode(["red apple"]), after.texts[0].tokenizer.encode(["red apple"])
    )


def test_saved_twice_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "again", load_model(saved))
    for path in saved.rglob("*"):
        if path.is_file():
            assert (tmp_path / "again" / path.relative_to(saved)).read_bytes() == path.read_bytes(), path


def test_half_precision_shards_load_as_float32(tmp_path: Path) -> None:
    save_model(tmp_path, tiny_parts(), dtype=torch.float16, max_bytes=20_000)
    files = tensor_files(tmp_path / "denoiser.safetensors")
    assert len(files) > 2
    assert all(f.stat().st_size <= 20_000 for f in files)
    assert all(tensor.dtype == torch.float16 for tensor in load_file(files[0]).values())
    for a, b in zip(networks(tiny_parts()), networks(load_model(tmp_path)), strict=True):
        for name, tensor in b.state_dict().items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, a.state_dict()[name].half().float())


def test_files_describe_themselves(saved: Path) -> None:
    for name, kind in (
        ("autoencoder", "autoencoder_kl"),
        ("denoiser", "unet"),
        ("text_encoder", "clip_text"),
    ):
        metadata = read_metadata(saved / f"{name}.safetensors")
        assert f'"kind":"{kind}"' in metadata["config"]
        assert metadata["modelspec.architecture"] == f"darkroom/{kind}"
        assert metadata["format"] == "pt"
    assert read_metadata(saved / "denoiser.safetensors")["modelspec.resolution"] == "32x32"


def test_summary_counts_the_parameters(saved: Path) -> None:
    summary, model = summarise(saved), load_model(saved)
    counts = [sum(t.numel() for t in network.state_dict().values()) for network in networks(model)]
    assert [summary.autoencoder, summary.denoiser, summary.text_encoder] == counts
    assert (summary.width, summary.height, summary.latent_shape) == (32, 32, (4, 8, 8))
    assert summary.size == sum(path.stat().st_size for path in saved.glob("*.safetensors"))


def test_a_vq_autoencoder_round_trips(tmp_path: Path) -> None:
    config = AutoencoderVQConfig(latent_channels=3, channels=(8, 8), res_blocks=1, groups=4, codes=16)
    before = AutoencoderVQ(config, LatentSpace(channels=3, stride=2, mean=(0.1,) * 3, std=(2.0,) * 3))
    save_autoencoder(tmp_path, before)
    after = load_autoencoder(tmp_path / "autoencoder.safetensors")
    assert (after.config, after.latent_space) == (before.config, before.latent_space)
    image = torch.randn(1, 3, 8, 8)
    assert torch.equal(before.eval().decode(before.encode(image)), after.decode(after.encode(image)))


@pytest.mark.parametrize("positions", ["sincos", "rope"])
def test_a_dit_round_trips_and_draws(folder: Path, positions: str) -> None:
    config = DiTConfig(
        in_channels=4, out_channels=4, sample_size=8, width=16, depth=2, num_heads=2, num_classes=None,
        context_dim=16, qk_norm=True, positions=positions,
    )  # fmt: skip
    network = randomised(DiT(config))
    save_denoiser(folder, network, tiny_parts().spec)
    model = load_model(folder)
    assert not any(
        t.is_meta for t in (*model.denoiser.network.parameters(), *model.denoiser.network.buffers())
    )
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 16)
    timestep = torch.tensor([3.0, 700.0])
    with torch.no_grad():
        assert torch.equal(network(x, timestep, context), model.denoiser.network(x, timestep, context))
    assert Pipeline(model)("red apple", seed=1, steps=2).images[0].size == (32, 32)
    with pytest.raises(InputError, match="must divide by 8"):
        Pipeline(model)("red apple", width=36)


def test_the_denoisers_latent_space_wins(folder: Path) -> None:
    autoencoder = load_autoencoder(folder)
    autoencoder.latent_space = replace(SPACE, mean=(0.0,) * 4)
    save_autoencoder(folder, autoencoder)
    assert load_autoencoder(folder).latent_space.mean == (0.0,) * 4
    assert load_model(folder).autoencoder.latent_space == SPACE
    assert load_model_autoencoder(folder).latent_space == SPACE


@pytest.mark.parametrize("name", ["autoencoder", "denoiser", "text_encoder"])
def test_a_missing_or_cut_part_is_named(folder: Path, name: str) -> None:
    path = folder / f"{name}.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=rf"{name}\.safetensors: truncated"):
        load_model(folder)
    path.unlink()
    with pytest.raises(InputError, match=rf"{name}\.safetensors: no such file"):
        load_model(folder)


def test_a_missing_folder_or_tokenizer_is_named(folder: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no such model folder"):
        load_model(folder / "nowhere")
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(InputError, match="tokenizer"):
        load_model(folder)


def test_wrong_names_and_shapes_are_listed_up_to_ten(folder: Path) -> None:
    path = folder / "denoiser.safetensors"
    tensors, metadata = load_tensors(path)
    names = sorted(tensors)
    changed = {name: t for name, t in tensors.items() if name not in names[:12]}
    changed[names[12]] = tensors[names[12]].flatten()[:1]
    save_tensors(path, changed | {"extra.weight": torch.zeros(1)}, metadata)
    with pytest.raises(InputError) as error:
        load_model(folder)
    message = str(error.value)
    assert f"missing: {', '.join(names[:10])} and 2 more" in message
    assert "unexpected: extra.weight" in message
    assert f"{names[12]} (1,) instead of {tuple(tensors[names[12]].shape)}" in message


def test_a_header_without_or_with_a_wrong_config_is_named(folder: Path) -> None:
    path = folder / "autoencoder.safetensors"
    tensors, metadata = load_tensors(path)
    save_tensors(path, tensors, {"format": "pt"})
    with pytest.raises(InputError, match=r"autoencoder\.safetensors: its header has no 'config'"):
        load_model(folder)
    save_tensors(path, tensors, metadata | {"config": metadata["config"].replace("res_blocks", "res_block")})
    with pytest.raises(InputError, match=r"autoencoder\.safetensors.*'res_block'.*'res_blocks'"):
        load_model(folder)
    save_tensors(path, tensors, metadata | {"config": "{"})
    with pytest.raises(InputError, match=r"autoencoder\.safetensors.*not valid JSON"):
        load_model(folder)


def test_parts_that_do_not_fit_are_named(folder: Path) -> None:
    parts = tiny_parts(context_dim=24)
    save_denoiser(folder, parts.denoiser.network, parts.spec)
    with pytest.raises(InputError, match="context width is 16 in the text encoder, 24 in the denoiser"):
        load_model(folder)


def test_another_stride_or_channel_count_is_named(folder: Path) -> None:
    parts = tiny_parts()
    spec = replace(parts.spec, latent_space=LatentSpace.identity(4, 8))
    save_denoiser(folder, parts.denoiser.network, spec)
    with pytest.raises(InputError, match="stride is 4 in the autoencoder, 8 in the denoiser's latent space"):
        load_model(folder)
    spec = replace(parts.spec, latent_space=LatentSpace.identity(3, 4))
    save_denoiser(folder, parts.denoiser.network, spec)
    with pytest.raises(InputError, match="latent channels is 4 in the autoencoder, 3 in the denoiser's"):
        load_model(folder)
