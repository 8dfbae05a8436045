"""Swaps from files to files, with random autoencoders whose latents are related as the tests say."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.tiny import SPACE, randomised, tiny_parts

import darkroom
from darkroom.checkpoint.fold import folded
from darkroom.checkpoint.model import INTERPOSER, load_model, save_autoencoder, save_model
from darkroom.checkpoint.swap import judge, refitted, swap_vae
from darkroom.errors import InputError
from darkroom.evaluate.handful import handful
from darkroom.evaluate.latent_fit import Affine
from darkroom.nn.autoencoder_kl import AutoencoderKL
from darkroom.nn.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig
from darkroom.nn.autoencoder_vq import AutoencoderVQ, AutoencoderVQConfig
from darkroom.nn.interposer import Interposed, Interposer, InterposerConfig
from darkroom.nn.latent_space import LatentSpace
from darkroom.train.interposer import InterposerTraining

SIZE = 32
QUICK = InterposerTraining(steps=2, batch_size=4, views=8, cells=8, width=8, blocks=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("swap") / "model"
    save_model(folder, tiny_parts())
    return folder


def own() -> AutoencoderKL:
    """The model's autoencoder."""
    return tiny_parts().autoencoder


def as_file(folder: Path, autoencoder) -> Path:
    save_autoencoder(folder, autoencoder)
    return folder / "autoencoder.safetensors"


def scaled() -> AutoencoderKL:
    """The same with each channel of its raw latents scaled and shifted."""
    scale, shift = torch.tensor([2.0, 0.5, 3.0, 0.1]).double(), torch.tensor([1.0, -2, 0, 0.3]).double()
    return folded(
        own(), Affine(scale.diag(), shift), Affine((1 / scale).diag(), -shift / scale), torch.zeros(4)
    )


def turned() -> AutoencoderKL:
    """The same with its latents turned among their channels, and shifted."""
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).double())[0]
    shift = torch.tensor([1.0, -2, 0, 0.3]).double()
    return folded(own(), Affine(turn, shift), Affine(turn.T, -turn.T @ shift), torch.zeros(4))


def drawn(folder: Path):
    result = darkroom.load(folder, device="cpu")("red apple", seed=1, steps=2)
    return result.latents, np.asarray(result.images[0]).astype(int)


def test_another_decoder_is_accepted_as_it_is(model, tmp_path):
    changed = own()
    with torch.no_grad():
        changed.decoder.conv_out.bias += 0.01
    verdict = swap_vae(model, as_file(tmp_path / "vae", changed), out=tmp_path / "out", size=SIZE)
    assert (verdict.decision, verdict.accepted) == ("accept", True)
    assert [trial.holds for trial in verdict.trials] == [True] * 3
    assert verdict.trials[0].to_decoder.r2 == 1
    before, after = drawn(model), drawn(tmp_path / "out")
    assert torch.equal(before[0], after[0])
    assert not np.array_equal(before[1], after[1])
    assert load_model(tmp_path / "out").spec == load_model(model).spec
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.width > 4 * SIZE


def test_another_scale_is_refitted_and_draws_the_same_picture(model, tmp_path):
    verdict = swap_vae(model, as_file(tmp_path / "vae", scaled()), out=tmp_path / "out", size=SIZE)
    assert verdict.decision == "rescale"
    assert [trial.holds for trial in verdict.trials] == [False, True, True]
    before, after = drawn(model), drawn(tmp_path / "out")
    assert torch.equal(before[0], after[0])
    assert np.abs(before[1] - after[1]).max() <= 1
    assert not (tmp_path / "out" / INTERPOSER).exists()
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        latents = [load_model(folder).autoencoder.encode(image) for folder in (model, tmp_path / "out")]
    assert torch.allclose(*latents, atol=1e-3)


