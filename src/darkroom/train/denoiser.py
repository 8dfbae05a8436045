"""Stage 2: freeze an autoencoder, and train a denoiser on its latents together with its text encoders."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from darkroom.checkpoint.build import Autoencoder, NetworkConfig, build_network, build_text_encoder
from darkroom.checkpoint.model import (
    TEXT_ENCODER,
    Defaults,
    DenoiserSpec,
    Model,
    check_fit,
    load_autoencoder,
    numbered,
    save_model,
)
from darkroom.data.folder import Pictures
from darkroom.data.latents import LatentSet, cached_latents
from darkroom.diffusion.denoiser import Denoiser, Prediction, expand
from darkroom.diffusion.path import NoisePath
from darkroom.diffusion.training_times import TimesConfig, sample_sigmas
from darkroom.images import grid, save_png
from darkroom.pipeline import Pipeline
from darkroom.rng import torch_generator
from darkroom.text.clip import CLIPTextConfig
from darkroom.text.conditioning import (
    Conditioning,
    FluxConditioning,
    SD3Conditioning,
    TextConditioning,
    TextPart,
    Told,
)
from darkroom.text.t5 import T5Config
from darkroom.text.t5_tokenizer import train_unigram
from darkroom.text.tokenizer import CLIP_LENGTH, TextTokenizer, train_bpe
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

    `texts` gives the shapes of the text encoders trained jointly, in the order that `conditioning` takes
    them; their vocabularies are learned from the captions and have at most `vocab_size` entries.
    `sample_prompts` are drawn while training (the first captions when empty).
    """

    out: Path
    seed: int = 0
    device: str | None = None
    data: DataConfig
    autoencoder: Path
    network: NetworkConfig
    texts: tuple[CLIPTextConfig | T5Config, ...]
    conditioning: Conditioning = field(default_factory=TextConditioning)
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
        self.denoiser, self.conditioning = model.denoiser, model.spec.conditioning
        self.latents = latents.to(device)
        self.captions = captions
        self.ids, self.empty_ids = (
            tuple(ids.to(device) for ids in self.conditioning.tokens(model.texts, texts))
            for texts in (captions, [""])
        )
        self.networks: dict[str, nn.Module] = {"denoiser": self.denoiser.network}
        self.networks |= {numbered(TEXT_ENCODER, n): part.encoder for n, part in enumerate(model.texts)}
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
        rows = torch.as_tensor(indices, device=self.device)
        ids = tuple(
            torch.where(expand(dropped, ids), empty, ids[rows])
            for ids, empty in zip(self.ids, self.empty_ids, strict=True)
        )
        cond = self.conditioning.condition(self.model.texts, ids, self.picture(x0), dropped)
        x, timestep = self.denoiser.network_input(x0, noise, sigma)
        x = x.contiguous(memory_format=torch.channels_last)
        output = self.denoiser.network(x, timestep, cond.context, extra=cond.extra)
        error = mean_squared_error(output, self.denoiser.target(x0, noise, sigma))
        weight = self.denoiser.loss_weight(sigma, objective.weight)
        return (weight * error).mean(), {"plain_loss": error.detach().mean()}

    def picture(self, x0: Tensor) -> Told:
        """What the conditions say of the pictures that these latents (B, C, h, w) are of."""
        stride = self.model.spec.latent_space.stride
        return Told(height=x0.shape[2] * stride, width=x0.shape[3] * stride)

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
    """The model of a recipe: the given autoencoder, learned vocabularies, networks fresh from the seed."""
    tokenizers = [_tokenizer(config, recipe.conditioning, pictures.captions) for config in recipe.texts]
    configs = [
        replace(config, vocab_size=tokenizer.vocab_size)
        if isinstance(config, T5Config)
        else replace(config, vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_token_id)
        for config, tokenizer in zip(recipe.texts, tokenizers, strict=True)
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_generator("cpu", recipe.seed, "initialisation").initial_seed())
        network = build_network(recipe.network)
        encoders = [build_text_encoder(config) for config in configs]
    objective = recipe.objective
    spec = DenoiserSpec(
        prediction=objective.prediction,
        path=objective.path,
        latent_space=autoencoder.latent_space,
        defaults=recipe.defaults,
        conditioning=recipe.conditioning,
    )
    model = Model(
        autoencoder=autoencoder,
        denoiser=Denoiser(network, objective.path, objective.prediction),
        texts=tuple(TextPart(*pair) for pair in zip(encoders, tokenizers, strict=True)),
        spec=spec,
    )
    check_fit(model, recipe.out)
    return model


def _tokenizer(
    config: CLIPTextConfig | T5Config, conditioning: Conditioning, captions: Sequence[str]
) -> TextTokenizer:
    """A vocabulary for a text encoder, learned from captions."""
    if isinstance(config, CLIPTextConfig):
        return train_bpe(captions, config.vocab_size, config.context_length)
    length = (
        conditioning.t5_length
        if isinstance(conditioning, SD3Conditioning | FluxConditioning)
        else CLIP_LENGTH
    )
    return train_unigram(captions, config.vocab_size, length)
