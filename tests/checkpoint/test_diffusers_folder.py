"""Folders in diffusers' layout: what may lie in them, and what is wrong with others."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import darkroom
from darkroom.checkpoint.formats.io import load_tensors, save_tensors
from darkroom.checkpoint.load import load_any, load_any_autoencoder
from darkroom.errors import InputError

pytest.importorskip("diffusers")

from tests.parity.pipelines import flux, sd3, sd15, sdxl, vae

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {"sd15": sd15, "sdxl": sdxl, "sd3": sd3, "flux": lambda folder: flux(folder, guided=True)}
    folders = {}
    for name, make in made.items():
        folder = tmp_path_factory.mktemp(name)
        make(folder).save_pretrained(folder / "model")
        folders[name] = folder / "model"
    return folders


def copied(saved: dict[str, Path], name: str, out: Path) -> Path:
    return shutil.copytree(saved[name], out / name)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_not_needed_is_not_looked_at(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(saved, "sd15", tmp_path)
    for part in ("safety_checker", "feature_extractor"):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text("not even JSON")
    edit(
        folder / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        requires_safety_checker=True,
    )
    assert load_any(folder).spec == load_any(saved["sd15"]).spec


def test_weights_in_shards_and_in_half_precision(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(saved, "sd15", tmp_path)
    tensors, metadata = load_tensors(folder / "unet" / WEIGHTS)
    (folder / "unet" / WEIGHTS).unlink()
    save_tensors(folder / "unet" / WEIGHTS, tensors, metadata, max_bytes=40_000)
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    tensors, metadata = load_tensors(folder / "vae" / WEIGHTS, dtype=torch.float16)
    (folder / "vae" / WEIGHTS).unlink()
    save_tensors(folder / "vae" / "diffusion_pytorch_model.fp16.safetensors", tensors, metadata)
    a, b = (darkroom.load(f, device="cpu")("red apple", seed=1, steps=2) for f in (folder, saved["sd15"]))
    assert torch.equal(a.latents, b.latents)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("unet", "lacks the folder transformer or unet, a part of the model"),
        ("vae", "lacks the folder vae or vqvae, a part of the model"),
        ("text_encoder", "lacks the folder text_encoder, a part of the model"),
        ("scheduler", "lacks the folder scheduler, a part of the model"),
        ("unet/config.json", r"unet/config\.json: cannot be read: No such file"),
        (f"unet/{WEIGHTS}", r"unet: no weights here: expected diffusion_pytorch_model\.safetensors or"),
    ],
)
def test_a_part_that_is_missing_is_named(
    saved: dict[str, Path], part: str, message: str, tmp_path: Path
) -> None:
    folder = copied(saved, "sd15", tmp_path)
    shutil.rmtree(folder / part) if (folder / part).is_dir() else (folder / part).unlink()
    with pytest.raises(InputError, match=message):
        load_any(folder)


def test_a_missing_tokenizer_is_looked_for_and_named(
    saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(saved, "sd15", tmp_path)
    elsewhere = shutil.move(folder / "tokenizer", tmp_path / "clip")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no cache"))
    monkeypatch.delenv("DARKROOM_TOKENIZERS", raising=False)
    with pytest.raises(InputError, match="tokenizer"):
        load_any(folder)
    assert load_any(folder, tokenizers=elsewhere).texts[0].tokenizer is not None


def test_pickled_weights_are_read(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(saved, "sd15", tmp_path)
    tensors, _ = load_tensors(folder / "vae" / WEIGHTS)
    (folder / "vae" / WEIGHTS).unlink()
    torch.save(tensors, folder / "vae" / "diffusion_pytorch_model.bin")
    ours, theirs = (load_any(path).autoencoder.state_dict() for path in (folder, saved["sd15"]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_part_without_weights_is_named(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(saved, "sd15", tmp_path)
    (folder / "vae" / WEIGHTS).unlink()
    with pytest.raises(InputError, match="vae: no weights here: expected diffusion_pytorch_model"):
        load_any(folder)


def test_an_unknown_pipeline_is_named(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(saved, "sd15", tmp_path)
    edit(folder / "model_index.json", _class_name="StableDiffusionPipelin")
    with pytest.raises(InputError, match="did you mean 'StableDiffusionPipeline'"):
        load_any(folder)


def test_a_part_of_another_family_is_named(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(saved, "sd15", tmp_path)
    shutil.rmtree(folder / "vae")
    shutil.copytree(saved["sd3"] / "vae", folder / "vae")
    with pytest.raises(InputError, match=r"sd15: its parts do not fit each other: .* denoiser's network"):
        load_any(folder)


def test_a_text_encoder_of_the_wrong_width_is_named(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(saved, "sdxl", tmp_path)
    edit(folder / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    with pytest.raises(InputError, match="context width is 16 in the text encoder, 32 in the denoiser"):
        load_any(folder)


def test_weights_of_another_shape_are_listed(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(saved, "sd15", tmp_path)
    edit(folder / "unet" / "config.json", cross_attention_dim=24)
    with pytest.raises(
        InputError, match=r"unet: its tensors are not those of its config; wrong shapes: .*attn2"
    ):
        load_any(folder)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sd15", {"width": 60}, "width must divide by 8 for this model, as 56 or 64, not 60"),
        ("sd3", {"width": 256}, "256x64 is too large for this model: its positions end at 192 a side"),
        ("flux", {"height": 40}, "height must divide by 16 for this model, as 32 or 48, not 40"),
        ("sd15", {"true_guidance_scale": 2.0}, "true_guidance_scale is for models that are told"),
        (
            "sd15",
            {"image": torch.zeros(1, 3, 64, 64), "strength": 0.1, "steps": 5},
            "strength 0.1 of 5 steps leaves none: raise either",
        ),
        (
            "flux",
            {"image_prompt": torch.zeros(1, 2, 40), "true_guidance_scale": 2.0},
            "leave true_guidance_scale at 1",
        ),
        ("sd15", {"image_prompt": torch.zeros(1, 2, 3)}, "image_prompt is for FLUX"),
        ("sd15", {"image": torch.zeros(1, 3, 64, 44)}, "width must divide by 8"),
        (
            "sd15",
            {"image": torch.zeros(1, 3, 64, 64), "width": 48, "height": 64},
            "`image` is 64x64, and to draw 48x64 it must be 48x64",
        ),
    ],
)
def test_what_a_family_cannot_do_is_named(
    saved: dict[str, Path], name: str, change: dict[str, Any], message: str
) -> None:
    pipe = darkroom.load(saved[name], device="cpu")
    with pytest.raises(InputError, match=message):
        pipe("red apple", **{"width": 64, "height": 64} | change if "image" not in change else change)


def test_a_refiner_of_another_family_is_refused(saved: dict[str, Path]) -> None:
    base, other = (darkroom.load(saved[name], device="cpu") for name in ("sd15", "sd3"))
    with pytest.raises(InputError, match="the refiner's latent_space is not this model's"):
        base("red apple", refiner=other)


def test_an_autoencoder_alone_and_in_a_models_place(saved: dict[str, Path], tmp_path: Path) -> None:
    vae(scaling_factor=0.5).save_pretrained(tmp_path / "other")
    alone = load_any_autoencoder(tmp_path / "other")
    assert alone.latent_space.std == (2.0,) * 4
    inside = load_any_autoencoder(saved["sd15"])
    swapped = load_any(saved["sd15"], parts=[tmp_path / "other"]).autoencoder
    assert swapped.latent_space == inside.latent_space, "the denoiser's wins"


def test_another_models_autoencoder_is_warned_of(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(saved, "sd15", tmp_path)
    edit(folder / "vae" / "config.json", scaling_factor=0.13025)
    with pytest.warns(
        UserWarning, match=r"latents are not those of Stable Diffusion 1\.5: .* wrong pictures"
    ):
        load_any(folder)


def test_the_family_can_be_said_where_folders_leave_it_open(saved: dict[str, Path]) -> None:
    assert load_any(saved["flux"]).spec.beside == "nothing"
    assert load_any(saved["flux"], family="flux-kontext").spec.beside == "reference"
    assert load_any(saved["sdxl"], family="playground-v2").spec.defaults.guidance_scale == 3.0
    with pytest.raises(InputError, match="unknown family 'flux-contexts': did you mean 'flux-kontext'"):
        load_any(saved["flux"], family="flux-contexts")
    with pytest.raises(InputError, match="says itself what it is: leave family out"):
        load_any("darkroom-shapes", family="sd1")


def test_text_encoders_take_their_places_too(saved: dict[str, Path], tmp_path: Path) -> None:
    """T5 for an SD 3 that was saved without it, and a part that has no place."""
    folder = copied(saved, "sd3", tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    edit(folder / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    whole, without = load_any(saved["sd3"]), load_any(folder)
    assert (len(whole.texts), len(without.texts)) == (3, 2)
    again = load_any(folder, parts=[folder / "text_encoder_3"], tokenizers=folder / "tokenizer_3")
    assert index["text_encoder_3"][1] == "T5EncoderModel" and len(again.texts) == 3
    ids = again.texts[2].tokenizer.encode(["red apple"], 12)
    assert torch.equal(again.texts[2].encoder(ids), whole.texts[2].encoder(ids))
    other = load_any(saved["sd15"], parts=[saved["flux"] / "text_encoder"])
    mine = load_any(saved["flux"]).texts[0]
    assert torch.equal(other.texts[0].encoder(ids[:, :4]).last, mine.encoder(ids[:, :4]).last)
    with pytest.raises(InputError, match="text_encoder_3: holds t5, which this model has no place for"):
        load_any(saved["sd15"], parts=[folder / "text_encoder_3"])


@pytest.mark.parametrize("device", ["foo", "cuda:99"])
def test_a_device_that_is_not_there_is_named(saved: dict[str, Path], device: str) -> None:
    with pytest.raises(InputError, match=f"device '{device}' cannot be used here"):
        darkroom.load(saved["sd15"], device=device)


def test_a_precision_that_no_network_runs_in_is_named(saved: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="dtype must be float32, bfloat16 or float16"):
        darkroom.load(saved["sd15"], dtype=torch.int8)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"no model here: expected denoiser\.safetensors, or .*model_index\.json"
    ):
        load_any(tmp_path)
