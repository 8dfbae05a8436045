"""The models that come with the package: what users see first must hold for the real weights."""

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import darkroom
from darkroom.checkpoint.model import load_autoencoder
from darkroom.presets import CARDS, DEFAULT_MODEL, bundled, model_folder

FILE_LIMIT, MODEL_LIMIT, REFINE_LIMIT = 16_000_000, 48_000_000, 6_000_000


@pytest.fixture(scope="module")
def pipe() -> darkroom.Pipeline:
    """The default model."""
    return darkroom.load(DEFAULT_MODEL, device="cpu")


def pixels(result: darkroom.Result) -> np.ndarray:
    """All pictures of a call, as integers that can be subtracted."""
    return np.stack([np.asarray(image, dtype=np.int16) for image in result.images])


def processor_seconds() -> float:
    """What finished child processes have used: unlike the clock, the same on a busy machine."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_a_picture_alone_is_the_one_among_four(pipe: darkroom.Pipeline) -> None:
    prompt = CARDS[DEFAULT_MODEL].demo.prompts[0]
    alone, among = pixels(pipe(prompt, seed=12)), pixels(pipe(prompt, seed=10, count=4))
    assert np.abs(alone[0] - among[2]).max() <= 1
    assert among.std() > 10


def test_exact_pictures_are_equal_to_the_byte(pipe: darkroom.Pipeline) -> None:
    prompt = CARDS[DEFAULT_MODEL].demo.prompts[5]
    alone = pixels(pipe(prompt, seed=12, exact=True))
    among = pixels(pipe(prompt, seed=10, count=4, exact=True))
    assert np.array_equal(alone[0], among[2])


def test_the_prompt_and_the_seed_matter(pipe: darkroom.Pipeline) -> None:
    one, other = CARDS[DEFAULT_MODEL].demo.prompts[:2]
    a, b, c = (pixels(pipe(prompt, seed=seed)) for prompt, seed in ((one, 1), (other, 1), (one, 2)))
    assert np.abs(a - b).max() > 50 and np.abs(a - c).max() > 10


@pytest.mark.slow
def test_the_same_command_twice_gives_the_same_file(tmp_path: Path) -> None:
    prompt = CARDS[DEFAULT_MODEL].demo.prompts[0]
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for file in files:
        command = [sys.executable, "-m", "darkroom", "generate", prompt, "--seed", "1", "-o", str(file)]
        before = processor_seconds()
        subprocess.run(command, check=True)
        assert processor_seconds() - before < 7.5  # five seconds of the clock on two cores
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_the_demo_draws_its_sheet_in_time(tmp_path: Path) -> None:
    before = processor_seconds()
    subprocess.run([sys.executable, "-m", "darkroom", "demo", "-o", str(tmp_path / "demo.png")], check=True)
    assert processor_seconds() - before < 100  # a minute of the clock on two cores
    with Image.open(tmp_path / "demo.png") as sheet:
        assert sheet.width > 8 * 96 and sheet.height > 3 * 96
    assert len(CARDS[DEFAULT_MODEL].demo.prompts) == 24


def test_weights_stay_within_their_sizes() -> None:
    for name, folder in bundled().items():
        sizes = {file.name: file.stat().st_size for file in folder.rglob("*") if file.is_file()}
        assert sizes.pop("refine.safetensors", 0) <= REFINE_LIMIT, name
        assert max(sizes.values()) <= FILE_LIMIT and sum(sizes.values()) <= MODEL_LIMIT, name


def test_every_bundled_model_has_a_card() -> None:
    assert DEFAULT_MODEL in bundled()
    assert set(bundled()) <= set(CARDS)


@pytest.mark.slow
def test_the_autoencoder_keeps_unseen_pictures(shared: Path) -> None:
    from benchmarks.mini_data import rows

    from darkroom.data.folder import Example, PictureSet
    from darkroom.data.latents import as_image
    from darkroom.evaluate.metrics import psnr, to_uint8

    autoencoder = load_autoencoder(model_folder(DEFAULT_MODEL)).requires_grad_(False)
    for split, target in (("concept", 33.0), ("val", 25.0)):
        chosen = [row for row in rows(shared / "data") if row.split == split and not row.skin_tone][::10]
        examples = [Example(path=shared / "data" / row.path, caption="") for row in chosen]
        original = PictureSet(examples, 128).images
        made = to_uint8(autoencoder.decode(autoencoder.encode(as_image(original))))
        assert psnr(made, original).mean() >= target
