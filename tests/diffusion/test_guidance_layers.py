"""Networks made worse on purpose: blocks left out, attention that sees nothing else, and what is refused."""

import copy

import pytest
import torch
from tests.networks import with_unit_gain
from torch import Tensor, nn

from darkroom.diffusion.denoiser import Condition, Denoiser, expand
from darkroom.diffusion.path import CosinePath, DiscretePath, EDMPath, FlowPath
from darkroom.errors import InputError
from darkroom.nn.attention import alone_mask, attention
from darkroom.nn.dit import DiT, DiTConfig
from darkroom.nn.extra import Extra
from darkroom.nn.flux import Flux, FluxConfig
from darkroom.nn.mmdit import MMDiT, MMDiTConfig
from darkroom.nn.unet import UNet, UNetConfig

DIT = DiTConfig(
    width=32,
    depth=3,
    num_heads=2,
    sample_size=8,
    context_dim=12,
    num_classes=None,
    positions="rope",
    pooled_dim=10,
)
MMDIT = MMDiTConfig(
    depth=3, num_heads=2, head_width=16, context_dim=12, pooled_dim=10, positions=8, dual_layers=2
)
FLUX = FluxConfig(
    in_channels=4,
    out_channels=4,
    double_blocks=2,
    single_blocks=2,
    num_heads=2,
    axes=(4, 6, 6),
    context_dim=12,
    pooled_dim=10,
    guidance=False,
)
UNET = UNetConfig(
    channels=(8, 16),
    res_blocks=1,
    attention_depth=(1, 2),
    num_heads=(2, 2),
    self_attention=(False, True),
    context_dim=12,
    groups=4,
    pooled_dim=10,
)


def networks() -> dict[str, nn.Module]:
    built = {"dit": DiT(DIT), "mmdit": MMDiT(MMDIT), "flux": Flux(FLUX), "unet": UNet(UNET)}
    return {name: with_unit_gain(network, 3) for name, network in built.items()}


NETWORKS = networks()


@torch.no_grad()
def answer(network: nn.Module, size: tuple[int, int] = (4, 6), **fields) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, network.config.in_channels, *size, generator=generator)
    context, pooled = torch.randn(2, 5, 12, generator=generator), torch.randn(2, 10, generator=generator)
    return network(x, torch.tensor([3.0, 900.0]), context, extra=Extra(pooled=pooled, **fields))


def blocks(network: nn.Module, number: int) -> tuple[nn.ModuleList, int]:
    """The list that a block is in, and where."""
    lists = [getattr(network, n, None) for n in ("blocks", "joint_blocks", "double_blocks", "single_blocks")]
    for found in filter(None, lists):
        if number < len(found):
            return found, number
        number -= len(found)
    raise AssertionError


@pytest.mark.parametrize(
    ("name", "number"),
    [("dit", 0), ("dit", 2), ("mmdit", 1), ("flux", 1), ("flux", 2), ("flux", 3)],
)
def test_a_skipped_block_is_one_that_is_not_there(name, number):
    cut = copy.deepcopy(NETWORKS[name])
    found, place = blocks(cut, number)
    del found[place]
    assert torch.equal(answer(NETWORKS[name], skip=(number,)), answer(cut))
    assert not torch.allclose(answer(NETWORKS[name], skip=(number,)), answer(NETWORKS[name]))


@pytest.mark.parametrize(
    ("name", "layers"),
    [("dit", (0, 1, 2)), ("mmdit", (0, 1, 2)), ("flux", (0, 1, 2, 3)), ("unet", ("mid", "down.1", "up.0"))],
)
def test_a_picture_of_one_place_has_nothing_else_to_see(name, layers):
    """There perturbed attention is plain attention, so both paths through every block are the same."""
    size = {"dit": (2, 2), "mmdit": (2, 2), "flux": (2, 2), "unet": (2, 2)}[name]
    plain, perturbed = (answer(NETWORKS[name], size, perturbed=p) for p in ((), layers))
    torch.testing.assert_close(perturbed, plain)
    wide = answer(NETWORKS[name], perturbed=layers)
    assert (wide - answer(NETWORKS[name])).norm() > 0.01 * wide.norm()


@pytest.mark.parametrize("name", ["dit", "mmdit", "flux"])
def test_each_layer_counts(name):
    answers = [answer(NETWORKS[name], perturbed=(layer,)) for layer in NETWORKS[name].layers]
    for k, first in enumerate(answers):
        assert all(not torch.allclose(first, other) for other in answers[k + 1 :])


