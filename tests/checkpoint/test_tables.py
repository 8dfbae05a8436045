"""Tables of weight names: every kind of rule, forward and back."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from darkroom.checkpoint.formats.io import load_tensors, save_tensors
from darkroom.checkpoint.layouts import CLIP_TEXT_TO_HUB
from darkroom.checkpoint.tables import (
    AsConv,
    Concat,
    Copy,
    Drop,
    JoinHeads,
    Rename,
    Split,
    SplitHeads,
    Swap,
    Table,
)
from darkroom.errors import InputError

TABLE = Table(
    (
        Drop("grid", lambda: torch.arange(3.0)),
        Rename("in.*", "proj_in.*"),
        Rename("blocks.*.mlp.**", "layers.*.ff.net.**"),
        Split("blocks.*.qkv.*", ("layers.*.q.*", "layers.*.k.*", "layers.*.v.*")),
        Concat(("a.weight", "b.weight"), "ab.weight"),
        Swap("final.*", "norm_out.*"),
        Copy("time.*", ("layers.0.time.*", "layers.1.time.*")),
    )
)


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "in.weight": (2, 3),
        "blocks.0.mlp.fc1.weight": (4, 2),
        "blocks.11.mlp.fc2.bias": (2,),
        "blocks.0.qkv.weight": (6, 2),
        "blocks.11.qkv.bias": (6,),
        "a.weight": (2, 2),
        "b.weight": (2, 2),
        "final.weight": (4, 2),
        "time.weight": (3, 3),
        "other.weight": (1,),
    }
    values = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    return values | {"grid": torch.arange(3.0)}


def test_rules_rename_split_join_swap_and_copy() -> None:
    ours = tensors()
    theirs = TABLE(ours)
    qkv, final = ours["blocks.0.qkv.weight"], ours["final.weight"]
    assert torch.equal(theirs["proj_in.weight"], ours["in.weight"])
    assert torch.equal(theirs["layers.11.ff.net.fc2.bias"], ours["blocks.11.mlp.fc2.bias"])
    assert torch.equal(theirs["layers.0.k.weight"], qkv[2:4])
    assert torch.equal(theirs["layers.11.v.bias"], ours["blocks.11.qkv.bias"][4:])
    assert torch.equal(theirs["ab.weight"], torch.cat([ours["a.weight"], ours["b.weight"]]))
    assert torch.equal(theirs["norm_out.weight"], torch.cat([final[2:], final[:2]]))
    assert torch.equal(theirs["layers.1.time.weight"], ours["time.weight"])
    assert torch.equal(theirs["other.weight"], ours["other.weight"])
    assert "grid" not in theirs and len(theirs) == len(ours) + 4 - 1 - 1 + 1


def test_inverse_after_table_is_the_identity_and_inputs_stay() -> None:
    ours = tensors()
    names = list(ours)
    theirs = TABLE(ours)
    again = TABLE.inverse()(theirs)
    assert list(ours) == names and again.keys() == ours.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in ours.items())
    twice = TABLE.inverse().inverse()(ours)
    assert all(torch.equal(twice[name], tensor) for name, tensor in theirs.items())


def test_no_value_lies_in_two_results(tmp_path: Path) -> None:
    """Pieces may lie in the memory of the whole, but training one result must not change another."""
    theirs = TABLE(tensors())
    for tensor in theirs.values():
        tensor.zero_()
    assert len(theirs) > 5 and all(bool((tensor == 0).all()) for tensor in theirs.values())
    for number, tensor in enumerate(theirs.values()):
        tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(theirs.values()))
    save_tensors(tmp_path / "t.safetensors", theirs, {})
    back, _ = load_tensors(tmp_path / "t.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.items())


def test_a_star_stands_for_one_part_of_a_name() -> None:
    rule = Table((Rename("in.*", "out.*"),))
    assert set(rule({"in.a": torch.ones(1), "in.a.b": torch.ones(1), "xin.a": torch.ones(1)})) == {
        "out.a",
        "in.a.b",
        "xin.a",
    }


@pytest.mark.parametrize("heads", [1, 3])
def test_heads_are_joined_one_after_another_and_split_again(heads: int) -> None:
    rule = JoinHeads(("*.q.*", "*.k.*", "*.v.*"), "*.qkv.*", heads)
    ours = {f"a.{letter}.weight": torch.randn(6, 4) for letter in "qkv"}
    ours |= {f"a.{letter}.bias": torch.randn(6) for letter in "qkv"}
    theirs = Table((rule,))(ours)
    assert {name: tuple(t.shape) for name, t in theirs.items()} == {
        "a.qkv.weight": (18, 4, 1),
        "a.qkv.bias": (18,),
    }
    width = 6 // heads
    last = theirs["a.qkv.weight"][-3 * width :, :, 0]
    for place, letter in enumerate("qkv"):
        rows = last[place * width : (place + 1) * width]
        assert torch.equal(rows, ours[f"a.{letter}.weight"][-width:])
    again = Table((rule,)).inverse()(theirs)
    assert again.keys() == ours.keys() and all(torch.equal(again[n], ours[n]) for n in ours)
    assert rule.inverse().inverse() == rule
    with pytest.raises(InputError, match="17 rows: not 3 parts of 2 heads"):
        SplitHeads("qkv", ("q", "k", "v"), 2)({"qkv": torch.ones(17)})


@pytest.mark.parametrize("dims", [1, 2])
def test_a_matrix_is_a_conv_of_one_place(dims: int) -> None:
    table = Table((AsConv("in", "out", dims),))
    conv = table({"in": torch.arange(6.0).reshape(2, 3)})["out"]
    assert conv.shape == (2, 3, *(1,) * dims)
    assert torch.equal(table.inverse()({"out": conv})["in"], conv.flatten(1))
    assert table.inverse().inverse()({"in": conv.flatten(1)})["out"].shape == conv.shape


def test_what_cannot_be_joined_or_split_is_named() -> None:
    theirs = TABLE(tensors())
    lacking = {name: tensor for name, tensor in theirs.items() if name != "layers.0.v.weight"}
    with pytest.raises(InputError, match=r"layers\.0\.v\.weight: missing beside layers\.0\.q\.weight"):
        TABLE.inverse()(lacking)
    unequal = theirs | {"layers.1.time.weight": torch.zeros(3, 3)}
    with pytest.raises(InputError, match=r"layers\.1\.time\.weight differs from layers\.0\.time\.weight"):
        TABLE.inverse()(unequal)
    with pytest.raises(InputError, match="7 rows: they do not split into 3"):
        TABLE(tensors() | {"blocks.0.qkv.weight": torch.ones(7, 2)})


def test_clip_prefix_goes_on_and_off() -> None:
    ours = {
        "embeddings.a": torch.ones(1),
        "final_layer_norm.b": torch.ones(2),
        "text_projection.weight": torch.ones(3),
    }
    theirs = CLIP_TEXT_TO_HUB(ours)
    assert set(theirs) == {
        "text_model.embeddings.a",
        "text_model.final_layer_norm.b",
        "text_projection.weight",
    }
    old = theirs | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    assert CLIP_TEXT_TO_HUB.inverse()(old).keys() == ours.keys()
    assert CLIP_TEXT_TO_HUB.inverse()(ours).keys() == ours.keys()