def test_mixed_channels_go_into_the_convs_and_draw_the_same_picture(model, tmp_path):
    verdict = swap_vae(model, as_file(tmp_path / "vae", turned()), out=tmp_path / "out", size=SIZE)
    assert verdict.decision == "affine"
    assert [trial.holds for trial in verdict.trials] == [False, False, True]
    after = load_model(tmp_path / "out")
    assert isinstance(after.autoencoder, AutoencoderKL)
    assert after.spec == load_model(model).spec
    assert np.abs(drawn(model)[1] - drawn(tmp_path / "out")[1]).max() <= 1


def other() -> AutoencoderKL:
    torch.manual_seed(7)
    return randomised(AutoencoderKL(own().config))


def test_another_space_is_refused_and_nothing_written_but_the_picture(model, tmp_path):
    verdict = swap_vae(model, as_file(tmp_path / "vae", other()), out=tmp_path / "out", size=SIZE)
    assert (verdict.decision, verdict.accepted) == ("refuse", False)
    assert "another latent space" in verdict.reasons[0]
    assert "interposer" in verdict.reasons[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.png", "vae"]


def test_a_useless_interposer_is_refused_with_its_figures(model, tmp_path):
    vae = as_file(tmp_path / "vae", other())
    verdict = swap_vae(model, vae, out=tmp_path / "out", size=SIZE, interposer=QUICK)
    assert verdict.decision == "refuse"
    assert verdict.trials[-1].kind == "interposer"
    assert "judged on 1 of 6 pictures" in verdict.reasons[1]
    assert "no use" in verdict.reasons[2]
    assert not (tmp_path / "out").exists()


def test_sixteen_channels_are_refused_before_anything_is_measured(model, tmp_path):
    sixteen = AutoencoderKL(replace(own().config, latent_channels=16))
    verdict = swap_vae(model, as_file(tmp_path / "vae", sixteen), out=tmp_path / "out", interposer=QUICK)
    assert verdict.decision == "refuse"
    assert "16 channels" in verdict.reasons[0]
    assert (verdict.old, verdict.new, verdict.trials, verdict.picture) == (None, None, (), None)
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]


def test_damaged_weights_are_refused_without_a_fit(model, tmp_path):
    damaged = own()
    with torch.no_grad():
        damaged.decoder.conv_out.bias[0] = float("nan")
    verdict = swap_vae(model, as_file(tmp_path / "vae", damaged), out=tmp_path / "out", size=SIZE)
    assert verdict.decision == "refuse"
    assert "not finite in float32" in verdict.reasons[0]
    assert verdict.new is not None and not verdict.trials


