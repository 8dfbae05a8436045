"""Refine changes what its networks say, of any size of picture, and draws from each picture's seed alone."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import darkroom.refine as module
from darkroom.cli_refine import refine as command
from darkroom.data.latents import as_image
from darkroom.diffusion.path import EDMPath
from darkroom.errors import InputError
from darkroom.evaluate.metrics import psnr, to_uint8
from darkroom.evaluate.spectrum import high_frequency_error
from darkroom.images import save_png, to_pil
from darkroom.nn.latent_space import LatentSpace
from darkroom.presets import model_folder
from darkroom.refine import (
    Refine,
    RefineConfig,
    RefineNetworks,
    RefineSpec,
    load_refine,
    noise_levels,
    round_trip,
    save_refine,
    tiles,
)
from tests.tiny import randomised, tiny_model

PATH = EDMPath(sigma_min=0.02, sigma_max=20.0, sigma_data=1.0)
SPEC = RefineSpec(
    config=RefineConfig(channels=(8, 8), res_blocks=1, groups=4),
    autoencoder="none",
    scale=0.1,
    path=PATH,
    steps=3,
)


class Blur(nn.Module):
    """An "autoencoder" that keeps the means of 4x4 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.latent_space = LatentSpace.identity(3, 4)

    def encode(self, image: Tensor) -> Tensor:
        return F.avg_pool2d(image, 4) * self.weight

    def decode(self, latents: Tensor) -> Tensor:
        return F.interpolate(latents, scale_factor=4.0)


