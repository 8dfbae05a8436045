"""Which dtype a device gets, and networks that overflow in float16: what is kept in float32, what is not."""

import copy
import gc
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from tests.conftest import relative_error
from tests.networks import with_unit_gain
from torch import Tensor, nn

from darkroom.errors import DarkroomError
from darkroom.nn.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from darkroom.nn.extra import Extra
from darkroom.nn.flux import Flux, FluxConfig
from darkroom.nn.unet import Conditioning, UNet, UNetConfig
from darkroom.runtime import precision
from darkroom.runtime.precision import float32_modules, guard_half, is_float16_only, pick_dtype, unguard_half
from darkroom.text.clip import CLIPTextConfig, CLIPTextEncoder, TextStates
from darkroom.text.t5 import T5Config, T5Encoder

MIDDLE = "mid_block.attentions.0.transformer_blocks.0"
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def autoencoder() -> AutoencoderKL:
    config = AutoencoderKLConfig(channels=(8, 16), res_blocks=1, groups=4)
    return with_unit_gain(AutoencoderKL(config))


def t5() -> T5Encoder:
    return with_unit_gain(
        T5Encoder(T5Config(vocab_size=60, width=16, layers=3, heads=2, head_width=8, intermediate=24))
    )


def unet() -> UNet:
    config = UNetConfig(
        channels=(16, 32, 32),
        res_blocks=1,
        attention_depth=(1, 1, 0),
        num_heads=(2,) * 3,
        context_dim=12,
        groups=8,
    )
    return with_unit_gain(UNet(config))


def flux() -> Flux:
    config = FluxConfig(
        in_channels=4,
        out_channels=4,
        double_blocks=2,
        single_blocks=2,
        num_heads=2,
        axes=(4, 6, 6),
        context_dim=12,
        pooled_dim=10,
    )
    return with_unit_gain(Flux(config))


