"""What we convert opens in diffusers, and is the same model there."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoint.test_load import SMALL, build, original, tokenizers, under  # noqa: F401
from torch import Tensor, nn

from darkroom.checkpoint.convert import convert
from darkroom.checkpoint.folder_files import EXTRA
from darkroom.checkpoint.formats.io import load_tensors, save_tensors
from darkroom.checkpoint.layouts import CLIP_TEXT_TO_HUB, autoencoder_to_original
from darkroom.checkpoint.load import load_any
from darkroom.checkpoint.model import Model
from darkroom.checkpoint.tables import Tensors

pytest.importorskip("diffusers")

import diffusers
from tests.parity.drawing import saved

WHOLE = ("sd1", "sd2", "sdxl", "sdxl-refiner", "playground-v2.5", "sd3-medium", "flux-dev", "flux-schnell")


def whole(name: str, model: Model) -> Tensors:
    """A model's single file with all its parts, FLUX's as user interfaces have it."""
    tensors = original(name, model)
    if not name.startswith("flux"):
        return tensors
    clip, t5 = (part.encoder.state_dict() for part in model.texts)
    vae = autoencoder_to_original(4)(model.autoencoder.state_dict())
    return (
        under("model.diffusion_model.", tensors)
        | under("vae.", vae)
        | under("text_encoders.clip_l.transformer.", CLIP_TEXT_TO_HUB(clip))
        | under("text_encoders.t5xxl.transformer.", t5)
    )


def parts_of(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


@pytest.mark.parametrize("name", WHOLE)
def test_our_folders_pass_from_pretrained(name: str, tokenizers: Path, tmp_path: Path) -> None:  # noqa: F811
    """Every network gets exactly the tensors of its file, and computes what ours does."""
    model = build(name, tokenizers)
    save_tensors(tmp_path / "model.safetensors", whole(name, model), {})
    convert(tmp_path / "model.safetensors", tmp_path / "folder", to="diffusers", tokenizers=[tokenizers])
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    parts = parts_of(pipe)
    assert len(parts) == 2 + len(SMALL[name]["texts"])
    for part, network in parts.items():
        file = next((tmp_path / "folder" / part).glob("*.safetensors"))
        held = {normal(n): t for n, t in load_tensors(file)[0].items()}
        theirs = {normal(n): t for n, t in network.state_dict().items()}
        assert held.keys() - theirs.keys() <= {"embeddings.position_ids"}
        assert all(torch.equal(theirs[n], t) for n, t in held.items() if n in theirs)
        assert not theirs.keys() - held.keys() - {"encoder.embed_tokens.weight", "shared.weight"}
    latents = torch.randn(1, model.autoencoder.config.latent_channels, 4, 4)
    with torch.no_grad():
        ours = model.autoencoder.decode_raw(latents)  # pyright: ignore[reportAttributeAccessIssue]
        assert torch.allclose(pipe.vae.decode(latents).sample, ours, atol=1e-5)


def normal(name: str) -> str:
    """transformers renamed CLIP's modules in version 5."""
    return name.removeprefix("text_model.")


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sd3-medium", "flux-dev"])
def test_folders_of_ours_draw_what_the_file_draws(name: str, tokenizers: Path, tmp_path: Path) -> None:  # noqa: F811
    model = build(name, tokenizers)
    save_tensors(tmp_path / "model.safetensors", whole(name, model), {})
    convert(tmp_path / "model.safetensors", tmp_path / "folder", to="diffusers", tokenizers=[tokenizers])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = load_any(tmp_path / "model.safetensors", tokenizers=tokenizers, family=name)
        folder = load_any(tmp_path / "folder")
    assert (folder.spec.prediction, folder.spec.path) == (file.spec.prediction, file.spec.path)
    assert folder.spec.latent_space.std == pytest.approx(file.spec.latent_space.std)
    assert same(folder.network.state_dict(), file.network.state_dict())
    assert same(folder.autoencoder.state_dict(), file.autoencoder.state_dict())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", [name for name in WHOLE if not name.startswith("flux")])
def test_our_single_files_pass_from_single_file(name: str, tokenizers: Path, tmp_path: Path) -> None:  # noqa: F811
    """diffusers opens the file with the folder's configs, offline, and has the folder's weights."""
    save_tensors(tmp_path / "model.safetensors", whole(name, build(name, tokenizers)), {})
    folder, file = tmp_path / "folder", tmp_path / "again.safetensors"
    convert(tmp_path / "model.safetensors", folder, to="diffusers", tokenizers=[tokenizers])
    (folder / EXTRA).unlink(missing_ok=True)  # as of a folder that never was a file
    convert(folder, file, to="single")
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    given = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3-medium" else {}
    pipe = type(theirs).from_single_file(str(file), config=str(folder), local_files_only=True, **given)
    parts, wanted = parts_of(pipe), parts_of(theirs)
    assert parts.keys() == wanted.keys() - given.keys()
    for part, network in parts.items():
        assert same(network.state_dict(), wanted[part].state_dict()), part


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_networks_alone_pass_from_single_file(name: str, tmp_path: Path) -> None:
    folder, theirs = saved(name).folder, saved(name).theirs
    kind = "unet" if name == "sd15" else "transformer"
    convert(folder / kind, tmp_path / "network.safetensors", to="single")
    check_network(getattr(theirs, kind), tmp_path / "network.safetensors", folder, kind)


@pytest.mark.slow
def test_flux_of_the_real_width_passes_from_single_file(tmp_path: Path) -> None:
    """diffusers splits its layers at the published width and no other."""
    with torch.device("meta"):
        network = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    network = network.to_empty(device="cpu").bfloat16()
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.uniform_(parameter, -1, 1, generator=generator)
    network.save_pretrained(tmp_path / "model/transformer")
    convert(tmp_path / "model/transformer", tmp_path / "flux.safetensors", to="single")
    check_network(network, tmp_path / "flux.safetensors", tmp_path / "model", "transformer")


def check_network(network: Any, file: Path, folder: Path, part: str) -> None:
    loaded = type(network).from_single_file(
        str(file), config=str(folder), subfolder=part, local_files_only=True, torch_dtype=network.dtype
    )
    assert same(loaded.state_dict(), network.state_dict())
