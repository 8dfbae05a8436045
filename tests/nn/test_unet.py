"""The U-Net without a reference: real checkpoints' names and shapes, conditions, precision and bad input."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from tests.networks import without_gradient
from torch import Tensor, nn

from darkroom.checkpoint.configs.unet import unet_config_from_diffusers
from darkroom.errors import InputError
from darkroom.nn.extra import Extra
from darkroom.nn.layers import halve, timestep_embedding
from darkroom.nn.unet import UNet, UNetConfig, size_embedding

TINY = UNetConfig(
    channels=(16, 32),
    res_blocks=1,
    attention_depth=(1, 1),
    num_heads=(2, 4),
    context_dim=12,
    groups=8,
    pooled_dim=20,
    num_classes=5,
)

# As the first latent diffusion models without a prompt.
PLAIN = UNetConfig(
    channels=(16, 32),
    res_blocks=1,
    attention_depth=(1, 1),
    num_heads=(2, 4),
    context_dim=None,
    groups=8,
    plain_attention=True,
    scale_shift_norm=True,
    resblock_updown=True,
)


def randomised(config: UNetConfig) -> UNet:
    """A network without zeros, so that every path reaches the output."""
    torch.manual_seed(0)
    unet = UNet(config).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return unet


def inputs(
    config: UNetConfig = TINY, height: int = 8, width: int = 6
) -> tuple[Tensor, Tensor, Tensor, Extra]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, config.in_channels, height, width, generator=generator)
    context = torch.randn(2, 7, config.context_dim or 0, generator=generator)
    extra = Extra(
        pooled=torch.randn(2, config.pooled_dim or 0, generator=generator),
        class_labels=torch.tensor([1, 4]),
        context_mask=torch.arange(7)[None] < torch.tensor([[5], [7]]),
    )
    return x, torch.tensor([3.0, 812.0]), context, extra


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl_base", "sdxl_refiner", "playground_v25"])
def test_real_checkpoints_fit(family: str, shared: Path) -> None:
    reference = json.loads((shared / f"reference/keys/{family}.diffusers.unet.json").read_text())
    config = json.loads(reference["source"].split("config.json ", 1)[1])
    with torch.device("meta"):
        unet = UNet(unet_config_from_diffusers(config))
    assert {name: list(t.shape) for name, t in unet.state_dict().items()} == reference["tensors"]


def test_inpainting_takes_nine_channels() -> None:
    with torch.device("meta"):
        unet = UNet(UNetConfig(in_channels=9))
    assert unet.conv_in.weight.shape == (320, 9, 3, 3)
    assert unet.conv_out.weight.shape == (4, 320, 3, 3)


def test_new_network_is_zero_and_its_blocks_are_identities() -> None:
    x, timestep, context, extra = inputs()
    unet = UNet(TINY)
    output = unet(x, timestep, context, extra=extra)
    assert torch.equal(output, torch.zeros_like(x))
    h = torch.randn(2, 32, 4, 3)
    assert torch.equal(unet.mid_block(h, unet.conditioning(x, timestep, context, extra)), h)
    plain = UNet(PLAIN)
    assert torch.equal(plain.mid_block(h, plain.conditioning(x, timestep, None, Extra())), h)
    (output - 1.0).square().mean().backward()
    assert unet.conv_out.weight.grad is not None and unet.conv_out.weight.grad.norm() > 0


def test_every_parameter_trains() -> None:
    x, timestep, context, extra = inputs()
    unet = randomised(TINY)
    unet(x, timestep, context, extra=extra).square().mean().backward()
    assert not without_gradient(unet)


def test_every_parameter_of_a_plain_network_trains() -> None:
    x, timestep, _, _ = inputs(PLAIN)
    unet = randomised(PLAIN)
    unet(x, timestep, None).square().mean().backward()
    # Adding the same to all keys changes no attention.
    assert all(name.endswith("to_k.bias") for name in without_gradient(unet))


@pytest.mark.parametrize("size", [(17, 13), (9, 8), (1, 5)])
def test_any_size(size: tuple[int, int]) -> None:
    config = dataclasses.replace(TINY, channels=(16, 16, 32), attention_depth=(0, 1, 0), num_heads=(2, 2, 4))
    x, timestep, context, extra = inputs(config, *size)
    assert randomised(config)(x, timestep, context, extra=extra).shape == x.shape
    assert randomised(PLAIN)(x, timestep, None).shape == x.shape


def test_halving_averages_and_rounds_odd_sizes_up() -> None:
    x = torch.arange(6.0).reshape(1, 1, 2, 3)
    assert torch.equal(halve(x), torch.tensor([[[[2.0, 3.5]]]]))
    assert halve(torch.ones(1, 1, 1, 1)).shape == (1, 1, 1, 1)


def test_masked_context_is_as_good_as_absent() -> None:
    x, timestep, context, extra = inputs()
    unet = randomised(TINY)
    whole = unet(x, timestep, context, extra=extra)
    noisy = torch.where(extra.context_mask[..., None], context, context + 10.0)
    torch.testing.assert_close(unet(x, timestep, noisy, extra=extra), whole)
    cut = Extra(pooled=extra.pooled[:1], class_labels=extra.class_labels[:1])
    torch.testing.assert_close(unet(x[:1], timestep[:1], context[:1, :5], extra=cut), whole[:1])


def test_mask_reaches_the_attention_that_replaces_self_attention() -> None:
    config = dataclasses.replace(TINY, self_attention=(False, True))
    x, timestep, context, extra = inputs()
    unet = randomised(config)
    noisy = torch.where(extra.context_mask[..., None], context, context + 10.0)
    torch.testing.assert_close(unet(x, timestep, noisy, extra=extra), unet(x, timestep, context, extra=extra))


@pytest.mark.slow
def test_compiles_without_graph_breaks() -> None:
    x, timestep, context, extra = inputs(height=7)
    unet = randomised(TINY)
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(x, timestep, context, extra=extra), unet(x, timestep, context, extra=extra)
    )


def test_channels_last_changes_no_value() -> None:
    x, timestep, context, extra = inputs()
    unet = randomised(TINY)
    reference = unet(x, timestep, context, extra=extra)
    output = unet.to(memory_format=torch.channels_last)(
        x.to(memory_format=torch.channels_last), timestep, context, extra=extra
    )
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, reference, rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast_stays_near_float32() -> None:
    x, timestep, context, extra = inputs()
    unet = randomised(TINY)
    reference = unet(x, timestep, context, extra=extra)
    with torch.autocast("cpu", torch.bfloat16):
        output = unet(x, timestep, context, extra=extra)
    assert (output.float() - reference).norm() / reference.norm() < 0.03


def test_bfloat16_network_tells_neighbouring_timesteps_apart() -> None:
    unet = randomised(TINY).bfloat16()
    x, _, context, _ = inputs()
    timestep = torch.tensor([996.0, 997.0])  # both round to the same bfloat16
    time = unet.conditioning(
        x.bfloat16(),
        timestep,
        context.bfloat16(),
        Extra(pooled=torch.zeros(2, 20), class_labels=torch.zeros(2, dtype=torch.int64)),
    ).time
    assert time.dtype == torch.bfloat16
    assert (time[0] - time[1]).abs().max() > 0.05


def test_without_context_it_is_a_plain_self_attention_unet() -> None:
    config = dataclasses.replace(TINY, context_dim=None, pooled_dim=None, num_classes=None)
    unet = randomised(config)
    x, timestep, context, extra = inputs()
    assert unet(x, timestep, None).shape == x.shape
    assert not any("attn2" in name for name in unet.state_dict())

    silent = randomised(dataclasses.replace(config, context_dim=12))
    silent.load_state_dict(unet.state_dict(), strict=False)
    for name, parameter in silent.named_parameters():
        if "attn2.to_out" in name:
            nn.init.zeros_(parameter)
    torch.testing.assert_close(unet(x, timestep, None), silent(x, timestep, context))

    with pytest.raises(InputError, match="context_mask"):
        unet(x, timestep, None, extra=Extra(context_mask=extra.context_mask))


@pytest.mark.parametrize("name", ["pooled", "class_labels"])
def test_conditions_must_match_the_network(name: str) -> None:
    x, timestep, context, extra = inputs()
    with pytest.raises(InputError, match=f"needs `extra.{name}`"):
        UNet(TINY)(x, timestep, context, extra=dataclasses.replace(extra, **{name: None}))
    without = dataclasses.replace(
        TINY, **{{"pooled": "pooled_dim", "class_labels": "num_classes"}[name]: None}
    )
    with pytest.raises(InputError, match=f"not built for `extra.{name}`"):
        UNet(without)(x, timestep, context, extra=extra)


def test_context_must_match_the_network() -> None:
    x, timestep, context, extra = inputs()
    with pytest.raises(InputError, match="needs `context`"):
        UNet(TINY)(x, timestep, None, extra=extra)
    with pytest.raises(InputError, match="not built for `context`"):
        UNet(dataclasses.replace(TINY, context_dim=None))(x, timestep, context, extra=extra)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": ()}, "at least one level"),
        ({"res_blocks": 0}, "res_blocks"),
        ({"num_heads": (2,)}, "`num_heads` has 1 values, `channels` 2"),
        ({"self_attention": (True, True, True)}, "`self_attention` has 3"),
        ({"channels": (16, 36)}, r"`channels`\[1\] = 36 must divide by groups = 8"),
        ({"num_heads": (2, 5)}, r"`num_heads`\[1\] = 5"),
        ({"context_dim": None, "self_attention": (True, False)}, "set `context_dim`"),
        ({"plain_attention": True}, "leave out `context_dim`"),
        ({"plain_attention": True, "context_dim": None, "linear_projection": True}, "`linear_projection`"),
        ({"plain_attention": True, "context_dim": None, "attention_depth": (1, 2)}, "to 0 or 1"),
    ],
)
def test_wrong_shapes_are_named(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(TINY, **changes)


def test_size_embedding_embeds_each_size_in_order() -> None:
    ids = torch.tensor([[1024.0, 768.0, 0.0, 16.0, 1024.0, 768.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    embedding = size_embedding(ids)
    assert embedding.shape == (2, 6 * 256)
    assert torch.equal(embedding[1, 512:768], timestep_embedding(torch.tensor([3.0]), 256)[0])
    assert embedding[1, 0] == pytest.approx(math.cos(1.0)) and embedding[1, 128] == pytest.approx(
        math.sin(1.0)
    )


def test_module_tree_holds_no_unused_layer() -> None:
    x, timestep, context, extra = inputs()
    unet, called = randomised(TINY), set()
    for name, module in unet.named_modules():
        if not list(module.children()) and not isinstance(module, nn.ModuleList):
            module.register_forward_hook(lambda *_, name=name: called.add(name))
    unet(x, timestep, context, extra=extra)
    leaves = {
        n for n, m in unet.named_modules() if not list(m.children()) and not isinstance(m, nn.ModuleList)
    }
    assert called == leaves