class Pointwise(nn.Module):
    """A "U-Net" whose answer at a place depends on that place alone, so that tiles change nothing."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, 12, 1)

    def forward(self, x: Tensor, timestep: Tensor, context: None, *, extra: None = None) -> Tensor:
        return self.conv_in(x).tanh()


@pytest.fixture
def refine() -> Refine:
    torch.manual_seed(0)
    return Refine(randomised(RefineNetworks(SPEC)), Blur())


def picture(height: int, width: int, count: int = 1) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 1.6 - 0.8


@pytest.mark.parametrize("size", [(16, 16), (13, 22), (1, 1), (3, 40)])
def test_new_networks_leave_pictures_of_any_size_as_they_are(size: tuple[int, int]) -> None:
    image = picture(*size)
    made = Refine(RefineNetworks(SPEC), Blur()).refine(image, [0], mode="regression")
    assert torch.equal(made, image)


def test_regression_adds_its_answer_in_units_of_the_scale(refine: Refine) -> None:
    image = picture(16, 24)
    lost = image - round_trip(refine.autoencoder, image)
    seen = torch.cat([F.pixel_unshuffle(image, 2), F.pixel_unshuffle(lost / 0.1, 2)], dim=1)
    with torch.no_grad():
        answer = refine.networks.regression(seen, torch.zeros(1), None)
    made = refine.refine(image, [0], mode="regression")
    assert torch.allclose(made, (image + 0.1 * F.pixel_shuffle(answer, 2)).clamp(-1, 1), atol=1e-6)
    assert (made - image).abs().max() > 0.02


def test_what_is_lost_twice_is_seen(refine: Refine) -> None:
    image = picture(16, 16)
    flat = F.interpolate(F.avg_pool2d(image, 4), scale_factor=4.0)
    assert (round_trip(refine.autoencoder, flat) - flat).abs().max() < 0.005
    sharp = Refine(refine.networks, nn.Identity())
    sharp.autoencoder.latent_space = LatentSpace.identity(3, 4)
    sharp.autoencoder.encode = sharp.autoencoder.decode = lambda x: x
    sharp.autoencoder.weight = nn.Parameter(torch.ones(()))
    other, made = (r.refine(image, [0], mode="regression") for r in (sharp, refine))
    assert (other - made).abs().max() > 0.01


def test_a_picture_depends_on_its_seed_alone(refine: Refine) -> None:
    images = picture(16, 16, count=3)
    together = refine.refine(images, [5, 6, 7])
    alone = refine.refine(images[1:2], [6])
    assert torch.allclose(together[1:2], alone, atol=1e-5)
    assert torch.equal(alone, refine.refine(images[1:2], [6]))
    assert (refine.refine(images[1:2], [7]) - alone).abs().mean() > 1e-3
    smooth = [refine.refine(images[1:2], [seed], mode="regression") for seed in (6, 7)]
    assert torch.equal(*smooth)


def test_strength_goes_from_the_regression_to_a_sample(refine: Refine) -> None:
    image = picture(32, 32)
    smooth = refine.refine(image, [0], mode="regression")
    assert torch.equal(refine.refine(image, [0], strength=0.0), smooth)
    apart = [(refine.refine(image, [0], strength=s, steps=6) - smooth).std() for s in (0.2, 0.5, 0.9)]
    assert 0 < apart[0] < apart[1] < apart[2]


def test_diffusion_goes_on_from_the_regression(refine: Refine) -> None:
    image = picture(32, 32)
    smooth, near = refine.refine(image, [0], mode="regression"), refine.refine(image, [0], strength=0.02)
    assert (near - smooth).abs().mean() < 0.2 * (smooth - image).abs().mean()


def test_what_is_missing_of_a_cell_repeats_the_edge(refine: Refine) -> None:
    odd, whole = torch.full((1, 3, 13, 14), 0.5), torch.full((1, 3, 16, 16), 0.5)
    made = refine.refine(odd, [0], mode="regression")
    assert torch.allclose(made, refine.refine(whole, [0], mode="regression")[:, :, :13, :14], atol=1e-6)


def test_levels_fall_from_the_strength_to_nothing() -> None:
    levels = noise_levels(PATH, 5, 1.0)
    assert levels[0] == pytest.approx(20.0) and levels[-2:] == pytest.approx([0.02, 0.0])
    assert len(levels) == 6 and levels == sorted(levels, reverse=True)
    half = ((0.02 ** (1 / 7) + 20 ** (1 / 7)) / 2) ** 7
    assert noise_levels(PATH, 5, 0.5)[0] == pytest.approx(half)
    assert noise_levels(PATH, 5, 0.0) == []


@pytest.mark.parametrize("size", [(40, 512), (512, 516), (1000, 2048), (513 * 4, 512)])
def test_tiles_cover_and_overlap(size: tuple[int, int]) -> None:
    total = torch.zeros(size)
    for rows, columns, weight in tiles(*size, 4):
        part = total[rows, columns]
        assert part.shape == weight.shape and max(part.shape) <= 512 and weight.min() > 0
        assert all(place % 4 == 0 for span in (rows, columns) for place in (span.start, span.stop))
        part += weight
    assert total.min() > 0
    rows = sorted({rows.start for rows, _, _ in tiles(*size, 4)})
    assert all(b - a <= 512 - 32 for a, b in pairwise(rows))


@pytest.mark.parametrize("mode", ["regression", "diffusion"])
def test_tiles_change_nothing_of_what_is_local(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    torch.manual_seed(0)
    networks = RefineNetworks(SPEC)
    networks.regression, networks.diffusion = Pointwise(24), Pointwise(36)
    refine, image = Refine(networks, Blur()), picture(37, 90, count=2)
    whole = refine.refine(image, [1, 2], mode=mode)
    monkeypatch.setattr(module, "TILE", 32)
    monkeypatch.setattr(module, "OVERLAP", 8)
    assert len(list(tiles(40, 92, 2))) > 4
    assert torch.allclose(refine.refine(image, [1, 2], mode=mode), whole, atol=1e-5)


def test_a_file_comes_back(tmp_path: Path, refine: Refine) -> None:
    file, wide = tmp_path / "networks.safetensors", tmp_path / "wide.safetensors"
    save_refine(file, refine.networks, dtype=torch.float16)
    save_refine(wide, refine.networks)
    count = sum(p.numel() for p in refine.networks.parameters())
    assert wide.stat().st_size - file.stat().st_size == pytest.approx(2 * count, abs=1000)
    again = load_refine(file, autoencoder=refine.autoencoder)
    assert again.networks.spec == SPEC and again.autoencoder is refine.autoencoder
    image = picture(16, 16)
    assert torch.allclose(again.refine(image, [3]), refine.refine(image, [3]), atol=0.02)


def test_the_autoencoder_is_the_model_folders(tmp_path: Path, refine: Refine) -> None:
    folder = tiny_model(tmp_path / "model")
    with pytest.raises(InputError, match=r"refine\.safetensors: no such file"):
        load_refine(folder)
    save_refine(folder / "refine.safetensors", refine.networks)
    made = load_refine(folder)
    assert made.autoencoder.latent_space.stride == 4
    assert made.refine(picture(10, 16), [0]).shape == (1, 3, 10, 16)
    assert not any(p.requires_grad for part in (made.networks, made.autoencoder) for p in part.parameters())


def test_files_that_are_none_are_named(tmp_path: Path, refine: Refine) -> None:
    other, alone = tmp_path / "other.safetensors", tmp_path / "alone.safetensors"
    save_file({"x": torch.zeros(2)}, other)
    with pytest.raises(InputError, match=r"other\.safetensors: its header has no 'refine'"):
        load_refine(other)
    save_refine(alone, refine.networks)
    with pytest.raises(InputError, match="made for the autoencoder none: give it"):
        load_refine(alone)
    with pytest.raises(InputError, match="darkroom-mini"):
        load_refine("darkroom-mni")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "regresion"}, "did you mean 'regression'"),
        ({"steps": 0}, "steps must be 1 or more, not 0"),
        ({"strength": 1.5}, r"strength must be in 0 ... 1, not 1\.5"),
        ({"strength": float("nan")}, "strength must be in 0 ... 1"),
    ],
)
def test_bad_options_are_named(refine: Refine, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        refine.refine(picture(8, 8), [0], **options)


def test_bad_pictures_and_configs_are_named(refine: Refine) -> None:
    with pytest.raises(InputError, match="2 pictures need as many seeds, not 1"):
        refine.refine(picture(8, 8, count=2), [0])
    with pytest.raises(InputError, match=r"must be \(B, 3, H, W\), not \(3, 8, 8\)"):
        refine.refine(picture(8, 8)[0], [0])
    with pytest.raises(InputError, match="`patch` = 3 must divide 512"):
        RefineConfig(patch=3)


def test_the_command_writes_beside_each_picture(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("a.png", "b.png"):
        save_png(tmp_path / name, to_pil(picture(20, 28))[0])
    command((tmp_path / "a.png", tmp_path / "b.png"), mode="diffusion", seed=4, steps=2, device="cpu")
    assert "a-refined.png: diffusion, seed 4\n" in capsys.readouterr().out
    a, b = ((tmp_path / f"{name}-refined.png").read_bytes() for name in "ab")
    assert a != b
    command((tmp_path / "b.png",), output=tmp_path / "c.png", seed=5, steps=2, device="cpu")
    assert (tmp_path / "c.png").read_bytes() == b
    with pytest.raises(InputError, match="one output for 2 pictures"):
        command((tmp_path / "a.png", tmp_path / "b.png"), output=tmp_path / "c.png")


def test_the_command_does_not_import_torch_for_its_mistakes() -> None:
    code = "import sys, darkroom.cli_refine; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == "False"


def test_the_bundled_file_is_small_and_for_its_model() -> None:
    folder = model_folder("darkroom-mini")
    assert (folder / "refine.safetensors").stat().st_size <= 6_000_000
    assert load_refine("darkroom-mini").networks.spec.autoencoder == "darkroom-mini"


def test_bundled_networks_keep_what_they_promise(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from refine_data import chosen

    from darkroom.data.folder import Example, PictureSet

    refine = load_refine("darkroom-mini")
    rows = [row for row in chosen(shared / "data", "test") if row.kind == "photo"][:4]
    original = PictureSet([Example(path=shared / "data" / r.path, caption="") for r in rows], 128).images
    decoded = round_trip(refine.autoencoder, as_image(original))
    smooth, drawn = (to_uint8(refine.refine(decoded, range(4), mode=m)) for m in ("regression", "diffusion"))
    before = psnr(original, to_uint8(decoded)).mean()
    assert psnr(original, smooth).mean() >= before + 0.3
    assert psnr(original, drawn).mean() >= before - 1.5
    error = high_frequency_error(original, to_uint8(decoded)).mean()
    assert high_frequency_error(original, drawn).mean() <= error / 2
