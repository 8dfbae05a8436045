"""The DiT against diffusers: `DiTTransformer2DModel`, and PixArt-α's blocks for the cross-attention."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests.closeness import assert_parity
from torch import Tensor

from darkroom.checkpoint.layouts import dit_to_diffusers
from darkroom.checkpoint.tables import Rename, Split, Table
from darkroom.errors import InputError
from darkroom.nn.dit import DiT, DiTConfig
from darkroom.nn.extra import Extra

CLASSES = DiTConfig(
    in_channels=4,
    out_channels=8,
    sample_size=8,
    width=32,
    depth=3,
    num_heads=4,
    num_classes=10,
    frequency_shift=1,
)
TEXT = DiTConfig(
    in_channels=3,
    out_channels=3,
    sample_size=12,
    width=24,
    depth=2,
    num_heads=2,
    num_classes=None,
    context_dim=20,
)


def test_reference_case(shared: Path) -> None:
    with safe_open(shared / "reference/cases/dit.safetensors", "pt") as file:
        fields = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    config = DiTConfig(
        in_channels=fields["in_channels"],
        out_channels=fields["out_channels"],
        sample_size=fields["sample_size"],
        patch_size=fields["patch_size"],
        width=fields["num_attention_heads"] * fields["attention_head_dim"],
        depth=fields["num_layers"],
        num_heads=fields["num_attention_heads"],
        num_classes=fields["num_embeds_ada_norm"],
        frequency_shift=1,
    )
    weights = {n.removeprefix("weights/"): t.float() for n, t in tensors.items() if n.startswith("weights/")}
    with pytest.raises(InputError, match="copies of one tensor"):
        dit_to_diffusers(config).inverse()(weights)
    # Its blocks have embedders that differ, as in no trained DiT: ours with each of them, a block of each.
    dits = [with_embedders_of(index, config, weights) for index in range(config.depth)]
    extra = Extra(class_labels=tensors["inputs/class_labels"])
    assert config.null_class in extra.class_labels
    x, timestep = tensors["inputs/hidden_states"], tensors["inputs/timestep"].float()
    with torch.no_grad():
        conds = [dit.conditioning(x, timestep, None, extra) for dit in dits]
        h = dits[0].x_embedder(x) + dits[0].fixed_positions(4, 4)
        assert_parity(h, tensors["probe/pos_embed"])
        for index, (dit, cond) in enumerate(zip(dits, conds, strict=True)):
            h = dit.blocks[index](h, cond)
            assert_parity(h, tensors[f"probe/transformer_blocks.{index}"])
        assert_parity(
            dits[0].unpatchified(dits[0].final_layer(h, conds[0].vector), 4), tensors["outputs/sample"]
        )


def with_embedders_of(block: int, config: DiTConfig, weights: dict[str, Tensor]) -> DiT:
    """Our DiT with the timestep and class embedders that diffusers' block of this number has."""
    chosen = dict(weights)
    for name in weights:
        if ".norm1.emb." in name:
            own = name.split(".norm1.emb.")[1]
            chosen[name] = weights[f"transformer_blocks.{block}.norm1.emb.{own}"]
    dit = DiT(config)
    dit.load_state_dict(dit_to_diffusers(config).inverse()(chosen), strict=True)
    return dit


def randomised(model: Any) -> Any:
    """The model with random weights everywhere, its gates, norms and output layer included."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def reference_dit(config: DiTConfig) -> Any:
    """diffusers' class-conditional DiT of this shape, its copied embedders equal in all blocks."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = randomised(
        diffusers.DiTTransformer2DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.width // config.num_heads,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            num_layers=config.depth,
            sample_size=config.sample_size,
            patch_size=config.patch_size,
            num_embeds_ada_norm=config.num_classes,
            norm_eps=1e-6,  # the original's, for which diffusers' default is 1e-5 in one of two norms
        )
    )
    first = model.transformer_blocks[0].norm1.emb
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first.state_dict())
        block.norm1.emb.time_proj.downscale_freq_shift = config.frequency_shift
    return model


def loaded(config: DiTConfig, model: Any) -> DiT:
    dit = DiT(config).eval()
    dit.load_state_dict(dit_to_diffusers(config).inverse()(model.state_dict()), strict=True)
    return dit


def values(config: DiTConfig, size: tuple[int, int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "x": torch.randn(3, config.in_channels, *size, generator=generator),
        "timestep": torch.tensor([0.0, 437.0, 999.0]),
        "class_labels": torch.tensor([3, 0, config.num_classes or 0]),
        "context": torch.randn(3, 7, config.context_dim or 1, generator=generator),
        "context_mask": torch.arange(7)[None] < torch.tensor([[3], [7], [1]]),
    }


def output(dit: DiT, v: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return dit(v["x"], v["timestep"], None, extra=Extra(class_labels=v["class_labels"]))


def reference_output(model: Any, v: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(v["x"], v["timestep"], v["class_labels"]).sample


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, (8, 8)),
        ({"frequency_shift": 0}, (8, 8)),
        ({"patch_size": 4, "out_channels": 4, "sample_size": 16}, (16, 16)),
        ({"patch_size": 1, "in_channels": 16, "out_channels": 16}, (8, 8)),
        ({"num_heads": 2, "width": 40, "depth": 1}, (12, 12)),  # another size than it was made for
        ({}, (6, 6)),
    ],
)
def test_same_output(changes: dict[str, Any], size: tuple[int, int]) -> None:
    config = dataclasses.replace(CLASSES, **changes)
    model, v = reference_dit(config), values(config, size)
    assert_parity(output(loaded(config, model), v), reference_output(model, v))


