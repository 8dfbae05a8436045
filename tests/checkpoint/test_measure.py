"""What networks predict, measured: exact ones by formula, small ones trained here, and the bundled models."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from tests.tiny import tiny_parts
from torch import Tensor, nn

import darkroom
from darkroom.checkpoint.build import build_network
from darkroom.checkpoint.formats.io import save_tensors
from darkroom.checkpoint.hypotheses import Hypothesis, hypotheses_for
from darkroom.checkpoint.known_latents import known_latents, no_condition, random_latents
from darkroom.checkpoint.layouts import unet_to_original
from darkroom.checkpoint.load import load_any, load_any_autoencoder
from darkroom.checkpoint.measure import (
    RATIOS,
    Measurement,
    measure,
    measure_file,
    measure_model,
    table,
    verdict,
)
from darkroom.checkpoint.model import save_model
from darkroom.data.shapes import ShapesSource, Vocabulary
from darkroom.diffusion.denoiser import Condition, Denoiser, expand
from darkroom.diffusion.path import DiscretePath, EDMPath, FlowPath
from darkroom.diffusion.training_times import TimesConfig, sample_sigmas
from darkroom.errors import InputError
from darkroom.families import FAMILIES
from darkroom.images import save_png, to_pil
from darkroom.inputs import Beside, beside_channels
from darkroom.nn.dit import DiTConfig
from darkroom.nn.extra import Extra
from darkroom.nn.flux import FluxConfig
from darkroom.nn.mmdit import MMDiTConfig
from darkroom.nn.unet import UNet, UNetConfig
from darkroom.rng import image_noise
from darkroom.text.conditioning import TextConditioning

SEEDS = 20
DISCRETE, ZERO_SNR = DiscretePath(), DiscretePath(zero_terminal_snr=True)
TRUTHS: dict[str, Hypothesis] = {
    "eps": Hypothesis(prediction="eps", path=DISCRETE),
    "v": Hypothesis(prediction="v", path=DISCRETE),
    "v, zero terminal SNR": Hypothesis(prediction="v", path=ZERO_SNR),
    "x0": Hypothesis(prediction="x0", path=DISCRETE),
    "x0, zero terminal SNR": Hypothesis(prediction="x0", path=ZERO_SNR),
    "flow": Hypothesis(prediction="flow", path=FlowPath()),
    "flow, told 0 to 1": Hypothesis(prediction="flow", path=FlowPath(num_timesteps=1)),
    "edm, data of 0.5": Hypothesis(prediction="edm", path=EDMPath()),
    "edm, data of 1": Hypothesis(prediction="edm", path=EDMPath(sigma_data=1.0)),
    "v along EDM's path, data of 1": Hypothesis(prediction="v", path=EDMPath(sigma_data=1.0)),
}
SPEC = FAMILIES["sd2"].spec
VOCABULARY = Vocabulary(
    colours=("red", "orange", "yellow", "green", "blue", "purple", "pink", "black"),
    shapes=("circle", "square", "triangle", "cross", "ring"),
    counts=(1,),
    sizes=("large",),
    places=("centre", "left", "right", "top", "bottom"),
)


class Exact(nn.Module):
    """The best possible network for pictures of one random colour each, by formula."""

    def __init__(self, truth: Hypothesis) -> None:
        super().__init__()
        self.denoiser = Denoiser(nn.Identity(), truth.path, truth.prediction)

    def forward(
        self, x: Tensor, timestep: Tensor, context: Tensor | None, *, extra: Extra | None = None
    ) -> Tensor:
        path = self.denoiser.path
        sigma = path.sigma_from_timestep(timestep)
        level, x = expand(sigma, x), x / path.input_scale(expand(sigma, x))
        alpha, cells = path.alpha(level), x.shape[2] * x.shape[3]
        # The mean of the normal posterior: the picture's mean, shrunk by what noise is left in it.
        shrunk = cells * alpha / (cells * alpha**2 + level**2)
        x0 = (shrunk * x.mean((2, 3), keepdim=True)).expand_as(x)
        return self.denoiser.target(x0, (x - alpha * x0) / level, sigma)


def colours(count: int = 6) -> Tensor:
    """Latents (N, 4, 8, 8) of one normal colour each."""
    return image_noise(range(count), (4, 1, 1), "colours").expand(-1, -1, 8, 8)


def decided(measured: Measurement, name: str) -> bool:
    """Whether this was found, and on every single seed."""
    found, best = measured.found, measured.rows[0]
    return found is not None and found.name == name and best.wins == measured.seeds == SEEDS


@pytest.mark.parametrize("name", TRUTHS)
def test_exact_networks_are_named_on_every_seed(name: str) -> None:
    truth = TRUTHS[name]
    assert truth.name == name
    measured = measure(Exact(truth), colours(), Condition(None), hypotheses_for(SPEC))
    assert decided(measured, name), table(measured)
    asked = truth.prediction != "eps" and truth.path.kind == "discrete"
    assert (measured.last_seen is not None) == asked
    assert measured.found is not None
    assert measured.found.corrected(SPEC).prediction == truth.prediction
    path = measured.found.corrected(SPEC).path
    assert path == replace(truth.path, final="first_level") if path.kind == "discrete" else truth.path


def test_the_error_is_that_of_theory() -> None:
    """Of colours of 64 cells, 1 / (64 + ratio²) of the squared error remains, of (1 + ratio²) for a guess."""
    latents = colours(60)
    measured = measure(
        Exact(TRUTHS["flow"]), latents / latents.std(correction=0), Condition(None), hypotheses_for(SPEC)
    )
    expected = 1.0
    for ratio in RATIOS:
        expected *= ((1 + ratio**2) / (64 + ratio**2)) ** (0.5 / len(RATIOS))
    assert measured.rows[0].error == pytest.approx(expected, rel=0.2)


def test_a_network_that_learned_nothing_is_undecided() -> None:
    measured = measure_model(tiny_parts(), seeds=3)
    assert measured.found is None
    assert verdict(measured).startswith("undecided: ")


def test_answers_that_are_no_numbers_lose() -> None:
    class Broken(Exact):
        def forward(
            self, x: Tensor, timestep: Tensor, context: Tensor | None, *, extra: Extra | None = None
        ) -> Tensor:
            if float(timestep.max()) <= 1:
                return torch.full_like(x, torch.nan)
            return super().forward(x, timestep, context, extra=extra)

    measured = measure(Broken(TRUTHS["eps"]), colours(), Condition(None), hypotheses_for(SPEC), seeds=3)
    assert measured.found is not None and measured.found.name == "eps"
    assert measured.rows[-1].error == torch.inf


def test_latents_that_a_network_knows_are_used() -> None:
    """Two thirds of what it is shown is nothing that it has learned."""
    latents = torch.cat([image_noise(range(6), (4, 8, 8), "strange") * 1.4, colours(3)])
    measured = measure(Exact(TRUTHS["v"]), latents, Condition(None), hypotheses_for(SPEC))
    assert decided(measured, "v")
    strange = measure(Exact(TRUTHS["v"]), latents[:6], Condition(None), hypotheses_for(SPEC))
    assert strange.found is None


def test_the_same_is_measured_again() -> None:
    first, second = (measure_model(tiny_parts(), seeds=2) for _ in range(2))
    assert first == second


def test_every_hypothesis_is_drawn_with_once_corrected() -> None:
    model = tiny_parts()
    zero_snr = [h for h in TRUTHS.values() if h.path == ZERO_SNR]
    for hypothesis in (*hypotheses_for(model.spec), *zero_snr):
        spec = hypothesis.corrected(model.spec)
        network = Denoiser(model.network, spec.path, spec.prediction)
        pipe = darkroom.Pipeline(replace(model, spec=spec, denoiser=network))
        latents = pipe("a photo", steps=3, seed=0, output="latents").latents
        assert latents.isfinite().all(), hypothesis.name


def test_what_is_right_already_stays_as_it_is() -> None:
    spec = FAMILIES["sd3-medium"].spec
    assert [h.corrected(spec) for h in hypotheses_for(spec) if h.name == "flow"] == [spec]
    told_v = FAMILIES["sd2"].spec
    assert [h.corrected(told_v) for h in hypotheses_for(told_v) if h.name == "v"] == [told_v]


def test_the_table_and_the_verdict() -> None:
    measured = measure(Exact(TRUTHS["v"]), colours(), Condition(None), hypotheses_for(SPEC), seeds=5)
    head, first, *others = table(measured)
    assert head == ("it predicts", "error", "+-", "smallest of 5")
    assert (first[0], first[3]) == ("v", "5")
    assert len(others) == len(hypotheses_for(SPEC)) - 1
    assert verdict(measured).startswith(f"v: error {float(first[1]):.2f}, next best {others[0][0]} ")
    assert "its last timestep heeds" in verdict(measured)
    flow = measure(Exact(TRUTHS["flow"]), colours(), Condition(None), hypotheses_for(SPEC), seeds=5)
    assert "timestep" not in verdict(flow)


def test_darkroom_shapes_is_what_its_header_says(tmp_path: Path) -> None:
    model = load_any("darkroom-shapes")
    assert decided(measure_model(model), "flow")
    pictures = ShapesSource(count=6, seed=3, vocabulary=VOCABULARY).pictures(32).images
    for number, image in enumerate(to_pil(pictures.float() / 127.5 - 1)):
        save_png(tmp_path / f"{number}.png", image)
    assert decided(measure_model(model, [tmp_path]), "flow")
    with pytest.raises(InputError, match=r"nowhere\.png"):
        measure_model(model, [tmp_path / "nowhere.png"])


def test_what_a_model_is_thought_to_be_decides_nothing() -> None:
    """The same network, said to predict v, is corrected to flow and loads again as that."""
    model = load_any("darkroom-shapes")
    wrong = replace(model.spec, prediction="v", path=DISCRETE)
    said = replace(model, spec=wrong, denoiser=Denoiser(model.network, DISCRETE, "v"))
    found = measure_model(said).found
    assert found is not None
    spec = found.corrected(wrong)
    assert (spec.prediction, spec.path.kind, spec.defaults.schedule) == ("flow", "flow", "flow")


@pytest.mark.slow
def test_darkroom_mini_is_what_its_header_says() -> None:
    assert decided(measure_model(load_any("darkroom-mini")), "flow")


# Networks trained here: on latents of shapes, and on random fields in the layout of SD 2.


def trained(
    truth: Hypothesis, config: UNetConfig, latents: Tensor, steps: int, context: Tensor | None = None
) -> UNet:
    """A U-Net trained on latents (N, C, h, w) with the first of a context (N, L, D)."""
    lr, batch = 3e-3, 32
    times = TimesConfig()
    if isinstance(truth.path, EDMPath):
        times = TimesConfig(kind="lognormal", mean=0.0, std=1.6)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = UNet(config)
    denoiser, generator = Denoiser(network, truth.path, truth.prediction), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        x0 = latents[torch.randint(len(latents), (batch,), generator=generator)]
        noise = torch.randn(x0.shape, generator=generator)
        sigma = sample_sigmas(times, truth.path, batch, generator)
        x, timestep = denoiser.network_input(x0, noise, sigma)
        told = None if context is None else context[:1].expand(batch, -1, -1)
        loss = (network(x, timestep, told) - denoiser.target(x0, noise, sigma)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return network.eval()


@pytest.fixture(scope="module")
def shape_latents() -> Tensor:
    pictures = ShapesSource(count=512).pictures(32).images.float() / 127.5 - 1
    with torch.no_grad():
        return load_any_autoencoder("darkroom-shapes").encode(pictures)


# Noise is learned later than what mixes it with pictures, and last that there is nothing else at the end.
STEPS = {"eps": 300, "v": 250, "v, zero terminal SNR": 500, "x0": 250, "flow": 250, "edm, data of 1": 250}
SMALL = UNetConfig(
    in_channels=8,
    out_channels=8,
    channels=(32, 48),
    res_blocks=1,
    attention_depth=(0, 0),
    mid_depth=0,
    num_heads=(1, 1),
    context_dim=None,
    groups=8,
)


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_small_networks_trained_here_are_named_on_every_seed(name: str, shape_latents: Tensor) -> None:
    network = trained(TRUTHS[name], SMALL, shape_latents, STEPS[name])
    unseen = ShapesSource(count=12, seed=7).pictures(32).images.float() / 127.5 - 1
    with torch.no_grad():
        latents = load_any_autoencoder("darkroom-shapes").encode(unseen)
    measured = measure(network, latents, no_condition(network, latents), hypotheses_for(SPEC))
    assert decided(measured, name), table(measured)


SMALL_SD2 = UNetConfig(
    channels=(64, 64),
    res_blocks=1,
    attention_depth=(0, 1),
    mid_depth=0,
    num_heads=(1, 1),
    context_dim=1024,
    linear_projection=True,
)


def sd2_file(path: Path, network: UNet) -> Path:
    """The network alone, as a single file of SD 2 names it."""
    tensors = unet_to_original(network.config)(network.state_dict())
    save_tensors(path, {f"model.diffusion_model.{name}": t for name, t in tensors.items()}, {})
    return path


def test_a_file_without_the_other_parts_is_measured(tmp_path: Path) -> None:
    path = sd2_file(tmp_path / "sd2.safetensors", UNet(SMALL_SD2))
    measured = measure_file(path, seeds=2)
    assert [row.hypothesis for row in measured.rows if row.hypothesis in hypotheses_for(SPEC)]
    assert measured.found is None
    save_png(tmp_path / "grey.png", to_pil(torch.zeros(3, 64, 64))[0])
    with pytest.raises(InputError, match="holds no autoencoder"):
        measure_file(path, [tmp_path / "grey.png"])
    with pytest.raises(InputError, match="no such"):
        measure_file(tmp_path / "none.safetensors")


def test_random_latents_are_smooth_and_of_unit_variance() -> None:
    fields = random_latents(SPEC.latent_space)
    assert fields.shape == (6, 4, 32, 32)
    assert float(fields.std()) == pytest.approx(1, abs=1e-3)
    assert float(fields.diff(dim=3).std()) < 0.9  # of white noise, √2
    assert float(fields.mean((2, 3)).std()) > 0.1  # whole pictures differ too


NETWORKS = {
    "classes": DiTConfig(in_channels=4, sample_size=8, width=16, depth=1, num_heads=2, num_classes=5),
    "guidance": FluxConfig(
        in_channels=4,
        out_channels=4,
        double_blocks=1,
        single_blocks=1,
        num_heads=2,
        axes=(4, 6, 6),
        context_dim=12,
        pooled_dim=8,
    ),
    "pooled": MMDiTConfig(
        in_channels=4,
        out_channels=4,
        depth=1,
        num_heads=2,
        head_width=8,
        context_dim=12,
        pooled_dim=8,
        positions=8,
    ),
    "beside": replace(SMALL, in_channels=9, out_channels=4),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_networks_of_every_kind_are_told_nothing(kind: str) -> None:
    network = build_network(NETWORKS[kind]).eval()
    latents = colours(3)
    told = no_condition(network, latents)
    measure(network, latents, told, hypotheses_for(SPEC), seeds=1)
    if kind == "classes":
        assert told.extra is not None and told.extra.class_labels is not None
        assert told.extra.class_labels.tolist() == [5] * 3


@pytest.mark.parametrize("beside", get_args(Beside))
def test_models_that_see_pictures_are_measured(beside: Beside) -> None:
    model, path = tiny_parts(), FlowPath()
    spec = replace(model.spec, beside=beside)
    seen = known_latents(replace(model, spec=spec))[1].beside
    channels = beside_channels(beside, spec.latent_space)
    assert (0 if seen is None else seen.shape[1]) == channels
    config, classes = model.network.config, 1000 if beside == "upscale" else None
    assert isinstance(config, UNetConfig)
    network = UNet(replace(config, in_channels=4 + channels, num_classes=classes))
    measured = measure_model(replace(model, spec=spec, denoiser=Denoiser(network, path, "flow")), seeds=1)
    assert len(measured.rows) == len(hypotheses_for(spec))


def test_a_folder_is_measured_as_a_model(tmp_path: Path) -> None:
    save_model(tmp_path, tiny_parts())
    assert measure_file(tmp_path, seeds=2) == measure_model(load_any(tmp_path), seeds=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eps", "v"])
def test_models_like_sd_2_that_say_the_other_are_told_apart(
    name: str, shape_latents: Tensor, tmp_path: Path
) -> None:
    """One layout, two predictions: the folder of each says the wrong one, and is corrected."""
    base, truth = load_any("darkroom-shapes"), TRUTHS[name]
    said = replace(
        base.spec,
        prediction="v" if name == "eps" else "eps",
        path=DISCRETE,
        conditioning=TextConditioning(layer=-2),
        defaults=replace(base.spec.defaults, schedule="leading"),
    )
    config = replace(SMALL, attention_depth=(0, 1), context_dim=64, linear_projection=True)
    model = replace(base, spec=said, denoiser=Denoiser(UNet(config), DISCRETE, said.prediction))
    context = known_latents(model)[1].context
    network = trained(truth, config, shape_latents, STEPS[name], context=context)
    save_model(tmp_path, replace(model, denoiser=Denoiser(network, DISCRETE, said.prediction)))
    measured = measure_file(tmp_path)
    assert decided(measured, name), table(measured)
    assert measured.found is not None
    assert measured.found.corrected(said) == replace(said, prediction=name)
