"""Train both modes of `refine` together, on pictures and what an autoencoder makes of them."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from darkroom.checkpoint.build import Autoencoder
from darkroom.checkpoint.load import load_any_autoencoder
from darkroom.data.folder import Pictures
from darkroom.data.latents import as_image
from darkroom.diffusion.path import EDMPath
from darkroom.diffusion.training_times import TimesConfig, sample_sigmas
from darkroom.errors import InputError
from darkroom.evaluate.metrics import to_uint8
from darkroom.images import grid, save_png, to_pil
from darkroom.refine import (
    FILE,
    MODES,
    Refine,
    RefineConfig,
    RefineNetworks,
    RefineSpec,
    round_trip,
    save_refine,
)
from darkroom.rng import torch_generator
from darkroom.train.distributed import join_world, local_device
from darkroom.train.loop import Run, Streams, TrainConfig
from darkroom.train.losses import mean_squared_error
from darkroom.train.optim import OptimConfig, ParameterGroup
from darkroom.train.recipe import DataConfig, check_run_folder, check_size, claim_run_folder, load_pictures

SHOWN = 6
GREY_LEVEL = 2 / 255  # of 8 bits, in −1..1
# Residuals have unit scale: below the first level lies what rounding to 8 bits adds, above the second nothing
# of them is left. The spread of ln(sigma) is that of Karras et al. 2022 at this scale, a little wider.
PATH = EDMPath(sigma_min=0.02, sigma_max=20.0, sigma_data=1.0)
TIMES = TimesConfig(kind="lognormal", mean=-0.4, std=1.4)


@dataclass(frozen=True, kw_only=True)
class RefineRecipe:
    """Everything that decides a run; `out` becomes a folder with `refine.safetensors` in it.

    `autoencoder` is a bundled model, or a folder or file with an autoencoder in it.
    """

    out: Path
    seed: int = 0
    device: str | None = None
    data: DataConfig
    autoencoder: Path
    network: RefineConfig = field(default_factory=RefineConfig)
    path: EDMPath = PATH
    times: TimesConfig = TIMES
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig


@dataclass(frozen=True)
class Rounds:
    """Pictures, what an autoencoder makes of each, and of that again, all uint8; `scale` is the standard
    deviation of the residual in −1..1.
    """

    original: Pictures
    decoded: Pictures
    again: Pictures
    scale: float

    def batch(self, indices: NDArray, coin: Tensor | None = None) -> list[Tensor]:
        """The three as images (B, 3, S, S) in −1..1, mirrored together as in `Pictures.batch`."""
        each = (self.original, self.decoded, self.again)
        return [as_image(pictures.batch(indices, coin)) for pictures in each]


class RefineTask:
    """One step: the regression's absolute error, and the diffusion's error at drawn noise levels."""

    def __init__(
        self, recipe: RefineRecipe, autoencoder: Autoencoder, rounds: Rounds, device: torch.device
    ) -> None:
        self.recipe, self.autoencoder, self.rounds = recipe, autoencoder, rounds
        spec = RefineSpec(
            config=recipe.network, autoencoder=recipe.autoencoder.name, scale=rounds.scale, path=recipe.path
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_generator("cpu", recipe.seed, "initialisation").initial_seed())
            self.model = RefineNetworks(spec)
        self.networks: dict[str, nn.Module] = {mode: getattr(self.model, mode) for mode in MODES}
        self.groups = [ParameterGroup(list(network.parameters())) for network in self.networks.values()]
        for network in self.networks.values():
            network.to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
            if recipe.train.compile:
                network.compile()

    def step(self, indices: NDArray, streams: Streams) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of both losses; no weight is in both networks, so each trains as it would alone."""
        original, decoded, again = self.rounds.batch(indices, streams.uniform("flip", len(indices)))
        seen = self.model.seen(decoded, again)
        x0 = self.model.patches(original - decoded) / self.rounds.scale
        regression = soft_absolute_error(self.model.regress(seen), x0, GREY_LEVEL / self.rounds.scale)
        diffusion = self.diffusion_loss(x0, seen, streams)
        logs = {"regression_loss": regression.detach(), "diffusion_loss": diffusion.detach()}
        return regression + diffusion, logs

    def diffusion_loss(self, x0: Tensor, seen: Tensor, streams: Streams) -> Tensor:
        """The squared error of the prediction, whose target has unit variance at every level."""
        denoiser, count = self.model.denoiser, len(x0)
        sigma = sample_sigmas(self.recipe.times, denoiser.path, count, streams.generator("sigma"))
        noise = streams.normal("noise", x0)
        x, timestep = denoiser.network_input(x0, noise, sigma)
        output = denoiser.network(torch.cat([x, seen], dim=1), timestep, None)
        return mean_squared_error(output, denoiser.target(x0, noise, sigma)).mean()

    def after_step(self, step: int) -> None:
        """Nothing to do between steps."""

    def show(self, path: Path) -> None:
        """Originals, decoded, and both modes' pictures, always from the same seeds."""
        indices = torch.linspace(0, len(self.rounds.original) - 1, SHOWN).long().unique().numpy()
        original, decoded, _ = self.rounds.batch(indices)
        refine, seeds = Refine(self.model, self.autoencoder), range(len(indices))
        with torch.compiler.set_stance("force_eager"):
            refined = [refine.refine(decoded, seeds, mode=mode) for mode in MODES]
        rows = [picture for images in (original, decoded, *refined) for picture in to_pil(images)]
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(path, grid(rows, len(indices), row_labels=("original", "decoded", *MODES)))


