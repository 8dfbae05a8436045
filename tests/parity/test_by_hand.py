"""Models that no pipeline of diffusers draws as we do, against diffusers' networks and schedulers by hand."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.checkpoint.test_load import UNET, VQ, build, original, tokenizers
from tests.networks import with_unit_gain
from torch import Tensor

import darkroom
from darkroom.checkpoint.build import build_autoencoder, build_network
from darkroom.checkpoint.formats.io import save_tensors
from darkroom.checkpoint.model import Model, check_fit
from darkroom.diffusion.denoiser import Denoiser
from darkroom.families import FAMILIES
from darkroom.pipeline import Pipeline

pytest.importorskip("diffusers")

import diffusers
from tests.parity.pipelines import dit, random_image

__all__ = ["tokenizers"]  # a fixture

LDM_DDIM = diffusers.DDIMScheduler(
    beta_start=0.0015,
    beta_end=0.0195,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)
STEPS = 5
Predict = Callable[[Tensor, Tensor], Tensor]


def loop(scheduler: Any, x: Tensor, predict: Predict, start: int = 0) -> tuple[list[Tensor], Tensor]:
    """Latents after each step from number `start` on, in our scale, and the last in theirs."""
    steps = []
    scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        for t in scheduler.timesteps[start:]:
            x = scheduler.step(predict(x, t), t, x).prev_sample
            previous = int(t) - scheduler.config.num_train_timesteps // STEPS
            kept = scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.final_alpha_cumprod
            steps.append(x / kept.sqrt())
    return steps, x


def assert_drawn(
    pipe: Pipeline, prompts: list[Any], expected: list[Tensor], decoded: Tensor, **options: Any
) -> None:
    steps: list[Tensor] = []
    result = pipe(prompts, seed=5, steps=STEPS, on_step=lambda p: steps.append(p.step.x), **options)
    for mine, theirs in zip(steps, expected, strict=True):
        assert ((mine - theirs).norm() / theirs.norm()).item() <= 1e-4
    drawn = np.stack([np.asarray(picture) for picture in result.images]) / 255
    shown = decoded.clamp(-1, 1).permute(0, 2, 3, 1).detach().numpy() / 2 + 0.5
    assert shown.std() >= 0.1
    assert np.abs(drawn - shown).max() <= 1 / 255


def unit_noise(*shape: int) -> Tensor:
    """What compat "diffusers" draws first."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def guided(network: Any, null: Any, labels: Any, scale: float = 3.0) -> Predict:
    def predict(x: Tensor, t: Tensor) -> Tensor:
        uncond, cond = network(torch.cat([x, x]), t, torch.cat([null, labels])).chunk(2)
        return uncond + scale * (cond - uncond)

    return predict


def cin(model: Model) -> tuple[Any, Any, Predict]:
    """The class-conditional model of 2021 in diffusers' classes: U-Net, first stage, guided prediction."""
    unet = diffusers.UNet2DConditionModel(
        in_channels=3, out_channels=3, block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=512,
    )  # fmt: skip
    unet.load_state_dict(model.network.state_dict())
    vq = diffusers.VQModel(
        block_out_channels=(32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 3, latent_channels=3,
        up_block_types=("UpDecoderBlock2D",) * 3, num_vq_embeddings=64, vq_embed_dim=3,
    )  # fmt: skip
    vq.load_state_dict(model.autoencoder.state_dict())
    embedding = model.texts[0].encoder.embedding.weight.detach()
    null, labels = (embedding[torch.tensor(ids)][:, None] for ids in ([1000, 1000], [7, 3]))
    return unet, vq, guided(lambda x, t, c: unet(x, t, c).sample, null, labels)


@pytest.mark.parametrize("from_picture", [False, True])
def test_classes_of_2021(from_picture: bool, tokenizers: Path, tmp_path: Path) -> None:
    model = build("ldm-cin256", tokenizers)
    save_tensors(tmp_path / "cin.safetensors", original("ldm-cin256", model), {})
    ours = darkroom.load(tmp_path / "cin.safetensors", device="cpu")
    _, vq, predict = cin(model)
    noise, start, options = unit_noise(2, 3, 16, 12), 0, {"width": 48, "height": 64}
    x = noise
    if from_picture:
        start, options = STEPS - int(STEPS * 0.6), {"image": random_image(64, 48), "strength": 0.6}
        LDM_DDIM.set_timesteps(STEPS)
        with torch.no_grad():
            latents = vq.encode(options["image"]).latents
        x = LDM_DDIM.add_noise(latents.expand(2, -1, -1, -1), noise, LDM_DDIM.timesteps[start])
    steps, x = loop(LDM_DDIM, x, predict, start)
    with torch.no_grad():
        image = vq.decode(x).sample
    assert_drawn(ours, [7, 3], steps, image, compat="diffusers", guidance_scale=3.0, **options)


def test_classes_from_a_picture_with_dit(tmp_path: Path) -> None:
    theirs = dit(tmp_path)
    theirs.save_pretrained(tmp_path / "model")
    ours = darkroom.load(tmp_path / "model", device="cpu")
    labels, null = torch.tensor([7, 3]), torch.tensor([1000, 1000])

    def network(x: Tensor, t: Tensor, classes: Tensor) -> Tensor:
        return theirs.transformer(x, timestep=t.expand(len(x)), class_labels=classes).sample[:, :4]

    start, image = STEPS - int(STEPS * 0.6), random_image(64, 64)
    theirs.scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        latents = theirs.vae.encode(image).latent_dist.sample(generator) * 0.18215
        noise = torch.randn(2, 4, 8, 8, generator=generator)
        x = theirs.scheduler.add_noise(
            latents.expand(2, -1, -1, -1), noise, theirs.scheduler.timesteps[start]
        )
        steps, x = loop(theirs.scheduler, x, guided(network, null, labels), start)
        shown = theirs.vae.decode(x / 0.18215).sample
    options = {"image": image, "strength": 0.6, "guidance_scale": 3.0, "compat": "diffusers"}
    assert_drawn(ours, [7, 3], steps, shown, **options)


def test_inpainting_of_2021() -> None:
    """What its network is shown is made as in its authors' script: hidden pixels black, the mask −1 and 1."""
    family = FAMILIES["ldm-inpainting"]
    shape = replace(
        UNET, in_channels=7, out_channels=3, context_dim=None, plain_attention=True, resblock_updown=True
    )
    network = with_unit_gain(build_network(shape), 9)
    autoencoder = with_unit_gain(build_autoencoder(replace(VQ, mid_attention=False)), 8)
    spec = family.spec
    model = Model(
        autoencoder=autoencoder,
        denoiser=Denoiser(network, spec.path, spec.prediction),
        texts=(),
        spec=spec,
    )
    check_fit(model, "small")
    image, mask = random_image(64, 48), torch.zeros(1, 1, 64, 48)
    mask[:, :, 8:37, 10:40] = 1
    masked = ((image + 1) / 2 * (1 - mask)) * 2 - 1
    with torch.no_grad():
        seen = autoencoder.encode(masked)
    seen = torch.cat([seen, F.interpolate(mask * 2 - 1, size=seen.shape[2:])], dim=1)
    scheduler = diffusers.DDIMScheduler.from_config(LDM_DDIM.config, beta_end=0.0205)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return network(torch.cat([x, seen], dim=1), t[None].float(), None)

    steps, x = loop(scheduler, unit_noise(1, 3, 16, 12), predict)
    with torch.no_grad():
        shown = autoencoder.decode(x)
    assert_drawn(Pipeline(model), [""], steps, shown, image=image, mask=mask, compat="diffusers")
