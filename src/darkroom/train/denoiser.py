"""Stage 2: freeze an autoencoder, and train a denoiser on its latents together with a text encoder."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from darkroom.checkpoint.model import (
    Autoencoder,
    Defaults,
    DenoiserSpec,
    Model,
    check_fit,
    load_autoencoder,
    save_model,
)
from darkroom.data.folder import Pictures
from darkroom.data.latents import LatentSet, cached_latents
from darkroom.diffusion.denoiser import Denoiser, Prediction
from darkroom.diffusion.path import NoisePath
from darkroom.diffusion.training_times import TimesConfig, sample_sigmas
from darkroom.images import grid, save_png
from darkroom.nn.dit import DiT, DiTConfig
from darkroom.nn.unet import UNet, UNetConfig
from darkroom.pipeline import Pipeline
from darkroom.rng import torch_generator
from darkroom.text.clip import CLIPTextConfig, CLIPTextEncoder
from darkroom.text.tokenizer import Tokenizer, train_bpe
from darkroom.train.distributed import join_world, local_device
from darkroom.train.loop import Run, Streams, TrainConfig
from darkroom.train.losses import mean_squared_error
from darkroom.train.optim import OptimConfig, ParameterGroup
from darkroom.train.recipe import DataConfig, check_run_folder, check_size, claim_run_folder, load_pictures

SHOWN_PROMPTS = 8


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the network predicts along which noising path, at which noise levels, weighted how."""

    prediction: Prediction = "flow"
    path: NoisePath
    times: TimesConfig = field(default_factory=TimesConfig)
    weight: Literal["uniform", "min_snr"] = "uniform"
    condition_dropout: float = 0.1


@dataclass(frozen=True, kw_only=True)
class DenoiserRecipe:
    """Everything that decides a run of stage 2; `out` becomes a model folder that `darkroom.load` opens.

    `text` gives the shape of a text encoder trained jointly; its vocabulary is learned from the captions and
    has at most `text.vocab_size` entries. `sample_prompts` are drawn while training (the first captions when
    empty).
    """

    out: Path
    seed: int = 0
    device: str | None = None
    data: DataConfig
    autoencoder: Path
    network: UNetConfig | DiTConfig
    text: CLIPTextConfig
    objective: ObjectiveConfig
    defaults: Defaults
    sample_prompts: tuple[str, ...] = ()
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig


