"""The U-Net against diffusers' `UNet2DConditionModel` and `UNet2DModel`, weight for weight."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests.closeness import assert_parity
from tests.networks import with_unit_gain
from torch import Tensor

from darkroom.checkpoint.configs.unet import unet_config_from_diffusers, unet_config_to_diffusers
from darkroom.nn.extra import Extra
from darkroom.nn.transformer import SpatialTransformer
from darkroom.nn.unet import UNet, UNetConfig, size_embedding

CONFIGS = {
    "masked, odd size": UNetConfig(
        channels=(16, 32, 48),
        res_blocks=2,
        attention_depth=(1, 2, 0),
        num_heads=(2, 4, 3),
        context_dim=24,
        groups=8,
    ),
    "classes, one block, attention everywhere": UNetConfig(
        in_channels=16,
        out_channels=16,
        channels=(24, 32),
        res_blocks=1,
        attention_depth=(1, 2),
        mid_depth=2,
        num_heads=(3, 1),
        context_dim=20,
        linear_projection=True,
        groups=4,
        num_classes=7,
    ),
    "sizes, deep middle, inpainting": UNetConfig(
        in_channels=9,
        channels=(32, 32, 64, 64),
        res_blocks=1,
        attention_depth=(0, 1, 2, 0),
        mid_depth=3,
        num_heads=(1, 2, 4, 8),
        context_dim=12,
        linear_projection=True,
        pooled_dim=10 + 6 * 8,
    ),
    "cross-attention only, learned variance": UNetConfig(
        out_channels=8,
        channels=(16, 16, 32),
        res_blocks=3,
        attention_depth=(1, 1, 1),
        num_heads=(2, 2, 2),
        self_attention=(False, True, False),
        context_dim=24,
        groups=16,
        num_classes=11,
    ),
    "no attention in the middle": UNetConfig(
        channels=(16, 32),
        res_blocks=1,
        attention_depth=(1, 1),
        mid_depth=0,
        num_heads=(2, 2),
        context_dim=8,
        groups=8,
    ),
}
SIZES = [(17, 13), (8, 12), (16, 9), (11, 8), (5, 3)]
CASES = ["unet_sd15", "unet_sd2", "unet_sdxl", "unet_refiner"]


@pytest.mark.parametrize("case", CASES)
def test_reference_cases(case: str, shared: Path) -> None:
    with safe_open(shared / f"reference/cases/{case}.safetensors", "pt") as file:
        config = unet_config_from_diffusers(json.loads(file.metadata()["config"]))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    weights = {n.removeprefix("weights/"): t for n, t in tensors.items() if n.startswith("weights/")}
    unet = UNet(config)
    unet.load_state_dict(weights, strict=True)
    pooled = None
    if config.pooled_dim:
        added = "inputs/added_cond_kwargs."
        pooled = torch.cat(
            [tensors[added + "text_embeds"], size_embedding(tensors[added + "time_ids"], 16)], dim=1
        )
    x, timestep, context = (
        tensors[f"inputs/{name}"] for name in ("sample", "timestep", "encoder_hidden_states")
    )
    with torch.no_grad():
        assert_parity(unet(x, timestep, context, extra=Extra(pooled=pooled)), tensors["outputs/sample"])


def reference_model(config: UNetConfig) -> Any:
    """diffusers' network of this shape with random weights, the output layer's and the norms' included."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    fields = unet_config_to_diffusers(config, size_embedding_dim=8)
    model = diffusers.UNet2DConditionModel.from_config(fields).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def random_inputs(config: UNetConfig, size: tuple[int, int]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    batch, length = 3, 9
    lengths = torch.tensor([[4], [9], [1]])
    # diffusers masks no attention that stands in for self-attention, so the two differ there.
    masked = config.self_attention is None
    return {
        "x": torch.randn(batch, config.in_channels, *size, generator=generator),
        "timestep": torch.tensor([0.0, 437.5, 999.0]),
        "context": torch.randn(batch, length, config.context_dim, generator=generator),
        "text": torch.randn(batch, 10, generator=generator),
        "ids": torch.randint(0, 1500, (batch, 6), generator=generator).float(),
        "class_labels": torch.tensor([0, 6, 3]) if config.num_classes else None,
        "context_mask": torch.arange(length)[None] < lengths if masked else None,
    }


def reference_output(model: Any, values: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(
            values["x"],
            values["timestep"],
            values["context"],
            class_labels=values["class_labels"],
            added_cond_kwargs={"text_embeds": values["text"], "time_ids": values["ids"]},
            encoder_attention_mask=values["context_mask"],
        ).sample


def output(unet: UNet, values: dict[str, Any]) -> Tensor:
    pooled = torch.cat([values["text"], size_embedding(values["ids"], 8)], dim=1)
    extra = Extra(
        pooled=pooled if unet.config.pooled_dim else None,
        class_labels=values["class_labels"],
        context_mask=values["context_mask"],
    )
    with torch.no_grad():
        return unet(values["x"], values["timestep"], values["context"], extra=extra)


def loaded(config: UNetConfig, model: Any) -> UNet:
    unet = UNet(config)
    unet.load_state_dict(model.state_dict(), strict=True)
    return unet


@pytest.mark.parametrize(("name", "size"), list(zip(CONFIGS, SIZES, strict=True)))
def test_same_output(name: str, size: tuple[int, int]) -> None:
    model = reference_model(CONFIGS[name])
    values = random_inputs(CONFIGS[name], size)
    assert_parity(output(loaded(CONFIGS[name], model), values), reference_output(model, values))


@pytest.mark.parametrize("linear_projection", [False, True])
def test_transformer_on_faint_pictures(linear_projection: bool) -> None:
    """Where the variance is as small as the epsilon of the norm, the epsilon shows."""
    models = pytest.importorskip("diffusers.models")
    torch.manual_seed(0)
    reference = models.Transformer2DModel(
        2, 8, 16, cross_attention_dim=12, norm_num_groups=4, use_linear_projection=linear_projection
    ).eval()
    ours = SpatialTransformer(16, 2, depth=1, context_dim=12, linear_projection=linear_projection, groups=4)
    ours.load_state_dict(reference.state_dict(), strict=True)
    x, context = 1e-3 * torch.randn(2, 16, 5, 3), torch.randn(2, 7, 12)
    with torch.no_grad():
        assert_parity(ours(x, context), reference(x, context).sample)


MUTATIONS = {
    "x": lambda v: v + 0.1,
    "timestep": lambda v: v + 1.0,
    "context": lambda v: v + 0.1,
    "text": lambda v: v + 0.1,
    "ids": lambda v: v + 1.0,
    "class_labels": lambda v: (v + 1) % 7,
    "context_mask": lambda v: ~v,
}


@pytest.mark.parametrize("field", MUTATIONS)
def test_every_input_changes_the_output_as_in_the_reference(field: str) -> None:
    config = UNetConfig(
        channels=(16, 32),
        res_blocks=1,
        attention_depth=(1, 1),
        num_heads=(2, 2),
        context_dim=12,
        groups=8,
        pooled_dim=10 + 6 * 8,
        num_classes=7,
    )
    model = reference_model(config)
    unet, values = loaded(config, model), random_inputs(config, (6, 5))
    mutated = values | {field: MUTATIONS[field](values[field])}
    if field == "context_mask":
        mutated["context_mask"][:, 0] = True  # nobody attends to nothing
    before, after = output(unet, values), output(unet, mutated)
    changed = (after - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)
    assert changed.min() > 1e-4
    assert_parity(after, reference_output(model, mutated))


PLAIN = UNetConfig(
    in_channels=3,
    out_channels=3,
    channels=(16, 32, 48),
    res_blocks=2,
    attention_depth=(0, 1, 1),
    num_heads=(2, 4, 6),
    context_dim=None,
    groups=8,
    plain_attention=True,
)
# Each with a size that halves without rest, since the reference takes no other.
UNCONDITIONAL = {
    "as for faces": (PLAIN, (12, 8)),
    "as for churches": (
        dataclasses.replace(PLAIN, attention_depth=(1, 1, 0), scale_shift_norm=True, resblock_updown=True),
        (8, 20),
    ),
    "as for inpainting, four levels": (
        dataclasses.replace(
            PLAIN,
            in_channels=7,
            channels=(16, 16, 32, 32),
            res_blocks=1,
            attention_depth=(0, 1, 0, 1),
            num_heads=(1, 1, 2, 2),
            resblock_updown=True,
        ),
        (16, 8),
    ),
    "scale and shift, attention in the middle alone, classes": (
        dataclasses.replace(
            PLAIN,
            in_channels=6,
            channels=(16, 40),
            attention_depth=(0, 0),
            num_heads=(2, 5),
            num_classes=7,
            scale_shift_norm=True,
        ),
        (6, 10),
    ),
}


def unconditional_reference(config: UNetConfig) -> Any:
    """diffusers' network of this shape without a context, with random weights."""
    diffusers = pytest.importorskip("diffusers")
    bare = ("ResnetDownsample", "ResnetUpsample") if config.resblock_updown else ("Down", "Up")
    down = [("AttnDown" if depth else bare[0]) + "Block2D" for depth in config.attention_depth]
    up = [("AttnUp" if depth else bare[1]) + "Block2D" for depth in reversed(config.attention_depth)]
    sampling = "resnet" if config.resblock_updown else "conv"
    model = diffusers.UNet2DModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        down_block_types=down,
        up_block_types=up,
        block_out_channels=config.channels,
        layers_per_block=config.res_blocks,
        downsample_type=sampling,
        upsample_type=sampling,
        attention_head_dim=config.channels[0] // config.num_heads[0],
        norm_num_groups=config.groups,
        attn_norm_num_groups=config.groups,
        resnet_time_scale_shift="scale_shift" if config.scale_shift_norm else "default",
        num_class_embeds=config.num_classes,
    )
    return with_unit_gain(model)


def unconditional_inputs(config: UNetConfig, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor | None]:
    x = torch.randn(3, config.in_channels, *size, generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([0, 6, 3]) if config.num_classes else None
    return x, torch.tensor([0.0, 437.5, 999.0]), labels


@pytest.mark.parametrize("name", UNCONDITIONAL)
def test_same_output_without_a_context(name: str) -> None:
    config, size = UNCONDITIONAL[name]
    model = unconditional_reference(config)
    x, timestep, labels = unconditional_inputs(config, size)
    with torch.no_grad():
        output = loaded(config, model)(x, timestep, None, extra=Extra(class_labels=labels))
        assert_parity(output, model(x, timestep, class_labels=labels).sample)


@pytest.mark.parametrize("name", UNCONDITIONAL)
def test_same_gradients_without_a_context(name: str) -> None:
    """Of each parameter but the keys' biases, which change no attention; in float64, since many layers add
    up.
    """
    config, size = UNCONDITIONAL[name]
    model = unconditional_reference(config).double()
    unet = loaded(config, model).double()
    x, timestep, labels = unconditional_inputs(config, size)
    output = unet(x.double(), timestep, None, extra=Extra(class_labels=labels))
    (output - 1.0).square().sum().backward()
    (model(x.double(), timestep, class_labels=labels).sample - 1.0).square().sum().backward()
    reference = dict(model.named_parameters())
    for parameter_name, parameter in unet.named_parameters():
        if not parameter_name.endswith("to_k.bias"):
            assert_parity(parameter.grad, reference[parameter_name].grad)
