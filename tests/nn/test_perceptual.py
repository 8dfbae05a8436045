"""Perceptual distances: the formula in float64 with plain operations, files, precision and gradients."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from darkroom.errors import InputError
from darkroom.nn.perceptual import LPIPS, SqueezeDistance, load_perceptual

# Convolutions as index/stride/padding, f fire modules, p2 and p3 poolings of those windows, t after a tap.
PLANS = {
    "vgg16": "0/1/1 2/1/1 t p2 5/1/1 7/1/1 t p2 10/1/1 12/1/1 14/1/1 t p2 17/1/1 19/1/1 21/1/1 t p2 "
    "24/1/1 26/1/1 28/1/1 t",
    "alexnet": "0/4/2 t p3 3/1/2 t p3 6/1/1 t 8/1/1 t 10/1/1 t",
    "squeezenet": "0/2/0 t p3 f3 f4 t p3 f6 f7 t p3 f9 t f10 t f11 t f12 t",
}


def plain_layers(plan: str, state: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    def conv(name: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride, padding).clamp_min(0)

    taps = []
    for token in plan.split():
        if token == "t":
            taps.append(x)
        elif token[0] == "p":
            x = F.max_pool2d(x, int(token[1]), 2, ceil_mode=plan is PLANS["squeezenet"])
        elif token[0] == "f":
            squeezed = conv(f"{token[1:]}.squeeze", x)
            wide = (conv(f"{token[1:]}.expand{k}x{k}", squeezed, padding=k // 2) for k in (1, 3))
            x = torch.cat(list(wide), dim=1)
        else:
            index, stride, padding = token.split("/")
            x = conv(index, x, int(stride), int(padding))
    return taps


def unit(x: Tensor) -> Tensor:
    return x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)


def pictures(size: tuple[int, int] = (64, 64), seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(2, 3, *size, generator=generator) * 2 - 1
    return a, (a + 0.3 * torch.randn(a.shape, generator=generator)).clamp(-1, 1)


def double_state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.double() for name, value in module.state_dict().items()}


@pytest.fixture(scope="module")
def squeeze(shared: Path) -> SqueezeDistance:
    return load_perceptual("squeeze", shared / "data/weights/squeezenet1_1_caffe_features.safetensors")


@pytest.mark.parametrize("backbone", PLANS)
@pytest.mark.parametrize("size", [(64, 64), (45, 58)])
def test_lpips_is_the_formula(backbone: str, size: tuple[int, int]) -> None:
    torch.manual_seed(1)
    model = LPIPS(backbone)
    a, b = pictures(size)
    shift, scale = (
        torch.tensor([-0.030, -0.088, -0.188]).double(),
        torch.tensor([0.458, 0.448, 0.450]).double(),
    )
    layers = [
        plain_layers(
            PLANS[backbone],
            double_state(model.features),
            (x.double() - shift[:, None, None]) / scale[:, None, None],
        )
        for x in (a, b)
    ]
    expected = torch.zeros(2).double()
    for head, x, y in zip(model.heads, *layers, strict=True):
        expected += ((unit(x) - unit(y)).pow(2) * head.double()[:, None, None]).sum(1).mean((1, 2))
    assert torch.allclose(model(a, b).double(), expected, rtol=1e-5)
    assert (expected > 1e-4).all()


def test_squeeze_is_the_formula(squeeze: SqueezeDistance) -> None:
    a, b = pictures((45, 58))
    mean = torch.tensor([103.939, 116.779, 123.68]).double()[:, None, None]
    layers = [
        plain_layers(
            PLANS["squeezenet"], double_state(squeeze.features), (x[:, [2, 1, 0]].double() + 1) * 127.5 - mean
        )
        for x in (a, b)
    ]
    parts = [(unit(x) - unit(y)).pow(2).sum(1).mean((1, 2)) for x, y in zip(*layers, strict=True)]
    assert len(parts) == 7
    assert torch.allclose(squeeze(a, b).double(), sum(parts) / 7, rtol=1e-5)
    assert torch.allclose(squeeze.fire9(a).double(), layers[0][-1].mean((2, 3)), rtol=1e-4, atol=1e-4)
    assert squeeze.fire9(a).shape == (2, 512)


def test_squeeze_ranks_damage(squeeze: SqueezeDistance) -> None:
    a, _ = pictures((32, 32))
    a = F.avg_pool2d(a, 5, 1, 2)
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(3))
    distances = [squeeze(a, (a + s * noise).clamp(-1, 1)).mean() for s in (0.0, 0.02, 0.1, 0.4)]
    assert distances[0] == 0
    assert distances == sorted(distances)
    assert torch.equal(squeeze(a, a.flip(0)), squeeze(a.flip(0), a))


@pytest.mark.parametrize("backbone", PLANS)
def test_works_at_32_pixels_compiled_and_in_bf16(backbone: str) -> None:
    torch.manual_seed(2)
    model = LPIPS(backbone)
    a, b = pictures((32, 32))
    expected = model(a, b)
    assert expected.shape == (2,)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(a, b), expected, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(a.bfloat16(), b.bfloat16())
    assert low.dtype == torch.float32
    assert torch.allclose(low, expected, rtol=0.1)


@pytest.mark.parametrize("kind", ["squeezenet", "alexnet", "unweighted"])
def test_gradients_are_finite_where_features_are_zero(kind: str) -> None:
    model = SqueezeDistance() if kind == "unweighted" else LPIPS(kind)
    for name, parameter in model.features.named_parameters():
        if name.endswith("bias"):
            parameter.fill_(-0.05)  # most features die, some at every channel of a position
    a = torch.zeros(1, 3, 48, 48, requires_grad=True)
    b, _ = pictures((48, 48))
    model(a, b[:1]).sum().backward()
    assert torch.isfinite(a.grad).all()


def test_gradient_reaches_images_and_no_weights() -> None:
    model = LPIPS("alexnet")
    a, b = pictures()
    a.requires_grad_(True)
    model(a, b).sum().backward()
    assert a.grad.norm() > 0
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())
    assert "shift" not in model.state_dict()


def backbone_file(folder: Path, backbone: str, suffix: str) -> tuple[Path, LPIPS]:
    model = LPIPS(backbone)
    state = {f"features.{name}": value.clone() for name, value in model.features.state_dict().items()}
    state["classifier.1.weight"] = torch.zeros(3, 3)
    path = folder / f"{backbone}{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    return path, model


@pytest.mark.parametrize(("backbone", "suffix"), [("alexnet", ".pth"), ("squeezenet", ".safetensors")])
def test_loads_files(tmp_path: Path, backbone: str, suffix: str) -> None:
    weights, model = backbone_file(tmp_path, backbone, suffix)
    heads = tmp_path / "heads.pth"
    torch.save({f"lin{i}.model.1.weight": h[None, :, None, None] for i, h in enumerate(model.heads)}, heads)
    a, b = pictures((32, 32))
    loaded = load_perceptual("lpips", weights, heads)
    assert isinstance(loaded, LPIPS) and loaded.backbone == backbone
    assert torch.equal(loaded(a, b), model(a, b))


@pytest.mark.parametrize(
    ("backbone", "name"), [("vgg16", "vgg"), ("alexnet", "alex"), ("squeezenet", "squeeze")]
)
def test_reads_the_published_heads(shared: Path, tmp_path: Path, backbone: str, name: str) -> None:
    weights, model = backbone_file(tmp_path, backbone, ".safetensors")
    loaded = load_perceptual("lpips", weights, shared / f"data/weights/lpips_v0.1/{name}.pth")
    assert all((head >= 0).all() and head.sum() > 0 for head in loaded.heads)
    a, b = pictures((32, 32))
    assert not torch.equal(loaded(a, b), model(a, b))


def test_wrong_files_are_named(tmp_path: Path) -> None:
    alexnet, _ = backbone_file(tmp_path, "alexnet", ".safetensors")
    heads = tmp_path / "short.pth"
    torch.save({"lin0.model.1.weight": torch.ones(1, 64, 1, 1)}, heads)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(alexnet.read_bytes()[:1000])
    other = tmp_path / "other.safetensors"
    save_file({"conv.weight": torch.ones(1)}, other)
    half = tmp_path / "half.safetensors"
    save_file({"features.0.weight": torch.ones(64, 3, 11, 11)}, half)
    cases = [
        ("lpips", alexnet, heads, "lin1.model.1.weight is missing"),
        ("lpips", alexnet, None, "needs a file of heads"),
        ("squeeze", alexnet, None, "holds alexnet"),
        ("squeeze", tmp_path / "absent.pth", None, "absent.pth"),
        ("squeeze", broken, None, "broken.safetensors"),
        ("squeeze", other, None, "no VGG16"),
        ("lpips", half, tmp_path / "absent.pth", "absent.pth"),
        ("sqeeze", alexnet, None, "squeeze"),
    ]
    for kind, weights, head_file, message in cases:
        with pytest.raises(InputError, match=message):
            load_perceptual(kind, weights, head_file)
    full = tmp_path / "full.pth"
    widths = (64, 192, 384, 256, 256)
    torch.save({f"lin{i}.model.1.weight": torch.ones(1, c, 1, 1) for i, c in enumerate(widths)}, full)
    with pytest.raises(InputError, match=r"half\.safetensors does not fit"):
        load_perceptual("lpips", half, full)
