"""The DiT without a reference implementation: its formula in float64, real names, options and bad input."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from darkroom.checkpoint.layouts import dit_to_diffusers
from darkroom.errors import InputError
from darkroom.nn.dit import DiT, DiTConfig, rotate, rotations, square_positions
from darkroom.nn.dit_layers import sincos_positions
from darkroom.nn.extra import Extra

TINY = DiTConfig(
    in_channels=3,
    out_channels=6,
    sample_size=8,
    width=32,
    depth=2,
    num_heads=4,
    mlp_ratio=3.0,
    num_classes=5,
    context_dim=12,
    pooled_dim=10,
)
PLAIN = dataclasses.replace(TINY, num_classes=None, context_dim=None, pooled_dim=None)
VARIANTS: dict[str, dict[str, Any]] = {
    "sines": {},
    "normed queries and keys": {"qk_norm": True},
    "rope": {"positions": "rope"},
    "rope and norms, patches of one cell": {"positions": "rope", "qk_norm": True, "patch_size": 1},
    "text only": {"num_classes": None, "pooled_dim": None},
}


def randomised(config: DiTConfig) -> DiT:
    """A network without zeros, so that every path reaches the output."""
    torch.manual_seed(0)
    dit = DiT(config).eval()
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return dit


def inputs(config: DiTConfig = TINY, height: int = 8, width: int = 8) -> dict[str, Any]:
    """All inputs that a network of this shape takes, by name; conditions that it lacks are None."""
    generator = torch.Generator().manual_seed(1)

    def normal(wanted: int | None, *shape: int) -> Tensor | None:
        return torch.randn(*shape, wanted, generator=generator) if wanted else None

    length = torch.tensor([[5], [7]])
    return {
        "x": torch.randn(2, config.in_channels, height, width, generator=generator),
        "timestep": torch.tensor([3.0, 812.0]),
        "context": normal(config.context_dim, 2, 7),
        "pooled": normal(config.pooled_dim, 2),
        "class_labels": torch.tensor([1, 5]) if config.num_classes else None,
        "context_mask": torch.arange(7)[None] < length if config.context_dim else None,
    }


def run(dit: DiT, values: dict[str, Any]) -> Tensor:
    extra = Extra(**{name: values[name] for name in ("pooled", "class_labels", "context_mask")})
    return dit(values["x"], values["timestep"], values["context"], extra=extra)


class Formula:
    """The network written out a second time in float64, a head and a patch at a time where it matters."""

    def __init__(self, dit: DiT) -> None:
        self.config = dit.config
        self.weights = {name: tensor.detach().double() for name, tensor in dit.state_dict().items()}

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def mlp(self, first: str, second: str, x: Tensor) -> Tensor:
        return self.linear(second, nn.functional.silu(self.linear(first, x)))

    def norm(self, x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()

    def heads_normed(self, name: str, x: Tensor) -> Tensor:
        if not self.config.qk_norm:
            return x
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.weights[f"{name}.weight"]

    def rotated(self, x: Tensor, columns: int) -> Tensor:
        """Pairs (i, i + d/2) of a head as complex numbers, turned by row (first half) or column."""
        if self.config.positions != "rope":
            return x
        dim = x.shape[-1]
        frequency = [10_000.0 ** (-4 * i / dim) for i in range(dim // 4)]
        angles = torch.tensor(
            [
                [p // columns * f for f in frequency] + [p % columns * f for f in frequency]
                for p in range(len(x))
            ],
            dtype=torch.float64,
        )
        turned = torch.complex(x[:, : dim // 2], x[:, dim // 2 :]) * torch.polar(
            torch.ones_like(angles), angles
        )
        return torch.cat([turned.real, turned.imag], dim=-1)

    def attention(
        self, name: str, q: Tensor, k: Tensor, v: Tensor, columns: int | None, mask: Tensor
    ) -> Tensor:
        dim = self.config.width // self.config.num_heads
        heads = []
        for start in range(0, self.config.width, dim):
            qh, kh, vh = (t[:, start : start + dim] for t in (q, k, v))
            qh, kh = self.heads_normed(f"{name}.q_norm", qh), self.heads_normed(f"{name}.k_norm", kh)
            if columns:
                qh, kh = self.rotated(qh, columns), self.rotated(kh, columns)
            scores = (qh @ kh.T / math.sqrt(dim)).masked_fill(~mask, -math.inf)
            heads.append(scores.softmax(-1) @ vh)
        return self.linear(f"{name}.proj", torch.cat(heads, -1))

    def vector(self, values: dict[str, Any], index: int) -> Tensor:
        angles = values["timestep"][index].double() * torch.tensor(
            [10_000.0 ** (-i / 128) for i in range(128)], dtype=torch.float64
        )
        vector = self.mlp("t_embedder.mlp.0", "t_embedder.mlp.2", torch.cat([angles.cos(), angles.sin()]))
        if self.config.num_classes:
            vector = vector + self.weights["y_embedder.embedding_table.weight"][values["class_labels"][index]]
        if self.config.pooled_dim:
            pooled = values["pooled"][index].double()
            vector = vector + self.mlp("pooled_embedder.mlp.0", "pooled_embedder.mlp.2", pooled)
        return nn.functional.silu(vector)

    def patches(self, x: Tensor) -> Tensor:
        p = self.config.patch_size
        kernel = self.weights["x_embedder.proj.weight"]
        rows = [
            (x[:, i : i + p, j : j + p] * kernel).sum((1, 2, 3)) + self.weights["x_embedder.proj.bias"]
            for i in range(0, x.shape[1], p)
            for j in range(0, x.shape[2], p)
        ]
        return torch.stack(rows)

    def picture(self, h: Tensor, height: int, width: int) -> Tensor:
        p, channels = self.config.patch_size, self.config.out_channels
        result = torch.zeros(channels, height, width, dtype=torch.float64)
        for n, patch in enumerate(h):
            i, j = n // (width // p) * p, n % (width // p) * p
            result[:, i : i + p, j : j + p] = patch.reshape(p, p, channels).permute(2, 0, 1)
        return result

    def __call__(self, values: dict[str, Any], index: int) -> Tensor:
        x = values["x"][index].double()
        columns, c = x.shape[2] // self.config.patch_size, self.vector(values, index)
        h = self.patches(x)
        if self.config.positions == "sincos":
            h = h + self.weights["pos_embed"][0]
        everything = torch.ones(1, len(h), dtype=torch.bool)
        for block in range(self.config.depth):
            name = f"blocks.{block}"
            parts = self.linear(f"{name}.adaLN_modulation.1", c).chunk(6)
            qkv = self.linear(f"{name}.attn.qkv", self.norm(h) * (1 + parts[1]) + parts[0]).chunk(3, -1)
            h = h + parts[2] * self.attention(f"{name}.attn", *qkv, columns, everything)
            if self.config.context_dim:
                kv = self.linear(f"{name}.cross_attn.kv_linear", values["context"][index].double()).chunk(
                    2, -1
                )
                q, mask = self.linear(f"{name}.cross_attn.q_linear", h), values["context_mask"][index][None]
                h = h + self.attention(f"{name}.cross_attn", q, *kv, None, mask)
            inner = self.linear(f"{name}.mlp.fc1", self.norm(h) * (1 + parts[4]) + parts[3])
            h = h + parts[5] * self.linear(f"{name}.mlp.fc2", nn.functional.gelu(inner, approximate="tanh"))
        shift, scale = self.linear("final_layer.adaLN_modulation.1", c).chunk(2)
        return self.picture(
            self.linear("final_layer.linear", self.norm(h) * (1 + scale) + shift), *x.shape[1:]
        )


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_equals_its_formula_in_float64(name: str) -> None:
    config = dataclasses.replace(TINY, **VARIANTS[name])
    dit, size = randomised(config), (8, 8) if config.positions == "sincos" else (6, 10)
    values = inputs(config, *size)
    output, formula = run(dit, values), Formula(dit)
    for index in range(2):
        expected = formula(values, index)
        assert (output[index] - expected).norm() / expected.norm() <= 1e-5


MUTATIONS = {
    "x": lambda v: v + 0.1,
    "timestep": lambda v: v + 1.0,
    "context": lambda v: v + 0.1,
    "pooled": lambda v: v + 0.1,
    "class_labels": lambda v: (v + 1) % 6,
    "context_mask": lambda v: ~v | (torch.arange(7) == 0),
}


@pytest.mark.parametrize("field", MUTATIONS)
@torch.no_grad()
def test_every_input_changes_the_output(field: str) -> None:
    values = inputs()
    values["context_mask"][1, 3] = False
    dit = randomised(TINY)
    before = run(dit, values)
    after = run(dit, values | {field: MUTATIONS[field](values[field])})
    changed = (after - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)
    assert changed.min() > 1e-4


@torch.no_grad()
def test_masked_context_is_as_good_as_absent() -> None:
    values, dit = inputs(), randomised(TINY)
    noisy = torch.where(values["context_mask"][..., None], values["context"], values["context"] + 10.0)
    torch.testing.assert_close(run(dit, values | {"context": noisy}), run(dit, values))


@pytest.mark.parametrize(("size", "name"), [(32, "dit_xl2_256"), (64, "dit_xl2_512")])
def test_real_checkpoints_fit(size: int, name: str, shared: Path) -> None:
    config = DiTConfig(sample_size=size)
    with torch.device("meta"):
        ours = DiT(config).state_dict()
    for file, tensors in (
        (f"{name}.single", ours),
        (f"{name}.diffusers.transformer", dit_to_diffusers(config)(ours)),
    ):
        expected = json.loads((shared / f"reference/keys/{file}.json").read_text())["tensors"]
        assert {n: list(t.shape) for n, t in tensors.items()} == expected
    back = dit_to_diffusers(config).inverse()(dit_to_diffusers(config)(ours))
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in ours.items()}


def test_fixed_positions_are_sines_of_column_then_row() -> None:
    positions = square_positions(TINY)
    assert positions.shape == (1, 16, 32) and positions.dtype == torch.float32
    patch = positions[0, 1 * 4 + 3]  # row 1, column 3
    for i in range(8):
        frequency = 10_000.0 ** (-i / 8)
        expected = [
            math.sin(3 * frequency),
            math.cos(3 * frequency),
            math.sin(frequency),
            math.cos(frequency),
        ]
        assert patch[[i, 8 + i, 16 + i, 24 + i]].tolist() == pytest.approx(expected, abs=1e-7)


def test_positions_of_another_size_span_the_same_range() -> None:
    double = sincos_positions(TINY.width, TINY.grid_size, 8, 4).reshape(8, 4, 32)
    torch.testing.assert_close(double[::2].reshape(1, 16, 32), square_positions(TINY))


def test_rope_sees_only_differences_of_positions() -> None:
    config = dataclasses.replace(TINY, width=16, num_heads=1)
    q, k = torch.randn(16), torch.randn(16)
    rotation = rotations(config, 5, 7, torch.device("cpu"))
    everywhere = [rotate(v.expand(1, 35, 1, 16), rotation)[0, :, 0] for v in (q, k)]
    scores = (everywhere[0] @ everywhere[1].T).reshape(5, 7, 5, 7)
    torch.testing.assert_close(scores[0, 0, 2, 3], scores[2, 3, 4, 6])
    torch.testing.assert_close(scores[3, 1, 1, 4], scores[4, 0, 2, 3])
    assert abs(scores[0, 0, 2, 3] - scores[0, 0, 3, 2]) > 1e-3
    torch.testing.assert_close(everywhere[0].norm(dim=1), q.norm().expand(35))


def test_new_network_is_zero_and_its_blocks_are_identities() -> None:
    values, dit = inputs(), DiT(TINY)
    output = run(dit, values)
    assert torch.equal(output, torch.zeros(2, 6, 8, 8))
    extra = Extra(**{name: values[name] for name in ("pooled", "class_labels", "context_mask")})
    cond = dit.conditioning(values["x"], values["timestep"], values["context"], extra)
    h = torch.randn(2, 16, 32)
    assert torch.equal(dit.blocks[0](h, cond), h)
    (output - 1.0).square().mean().backward()
    assert dit.final_layer.linear.weight.grad is not None and dit.final_layer.linear.weight.grad.norm() > 0


def test_initialisation_follows_the_paper() -> None:
    dit = DiT(dataclasses.replace(TINY, width=128))
    for name in ("t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight", "y_embedder.embedding_table.weight"):
        assert dit.get_parameter(name).std().item() == pytest.approx(0.02, rel=0.1)
    assert dit.blocks[1].attn.qkv.weight.abs().max().item() == pytest.approx(math.sqrt(6 / 512), rel=0.01)
    assert dit.x_embedder.proj.weight.abs().max().item() == pytest.approx(math.sqrt(6 / 140), rel=0.01)
    assert all(p.abs().max() == 0 for n, p in dit.named_parameters() if n.endswith("bias"))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_trains(name: str) -> None:
    config = dataclasses.replace(TINY, **VARIANTS[name])
    dit = randomised(config)
    run(dit, inputs(config)).square().mean().backward()
    assert [n for n, p in dit.named_parameters() if p.grad is None or p.grad.norm() == 0] == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("sines", (8, 8)), ("sines", (4, 12)), ("rope", (4, 12))])
def test_compiles_without_graph_breaks(name: str, size: tuple[int, int]) -> None:
    config = dataclasses.replace(TINY, depth=1, qk_norm=True, **VARIANTS[name])
    values, dit = inputs(config, *size), randomised(config)
    torch.compiler.reset()
    compiled = torch.compile(dit, backend="eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, values), run(dit, values))


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_bfloat16_stays_near_float32(name: str) -> None:
    config = dataclasses.replace(TINY, **VARIANTS[name])
    values, dit = inputs(config), randomised(config)
    reference = run(dit, values)
    with torch.autocast("cpu", torch.bfloat16):
        assert (run(dit, values).float() - reference).norm() / reference.norm() < 0.04
    half = {n: v.bfloat16() if n in ("x", "context") and v is not None else v for n, v in values.items()}
    output = run(dit.bfloat16(), half)
    assert output.dtype == torch.bfloat16
    assert (output.float() - reference).norm() / reference.norm() < 0.04


@torch.no_grad()
def test_bfloat16_network_tells_neighbouring_timesteps_apart() -> None:
    dit, x = randomised(PLAIN).bfloat16(), inputs(PLAIN)["x"].bfloat16()
    vector = dit.conditioning(x, torch.tensor([996.0, 997.0]), None, Extra()).vector  # equal in bfloat16
    assert vector.dtype == torch.bfloat16 and (vector[0] - vector[1]).abs().max() > 0.05


@torch.no_grad()
def test_without_conditions_it_takes_latents_and_timestep_alone() -> None:
    dit, values = randomised(PLAIN), inputs(PLAIN)
    assert dit(values["x"], values["timestep"], None).shape == (2, 6, 8, 8)
    with pytest.raises(InputError, match="context_mask"):
        dit(values["x"], values["timestep"], None, extra=Extra(context_mask=torch.ones(2, 7).bool()))


@pytest.mark.parametrize("name", ["context", "pooled", "class_labels"])
def test_conditions_must_match_the_network(name: str) -> None:
    values = inputs()
    with pytest.raises(InputError, match=f"needs `.*{name}`"):
        run(DiT(TINY), values | {name: None})
    without = {"context": "context_dim", "pooled": "pooled_dim", "class_labels": "num_classes"}[name]
    with pytest.raises(InputError, match=f"not built for `.*{name}`"):
        run(DiT(dataclasses.replace(TINY, **{without: None})), values)


def test_sizes_must_divide_into_patches() -> None:
    with pytest.raises(InputError, match="7x8 do not divide into patches of 2x2"):
        run(DiT(TINY), inputs(TINY, 8, 7))


def test_null_class_is_the_last_label() -> None:
    assert DiTConfig().null_class == 1000
    assert DiT(TINY).y_embedder.embedding_table.num_embeddings == 6
    with pytest.raises(InputError, match="no classes"):
        _ = PLAIN.null_class


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 30}, "must divide by `num_heads` = 4"),
        ({"width": 24, "positions": "rope"}, "a head by 4"),
        ({"width": 6, "num_heads": 1}, "it by 4"),
        ({"sample_size": 9}, "`sample_size` = 9 must divide by `patch_size` = 2"),
        ({"depth": 0}, "`depth` = 0"),
    ],
)
def test_bad_configs_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(TINY, **changes)
