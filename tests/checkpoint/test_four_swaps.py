"""Four swaps on autoencoders that are trained here, from files to files, and pictures drawn with them."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.tiny import tiny_parts

import darkroom
from darkroom.checkpoint.model import INTERPOSER, save_autoencoder, save_model
from darkroom.checkpoint.swap import swap_vae
from darkroom.data.latents import as_image
from darkroom.data.shapes import ShapesSource
from darkroom.nn.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from darkroom.train.autoencoder import measure_latent_space
from darkroom.train.interposer import InterposerTraining

SIZE = 32
SHAPE = AutoencoderKLConfig(channels=(16, 16, 32), res_blocks=1, groups=8, mid_attention=False)
TRAINING = InterposerTraining(steps=300, views=256, cells=8, width=32, blocks=2)
pytestmark = pytest.mark.slow


def train(seed: int, steps: int, start: AutoencoderKL | None = None) -> AutoencoderKL:
    """A new autoencoder of generated shapes, or `start` with its decoder trained further."""
    torch.manual_seed(seed)
    model = AutoencoderKL(SHAPE) if start is None else deepcopy(start)
    images = ShapesSource(count=512).pictures(SIZE).images
    model.requires_grad_(True)
    for part in (model.encoder, model.quant_conv):
        part.requires_grad_(start is None)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        image = as_image(images[torch.randint(len(images), (16,))])
        posterior = model.posterior(image)
        latents = posterior.mean if start else posterior.sample(torch.randn_like(posterior.mean))
        loss = (model.decode_raw(latents) - image).square().mean()
        (loss + 1e-4 * posterior.kl().mean() / image[0].numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def first() -> AutoencoderKL:
    model = train(0, 300)
    model.latent_space = measure_latent_space(
        model, ShapesSource(count=64).pictures(SIZE), torch.device("cpu")
    )
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, first: AutoencoderKL) -> Path:
    """A folder with a model and 24 pictures that no training has seen."""
    folder = tmp_path_factory.mktemp("swaps")
    parts = tiny_parts()
    spec = replace(parts.spec, latent_space=first.latent_space)
    save_model(folder / "model", replace(parts, autoencoder=deepcopy(first), spec=spec))
    (folder / "pictures").mkdir()
    for k, pixels in enumerate(ShapesSource(count=24, seed=5).pictures(SIZE).images):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / "pictures" / f"{k:02}.png")
    return folder


def swap(place: Path, name: str, autoencoder: AutoencoderKL, **options):
    save_autoencoder(place / f"vae-{name}", autoencoder)
    out = place / name
    verdict = swap_vae(
        place / "model", place / f"vae-{name}", [place / "pictures"], out=out, size=SIZE, **options
    )
    print("", name, verdict.decision, *verdict.reasons, *verdict.warnings, sep="\n  ")
    for row in (*verdict.quality_rows(), *verdict.fit_rows()):
        print("   ", " | ".join(row))
    return verdict, out


def drawn(folder: Path):
    result = darkroom.load(folder, device="cpu")("red apple", seed=1, steps=4)
    return result.latents, np.asarray(result.images[0]).astype(int)


def test_a_decoder_trained_further_is_accepted_and_keeps_more(place, first):
    verdict, out = swap(place, "finetune", train(2, 200, first))
    assert verdict.decision == "accept"
    assert verdict.trials[0].to_decoder.r2 == verdict.trials[0].to_denoiser.r2 == 1
    assert verdict.new.quality.psnr > verdict.old.quality.psnr + 0.5
    assert verdict.trials[0].loss < -0.5
    before, after = drawn(place / "model"), drawn(out)
    assert torch.equal(before[0], after[0])
    assert not np.array_equal(before[1], after[1])


def test_another_seed_is_refused_and_accepted_with_an_interposer(place):
    other = train(1, 300)
    refused, out = swap(place, "seed", other)
    assert refused.decision == "refuse"
    assert "another latent space" in refused.reasons[0]
    assert max(trial.to_decoder.r2 for trial in refused.trials) < 0.8
    assert not out.exists() and out.with_name("seed.png").exists()
    accepted, out = swap(place, "interposed", other, interposer=TRAINING)
    assert accepted.decision == "interposer"
    affine, interposer = accepted.trials[-2:]
    assert interposer.to_decoder.r2 > affine.to_decoder.r2 + 0.2
    assert interposer.decoded > affine.decoded + 1
    assert interposer.loss < 3
    assert f"{abs(interposer.loss):.2f} dB" in accepted.reasons[0]
    assert "judged on 6 of 24 pictures" in accepted.reasons[1]
    assert (out / INTERPOSER).exists()
    before, after = drawn(place / "model"), drawn(out)
    assert torch.equal(before[0], after[0])
    assert np.isfinite(after[1]).all()


def test_the_same_weights_at_another_scale_are_rescaled_to_the_same_picture(place, first):
    scaled, channels = deepcopy(first), SHAPE.latent_channels
    scale = torch.tensor([2.0, 0.5, 5.0, 0.1])
    scaled.quant_conv.weight[:channels] *= scale[:, None, None, None]
    scaled.quant_conv.bias[:channels] *= scale
    scaled.quant_conv.bias[channels:] += 2 * scale.log()
    scaled.post_quant_conv.weight /= scale[:, None, None]
    verdict, out = swap(place, "scaled", scaled)
    assert verdict.decision == "rescale"
    assert not verdict.trials[0].holds
    assert verdict.trials[1].to_decoder.r2 == pytest.approx(1, abs=1e-6)
    before, after = drawn(place / "model"), drawn(out)
    assert torch.equal(before[0], after[0])
    assert np.abs(before[1] - after[1]).max() <= 1


def test_sixteen_channels_are_refused(place):
    verdict, out = swap(place, "sixteen", AutoencoderKL(replace(SHAPE, latent_channels=16)))
    assert verdict.decision == "refuse"
    assert "16 channels at stride 4" in verdict.reasons[0]
    assert not out.exists()