class DenoiserTask:
    """One step of stage 2: noise the latents, read the captions, and compare the network's answer with its
    target.
    """

    def __init__(
        self,
        recipe: DenoiserRecipe,
        model: Model,
        latents: LatentSet,
        captions: list[str],
        device: torch.device,
    ) -> None:
        self.recipe, self.model, self.device = recipe, model, device
        self.denoiser, self.text_encoder = model.denoiser, model.text_encoder
        self.latents = latents.to(device)
        self.captions = captions
        self.ids = model.tokenizer.encode(captions).to(device)
        self.empty_ids = model.tokenizer.encode([""]).to(device)
        self.networks: dict[str, nn.Module] = {
            "denoiser": self.denoiser.network,
            "text_encoder": self.text_encoder,
        }
        for network in (*self.networks.values(), model.autoencoder):
            network.to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.groups = [ParameterGroup([p for net in self.networks.values() for p in net.parameters()])]
        if recipe.train.compile:
            for network in self.networks.values():
                network.compile()

    def step(self, indices: NDArray, streams: Streams) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted error of the prediction, averaged over pictures and elements."""
        objective, count = self.recipe.objective, len(indices)
        x0 = self.latents.batch(indices, streams.uniform("flip", count))  # (B, C, h, w)
        noise = streams.normal("noise", x0)
        sigma = sample_sigmas(objective.times, self.denoiser.path, count, streams.generator("sigma"))  # (B,)
        dropped = streams.uniform("dropout", count) < objective.condition_dropout
        ids = torch.where(
            dropped[:, None], self.empty_ids, self.ids[torch.as_tensor(indices, device=self.device)]
        )
        context = self.text_encoder(ids).last  # (B, L, D)
        x, timestep = self.denoiser.network_input(x0, noise, sigma)
        output = self.denoiser.network(x.contiguous(memory_format=torch.channels_last), timestep, context)
        error = mean_squared_error(output, self.denoiser.target(x0, noise, sigma))
        weight = self.denoiser.loss_weight(sigma, objective.weight)
        return (weight * error).mean(), {"plain_loss": error.detach().mean()}

    def after_step(self, step: int) -> None:
        """Nothing to do between steps."""

    def show(self, path: Path) -> None:
        """Pictures of the sample prompts, always from the same seeds."""
        prompts = list(self.recipe.sample_prompts or self.captions[:SHOWN_PROMPTS])
        for network in self.networks.values():
            network.eval()
        with torch.compiler.set_stance("force_eager"):
            result = Pipeline(self.model)(prompts, seed=0)
        for network in self.networks.values():
            network.train()
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(path, grid(result.images, columns=min(4, len(prompts)), labels=prompts))


def train(recipe: DenoiserRecipe) -> Path:
    """Train a denoiser and its text encoder as the recipe says and return the model folder.

    The same call resumes a run that was stopped. Raises InputError for a recipe, data or autoencoder that
    cannot be used together.
    """
    return finish(prepare(recipe))


def prepare(recipe: DenoiserRecipe) -> Run[DenoiserTask]:
    """Everything up to the first step: the run's folder, the latents, the networks on the device."""
    world = join_world()
    device = local_device(recipe.device, world)
    autoencoder = load_autoencoder(recipe.autoencoder).to(device)
    check_run_folder(recipe.out, recipe)
    check_size(recipe.data, autoencoder.config.stride)
    pictures = load_pictures(recipe.data)
    model = build_model(recipe, autoencoder, pictures)
    Pipeline(model).request("")  # defaults that cannot be drawn with are found now, not at the first sample
    if world.is_main:
        claim_run_folder(recipe.out, recipe)
    latents = cached_latents(autoencoder, pictures, recipe.out / "latents.safetensors")
    task = DenoiserTask(recipe, model, latents, pictures.captions, device)
    return Run.of(recipe, task, pictures.weights, device, world)


def finish(run: Run[DenoiserTask]) -> Path:
    """Train, and write the averaged weights as a model folder."""
    ema = run.fit()
    if run.world.is_main:
        with ema.applied():
            save_model(run.out, run.task.model)
    return run.out


def build_model(recipe: DenoiserRecipe, autoencoder: Autoencoder, pictures: Pictures) -> Model:
    """The model of a recipe: the given autoencoder, a learned vocabulary, networks fresh from the seed."""
    tokenizer = train_bpe(pictures.captions, recipe.text.vocab_size, recipe.text.context_length)
    text = tokenizer_fitted(recipe.text, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_generator("cpu", recipe.seed, "initialisation").initial_seed())
        network = UNet(recipe.network) if isinstance(recipe.network, UNetConfig) else DiT(recipe.network)
        text_encoder = CLIPTextEncoder(text)
    objective = recipe.objective
    spec = DenoiserSpec(
        prediction=objective.prediction,
        path=objective.path,
        latent_space=autoencoder.latent_space,
        defaults=recipe.defaults,
    )
    denoiser = Denoiser(network, objective.path, objective.prediction)
    model = Model(
        autoencoder=autoencoder, denoiser=denoiser, text_encoder=text_encoder, tokenizer=tokenizer, spec=spec
    )
    check_fit(model, recipe.out)
    return model


def tokenizer_fitted(config: CLIPTextConfig, tokenizer: Tokenizer) -> CLIPTextConfig:
    """The text encoder's config with the vocabulary that was really learned."""
    return replace(config, vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_token_id)
