"""Seamless networks: equal in all places, of the same weights, and pictures of theirs that tile."""

import copy
from dataclasses import replace

import pytest
import torch
from tests.networks import with_unit_gain
from tests.tiny import randomised, tiny_parts

import darkroom
from darkroom.diffusion.denoiser import Condition
from darkroom.diffusion.tiled import Rolled, Tiled
from darkroom.errors import InputError
from darkroom.nn.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from darkroom.nn.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig
from darkroom.nn.dit import DiT, DiTConfig
from darkroom.nn.unet import UNet, UNetConfig
from darkroom.pipeline import Pipeline
from darkroom.runtime.precision import guard_half
from darkroom.runtime.seamless import is_seamless, seamless, seamless_model

CONV_UNET = UNetConfig(
    channels=(16, 16, 16),
    res_blocks=1,
    attention_depth=(0, 1, 0),
    num_heads=(2, 2, 2),
    groups=4,
    context_dim=16,
)
KL = AutoencoderKLConfig(channels=(8, 16, 16), res_blocks=1, groups=4)  # with attention in the middle


def unet():
    torch.manual_seed(0)
    return randomised(UNet(CONV_UNET))


def answer(network, x):
    return network(x, torch.full((len(x),), 500.0), torch.ones(len(x), 3, 16))


def rolled(function, x, shift, scale=1):
    """A function of x rolled, rolled back."""
    back = tuple(int(-s * scale) for s in shift)
    return function(x.roll(shift, (-2, -1))).roll(back, (-2, -1))


def difference(a, b):
    return float((a - b).abs().max())


@torch.no_grad()
@pytest.mark.parametrize(("axes", "shift"), [("x", (0, 4)), ("y", (8, 0)), ("xy", (4, 8))])
def test_a_seamless_unet_treats_all_places_alike(axes, shift):
    network, x = unet(), torch.randn(2, 4, 16, 24)
    wrapped = seamless(network, axes)
    assert difference(rolled(lambda p: answer(wrapped, p), x, shift), answer(wrapped, x)) < 1e-5
    assert difference(rolled(lambda p: answer(network, p), x, shift), answer(network, x)) > 0.05


@torch.no_grad()
def test_in_the_other_axis_nothing_wraps():
    x = torch.randn(1, 4, 16, 24)
    wrapped = seamless(unet(), "x")
    assert difference(rolled(lambda p: answer(wrapped, p), x, (8, 0)), answer(wrapped, x)) > 0.05


@torch.no_grad()
@pytest.mark.parametrize(
    "autoencoder",
    [
        lambda: randomised(AutoencoderKL(KL)),
        lambda: with_unit_gain(AutoencoderTiny(AutoencoderTinyConfig(channels=8)), gain=1.4),
    ],
    ids=["KL", "tiny"],
)
def test_seamless_autoencoders_treat_all_places_alike(autoencoder):
    torch.manual_seed(1)
    network = autoencoder()
    wrapped, stride = seamless(network, "xy"), network.latent_space.stride
    latents, image = torch.randn(1, 4, 8, 12), torch.randn(1, 3, 8 * stride, 12 * stride)
    shift, pixels = (2, 5), (2 * stride, 5 * stride)
    assert difference(rolled(wrapped.decode, latents, shift, stride), wrapped.decode(latents)) < 1e-4
    assert difference(rolled(wrapped.encode, image, pixels, 1 / stride), wrapped.encode(image)) < 1e-4
    assert difference(rolled(network.decode, latents, shift, stride), network.decode(latents)) > 0.01
    assert difference(rolled(network.encode, image, pixels, 1 / stride), network.encode(image)) > 0.01