def test_the_mask_lets_a_picture_see_its_text_and_itself():
    q, k, v = torch.randn(3, 1, 5, 4).double()
    found = attention(q, k, v, 1, alone_mask(2, 3, q.device))
    scores = q[0] @ k[0].T / 2
    for place in range(5):
        seen = [0, 1, place] if place >= 2 else list(range(5))
        expected = scores[place, seen].softmax(0) @ v[0, seen]
        torch.testing.assert_close(found[0, place], expected)


def test_the_second_attention_of_sd35_is_perturbed_too():
    """With the first alike: the text and each token alone, of a picture of two tokens."""
    network = NETWORKS["mmdit"]
    stream = network.joint_blocks[0].x_block
    x, zeros = torch.randn(1, 6, 32), torch.zeros(1, 1, 32)
    with torch.no_grad():
        alone = stream.self_attended(x, zeros, zeros, alone=True)
        one_by_one = [stream.self_attended(x[:, k : k + 1], zeros, zeros, alone=False) for k in range(6)]
    torch.testing.assert_close(alone, torch.cat(one_by_one, dim=1))


def test_names_of_a_unet():
    assert NETWORKS["unet"].layers == (
        *("mid", "mid.0", "down.1", "down.1.0"),
        *("up.0", "up.0.0", "up.0.1"),
    )  # the outer level attends to the text alone
    both = answer(NETWORKS["unet"], perturbed=("up.0",))
    assert torch.equal(both, answer(NETWORKS["unet"], perturbed=("up.0.0", "up.0.1")))
    assert not torch.allclose(both, answer(NETWORKS["unet"], perturbed=("up.0.1",)))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("unet", {"skip": (1,)}, "this U-Net was not built for `extra.skip`"),
        ("unet", {"perturbed": ("down.0",)}, r"`extra.perturbed`: this U-Net has no layer 'down.0', only"),
        ("unet", {"perturbed": (1,)}, "no layer 1, only"),
        ("dit", {"skip": (3,)}, "`extra.skip`: this DiT has no layer 3, only 0 to 2"),
        ("mmdit", {"perturbed": ("mid",)}, "this MM-DiT has no layer 'mid', only 0 to 2"),
        ("flux", {"perturbed": (-1,)}, "this FLUX network has no layer -1, only 0 to 3"),
    ],
)
def test_layers_that_are_not_there(name, fields, message):
    with pytest.raises(InputError, match=message):
        answer(NETWORKS[name], **fields)


def test_conditions_carry_what_is_said_of_a_call():
    plain = Condition(torch.zeros(2, 7, 8), Extra(pooled=torch.zeros(2, 5)))
    worse = plain.worsened(skip=(1,), perturbed=("mid",))
    taken = worse.take(torch.tensor([1]))
    assert (taken.extra.skip, taken.extra.perturbed, len(taken.extra.pooled)) == ((1,), ("mid",), 1)
    joined = Condition.cat([worse, worse])
    assert (joined.extra.skip, joined.extra.perturbed, len(joined.extra.pooled)) == ((1,), ("mid",), 4)
    assert worse.joins(taken)
    assert not worse.joins(plain)
    with pytest.raises(InputError, match="differ in 'skip'"):
        Condition.cat([worse, plain])
    bare = Condition(None).worsened(skip=(2,), perturbed=())
    assert Condition.cat([bare, bare]).extra == Extra(skip=(2,))


@pytest.mark.parametrize(
    ("path", "prediction"),
    [
        (DiscretePath(), "eps"),
        (DiscretePath(), "v"),
        (CosinePath(), "v"),
        (EDMPath(), "edm"),
        (FlowPath(), "flow"),
        (FlowPath(sigma_max=0.99), "eps"),
        (DiscretePath(), "x0"),
    ],
)
@pytest.mark.parametrize("share", [0.05, 0.4, 0.9])
def test_outputs_and_one_level_for_all(path, prediction, share):
    sigma = path.sigma_min + share * (path.sigma_max - path.sigma_min)
    x, output = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
    denoiser = Denoiser(nn.Identity(), path, prediction)
    for level in (sigma, torch.full((3,), sigma, dtype=torch.float64)):
        clean = denoiser.from_output(x, output, level)
        torch.testing.assert_close(denoiser.to_output(x, clean, level), output)
    assert expand(sigma, x) == sigma

    class Net(nn.Module):
        def forward(self, x: Tensor, timestep: Tensor, context: None, *, extra: None) -> Tensor:
            assert timestep.dtype == torch.float32
            return x * (1 + timestep[:, None, None, None] / 1000)

    denoiser, x = Denoiser(Net(), path, prediction), x.float()
    one, rows = (denoiser(x, level, Condition(None)) for level in (sigma, torch.full((3,), sigma)))
    assert one.dtype == torch.float32
    assert ((one - rows).norm() / (rows.norm() + x.norm() * (prediction == "eps"))).item() < 1e-5
