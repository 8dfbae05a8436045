"""Upscalers written once more, from their papers and releases: other constructions than darkroom's."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = dict[str, Tensor]


def conv(state: State, name: str, x: Tensor) -> Tensor:
    """The conv of a name, whatever its size, keeping the picture's."""
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state.get(f"{name}.bias"), padding=weight.shape[-1] // 2)


def lrelu(x: Tensor, slope: float = 0.2) -> Tensor:
    """A leaky rectifier, without torch's own."""
    return torch.where(x > 0, x, slope * x)


def rrdbnet(state: State, image: Tensor) -> Tensor:
    """Real-ESRGAN's generator as a function of its state dict in the names of the release."""
    fold = round((state["conv_first.weight"].shape[1] / 3) ** 0.5)
    b, c, h, w = image.shape
    folded = image.reshape(b, c, h // fold, fold, w // fold, fold).permute(0, 1, 3, 5, 2, 4)
    first = conv(state, "conv_first", folded.reshape(b, c * fold * fold, h // fold, w // fold))
    x, number = first, 0
    while f"body.{number}.rdb1.conv1.weight" in state:
        start = x
        for dense in ("rdb1", "rdb2", "rdb3"):
            x = dense_block(state, f"body.{number}.{dense}", x)
        x, number = start + 0.2 * x, number + 1
    x, up = first + conv(state, "conv_body", x), 1
    while f"conv_up{up}.weight" in state:
        x = lrelu(conv(state, f"conv_up{up}", x.repeat_interleave(2, 2).repeat_interleave(2, 3)))
        up += 1
    return conv(state, "conv_last", lrelu(conv(state, "conv_hr", x)))


def dense_block(state: State, name: str, x: Tensor) -> Tensor:
    """Five convs on all that was before, with ESRGAN+'s shortcuts where there are weights for them."""
    seen = [x]
    for number in range(1, 6):
        out = conv(state, f"{name}.conv{number}", torch.cat(seen, 1))
        out = out if number == 5 else lrelu(out)
        if f"{name}.conv1x1.weight" in state:
            out = out + conv(state, f"{name}.conv1x1", x) if number == 2 else out
            out = out + seen[2] if number == 4 else out
        seen.append(out)
    return x + 0.2 * seen[5]


def random_rrdbnet(width=8, blocks=2, growth=4, ups=2, fold=1, plus=False, seed=0) -> State:
    """A state dict in Real-ESRGAN's names, its numbers large enough that every tensor counts."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}

    def add(name: str, into: int, out: int, size: int = 3, bias: bool = True) -> None:
        state[f"{name}.weight"] = torch.randn(out, into, size, size, generator=generator) / (
            into * size**2
        ) ** (0.5)
        if bias:
            state[f"{name}.bias"] = 0.3 * torch.randn(out, generator=generator)

    add("conv_first", 3 * fold**2, width)
    for block in range(blocks):
        for dense in (1, 2, 3):
            name = f"body.{block}.rdb{dense}"
            for number in range(1, 6):
                out = width if number == 5 else growth
                add(f"{name}.conv{number}", width + (number - 1) * growth, out)
            if plus:
                add(f"{name}.conv1x1", width, growth, size=1, bias=False)
    add("conv_body", width, width)
    for up in range(1, ups + 1):
        add(f"conv_up{up}", width, width)
    add("conv_hr", width, width)
    add("conv_last", width, 3)
    return state


class OldDense(nn.Module):
    """A dense block whose convs are pairs of a conv and a rectifier, as in the first release of ESRGAN."""

    def __init__(self, width: int, growth: int, plus: bool) -> None:
        super().__init__()
        for number in range(1, 6):
            out = width if number == 5 else growth
            layers = [nn.Conv2d(width + (number - 1) * growth, out, 3, padding=1)]
            layers += [] if number == 5 else [nn.LeakyReLU(0.2)]
            self.add_module(f"conv{number}", nn.Sequential(*layers))
        self.conv1x1 = nn.Conv2d(width, growth, 1, bias=False) if plus else None

    def forward(self, x: Tensor) -> Tensor:
        a = self.conv1(x)
        b = self.conv2(torch.cat((x, a), 1)) + (self.conv1x1(x) if self.conv1x1 else 0)
        c = self.conv3(torch.cat((x, a, b), 1))
        d = self.conv4(torch.cat((x, a, b, c), 1)) + (b if self.conv1x1 else 0)
        return self.conv5(torch.cat((x, a, b, c, d), 1)).mul(0.2) + x


class OldRRDB(nn.Module):
    """Three dense blocks, in the first release's names."""

    def __init__(self, width: int, growth: int, plus: bool) -> None:
        super().__init__()
        self.RDB1, self.RDB2, self.RDB3 = (OldDense(width, growth, plus) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.RDB3(self.RDB2(self.RDB1(x))).mul(0.2) + x


class Shortcut(nn.Module):
    """What is in it, added to its input."""

    def __init__(self, sub: nn.Module) -> None:
        super().__init__()
        self.sub = sub

    def forward(self, x: Tensor) -> Tensor:
        return x + self.sub(x)


class OldESRGAN(nn.Module):
    """The generator as the first release built it, one flat sequence: its names are numbers."""

    def __init__(self, width=8, blocks=2, growth=4, ups=2, plus=False) -> None:
        super().__init__()
        body = [OldRRDB(width, growth, plus) for _ in range(blocks)] + [nn.Conv2d(width, width, 3, padding=1)]
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), Shortcut(nn.Sequential(*body))]
        for _ in range(ups):
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.2)]
        layers += [
            nn.Conv2d(width, width, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 3, 3, padding=1),
        ]
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def bsrgan_names(state: State) -> State:
    """A state dict of Real-ESRGAN's names in those of BSRGAN and RealSR."""
    renamed = {}
    for name, tensor in state.items():
        first, *rest = name.split(".")
        if first == "body":
            block, dense, *rest = rest
            name = ".".join(["RRDB_trunk", block, dense.upper(), *rest])
        else:
            words = {
                "conv_body": "trunk_conv",
                "conv_hr": "HRconv",
                "conv_up1": "upconv1",
                "conv_up2": "upconv2",
            }
            name = ".".join([words.get(first, first), *rest])
        renamed[name] = tensor
    return renamed


