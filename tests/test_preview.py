"""Previews: the matrix and its fit, tiny autoencoders, the file on the way, stopping."""

import statistics
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import darkroom
from darkroom.checkpoint.load import load_any_autoencoder
from darkroom.codec import read_image
from darkroom.data.shapes import ShapesSource
from darkroom.errors import Cancelled, InputError
from darkroom.evaluate.metrics import psnr, to_uint8
from darkroom.families import FAMILIES
from darkroom.nn.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig
from darkroom.pipeline import Pipeline
from darkroom.presets import bundled
from darkroom.preview import (
    LatentRGB,
    PreviewFile,
    TinyPreview,
    find_preview,
    fit_preview,
    load_preview,
    save_preview,
    sidecar,
)
from darkroom.progress import Progress
from tests.tiny import tiny_parts

COLOURS = LatentRGB(matrix=((1.0, 0.0, 0.0), (0.0, 0.5, 0.0)), bias=(0.0, 0.0, -1.0))


class Mean(torch.nn.Module):
    """An autoencoder whose two channels are red and twice green, averaged over 4x4 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.latent_space = AutoencoderTiny(AutoencoderTinyConfig()).latent_space.identity(2, 4)

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(image[:, :2], 4) * torch.tensor([1.0, 2.0])[:, None, None]


def red_and_green(count: int, side: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, side, side, generator=generator) * 2 - 1
    images[:, 2] = -1
    return list(images)


def test_a_matrix_maps_each_cell() -> None:
    latents = torch.tensor([[[[1.0, -1.0]], [[1.0, 0.0]]]])
    (image,) = COLOURS(latents)
    assert image.size == (2, 1)
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 191, 0), (0, 128, 0)]
    assert len(COLOURS(torch.zeros(3, 2, 4, 5))) == 3


def test_enlarged_hard_and_smooth() -> None:
    latents = torch.tensor([[[[1.0, -1.0]], [[0.0, 0.0]]]])
    hard, smooth = (np.asarray(COLOURS(latents, scale=8, smooth=s)[0])[0, :, 0] for s in (False, True))
    assert hard.tolist() == [255] * 8 + [0] * 8
    assert len(smooth) == 16 and 0 < smooth[7] < 255 and (np.diff(smooth.astype(int)) <= 0).all()


def test_the_fit_finds_the_matrix() -> None:
    found = fit_preview(Mean(), red_and_green(4))
    assert np.allclose(found.colours.matrix, COLOURS.matrix, atol=1e-4)
    assert np.allclose(found.colours.bias, COLOURS.bias, atol=1e-4)
    assert found.psnr > 50


def test_the_psnr_is_of_pictures_not_seen() -> None:
    images = red_and_green(2)
    images[1] = -images[1]  # blue is 1 in one and -1 in the other: no fit of one can know the other's
    images[1][:2] = images[0][:2]
    assert fit_preview(Mean(), images).psnr < 10


def test_too_few_cells() -> None:
    with pytest.raises(InputError, match="too few"):
        fit_preview(Mean(), [torch.zeros(3, 4, 4)])


def test_kept_beside_the_model(tmp_path: Path) -> None:
    folder, file = tmp_path / "model", tmp_path / "model.safetensors"
    folder.mkdir()
    file.touch()
    assert sidecar(folder) == folder / "preview.json"
    assert sidecar(file) == tmp_path / "model.safetensors.preview.json"
    save_preview(sidecar(file), COLOURS)
    space = FAMILIES["sd1"].spec.latent_space
    assert find_preview(file, space) == load_preview(sidecar(file)) == COLOURS
    assert find_preview(folder, space) != COLOURS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "the whole"),
        ('{"matrix":[[1,2]]}', "3 numbers"),
        ('{"matrix":[]}', "3 numbers"),
        ('{"matrx":[[1,2,3]]}', "matrx"),
        ("{", "not valid JSON"),
    ],
)
def test_a_file_that_is_no_preview(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "preview.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_preview(path)
    assert str(path) in str(caught.value)


def test_published_matrices_and_none(tmp_path: Path) -> None:
    sd1, sdxl = (find_preview(tmp_path, FAMILIES[name].spec.latent_space) for name in ("sd1", "sdxl"))
    assert sd1.matrix[3][2] == -0.473 and sdxl.bias[0] == pytest.approx(150 / 127.5 - 1)
    assert sdxl.matrix[1] == pytest.approx((-60 / 127.5, -5 / 127.5, 10 / 127.5))
    with pytest.raises(InputError, match="`darkroom preview fit"):
        find_preview(tmp_path, FAMILIES["flux-dev"].spec.latent_space)


def test_other_latents_are_refused() -> None:
    with pytest.raises(InputError, match="2 latent channels, not 4"):
        COLOURS(torch.zeros(1, 4, 8, 8))
    tiny = TinyPreview(AutoencoderTiny(AutoencoderTinyConfig(channels=8)))
    with pytest.raises(InputError, match="4 latent channels, not 2"):
        tiny(torch.zeros(1, 2, 8, 8))


def test_a_tiny_autoencoder_shows_the_full_size() -> None:
    autoencoder = AutoencoderTiny(AutoencoderTinyConfig(channels=8)).eval()
    latents = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    images = TinyPreview(autoencoder)(latents)
    assert [image.size for image in images] == [(48, 32)] * 2
    expected = to_uint8(autoencoder.decode(latents))[1].permute(1, 2, 0)
    assert np.array_equal(np.asarray(images[1]), expected.numpy())


def test_the_matrix_costs_less_than_a_millisecond() -> None:
    latents = torch.randn(1, 2, 64, 64)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        COLOURS(latents)
        times.append(time.perf_counter() - start)
    assert statistics.median(times) < 1e-3


def test_the_bundled_previews_show_the_picture() -> None:
    """Held against pictures that the fit has not seen, averaged over each cell."""
    for name, least in (("darkroom-shapes", 19.0), ("darkroom-mini", 21.0)):
        autoencoder = load_any_autoencoder(name)
        colours = find_preview(bundled()[name], autoencoder.latent_space)
        side = 32 if name == "darkroom-shapes" else 128
        images = torch.stack(list(ShapesSource(count=8, seed=1).pictures(side).images)).float() / 127.5 - 1
        with torch.no_grad():
            shown = colours.image(autoencoder.encode(images))
        small = F.avg_pool2d(images, autoencoder.latent_space.stride)
        assert psnr(to_uint8(small), to_uint8(shown)).mean() > least, name


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline(tiny_parts(), name="tiny")


FOUR = LatentRGB(matrix=((0.5, 0, 0), (0, 0.5, 0), (0, 0, 0.5), (0.1, 0.1, 0.1)))


def test_the_file_shows_each_step(pipe: Pipeline, tmp_path: Path) -> None:
    path, sizes, writes = tmp_path / "p.png", [], []
    previews = PreviewFile(path, FOUR, every=2)

    def on_step(progress: Progress) -> None:
        before = path.read_bytes() if path.exists() else b""
        previews(progress)
        if path.exists() and path.read_bytes() != before:
            writes.append(progress.done)
            expected = FOUR(progress.step.denoised, scale=32, smooth=True)[0]
            assert Image.open(path).tobytes() == expected.tobytes()
            sizes.append(Image.open(path).size)

    result = pipe("red apple", seed=1, steps=5, on_step=on_step)
    assert writes == [2, 4, 5] and set(sizes) == {(256, 256)}
    expected = FOUR(result.latents, scale=32, smooth=True)[0]
    assert Image.open(path).tobytes() == expected.tobytes()
    assert sorted(tmp_path.iterdir()) == [path]


def test_the_file_shows_all_pictures_of_a_batch(pipe: Pipeline, tmp_path: Path) -> None:
    pipe("red apple", seed=1, steps=1, count=3, on_step=PreviewFile(tmp_path / "p.png", FOUR))
    assert Image.open(tmp_path / "p.png").size == (4 + 2 * 132, 4 + 2 * 132)


def test_a_callback_stops_between_steps_and_the_preview_stays(pipe: Pipeline, tmp_path: Path) -> None:
    previews, seen = PreviewFile(tmp_path / "p.png", FOUR), []

    def on_step(progress: Progress) -> None:
        previews(progress)
        seen.append(progress.done)
        if progress.done == 2:
            raise Cancelled("stopped")

    with pytest.raises(Cancelled, match="stopped") as caught:
        pipe("red apple", seed=1, steps=5, on_step=on_step)
    assert seen == [1, 2] and (tmp_path / "p.png").exists() and caught.value.exit_code == 130
    after = pipe("red apple", seed=1, steps=5)
    assert torch.equal(after.latents, pipe("red apple", seed=1, steps=5).latents)
    assert isinstance(caught.value, darkroom.DarkroomError)


def test_fitted_to_the_tiny_autoencoder_of_flux2(shared: Path) -> None:
    autoencoder = load_any_autoencoder(shared / "data" / "weights" / "taef2_encoder.pth")
    pictures = sorted((shared / "data" / "grocery256").rglob("*.jpg"))[::40][:12]
    images = [read_image(path, 8, 128) for path in pictures]
    found = fit_preview(autoencoder, images)
    assert len(found.colours.matrix) == 32
    assert found.psnr > 19
    with torch.no_grad():
        latents = autoencoder.encode(images[0][None])
    small, whole = found.colours(latents)[0], TinyPreview(autoencoder)(latents)[0]
    assert (small.size, whole.size) == ((16, 16), (128, 128))
    near = np.asarray(whole.resize((16, 16), Image.Resampling.BOX), float) - np.asarray(small, float)
    assert np.abs(near).mean() < 20
