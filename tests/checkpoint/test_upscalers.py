"""Files of upscalers in every layout that people have, against networks written once more."""

import pickle
import warnings

import pytest
import torch
from safetensors.torch import save_file
from tests import upscaler_references as reference
from tests.torch_files import data_pkl

from darkroom.checkpoint.upscaler_names import read_upscaler, upscaler_title
from darkroom.checkpoint.upscalers import load_upscaler
from darkroom.errors import InputError

IMAGE = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(3))


def saved(path, state, key=None):
    """A file of `torch.save` with a state dict, under a key if one is given."""
    torch.save({key: state} if key else state, path)
    return path


def drawn(path):
    """What a file's upscaler makes of the picture."""
    return load_upscaler(path).network(IMAGE)


def assert_close(value, expected):
    torch.testing.assert_close(value, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("numbers", "scale", "title"),
    [
        ({}, 4, "ESRGAN x4, 2 blocks of 8 channels"),
        ({"fold": 2}, 2, "ESRGAN x2, 2 blocks of 8 channels"),
        ({"fold": 4}, 1, "ESRGAN x1, 2 blocks of 8 channels"),
        ({"blocks": 6, "growth": 5, "width": 12}, 4, "ESRGAN x4, 6 blocks of 12 channels"),
        ({"ups": 1}, 2, "ESRGAN x2, 2 blocks of 8 channels"),
        ({"ups": 0}, 1, "ESRGAN x1, 2 blocks of 8 channels"),
        ({"ups": 3}, 8, "ESRGAN x8, 2 blocks of 8 channels"),
        ({"plus": True}, 4, "ESRGAN+ x4, 2 blocks of 8 channels"),
    ],
)
def test_real_esrgan_in_all_sizes(tmp_path, numbers, scale, title):
    state = reference.random_rrdbnet(**numbers)
    path = saved(tmp_path / "model.pth", state, "params_ema")
    upscaler = load_upscaler(path)
    assert (upscaler.scale, upscaler.multiple, upscaler.name) == (scale, numbers.get("fold", 1), title)
    assert_close(upscaler.network(IMAGE), reference.rrdbnet(state, IMAGE))


@pytest.mark.parametrize("ups", [0, 1, 2, 3])
@pytest.mark.parametrize("plus", [False, True])
def test_the_first_release_of_esrgan_whose_names_are_numbers(tmp_path, ups, plus):
    torch.manual_seed(ups)
    network = reference.OldESRGAN(ups=ups, plus=plus)
    names = set(network.state_dict())
    assert {"model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight", "model.1.sub.2.bias"} <= names
    path = saved(tmp_path / "4x_Old.pth", network.state_dict())
    assert load_upscaler(path).scale == 2**ups
    with torch.no_grad():
        assert_close(drawn(path), network(IMAGE))


@pytest.mark.parametrize("ups", [1, 2])
def test_bsrgan_and_realsr(tmp_path, ups):
    state = reference.random_rrdbnet(ups=ups)
    renamed = reference.bsrgan_names(state)
    assert {"RRDB_trunk.1.RDB3.conv5.weight", "trunk_conv.bias", "HRconv.weight", "upconv1.weight"} <= set(
        renamed
    )
    assert_close(drawn(saved(tmp_path / "BSRGAN.pth", renamed)), reference.rrdbnet(state, IMAGE))


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_compact(tmp_path, scale):
    state = reference.random_compact(scale=scale, convs=5)
    path = saved(tmp_path / "realesr.pth", state, "params")
    assert load_upscaler(path).name == f"Real-ESRGAN compact x{scale}, 5 convs of 8 channels"
    assert_close(drawn(path), reference.compact(state, IMAGE))


@pytest.mark.parametrize(("scale", "norm"), [(2, True), (4, False)])
def test_span_joins_its_branches(tmp_path, scale, norm):
    state = reference.random_span(scale=scale, norm=norm)
    path = saved(tmp_path / "span.pth", state, "params")
    assert load_upscaler(path).scale == scale
    # In float64, as pictures times 255 leave float32 few digits.
    network = load_upscaler(path, dtype=torch.float64).network
    wide = {name: tensor.double() for name, tensor in state.items()}
    torch.testing.assert_close(
        network(IMAGE.double()), reference.span(wide, IMAGE.double()), rtol=1e-9, atol=1e-9
    )


def test_span_whose_branches_are_joined_already(tmp_path):
    state = reference.random_span(norm=False)
    network = load_upscaler(saved(tmp_path / "span.pth", state)).network
    merged = {}
    for name, tensor in network.state_dict().items():
        first = name.split(".")[0]
        plain = first in ("conv_cat", "upsampler")
        owner, part = name.rsplit(".", 1)
        merged[name if plain else f"{owner}.eval_conv.{part}"] = tensor
    path = saved(tmp_path / "merged.pth", merged | {"no_norm": torch.zeros(1)})
    assert torch.equal(drawn(path), network(IMAGE))