def train(recipe: RefineRecipe) -> Path:
    """Train both modes as the recipe says and return the folder of the result.

    The same call resumes a run that was stopped. Raises InputError for a recipe, data or autoencoder that
    cannot be used together.
    """
    return finish(prepare(recipe))


def prepare(recipe: RefineRecipe) -> Run[RefineTask]:
    """Everything up to the first step: the run's folder, pictures in memory, networks on the device."""
    world = join_world()
    device = local_device(recipe.device, world)
    autoencoder = load_any_autoencoder(recipe.autoencoder, device=device)
    check_run_folder(recipe.out, recipe)
    check_size(recipe.data, autoencoder.config.stride)
    pictures = load_pictures(recipe.data).to(device)
    task = RefineTask(recipe, autoencoder, decoded_rounds(autoencoder, pictures), device)
    if world.is_main:
        claim_run_folder(recipe.out, recipe)
    return Run.of(recipe, task, pictures.weights, device, world)


def finish(run: Run[RefineTask]) -> Path:
    """Train, and write the averaged weights of both modes to one file."""
    ema = run.fit()
    if run.world.is_main:
        with ema.applied():
            save_refine(run.out / FILE, run.task.model)
    return run.out


def decoded_rounds(autoencoder: Autoencoder, pictures: Pictures, batch_size: int = 64) -> Rounds:
    """All pictures encoded and decoded, once and twice; raises InputError if nothing is lost by that."""
    decoded, again = torch.empty_like(pictures.images), torch.empty_like(pictures.images)
    square = 0.0
    for start in tqdm(range(0, len(pictures), batch_size), desc="decoding", unit="batch", delay=1):
        part = slice(start, min(start + batch_size, len(pictures)))
        image = as_image(pictures.images[part])
        once = round_trip(autoencoder, image)
        decoded[part], again[part] = to_uint8(once), to_uint8(round_trip(autoencoder, once))
        square += float((image - once).square().double().sum())
    if not square:
        raise InputError("the autoencoder gives every picture back as it was: there is nothing to refine")
    scale = (square / decoded.numel()) ** 0.5
    return Rounds(pictures, _like(pictures, decoded), _like(pictures, again), scale)


def _like(pictures: Pictures, images: Tensor) -> Pictures:
    """Other images of the same pictures."""
    made = Pictures(images, pictures.captions, pictures.weights, pictures.flips.tolist(), pictures.size)
    return made.to(images.device)


def soft_absolute_error(prediction: Tensor, target: Tensor, least: float) -> Tensor:
    """The mean of sqrt(error² + least²) in float32: |error| for all that are well above `least`.

    Charbonnier et al. 1994.
    """
    return ((prediction.float() - target).square() + least**2).sqrt().mean()
