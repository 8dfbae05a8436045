"""The best latents, where they are known, and for every kind of autoencoder."""

import torch
import torch.nn.functional as F
from tests.tiny import randomised
from torch import Tensor, nn

from darkroom.evaluate.ceiling import best_latents, ceiling
from darkroom.evaluate.handful import handful
from darkroom.evaluate.metrics import psnr, to_uint8
from darkroom.nn.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from darkroom.nn.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig
from darkroom.nn.autoencoder_vq import AutoencoderVQ, AutoencoderVQConfig

SHAPE = {"channels": (8, 16), "res_blocks": 1, "groups": 4, "mid_attention": False}


class Blocks(nn.Module):
    """Decodes each latent to a block of 4×4 pixels, so that the best latents are the blocks' means."""

    def __init__(self, encoded: float = 1.0, drawn: float = 1.0) -> None:
        super().__init__()
        self.encoded, self.drawn = encoded, drawn
        self.weight = nn.Parameter(torch.ones(()))

    def encode(self, image: Tensor) -> Tensor:
        return F.avg_pool2d(image, 4) * self.encoded

    def decode(self, latents: Tensor) -> Tensor:
        return F.interpolate(latents, scale_factor=4) * self.drawn * self.weight


def picture() -> Tensor:
    return handful(32)["clouds"]


def image() -> Tensor:
    return picture()[None].float() / 127.5 - 1


def test_the_best_latents_are_found() -> None:
    found = best_latents(Blocks(encoded=0.3), image(), steps=200)
    assert torch.allclose(found, F.avg_pool2d(image(), 4), atol=2e-3)


def test_what_the_encoder_misses_and_what_the_decoder_lacks() -> None:
    best = to_uint8(F.interpolate(F.avg_pool2d(image(), 4), scale_factor=4))
    limit = psnr(picture()[None], best).item()
    for encoded in (1.0, 0.3):
        assert abs(ceiling(Blocks(encoded), [picture()], steps=100).psnr - limit) < 0.01


def test_never_worse_than_the_encoder() -> None:
    network = Blocks()
    start = network.encode(image())
    assert torch.equal(best_latents(network, image(), steps=3, learning_rate=50.0), start)


def test_the_last_step_counts() -> None:
    assert not torch.equal(best_latents(Blocks(0.3), image(), steps=1), Blocks(0.3).encode(image()))


def test_the_learning_rate_falls_along_half_a_cosine() -> None:
    network = Blocks(encoded=0.0, drawn=1e-3)  # so far from white that every step goes all of its way
    found = best_latents(network, torch.ones(1, 3, 32, 32), steps=20, learning_rate=0.1)
    assert torch.allclose(found, torch.tensor(0.1 * (20 / 2 + 0.5)), atol=0.01)


def test_more_steps_do_not_hurt_and_nothing_is_random() -> None:
    torch.manual_seed(0)
    network = randomised(AutoencoderKL(AutoencoderKLConfig(**SHAPE)))
    few, many, again = (ceiling(network, [picture()], steps=steps) for steps in (2, 40, 40))
    assert many.psnr > few.psnr
    assert many.each == again.each
    assert torch.equal(many.images[0], again.images[0])


def test_gain_for_every_kind() -> None:
    kinds = {
        "kl": lambda: AutoencoderKL(AutoencoderKLConfig(**SHAPE)),
        "vq": lambda: AutoencoderVQ(AutoencoderVQConfig(**SHAPE, codes=64)),
        "tiny": lambda: AutoencoderTiny(AutoencoderTinyConfig(channels=8)),
    }
    for name, build in kinds.items():
        torch.manual_seed(0)
        network = randomised(build())
        with torch.no_grad():
            before = psnr(picture()[None], to_uint8(network.decode(network.encode(image())))).item()
        assert ceiling(network, [picture()], steps=40).psnr > before + 0.2, name


def test_the_error_is_that_of_what_is_saved() -> None:
    white = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    network = Blocks(drawn=10.0)  # 10 is saved as white: nothing is left to gain
    start = network.encode(white[None].float() / 127.5 - 1)
    assert torch.equal(best_latents(network, white[None].float() / 127.5 - 1, steps=5), start)
    assert ceiling(network, [white], steps=5).psnr == float("inf")


def test_it_comes_back_from_beyond_white() -> None:
    grey = torch.full((1, 3, 32, 32), 0.1)
    found = Blocks(encoded=30.0).decode(best_latents(Blocks(encoded=30.0), grey, steps=200))
    assert torch.allclose(found, grey, atol=0.01)


def test_weights_get_no_gradients() -> None:
    network = Blocks(0.3)
    best_latents(network, image(), steps=2)
    assert network.weight.grad is None


def test_every_step_is_reported() -> None:
    calls = []
    ceiling(Blocks(), [picture(), picture()], steps=7, on_step=lambda: calls.append(1))
    assert len(calls) == 14


def test_not_a_number_ends_with_the_encoder() -> None:
    network = Blocks(drawn=float("nan"))
    assert torch.equal(best_latents(network, image(), steps=3), network.encode(image()))