@pytest.mark.parametrize("prefix", ["", "params_ema.", "params.", "module.", "params_ema.module."])
def test_safetensors_and_what_stands_before_names(tmp_path, prefix):
    state = reference.random_rrdbnet()
    save_file({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "x4.safetensors")
    assert_close(drawn(tmp_path / "x4.safetensors"), reference.rrdbnet(state, IMAGE))


def test_the_average_is_taken_where_there_are_two(tmp_path):
    average, last = reference.random_rrdbnet(seed=1), reference.random_rrdbnet(seed=2)
    torch.save({"params": last, "params_ema": average}, tmp_path / "both.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_close(drawn(tmp_path / "both.pth"), reference.rrdbnet(average, IMAGE))
    both = {f"params.{n}": t for n, t in last.items()} | {f"params_ema.{n}": t for n, t in average.items()}
    save_file(both, tmp_path / "both.safetensors")
    assert_close(drawn(tmp_path / "both.safetensors"), reference.rrdbnet(average, IMAGE))


def test_half_precision_files_and_networks(tmp_path):
    state = {name: tensor.half() for name, tensor in reference.random_rrdbnet().items()}
    path = saved(tmp_path / "half.pth", state)
    wide = {name: tensor.float() for name, tensor in state.items()}
    assert_close(drawn(path), reference.rrdbnet(wide, IMAGE))  # float32 unless asked
    network = load_upscaler(path, dtype=torch.bfloat16).network
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in network.parameters())


def test_real_sizes_are_read_from_shapes():
    state = {n: tuple(t.shape) for n, t in reference.random_rrdbnet(64, 23, 32).items()}
    assert read_upscaler("x4plus", state).numbers == {
        "width": 64,
        "blocks": 23,
        "growth": 32,
        "doublings": 2,
        "unshuffle": 1,
        "plus": False,
    }
    assert upscaler_title(state) == "ESRGAN x4, 23 blocks of 64 channels"
    shapes = {n: tuple(t.shape) for n, t in reference.random_compact(64, 32).items()}
    assert upscaler_title(shapes) == "Real-ESRGAN compact x4, 32 convs of 64 channels"
    assert upscaler_title({"model.diffusion_model.out.2.weight": (4, 320, 3, 3)}) is None
    assert upscaler_title({"body.0.weight": (64, 4, 3, 3), "body.1.weight": (64,)}) == "Real-ESRGAN compact"


BLOCK = "layers.0.residual_group.blocks.0.attn"


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ({f"{BLOCK}.relative_position_bias_table": (225, 6)}, "looks like SwinIR, which is not read"),
        ({"layers.0.blocks.0.attn.attns.0.pos.pos_proj.weight": (5, 2)}, "looks like DAT, which is not"),
        ({"unet1.conv1.conv.0.weight": (32, 3, 3, 3)}, "looks like Real-CUGAN"),
        ({"body.0.weight": (64, 3, 3, 3), "body.2.weight": (64, 64, 3, 3)}, "other rectifiers than PReLU"),
        ({"lora_unet_up_blocks_0.lora_down.weight": (4, 8)}, "looks like a LoRA, and is no upscaler"),
        ({"embed.weight": (3, 4)}, "is no upscaler that is known: it has embed.weight"),
    ],
)
def test_other_files_are_named(tmp_path, names, says):
    path = tmp_path / "some.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in names.items()}, path)
    with pytest.raises(InputError, match=rf"some.safetensors: .*{says}.*Upscalers that are read: ESRGAN"):
        load_upscaler(path)


def changed(**shapes):
    """ESRGAN's state dict with tensors of other shapes; None takes one away, "__" stands for a dot."""
    state = reference.random_rrdbnet()
    for name, shape in shapes.items():
        name = name.replace("__", ".")
        if shape is None:
            del state[name]
        else:
            state[name] = torch.zeros(shape)
    return state


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (changed(conv_last__weight=None), "looks like ESRGAN, but lacks 'conv_last.weight'"),
        (changed(conv_hr__bias=None), "missing: conv_hr.bias"),
        (changed(more=(1,)), "unexpected: more"),
        (changed(conv_hr__weight=(8, 8, 2, 2)), "wrong shapes: conv_hr.weight"),
        (changed(conv_first__weight=(8, 1, 3, 3)), "only RGB pictures are read"),
        (changed(conv_first__weight=(8, 4, 3, 3)), "has 3 channels at one end and 4 at the other"),
        (changed(conv_first__weight=(8, 27, 3, 3)), "folds the picture by 3 and doubles it 2 times"),
        (changed(conv_first__weight=(8,)), r"its conv_first.weight has shape \[8\], where a conv should be"),
        (changed(RRDB_trunk__0__RDB1__conv1__weight=(4, 8, 3, 3)), "the same tensors in two layouts"),
        (
            {"body.0.weight": torch.zeros(8, 3, 3, 3), "body.1.weight": torch.zeros(8)},
            "looks like Real-ESRGAN compact, but its body.1.weight has shape",
        ),
        (
            reference.random_span() | {"conv_1.conv.1.weight": torch.zeros(16, 6, 1, 1)},
            r"its conv_1.conv.1.weight has shape \[16, 6, 1, 1\], not \[16, 6, 3, 3\]",
        ),
        (
            {n: t for n, t in reference.random_span().items() if n != "block_2.c1_r.sk.bias"},
            "looks like SPAN, but lacks 'block_2.c1_r.sk.bias'",
        ),
    ],
)
def test_damaged_files_say_what_is_wrong(tmp_path, state, says):
    with pytest.raises(InputError, match=rf"damaged.pth: .*{says}"):
        load_upscaler(saved(tmp_path / "damaged.pth", state))


def test_a_huge_number_in_a_name_builds_no_huge_network(tmp_path):
    state = reference.random_rrdbnet(blocks=1)
    renamed = {n.replace("body.0.", "body.99999999."): t for n, t in state.items()}
    with pytest.raises(InputError, match=r"lacks .body\.0\.rdb1\.conv1\.weight"):
        load_upscaler(saved(tmp_path / "huge.pth", renamed))


def test_nothing_in_a_pickle_is_run(tmp_path):
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return exec, (f"open({str(ran)!r}, 'w')",)

    path = data_pkl(tmp_path / "evil.pth", pickle.dumps({"params_ema": Evil()}, protocol=2))
    with pytest.raises(InputError):
        load_upscaler(path)
    assert not ran.exists()