def noise(*shape: int, seed: int = 1) -> Tensor:
    """What both precisions can be given alike."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half().float()


def unet_inputs() -> tuple[Tensor, Tensor, Tensor]:
    return noise(2, 4, 10, 6), torch.tensor([3.0, 812.0]), noise(2, 7, 12)


@torch.no_grad()
def enlarge(network: nn.Module, path: str, largest: float = 5e4) -> None:
    """Scale a layer so that its largest weight is this, which float16 holds, and what it gives is more."""
    layer = network.get_submodule(path)
    factor = largest / max(parameter.abs().max() for parameter in layer.parameters())
    for parameter in layer.parameters():
        parameter.mul_(factor)


def both(
    network: nn.Module, call: Callable[..., Tensor], *inputs: Tensor
) -> tuple[nn.Module, Tensor, Tensor, list[str]]:
    """The guarded float16 twin; its answer, that of float32 with the same weights, and the warnings."""
    half = copy.deepcopy(network).half()
    guarded = guard_half(copy.deepcopy(half), "tiny network")
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reference = call(half.float(), *inputs)
        result = call(guarded, *(x.half() if x.ndim > 1 and x.is_floating_point() else x for x in inputs))
    return guarded, result, reference, [str(w.message) for w in caught]


def decode(network: nn.Module, latents: Tensor) -> Tensor:
    return network.decode(latents)


def forward(network: nn.Module, *inputs: Tensor) -> Tensor:
    return network(*inputs)


def assert_near(result: Tensor, reference: Tensor) -> None:
    assert result.dtype == torch.float16
    assert result.isfinite().all()
    assert relative_error(result, reference) < 2e-2


def test_the_cpu_gets_float32_unless_asked() -> None:
    assert pick_dtype(CPU, None) == torch.float32
    assert pick_dtype(CPU, torch.float16) == pick_dtype(CUDA, torch.float16) == torch.float16
    assert not is_float16_only(CPU)


@pytest.mark.parametrize(
    ("supported", "dtype"),
    [
        ({torch.bfloat16, torch.float16}, torch.bfloat16),
        ({torch.float16}, torch.float16),
        (set(), torch.float32),
    ],
)
@pytest.mark.parametrize("device", [CUDA, torch.device("mps"), torch.device("xpu", 1)])
def test_accelerators_get_what_they_compute_in(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, supported: set[torch.dtype], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(precision, "computes_in", lambda asked, dtype: asked == device and dtype in supported)
    assert pick_dtype(device, None) == dtype
    assert is_float16_only(device) == (dtype == torch.float16)


def test_emulated_bfloat16_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: warnings.catch_warnings())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    precision.computes_in.cache_clear()
    assert not precision.computes_in(CUDA, torch.bfloat16)
    precision.computes_in.cache_clear()


def test_a_device_is_tried_with_a_product() -> None:
    assert precision.computes_in(CPU, torch.bfloat16)
    assert not precision.computes_in(CPU, torch.uint16)


def test_a_layer_that_overflows_inside_a_block() -> None:
    network = autoencoder()
    path = "decoder.up_blocks.0.resnets.0"
    enlarge(network, f"{path}.conv1")  # normalised away again by norm2, so only conv1 and norm2 see it
    guarded, result, reference, messages = both(network, decode, noise(2, 4, 5, 3))
    assert_near(result, reference)
    assert float32_modules(guarded) == [path]
    assert messages == [f"tiny network: {path} overflows in float16 and runs in float32 from now on"]


def test_a_sum_that_stays_large() -> None:
    network = autoencoder()
    enlarge(network, "decoder.mid_block.resnets.0.conv2")
    guarded, result, reference, messages = both(network, decode, noise(2, 4, 5, 3))
    assert_near(result, reference)
    assert float32_modules(guarded) == ["decoder"]
    assert len(messages) == 1


def test_only_the_part_that_overflows_is_in_float32() -> None:
    network = autoencoder()
    enlarge(network, "encoder.down_blocks.1.resnets.0.conv1")
    guarded, result, reference, _ = both(network, lambda n, x: n.encode(x), noise(2, 3, 10, 6))
    assert_near(result, reference)
    seen: dict[str, torch.dtype] = {}
    for path, module in guarded.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda m, args, path=path: seen.update({path: m.weight.dtype}))
    with torch.no_grad():
        guarded.decode(guarded.encode(noise(2, 3, 10, 6).half()))
    block = "encoder.down_blocks.1.resnets.0."
    assert {path for path, dtype in seen.items() if dtype == torch.float32} == {
        path for path in seen if path.startswith(block)
    }
    assert len(seen) > 10
    assert {p.dtype for p in guarded.parameters()} == {torch.float16}  # between calls, and in files


def test_the_posterior_is_checked_too() -> None:
    network = autoencoder()
    enlarge(network, "encoder.down_blocks.1.resnets.0.conv1")
    _, result, reference, _ = both(network, lambda n, x: n.posterior(x).logvar, noise(2, 3, 10, 6))
    assert_near(result, reference)


def test_t5_with_one_huge_layer() -> None:
    network = t5()
    enlarge(network, "encoder.block.1.layer.1.DenseReluDense.wo")
    guarded, result, reference, _ = both(network, forward, torch.tensor([[3, 14, 15, 9], [2, 6, 5, 0]]))
    assert_near(result, reference)
    # The sum of the blocks stays large up to the final norm.
    assert float32_modules(guarded) == ["encoder"]


def test_t5_with_huge_numbers_inside_its_feed_forward() -> None:
    network = t5()
    for layer in range(2):
        feed_forward = f"encoder.block.{layer}.layer.1.DenseReluDense"
        enlarge(network, f"{feed_forward}.wi_1")
        enlarge(network, f"{feed_forward}.wo", 1e-4)
    # With a mask, whose negative infinities are meant.
    mask = torch.tensor([[True, True, True, False], [True, True, True, True]])
    guarded, result, reference, messages = both(
        network, forward, torch.tensor([[3, 14, 15, 9], [2, 6, 5, 0]]), mask
    )
    assert_near(result, reference)
    assert float32_modules(guarded) == [f"encoder.block.{k}.layer.1.DenseReluDense" for k in range(2)]
    assert len(messages) == 2


def test_t5_whose_first_block_holds_what_all_use() -> None:
    network = t5()
    attention = "encoder.block.0.layer.0.SelfAttention"  # and the distances that are looked up from outside
    enlarge(network, f"{attention}.v")
    enlarge(network, f"{attention}.o", 1e-4)
    ids, mask = torch.tensor([[3, 14, 15, 9]]), torch.tensor([[True, True, True, False]])
    guarded, result, reference, _ = both(network, forward, ids, mask)
    assert_near(result, reference)
    assert float32_modules(guarded) == [attention]
    with torch.no_grad():
        assert_near(guarded(ids, mask), reference)


def test_a_stretch_takes_in_what_was_found_before() -> None:
    network = t5()
    enlarge(network, "encoder.block.0.layer.1.DenseReluDense.wi_1")
    enlarge(network, "encoder.block.0.layer.1.DenseReluDense.wo", 1e-4)
    enlarge(network, "encoder.block.1.layer.1.DenseReluDense.wo")
    guarded, result, reference, messages = both(network, forward, torch.tensor([[3, 14, 15, 9]]))
    assert_near(result, reference)
    assert float32_modules(guarded) == ["encoder"]
    assert messages == ["tiny network: encoder overflows in float16 and runs in float32 from now on"]


@pytest.mark.parametrize(
    ("large", "small", "within"),
    [
        ("down_blocks.1.resnets.0.conv1", None, "down_blocks.1.resnets.0"),
        ("up_blocks.1.resnets.1.conv1", None, "up_blocks.1.resnets.1"),
        (f"{MIDDLE}.attn2.to_v", f"{MIDDLE}.attn2.to_out.0", f"{MIDDLE}.attn2"),
        ("down_blocks.0.resnets.0.conv2", None, ""),  # a skip that the last level of the way up gets
    ],
)
def test_unet(large: str, small: str | None, within: str) -> None:
    network = unet()
    enlarge(network, large)
    if small:
        enlarge(network, small, 1e-4)
    guarded, result, reference, _ = both(network, forward, *unet_inputs())
    assert_near(result, reference)
    assert float32_modules(guarded) == [within]


def test_a_level_is_tried_with_what_it_took_from_its_callers_list() -> None:
    network = unet()
    enlarge(network, "up_blocks.1.resnets.0.conv2")
    enlarge(network, "up_blocks.1.resnets.1.conv_shortcut", 1e-5)
    guarded, result, reference, _ = both(network, forward, *unet_inputs())
    assert_near(result, reference)
    assert float32_modules(guarded) == ["up_blocks.1"]


@pytest.mark.parametrize("level", range(3))
def test_a_level_that_takes_from_its_callers_list(level: int) -> None:
    """The first and the later calls take as many skips as a network in float16 does."""
    network = unet().half()
    inputs = [x.half() if x.ndim > 1 else x for x in unet_inputs()]
    with torch.no_grad():
        plain = network(*inputs)
        guarded = guard_half(network, "unet")
        getattr(guarded, precision.GUARD).promote(guarded, f"up_blocks.{level}")
        result = guarded(*inputs)
    assert relative_error(result, plain) < 1e-2
    assert not torch.equal(result, plain)


@pytest.mark.parametrize(
    ("large", "small", "within"),
    [
        ("single_blocks.0.linear1", "single_blocks.0.linear2", "single_blocks.0"),
        ("double_blocks.0.txt_mlp.0", "double_blocks.0.txt_mlp.2", "double_blocks.0.txt_mlp"),
        ("double_blocks.1.txt_mlp.2", None, ""),  # the sum of all blocks
    ],
)
def test_flux(large: str, small: str | None, within: str) -> None:
    network = flux()
    enlarge(network, large)
    if small:
        enlarge(network, small, 1e-4)
    extra = Extra(pooled=noise(2, 10), guidance=torch.tensor([3.5, 1.0]))

    def call(network: nn.Module, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return network(x, timestep, context, extra=extra)

    inputs = (noise(2, 4, 6, 8), torch.tensor([3.0, 900.0]), noise(2, 5, 12))
    guarded, result, reference, _ = both(network, call, *inputs)
    assert_near(result, reference)
    assert float32_modules(guarded) == [within]


def test_states_of_several_tensors() -> None:
    config = CLIPTextConfig(vocab_size=60, context_length=8, width=16, layers=2, heads=2)
    network = with_unit_gain(CLIPTextEncoder(config))
    enlarge(network, "encoder.layers.1.mlp.fc1")
    enlarge(network, "encoder.layers.1.mlp.fc2", 1e-4)
    ids = torch.tensor([[3, 14, 15, 59]])
    guarded, result, reference, _ = both(network, lambda n, ids: n(ids).last, ids)
    assert_near(result, reference)
    assert float32_modules(guarded) == ["encoder.layers.1.mlp"]
    assert isinstance(guarded, CLIPTextEncoder)
    states = guarded(ids)
    assert isinstance(states, TextStates)
    assert all(t.dtype == torch.float16 and t.isfinite().all() for t in (*states.hidden, states.pooled))


def test_a_clean_network_stays_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_Search", None)
    network = autoencoder().half()
    latents, image = noise(2, 4, 5, 3).half(), noise(1, 3, 10, 6).half()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = network.decode(latents), network.encode(image), network.posterior(image).mean
        guarded = guard_half(network, "clean")
        checked = guarded.decode(latents), guarded.encode(image), guarded.posterior(image).mean
    assert all(torch.equal(a, b) for a, b in zip(plain, checked, strict=True))
    assert float32_modules(guarded) == []
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in guarded.modules())


def test_a_result_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = []
    monkeypatch.setattr(precision, "is_finite", lambda value: checks.append(value) or True)
    guard_half(autoencoder().half(), "clean").encode(noise(1, 3, 10, 6).half())
    assert len(checks) == 1


def test_the_second_call_does_not_search(monkeypatch: pytest.MonkeyPatch) -> None:
    network = autoencoder()
    enlarge(network, "decoder.up_blocks.0.resnets.0.conv1")
    latents = noise(2, 4, 5, 3)
    guarded, result, _, messages = both(network, decode, latents)
    assert len(messages) == 1
    monkeypatch.setattr(precision, "_Search", None)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(guarded.decode(latents.half()), result)


def test_another_overflow_is_found_later() -> None:
    network = autoencoder()
    for block in ("decoder.up_blocks.0.resnets.0", "encoder.down_blocks.1.resnets.0"):
        enlarge(network, f"{block}.conv1")
    guarded, *_ = both(network, decode, noise(2, 4, 5, 3))
    assert len(float32_modules(guarded)) == 1
    with torch.no_grad(), pytest.warns(UserWarning) as caught:
        assert guarded.encode(noise(1, 3, 10, 6).half()).isfinite().all()
    assert len(caught) == 1
    assert float32_modules(guarded) == ["decoder.up_blocks.0.resnets.0", "encoder.down_blocks.1.resnets.0"]


def test_weights_that_are_not_numbers() -> None:
    network = autoencoder()
    with torch.no_grad():
        network.decoder.up_blocks[0].resnets[0].conv2.weight[0, 0, 0, 0] = torch.nan
    enlarge(network, "decoder.mid_block.resnets.0.conv1")
    guarded = guard_half(network.half(), "sick autoencoder")
    named = r"sick autoencoder: decoder\.up_blocks\.0\.resnets\.0\.conv2 gives values that are not finite"
    with torch.no_grad(), pytest.raises(DarkroomError, match=named):
        guarded.decode(noise(2, 4, 5, 3).half())
    assert float32_modules(guarded) == []
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in guarded.modules())


def test_inputs_that_are_not_numbers() -> None:
    guarded = guard_half(autoencoder().half(), "healthy")
    with torch.no_grad(), pytest.raises(DarkroomError, match="healthy: its input has values that are not"):
        guarded.decode(torch.full((1, 4, 5, 3), torch.nan, dtype=torch.float16))


def test_a_result_beyond_float16() -> None:
    network = autoencoder()
    enlarge(network, "decoder.conv_out")
    guarded = guard_half(network.half(), "loud")
    with (
        torch.no_grad(),
        pytest.raises(DarkroomError, match="does not fit into float16; load it in bfloat16"),
    ):
        guarded.decode(noise(1, 4, 5, 3).half())


def test_an_infinity_that_does_no_harm_is_let_be() -> None:
    class Saturated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.linear(x))

    network = nn.Sequential(Saturated(), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    with torch.no_grad():
        network[0].linear.weight.mul_(1e5)
        network[1][0].weight.mul_(1e5)
    guarded, result, reference, _ = both(network, forward, 10 * noise(3, 4))
    assert_near(result, reference)
    assert float32_modules(guarded) == ["1"]


def test_a_module_that_is_told_by_a_dataclass() -> None:
    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((4, 4), 4e4))

        def forward(self, x: Tensor, cond: Conditioning) -> Conditioning:
            assert cond.context is not None and cond.mask is None
            return Conditioning((x @ self.weight) @ cond.time, x @ cond.context, cond.mask)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.told = Told()

        def forward(self, x: Tensor) -> Tensor:
            told = self.told(x, cond=Conditioning(x.T * 1e-4, x.T, None))
            assert told.context is not None
            return told.time + told.context

    guarded, result, reference, _ = both(Network(), forward, noise(3, 4))
    assert_near(result, reference)
    assert float32_modules(guarded) == ["told"]


def test_an_overflow_to_negative_infinity_alone() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.first(x) + self.second(x))

    network = nn.Sequential(Sum(), nn.Linear(4, 4))
    with torch.no_grad():
        for layer in (network[0].first, network[0].second):
            layer.bias.copy_(torch.tensor([-60000.0, 0.0, 0.0, 0.0]))
    guarded, result, reference, _ = both(network, forward, noise(3, 4))
    assert_near(result, reference)
    assert float32_modules(guarded) == ["0"]


def test_a_failure_inside_leaves_the_weights_as_they_were() -> None:
    network = autoencoder()
    enlarge(network, "decoder.up_blocks.0.resnets.0.conv1")
    latents = noise(2, 4, 5, 3)
    guarded, result, _, _ = both(network, decode, latents)
    block = guarded.decoder.up_blocks[0].resnets[0]

    def fail(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise RuntimeError("out of memory")

    handle = block.conv2.register_forward_pre_hook(fail)
    with torch.no_grad(), pytest.raises(RuntimeError, match="out of memory"):
        guarded.decode(latents.half())
    handle.remove()
    assert {p.dtype for p in guarded.parameters()} == {torch.float16}
    with torch.no_grad():
        assert torch.equal(guarded.decode(latents.half()), result)


def test_the_guard_can_be_taken_off() -> None:
    network = autoencoder()
    enlarge(network, "decoder.up_blocks.0.resnets.0.conv1")
    latents = noise(2, 4, 5, 3)
    guarded, *_ = both(network, decode, latents)
    assert type(guarded) is not AutoencoderKL
    plain = unguard_half(guarded)
    assert plain is guarded and type(plain) is AutoencoderKL
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())
    with torch.no_grad():
        assert not plain.decode(latents.half()).isfinite().all()
    assert unguard_half(plain) is plain


def test_only_float16_networks_are_guarded_and_once() -> None:
    network = autoencoder()
    assert type(guard_half(network, "float32")) is AutoencoderKL
    guarded = guard_half(network.half(), "float16")
    kind = type(guarded)
    assert type(guard_half(guarded, "again")) is kind


def test_a_copy_is_guarded_by_itself_and_freed_with_its_last_reference() -> None:
    network = autoencoder()
    enlarge(network, "decoder.up_blocks.0.resnets.0.conv1")
    latents = noise(2, 4, 5, 3)
    guarded, result, _, _ = both(network, decode, latents)
    twin = copy.deepcopy(guarded)
    unguard_half(guarded)
    with torch.no_grad():
        assert torch.equal(twin.decode(latents.half()), result)
    gc.disable()
    try:
        alive = weakref.ref(twin)
        del twin
        assert alive() is None
    finally:
        gc.enable()


def test_gradients_reach_the_float16_weights() -> None:
    network = autoencoder()
    path = "decoder.up_blocks.0.resnets.0.conv1"
    enlarge(network, path)
    guarded, *_ = both(network, decode, noise(2, 4, 5, 3))
    guarded.decode(noise(2, 4, 5, 3).half()).float().mean().backward()
    gradient = guarded.get_submodule(path).weight.grad
    assert gradient is not None and gradient.dtype == torch.float16 and gradient.isfinite().all()
