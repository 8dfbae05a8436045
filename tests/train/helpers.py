"""Small recipes that train in seconds."""

from pathlib import Path

from darkroom.checkpoint.model import Defaults
from darkroom.data.shapes import ShapesSource
from darkroom.diffusion.path import FlowPath
from darkroom.nn.autoencoder_kl import AutoencoderKLConfig
from darkroom.nn.unet import UNetConfig
from darkroom.text.clip import CLIPTextConfig
from darkroom.train.autoencoder import AutoencoderRecipe
from darkroom.train.denoiser import DenoiserRecipe, ObjectiveConfig
from darkroom.train.loop import TrainConfig
from darkroom.train.losses import AdversarialConfig, AutoencoderLossConfig
from darkroom.train.optim import OptimConfig
from darkroom.train.recipe import DataConfig

SHAPES = DataConfig(size=32, shapes=ShapesSource(count=24))


def short(steps: int, **changes: object) -> TrainConfig:
    """A run of a few steps that saves at every second one."""
    fields = {"batch_size": 4, "log_every": 1, "sample_every": 1000, "save_every": 2}
    return TrainConfig(steps=steps, **{**fields, **changes})


def autoencoder_recipe(out: Path, *, steps: int = 6, **changes: object) -> AutoencoderRecipe:
    """A tiny KL autoencoder with a discriminator that joins at step 2."""
    fields = {
        "data": SHAPES,
        "autoencoder": AutoencoderKLConfig(
            channels=(8, 16), latent_channels=3, res_blocks=1, groups=4, mid_attention=False
        ),
        "loss": AutoencoderLossConfig(adversarial=AdversarialConfig(start_step=2, channels=8, layers=1)),
        "optim": OptimConfig(lr=1e-3, warmup_steps=2),
        "train": short(steps),
        "device": "cpu",
    }
    return AutoencoderRecipe(out=out, **{**fields, **changes})


def denoiser_recipe(out: Path, autoencoder: Path, *, steps: int = 6, **changes: object) -> DenoiserRecipe:
    """A tiny U-Net and text encoder on the latents of `autoencoder`."""
    fields = {
        "data": SHAPES,
        "autoencoder": autoencoder,
        "network": UNetConfig(
            in_channels=3,
            out_channels=3,
            channels=(8, 16),
            res_blocks=1,
            attention_depth=(0, 1),
            num_heads=(1, 2),
            context_dim=16,
            groups=4,
        ),
        "texts": (CLIPTextConfig(vocab_size=600, context_length=16, width=16, layers=1, heads=2),),
        "objective": ObjectiveConfig(path=FlowPath()),
        "defaults": Defaults(
            width=32, height=32, steps=2, guidance_scale=2.0, sampler="euler", schedule="flow"
        ),
        "optim": OptimConfig(lr=1e-3, warmup_steps=2),
        "train": short(steps),
        "device": "cpu",
    }
    return DenoiserRecipe(out=out, **{**fields, **changes})