def compact(state: State, image: Tensor) -> Tensor:
    """Real-ESRGAN's compact network as a function of its state dict."""
    last = max(int(name.split(".")[1]) for name in state)
    x = image
    for number in range(last + 1):
        weight = state[f"body.{number}.weight"]
        if weight.ndim == 1:
            x = torch.where(x > 0, x, weight[:, None, None] * x)
        else:
            x = conv(state, f"body.{number}", x)
    b, c, h, w = x.shape
    scale = round((c / 3) ** 0.5)
    x = x.reshape(b, 3, scale, scale, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, 3, h * scale, w * scale)
    return x + image.repeat_interleave(scale, 2).repeat_interleave(scale, 3)


def random_compact(width=8, convs=3, scale=4, seed=0) -> State:
    """A state dict of a compact network."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    sizes = [3] + [width] * (convs + 1) + [3 * scale**2]
    for number in range(convs + 2):
        into, out = sizes[number], sizes[number + 1]
        state[f"body.{2 * number}.weight"] = (
            torch.randn(out, into, 3, 3, generator=generator) / (into * 9) ** 0.5
        )
        state[f"body.{2 * number}.bias"] = 0.2 * torch.randn(out, generator=generator)
        if number <= convs:
            state[f"body.{2 * number + 1}.weight"] = torch.rand(width, generator=generator)
    return state


def span_conv(state: State, name: str, x: Tensor) -> Tensor:
    """SPAN's conv of branches as it is outside training: one linear map, zeros around the picture.

    The map and the constant are found by running the branches, not by multiplying their weights.
    """
    w = {n: state[f"{name}.conv.{n}.weight"] for n in range(3)}
    bias = {n: state[f"{name}.conv.{n}.bias"] for n in range(3)}
    linear = F.conv2d(F.conv2d(F.conv2d(F.pad(x, (1, 1, 1, 1)), w[0]), w[1]), w[2])
    blank = torch.zeros(1, x.shape[1], 3, 3).to(x)
    constant = F.conv2d(F.conv2d(F.conv2d(blank, w[0], bias[0]), w[1], bias[1]), w[2], bias[2])
    return linear + constant + F.conv2d(x, state[f"{name}.sk.weight"], state[f"{name}.sk.bias"])


def span(state: State, image: Tensor) -> Tensor:
    """SPAN as a function of its state dict."""
    x = image
    if "no_norm" not in state:
        x = (image - torch.tensor([0.4488, 0.4371, 0.4040], dtype=image.dtype).reshape(1, 3, 1, 1)) * 255
    first = x = span_conv(state, "conv_1", x)
    outputs, inner = [], x
    for number in range(1, 7):
        inner = span_conv(state, f"block_{number}.c1_r", x)
        inner = inner * torch.sigmoid(inner)
        h = span_conv(state, f"block_{number}.c2_r", inner)
        h = span_conv(state, f"block_{number}.c3_r", h * torch.sigmoid(h))
        x = (h + x) * (torch.sigmoid(h) - 0.5)
        outputs.append(x)
    last = span_conv(state, "conv_2", outputs[5])
    h = conv(state, "conv_cat", torch.cat([first, last, outputs[0], inner], 1))
    h = conv(state, "upsampler.0", h)
    b, c, rows, columns = h.shape
    scale = round((c / 3) ** 0.5)
    h = h.reshape(b, 3, scale, scale, rows, columns).permute(0, 1, 4, 2, 5, 3)
    return h.reshape(b, 3, rows * scale, columns * scale)


def random_span(width=8, scale=2, norm=True, seed=0) -> State:
    """A state dict of a SPAN, with branches, and merged convs of other numbers, which nothing must use."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {} if norm else {"no_norm": torch.zeros(1)}

    def add(name: str, into: int, out: int, size: int) -> None:
        state[f"{name}.weight"] = (
            torch.randn(out, into, size, size, generator=generator) / (into * size**2) ** 0.5
        )
        state[f"{name}.bias"] = 0.2 * torch.randn(out, generator=generator)

    def branches(name: str, into: int, out: int) -> None:
        add(f"{name}.sk", into, out, 1)
        for number, (a, b, size) in enumerate(
            [(into, 2 * into, 1), (2 * into, 2 * out, 3), (2 * out, out, 1)]
        ):
            add(f"{name}.conv.{number}", a, b, size)
        add(f"{name}.eval_conv", into, out, 3)

    branches("conv_1", 3, width)
    for block in range(1, 7):
        for layer in ("c1_r", "c2_r", "c3_r"):
            branches(f"block_{block}.{layer}", width, width)
    add("conv_cat", 4 * width, width, 1)
    branches("conv_2", width, width)
    add("upsampler.0", width, 3 * scale**2, 3)
    return state
