"""The exported folder opens in diffusers and draws the pictures that we draw."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.conftest import relative_error
from tests.tiny import CAPTIONS, SPACE, tiny_model, tiny_parts

import darkroom
from darkroom.checkpoint.export import export_diffusers, folded
from darkroom.checkpoint.model import load_model, save_model
from darkroom.diffusion.path import CosinePath, DiscretePath, EDMPath, FlowPath, NoisePath
from darkroom.diffusion.schedules import flow_sigmas
from darkroom.errors import InputError
from darkroom.nn.latent_space import LatentSpace
from darkroom.presets import CARDS, bundled
from darkroom.rng import image_noise

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

STEPS = 27  # divides 999: the timesteps are whole, as diffusers makes them


@pytest.fixture(scope="module", params=[False, True], ids=["no_quant_conv", "quant_conv"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"), quant_conv=request.param)


@pytest.fixture(scope="module")
def exported(folder: Path) -> Path:
    out = folder.parent / f"{folder.name}-exported"
    export_diffusers(folder, out)
    return out


@pytest.fixture(scope="module")
def theirs(exported: Path):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(exported)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def largest_difference(ours: darkroom.Pipeline, theirs, prompts: list[str], seed: int) -> int:
    space, defaults = ours.model.spec.latent_space, ours.model.spec.defaults
    shape = (space.channels, defaults.height // space.stride, defaults.width // space.stride)
    noise = image_noise(range(seed, seed + len(prompts)), shape, "start")
    scale = defaults.guidance_scale
    a = ours(
        prompts, seed=seed, steps=STEPS, sampler="dpmpp_2m", schedule="flow", negative_prompt="blue"
    ).images
    b = theirs(
        prompts,
        negative_prompt=["blue"] * len(prompts),
        latents=noise,
        num_inference_steps=STEPS,
        guidance_scale=scale,
        height=defaults.height,
        width=defaults.width,
    ).images
    pairs = [(np.asarray(x, np.int16), np.asarray(y, np.int16)) for x, y in zip(a, b, strict=True)]
    assert all(x.std() > 10 for x, _ in pairs), "flat pictures prove nothing"
    return max(int(np.abs(x - y).max()) for x, y in pairs)


def test_diffusers_draws_the_same_pictures(folder: Path, theirs) -> None:
    assert largest_difference(darkroom.load(folder, device="cpu"), theirs, [*CAPTIONS[:2], ""], seed=3) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", bundled())
def test_diffusers_draws_the_bundled_models_pictures(name: str, tmp_path: Path) -> None:
    export_diffusers(bundled()[name], tmp_path / "exported")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "exported")
    prompts = CARDS[name].demo.prompts[::5]
    assert largest_difference(darkroom.load(name, device="cpu"), theirs, prompts, seed=1) <= 2


def test_text_states_and_ids_are_the_same(folder: Path, theirs) -> None:
    model = load_model(folder)
    ids = model.texts[0].tokenizer.encode(CAPTIONS)
    length = theirs.tokenizer.model_max_length
    given = theirs.tokenizer(
        CAPTIONS, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    assert torch.equal(given.input_ids, ids)
    with torch.no_grad():
        ours, reference = model.texts[0].encoder(ids), theirs.text_encoder(ids)
    assert relative_error(ours.last, reference.last_hidden_state) <= 1e-5
    assert relative_error(ours.pooled, reference.pooler_output) <= 1e-5


def test_the_autoencoder_speaks_normalised_latents(folder: Path, theirs) -> None:
    autoencoder = load_model(folder).autoencoder
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        posterior = theirs.vae.encode(image).latent_dist
        raw = autoencoder.posterior(image)
        latents = autoencoder.encode(image)
        assert relative_error(posterior.mean, latents) <= 1e-5
        std = torch.tensor(SPACE.std)[:, None, None]
        assert relative_error(posterior.std, torch.exp(0.5 * raw.logvar) / std) <= 1e-5
        assert relative_error(theirs.vae.decode(latents).sample, autoencoder.decode(latents)) <= 1e-5
    assert theirs.vae.config.scaling_factor == 1.0


def test_folding_leaves_the_models_own_weights_alone(folder: Path) -> None:
    autoencoder = load_model(folder).autoencoder
    before = {name: tensor.clone() for name, tensor in autoencoder.state_dict().items()}
    folded(autoencoder.double(), LatentSpace.identity(4, 4))
    folded(autoencoder, SPACE)
    assert all(
        torch.equal(before[name].double(), tensor) for name, tensor in autoencoder.state_dict().items()
    )


def test_the_scheduler_is_the_solver_we_sample_with(exported: Path) -> None:
    config = json.loads((exported / "scheduler" / "scheduler_config.json").read_text())
    assert config["_class_name"] == "DPMSolverMultistepScheduler"
    assert config["prediction_type"] == "flow_prediction" and config["use_flow_sigmas"]
    assert (config["solver_order"], config["final_sigmas_type"]) == (2, "zero")


def test_diffusers_takes_the_timesteps_that_we_take(theirs) -> None:
    theirs.scheduler.set_timesteps(STEPS)
    assert theirs.scheduler.timesteps.tolist() == list(range(999, 0, -37))
    sigmas = flow_sigmas(FlowPath(sigma_max=0.999), STEPS)
    assert torch.allclose(
        theirs.scheduler.sigmas.double(), torch.tensor(sigmas, dtype=torch.float64), atol=1e-6
    )


@pytest.mark.parametrize(
    ("prediction", "path", "sampler", "schedule", "tolerance"),
    [
        ("v", DiscretePath(), "ddim", "leading", 1e-4),
        ("v", DiscretePath(beta_schedule="cosine"), "ddim", "trailing", 1e-4),
        # We end at x0 + sigma * noise, diffusers at the same scaled to unit variance.
        ("x0", DiscretePath(final="first_level"), "ddim", "leading", 1e-3),
        ("eps", DiscretePath(), "dpmpp_2m", "trailing", 1e-4),
        # diffusers tells the network whole timesteps, we the ones that the noise levels have.
        ("v", DiscretePath(), "dpmpp_2m", "karras", 2e-2),
        ("v", DiscretePath(), "euler", "trailing", 1e-4),
    ],
)
def test_variance_preserving_models_take_the_same_steps(
    prediction: str, path: DiscretePath, sampler: str, schedule: str, tolerance: float, tmp_path: Path
) -> None:
    parts = tiny_parts()
    defaults = replace(parts.spec.defaults, sampler=sampler, schedule=schedule, steps=10)
    spec = replace(parts.spec, prediction=prediction, path=path, defaults=defaults)
    save_model(tmp_path / "model", replace(parts, spec=spec))
    export_diffusers(tmp_path / "model", tmp_path / "out")
    ours = darkroom.load(tmp_path / "model", device="cpu")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    noise = image_noise([1], (4, 8, 8), "start")
    a = ours("red apple", seed=1, guidance_scale=2.0, output="latents").latents
    options = {
        "num_inference_steps": 10,
        "guidance_scale": 2.0,
        "height": 32,
        "width": 32,
        "output_type": "latent",
    }
    b = theirs("red apple", latents=noise, **options).images
    assert relative_error(a, b) <= tolerance


@pytest.mark.parametrize(("prediction", "path"), [("edm", EDMPath()), ("v", CosinePath())])
def test_a_path_that_diffusers_lacks_is_refused(prediction: str, path: NoisePath, tmp_path: Path) -> None:
    parts = tiny_parts()
    spec = replace(parts.spec, prediction=prediction, path=path)
    save_model(tmp_path / "model", replace(parts, spec=spec))
    with pytest.raises(InputError, match=r"no scheduler for prediction|predict as EDM"):
        export_diffusers(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_output_must_be_new(folder: Path, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="already there"):
        export_diffusers(folder, exported)
    with pytest.raises(InputError, match="does not exist"):
        export_diffusers(folder, tmp_path / "no" / "where")
    assert list(tmp_path.iterdir()) == []