def test_pictures_and_dtype_are_the_callers(model, tmp_path):
    for name, picture in handful(SIZE).items():
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{name}.png")
    vae = as_file(tmp_path / "vae", own())
    one = swap_vae(
        model, vae, [tmp_path / "text.png"], out=tmp_path / "a", size=SIZE, dtype=torch.float16,
        perceptual=lambda a, b: (a - b).abs().mean((1, 2, 3)),
    )  # fmt: skip
    drawn = swap_vae(model, vae, out=tmp_path / "b", size=SIZE)
    assert one.decision == drawn.decision == "accept"
    assert one.old is not None and one.old.quality.psnr != drawn.old.quality.psnr
    assert one.quality_rows()[1][7] != "-" == drawn.quality_rows()[1][7]
    for name in ("autoencoder", "denoiser"):
        weights = load_file(tmp_path / "a" / f"{name}.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.float16}


def test_an_output_that_is_there_or_has_no_folder_is_named_before_any_work(model, tmp_path):
    with pytest.raises(InputError, match="already there"):
        swap_vae("nowhere", "nowhere", out=model)
    with pytest.raises(InputError, match="does not exist"):
        swap_vae("nowhere", "nowhere", out=tmp_path / "no" / "out")


@pytest.mark.slow
def test_a_swapped_model_can_be_swapped_back(model, tmp_path):
    first = swap_vae(model, as_file(tmp_path / "vae", scaled()), out=tmp_path / "there", size=SIZE)
    second = swap_vae(tmp_path / "there", model, out=tmp_path / "back", size=SIZE)
    assert first.decision == second.decision == "rescale"
    space = load_model(tmp_path / "back").spec.latent_space
    assert space.mean == pytest.approx(SPACE.mean, abs=1e-3)
    assert space.std == pytest.approx(SPACE.std, rel=1e-3)


PICTURES = list(handful(SIZE).values())


def with_autoencoder(autoencoder, space: LatentSpace):
    parts = tiny_parts()
    return replace(parts, autoencoder=autoencoder, spec=replace(parts.spec, latent_space=space))


def test_a_vq_autoencoder_of_another_scale_is_refitted():
    config = AutoencoderVQConfig(latent_channels=4, channels=(8, 16, 16), res_blocks=1, groups=4, codes=64)
    torch.manual_seed(0)
    old = randomised(AutoencoderVQ(config, SPACE))
    new = deepcopy(old)
    with torch.no_grad():
        for parameter in (new.quant_conv.weight, new.quant_conv.bias, new.quantize.embedding.weight):
            parameter *= 2
        new.post_quant_conv.weight /= 2
    verdict, swapped = judge(with_autoencoder(old, SPACE), new, PICTURES)
    assert verdict.decision == "rescale" and swapped is not None
    assert isinstance(swapped.autoencoder, AutoencoderVQ)
    assert swapped.spec.latent_space.std == pytest.approx([2 * std for std in SPACE.std], rel=1e-4)


@torch.no_grad()
def test_a_tiny_autoencoder_goes_in_as_it_is_or_behind_an_affine_map(tmp_path):
    torch.manual_seed(0)
    config = AutoencoderTinyConfig(channels=8)
    old, space = randomised(AutoencoderTiny(config)), LatentSpace.identity(4, 8)
    verdict, swapped = judge(with_autoencoder(deepcopy(old), space), deepcopy(old), PICTURES)
    assert verdict.decision == "accept" and swapped is not None
    assert isinstance(swapped.autoencoder, AutoencoderTiny)
    # In a space of several scales a tiny autoencoder cannot say its latents' normalisation itself.
    each = replace(space, std=(1.0, 2.0, 3.0, 4.0))
    verdict, swapped = judge(with_autoencoder(deepcopy(old), each), deepcopy(old), PICTURES)
    assert verdict.decision == "accept" and swapped is not None
    assert isinstance(swapped.autoencoder, Interposed)
    save_model(tmp_path, swapped)
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    assert torch.allclose(load_model(tmp_path).autoencoder.encode(image), old.encode(image), atol=1e-5)


def test_refitted_is_the_map_after_the_old_normalisation():
    scale, shift = torch.tensor([2.0, 0.5, 3.0, 0.1]).double(), torch.tensor([1.0, -2, 0, 0.3]).double()
    latents = torch.randn(1, 4, 3, 3)
    expected = SPACE.denormalise(Affine(scale.diag(), shift)(latents))
    assert torch.allclose(
        refitted(SPACE, Affine(scale.diag(), shift)).denormalise(latents), expected, atol=1e-5
    )


def test_an_interposer_is_judged_on_pictures_that_it_has_not_seen(monkeypatch):
    seen = []

    def untrained(old, new, pictures, training):
        seen.extend(pictures)
        assert new.latent_space != SPACE  # normalised to what the denoiser knows
        return Interposer(InterposerConfig(latent_channels=4, blocks=0))

    monkeypatch.setattr("darkroom.checkpoint.swap.train_interposer", untrained)
    verdict, _ = judge(tiny_parts(), other(), PICTURES, interposer=QUICK)
    assert [any(torch.equal(each, picture) for each in seen) for picture in PICTURES] == [
        True, True, True, False, True, True
    ]  # fmt: skip
    assert len(verdict.trials[-1].images) == 1
    with pytest.raises(InputError, match="two pictures at least"):
        judge(tiny_parts(), other(), PICTURES[:1], interposer=QUICK)