MUTATIONS = {
    "x": lambda v: v + 0.1,
    "timestep": lambda v: v + 1.0,
    "class_labels": lambda v: (v + 1) % 11,
}


@pytest.mark.parametrize("field", MUTATIONS)
def test_every_input_changes_the_output_as_in_the_reference(field: str) -> None:
    model, v = reference_dit(CLASSES), values(CLASSES, (8, 8))
    dit, mutated = loaded(CLASSES, model), v | {field: MUTATIONS[field](v[field])}
    before, after = output(dit, v), output(dit, mutated)
    changed = (after - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)
    assert changed.min() > 1e-4
    assert_parity(after, reference_output(model, mutated))


def test_table_and_inverse_cover_diffusers_exactly() -> None:
    model = reference_dit(CLASSES)
    table, original = dit_to_diffusers(CLASSES), loaded(CLASSES, model).state_dict()
    theirs = table(original)
    assert theirs.keys() == model.state_dict().keys()
    assert all(torch.equal(theirs[n], t) for n, t in model.state_dict().items())
    again = table.inverse()(theirs)
    assert again.keys() == original.keys()
    assert all(torch.equal(again[n], t) for n, t in original.items())
    model.load_state_dict(theirs, strict=True)


# PixArt's blocks are ours, but they share one modulation, to which each adds a table of its own.
PIXART = Table(
    (
        Rename("pos_embed.proj.*", "x_embedder.proj.*"),
        Rename("adaln_single.emb.timestep_embedder.linear_1.*", "t_embedder.mlp.0.*"),
        Rename("adaln_single.emb.timestep_embedder.linear_2.*", "t_embedder.mlp.2.*"),
        Rename("transformer_blocks.*.attn1.to_out.0.*", "blocks.*.attn.proj.*"),
        Rename("transformer_blocks.*.attn2.to_out.0.*", "blocks.*.cross_attn.proj.*"),
        Rename("transformer_blocks.*.attn2.to_q.*", "blocks.*.cross_attn.q_linear.*"),
        Rename("transformer_blocks.*.ff.net.0.proj.*", "blocks.*.mlp.fc1.*"),
        Rename("transformer_blocks.*.ff.net.2.*", "blocks.*.mlp.fc2.*"),
        Split(
            "blocks.*.attn.qkv.*", tuple(f"transformer_blocks.*.attn1.to_{letter}.*" for letter in "qkv")
        ).inverse(),
        Split(
            "blocks.*.cross_attn.kv_linear.*",
            tuple(f"transformer_blocks.*.attn2.to_{letter}.*" for letter in "kv"),
        ).inverse(),
    )
)


def reference_pixart(config: DiTConfig) -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return randomised(
        diffusers.PixArtTransformer2DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.width // config.num_heads,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            num_layers=config.depth,
            cross_attention_dim=config.context_dim,
            sample_size=config.sample_size,
            patch_size=config.patch_size,
            use_additional_conditions=False,
        )
    )


def pixart_as_dit(config: DiTConfig, model: Any) -> DiT:
    dit = DiT(config).eval()
    tensors = PIXART(model.state_dict())
    weight, bias = tensors.pop("adaln_single.linear.weight"), tensors.pop("adaln_single.linear.bias")
    for index in range(config.depth):
        table = tensors.pop(f"transformer_blocks.{index}.scale_shift_table")
        tensors[f"blocks.{index}.adaLN_modulation.1.weight"] = weight
        tensors[f"blocks.{index}.adaLN_modulation.1.bias"] = bias + table.flatten()
    # The last modulation is another function of the timestep there, so the comparison ends before it.
    rest = {name: tensor for name, tensor in dit.state_dict().items() if name.startswith("final_layer")}
    left_out = ("scale_shift_table", "proj_out.weight", "proj_out.bias")
    ours = {name: tensor for name, tensor in tensors.items() if name not in left_out}
    dit.load_state_dict(ours | rest | {"pos_embed": dit.pos_embed}, strict=True)
    return dit


def last_block_output(block: Any, call: Any) -> Tensor:
    outputs: list[Tensor] = []
    handle = block.register_forward_hook(lambda _module, _inputs, result: outputs.append(result))
    with torch.no_grad():
        call()
    handle.remove()
    return outputs[0]


def text_outputs(dit: DiT, model: Any, v: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What leaves the last block of ours and of the reference."""
    extra = Extra(context_mask=v["context_mask"])
    ours = last_block_output(dit.blocks[-1], lambda: dit(v["x"], v["timestep"], v["context"], extra=extra))
    theirs = last_block_output(
        model.transformer_blocks[-1],
        lambda: model(
            v["x"],
            encoder_hidden_states=v["context"],
            timestep=v["timestep"],
            encoder_attention_mask=v["context_mask"],
        ),
    )
    return ours, theirs


TEXT_MUTATIONS = {
    "nothing": lambda v: v,
    "x": lambda v: v + 0.1,
    "timestep": lambda v: v + 1.0,
    "context": lambda v: v + 0.1,
    "context_mask": lambda v: ~v | (torch.arange(7) == 6),
}


@pytest.mark.parametrize("field", TEXT_MUTATIONS)
def test_cross_attention_blocks_equal_those_of_pixart(field: str) -> None:
    model, v = reference_pixart(TEXT), values(TEXT, (12, 12))
    dit = pixart_as_dit(TEXT, model)
    before, _ = text_outputs(dit, model, v)
    changed = field != "nothing"
    mutated = v | ({field: TEXT_MUTATIONS[field](v[field])} if changed else {})
    after, reference = text_outputs(dit, model, mutated)
    assert_parity(after, reference)
    difference = (after - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)
    assert difference.min() > 1e-4 if changed else difference.max() == 0