@torch.no_grad()
def test_the_original_stays_as_it_is_and_the_weights_are_the_same():
    network, x = unet(), torch.randn(1, 4, 16, 16)
    before, modules = answer(network, x), [type(m) for m in network.modules()]
    wrapped = seamless(network, "xy")
    answer(wrapped, x)
    assert torch.equal(answer(network, x), before)
    assert [type(m) for m in network.modules()] == modules
    assert (is_seamless(network), is_seamless(wrapped)) == (False, True)
    ours, theirs = dict(network.named_parameters()), dict(wrapped.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(theirs[name] is parameter for name, parameter in ours.items())
    next(network.parameters()).mul_(2)  # the weights are one: what changes them changes both
    assert torch.equal(next(network.parameters()), next(wrapped.parameters()))
    assert isinstance(wrapped, UNet) and not wrapped.training


@torch.no_grad()
def test_a_network_that_was_guarded_in_half_precision_is_guarded_apart():
    network = guard_half(unet().half(), "denoiser")
    wrapped = seamless(network, "x")
    assert wrapped.half_guard is not network.half_guard
    x = torch.randn(1, 4, 16, 16).half()
    answered = wrapped(x, torch.tensor([500.0]), torch.ones(1, 3, 16).half())
    assert answered.isfinite().all() and not network.half_guard.promoted


def test_sides_that_are_not_halved_evenly_are_an_error():
    wrapped = seamless(unet(), "x")
    answer(wrapped, torch.randn(1, 4, 15, 16))
    with pytest.raises(InputError, match=r"the width of a seamless picture must be even wherever .* it is 9"):
        answer(wrapped, torch.randn(1, 4, 16, 18))
    coder = seamless(AutoencoderKL(KL), "y")
    with pytest.raises(InputError, match="the height of a seamless picture must be even"):
        coder.encode(torch.randn(1, 3, 18, 16))


def test_transformers_have_no_padding_to_wrap():
    config = DiTConfig(width=16, depth=1, num_heads=2, sample_size=8, num_classes=None, out_channels=4)
    with pytest.raises(InputError, match="a DiT has no padding that could be wrapped"):
        seamless(DiT(config), "x")
    with pytest.raises(InputError, match="unknown axes 'both'"):
        seamless(unet(), "both")


def test_a_seamless_model_shares_the_model():
    model = tiny_parts()
    wrapped = seamless_model(model, "x")
    assert is_seamless(wrapped.network) and is_seamless(wrapped.autoencoder)
    assert not is_seamless(model.network) and not is_seamless(model.autoencoder)
    assert wrapped.texts is model.texts and wrapped.spec is model.spec
    assert next(wrapped.network.parameters()) is next(model.network.parameters())
    tiled = replace(model, denoiser=Tiled(model.denoiser, (4, 4), 1))
    with pytest.raises(InputError, match="tiled or rolled already"):
        seamless_model(tiled, "x")


def test_a_transformers_pictures_are_rolled():
    config = DiTConfig(width=16, depth=1, num_heads=2, sample_size=8, num_classes=None, out_channels=4)
    model = tiny_parts()
    denoiser = copy.copy(model.denoiser)
    denoiser.network = with_unit_gain(DiT(config))
    wrapped = seamless_model(replace(model, denoiser=denoiser), "x")
    assert isinstance(wrapped.denoiser, Rolled) and is_seamless(wrapped.autoencoder)
    x, cond = torch.randn(1, 4, 8, 12), Condition(None)
    level = torch.tensor([0.5])
    shift = wrapped.denoiser.shift(0.5, 8, 12)
    expected = rolled(lambda p: denoiser(p, level, cond), x, shift)
    assert torch.equal(wrapped.denoiser(x, level, cond), expected)


def jumps(latents, autoencoder):
    """The mean step between the edges' columns and rows, over that between columns and rows inside."""
    image = autoencoder.decode(latents).clamp(-1, 1)
    across = (image[..., 0] - image[..., -1]).abs().mean() / image.diff(dim=-1).abs().mean()
    down = (image[..., 0, :] - image[..., -1, :]).abs().mean() / image.diff(dim=-2).abs().mean()
    return float(across), float(down)


PROMPT = "a photo of fresh green leaves, seamless texture filling the frame"


DRAWN = {"seed": 3, "count": 2, "steps": 8, "output": "latents"}


@pytest.fixture(scope="module")
def pipe():
    return darkroom.load("darkroom-mini", device="cpu")


@torch.no_grad()
def test_pictures_of_a_plain_model_do_not_tile(pipe):
    across, down = jumps(pipe(PROMPT, **DRAWN).latents, pipe.model.autoencoder)
    print(f"plain: {across:.2f} across the edge in x, {down:.2f} in y")
    assert across > 2 and down > 2


@torch.no_grad()
@pytest.mark.parametrize("wrap", ["seamless", "tiled", "rolled"])
def test_pictures_of_a_seamless_model_tile(pipe, wrap):
    model = seamless_model(pipe.model, "x")
    if wrap == "tiled":
        model = replace(model, denoiser=Tiled(pipe.model.denoiser, (16, 16), 4, wrap="x"))
    if wrap == "rolled":
        model = replace(model, denoiser=Rolled(pipe.model.denoiser, "x"))
    across, down = jumps(Pipeline(model)(PROMPT, **DRAWN).latents, model.autoencoder)
    print(f"{wrap}: {across:.2f} across the edge in x, {down:.2f} in y")
    assert across < 1.5
    assert down > 2
