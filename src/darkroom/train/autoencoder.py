"""Stage 1: train an autoencoder, then measure its latent space and write both into one file."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from darkroom.checkpoint.model import save_autoencoder
from darkroom.data.folder import Pictures
from darkroom.data.latents import as_image
from darkroom.images import grid, save_png, to_pil
from darkroom.nn.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from darkroom.nn.autoencoder_vq import AutoencoderVQ, AutoencoderVQConfig, CodeRevival, VQReconstruction
from darkroom.nn.latent_space import LatentSpace
from darkroom.rng import torch_generator
from darkroom.train.distributed import join_world, local_device
from darkroom.train.loop import Run, Streams, TrainConfig
from darkroom.train.losses import Adversary, AutoencoderLossConfig, ReconstructionLoss
from darkroom.train.optim import OptimConfig, ParameterGroup
from darkroom.train.recipe import DataConfig, check_run_folder, check_size, claim_run_folder, load_pictures

SHOWN = 8

TrainedAutoencoder = AutoencoderKL | AutoencoderVQ


@dataclass(frozen=True, kw_only=True)
class AutoencoderRecipe:
    """Everything that decides a run of stage 1; `out` becomes a folder with `autoencoder.safetensors` in
    it.
    """

    out: Path
    seed: int = 0
    device: str | None = None
    data: DataConfig
    autoencoder: AutoencoderKLConfig | AutoencoderVQConfig
    loss: AutoencoderLossConfig = field(default_factory=AutoencoderLossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig


class AutoencoderTask:
    """One step of stage 1: encode, sample or quantise, decode, and weigh the errors."""

    def __init__(self, recipe: AutoencoderRecipe, pictures: Pictures, device: torch.device) -> None:
        self.recipe, self.pictures, self.device = recipe, pictures, device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_generator("cpu", recipe.seed, "initialisation").initial_seed())
            self.model = build_autoencoder(recipe.autoencoder)
            self.loss = ReconstructionLoss(recipe.loss)
            adversarial = recipe.loss.adversarial
            self.adversary = Adversary(adversarial) if adversarial else None
        self.networks: dict[str, nn.Module] = {"autoencoder": self.model, "loss": self.loss}
        self.codes: VQReconstruction | None = None
        if isinstance(self.model, AutoencoderVQ):
            self.networks["revival"] = CodeRevival(self.model.config.codes)
        trained = [p for net in self.networks.values() for p in net.parameters() if p.requires_grad]
        self.groups = [ParameterGroup(trained)]
        if self.adversary is not None:
            self.networks["adversary"] = self.adversary
            judges = list(self.adversary.parameters())
            lr_scale = self.adversary.config.lr_scale
            self.groups.append(ParameterGroup(judges, lr_scale, betas=(0.5, 0.9)))
        for network in (*self.networks.values(), *self.loss.frozen):
            network.to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if recipe.train.compile:
            for part in (self.model.encoder, self.model.decoder, *self.loss.frozen):
                part.compile()

    def step(self, indices: NDArray, streams: Streams) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of stage 1 (Rombach et al. 2022, appendix G), averaged over elements."""
        image = self.images(indices, streams.uniform("flip", len(indices)))
        reconstruction, regularisation, logs = self.reconstruct(image, streams)
        nll, parts = self.loss(reconstruction, image)
        loss, logs = nll + regularisation, logs | parts
        if self.adversary is not None and streams.step >= self.adversary.config.start_step:
            adversarial, parts = self.adversary(reconstruction, image, nll, self.model.last_layer)
            loss, logs = loss + adversarial, logs | parts
        return loss, logs

    def reconstruct(self, image: Tensor, streams: Streams) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Reconstruction, weighted regularisation loss, and values to log, for either kind of autoencoder."""
        config = self.recipe.loss
        if isinstance(self.model, AutoencoderVQ):
            output = self.model.quantised_reconstruction(image)
            logs = {
                "codebook_loss": output.codebook_loss.detach(),
                **self.model.quantize.usage(output.indices),
            }
            self.codes = output
            return output.image, config.codebook_weight * output.codebook_loss, logs
        posterior = self.model.posterior(image)
        latents = posterior.sample(streams.normal("posterior", posterior.mean))
        kl = posterior.kl().mean()
        weighted = config.kl_weight * kl / image[0].numel()
        return self.model.decode_raw(latents), weighted, {"kl": kl.detach()}

    def images(self, indices: NDArray, coin: Tensor | None = None) -> Tensor:
        """Pictures in −1..1 on the device, mirrored by `coin` (B,) where their source allows it."""
        return as_image(self.pictures.batch(indices, coin).to(self.device))

    def after_step(self, step: int) -> None:
        """Revive dead codes of a codebook."""
        if self.codes is not None:
            generator = torch_generator(self.device, self.recipe.seed, "revive", step)
            self.networks["revival"](self.model.quantize, self.codes, generator)

    def show(self, path: Path) -> None:
        """Pictures above their reconstructions."""
        indices = torch.linspace(0, len(self.pictures) - 1, min(SHOWN, len(self.pictures))).long().numpy()
        image = self.images(indices)
        pairs = torch.cat([image, self.model.decode(self.model.encode(image)).float()])
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(path, grid(to_pil(pairs), columns=len(indices)))


def train(recipe: AutoencoderRecipe) -> Path:
    """Train an autoencoder as the recipe says and return the folder of the result.

    The same call resumes a run that was stopped. Raises InputError for a recipe or data that cannot be used.
    """
    return finish(prepare(recipe))


def prepare(recipe: AutoencoderRecipe) -> Run[AutoencoderTask]:
    """Everything up to the first step: the folder, the pictures in memory, the networks on the device."""
    world = join_world()
    device = local_device(recipe.device, world)
    check_run_folder(recipe.out, recipe)
    check_size(recipe.data, recipe.autoencoder.stride)
    pictures = load_pictures(recipe.data)
    pictures.to(device)
    task = AutoencoderTask(recipe, pictures, device)
    if world.is_main:
        claim_run_folder(recipe.out, recipe)
    return Run.of(recipe, task, pictures.weights, device, world)


def finish(run: Run[AutoencoderTask]) -> Path:
    """Train, measure the latent space of the averaged weights, and write the file."""
    ema, task = run.fit(), run.task
    if run.world.is_main:
        with ema.applied():
            task.model.latent_space = measure_latent_space(task.model, task.pictures, run.device)
            save_autoencoder(run.out, task.model)
    return run.out


def build_autoencoder(config: AutoencoderKLConfig | AutoencoderVQConfig) -> TrainedAutoencoder:
    """The network of a config, freshly initialised."""
    return AutoencoderVQ(config) if isinstance(config, AutoencoderVQConfig) else AutoencoderKL(config)


@torch.no_grad()
def measure_latent_space(
    model: TrainedAutoencoder, pictures: Pictures, device: torch.device, batch_size: int = 64
) -> LatentSpace:
    """Per-channel mean and standard deviation of the raw latents over all pictures, each once.

    Sums are kept in float64 on the host, so that the result does not depend on the batch size.
    """
    config = model.config
    raw = LatentSpace.identity(config.latent_channels, config.stride)
    model.latent_space = raw
    total = torch.zeros(2, config.latent_channels, dtype=torch.float64)
    count = 0
    for start in tqdm(range(0, len(pictures), batch_size), desc="measuring latents", unit="batch", delay=1):
        indices = list(range(start, min(start + batch_size, len(pictures))))
        latents = model.encode(as_image(pictures.batch(indices).to(device))).double().cpu()
        total += torch.stack([latents.sum((0, 2, 3)), latents.square().sum((0, 2, 3))])
        count += latents[:, 0].numel()
    mean, square = total / count
    std = (square - mean.square()).clamp_min(1e-12).sqrt()
    return replace(raw, mean=tuple(mean.tolist()), std=tuple(std.tolist()))
