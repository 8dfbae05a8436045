"""The denoiser: what each prediction means on each path, in which dtype, and what is refused."""

import pytest
import torch
from torch import Tensor, nn

from darkroom.diffusion.denoiser import MIN_SNR_GAMMA, PREDICTIONS, Condition, Denoiser
from darkroom.diffusion.path import CosinePath, DiscretePath, EDMPath, FlowPath
from darkroom.errors import InputError
from darkroom.nn.extra import Extra

PATHS = [
    DiscretePath(),
    CosinePath(),
    EDMPath(),
    FlowPath(sigma_max=0.999),
    DiscretePath(zero_terminal_snr=True),
]
REFUSED = {("v", "flow"), ("edm", "flow")}
PAIRS = [
    (p, path)
    for path in PATHS
    for p in PREDICTIONS
    if (p, path.kind) not in REFUSED
    and not (p == "eps" and path.kind == "discrete" and path.zero_terminal_snr)
]
SHAPE = (3, 4, 5, 5)


class Told(nn.Module):
    """A network that gives a fixed answer and remembers what it was asked."""

    def __init__(self, answer: Tensor | None = None) -> None:
        super().__init__()
        self.answer = answer

    def forward(
        self, x: Tensor, timestep: Tensor, context: Tensor | None, *, extra: Extra | None = None
    ) -> Tensor:
        self.asked = (x, timestep, context, extra)
        return x if self.answer is None else self.answer


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, *SHAPE, generator=generator)
    return x0, noise


def levels(path, dtype=torch.float32) -> Tensor:
    """A low, a middle and a high noise level of a path."""
    low, high = path.sigma_min, path.sigma_max
    return torch.tensor([low, (low * high) ** 0.5, high * 0.9], dtype=dtype)


@pytest.mark.parametrize(("prediction", "path"), PAIRS, ids=lambda v: getattr(v, "kind", v))
def test_the_target_denoises_exactly(prediction, path, pair):
    """A network that answers with its target gives x0 back; float64, so that no level hides an error."""
    x0, noise = (t.double() for t in pair)
    sigma = levels(path, torch.float64)
    network = Told()
    denoiser = Denoiser(network, path, prediction)
    network.answer = denoiser.target(x0, noise, sigma)
    x = denoiser.noisy(x0, noise, sigma)
    assert torch.allclose(denoiser(x, sigma, Condition(None)), x0, atol=1e-7)
    net_x, timestep = denoiser.network_input(x0, noise, sigma)
    assert torch.allclose(network.asked[0], net_x)
    assert torch.equal(network.asked[1], timestep)
    assert timestep.shape == (3,)


@pytest.mark.parametrize(("prediction", "path"), PAIRS, ids=lambda v: getattr(v, "kind", v))
def test_min_snr_weighs_the_error_of_x0(prediction, path, pair):
    """min(SNR, 5) · |error of x0|² is the weight · |error of the output|², in units of sigma_data."""
    x0, noise = (t.double() for t in pair)
    sigma = levels(path, torch.float64)
    denoiser = Denoiser(Told(), path, prediction)
    x, target = denoiser.noisy(x0, noise, sigma), denoiser.target(x0, noise, sigma)
    error = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x0_error = (denoiser.from_output(x, target + error, sigma) - x0).square().mean((1, 2, 3))
    data = path.sigma_data
    snr = (path.alpha(sigma) * data / sigma) ** 2
    expected = snr.clamp(max=MIN_SNR_GAMMA) * x0_error / data**2
    ours = denoiser.loss_weight(sigma, "min_snr") * error.square().mean((1, 2, 3))
    assert torch.allclose(ours, expected, rtol=1e-6)
    assert torch.equal(denoiser.loss_weight(sigma), torch.ones_like(sigma))


def test_min_snr_in_the_papers_forms():
    path = DiscretePath()
    sigma = levels(path)
    snr = sigma**-2
    capped = snr.clamp(max=5.0)
    forms = {"eps": capped / snr, "v": capped / (snr + 1), "x0": capped}
    for prediction, expected in forms.items():
        assert torch.allclose(Denoiser(Told(), path, prediction).loss_weight(sigma, "min_snr"), expected)
    flow = Denoiser(Told(), FlowPath(), "flow").loss_weight(torch.tensor([0.0, 0.5, 1.0]), "min_snr")
    assert flow.tolist() == [0.0, 0.25, 0.0]


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.kind)
def test_the_network_sees_unit_variance(path, pair):
    x0, noise = pair
    x0 = x0 * path.sigma_data
    denoiser = Denoiser(Told(), path, "x0")
    net_x, _ = denoiser.network_input(x0, noise, levels(path))
    low = (
        0.5 if path.kind == "flow" else 0.85
    )  # halfway along the straight path the standard deviation is 0.71
    assert all(low < float(std) < 1.15 for std in net_x.std((1, 2, 3)))


def test_float32_is_near_float64(pair):
    x0, noise = pair
    for prediction, path in PAIRS:
        sigma = levels(path, torch.float64)
        denoiser = Denoiser(Told(noise.double()), path, prediction)
        x = denoiser.noisy(x0.double(), noise.double(), sigma)
        exact = denoiser(x, sigma, Condition(None))
        single = denoiser(x.float(), sigma.float(), Condition(None))
        assert single.dtype == torch.float32
        scale = exact.norm() + x.norm() * (prediction == "eps")  # eps subtracts two numbers of x's size
        assert float((single - exact).norm() / scale) < 1e-5


def test_the_network_computes_in_its_own_dtype(pair):
    x, context = pair[0], torch.randn(3, 7, 8)
    network = Told().to(torch.bfloat16)
    network.weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    denoised = Denoiser(network, FlowPath(), "flow")(x, torch.full((3,), 0.5), Condition(context))
    net_x, timestep, told_context, _ = network.asked
    assert net_x.dtype == told_context.dtype == torch.bfloat16
    assert timestep.dtype == denoised.dtype == torch.float32


def test_every_part_of_the_condition_reaches_the_network(pair):
    network, extra = Told(), Extra(class_labels=torch.zeros(3, dtype=torch.int64))
    context = torch.randn(3, 7, 8)
    Denoiser(network, FlowPath(), "flow")(pair[0], torch.full((3,), 0.5), Condition(context, extra))
    assert network.asked[2] is context
    assert network.asked[3] is extra


@pytest.mark.parametrize(
    ("prediction", "path", "message"),
    [
        ("v", FlowPath(), "not defined on a flow path"),
        ("edm", FlowPath(), "not defined on a flow path"),
        ("eps", FlowPath(), "'sigma_max' below 1"),
        ("eps", DiscretePath(zero_terminal_snr=True), "zero_terminal_snr"),
        ("epsilon", DiscretePath(), "did you mean 'eps'"),
    ],
)
def test_predictions_that_say_nothing_are_refused(prediction, path, message):
    with pytest.raises(InputError, match=message):
        Denoiser(Told(), path, prediction)


def test_unknown_loss_weight():
    with pytest.raises(InputError, match="did you mean 'min_snr'"):
        Denoiser(Told(), DiscretePath(), "v").loss_weight(torch.ones(1), "min-snr")


def test_conditions_join_along_the_batch():
    a = Condition(torch.zeros(2, 7, 8), Extra(pooled=torch.zeros(2, 5)))
    b = Condition(torch.ones(2, 7, 8), Extra(pooled=torch.ones(2, 5)))
    joined = Condition.cat([a, b])
    assert joined.context.shape == (4, 7, 8)
    assert joined.extra.pooled[:, 0].tolist() == [0, 0, 1, 1]
    assert joined.extra.class_labels is None
    assert Condition.cat([a]) is a
    assert Condition.cat([Condition(None), Condition(None)]) == Condition(None)
    with pytest.raises(InputError, match="some have 'pooled'"):
        Condition.cat([a, Condition(torch.ones(2, 7, 8))])


@pytest.mark.parametrize("path", [DiscretePath(), FlowPath(), EDMPath(), CosinePath()], ids=lambda p: p.kind)
def test_compiles_without_graph_breaks(path, pair):
    torch._dynamo.reset()
    network = nn.Module()
    network.forward = lambda x, timestep, context, *, extra=None: x * timestep[:, None, None, None]
    denoiser = Denoiser(network, path, "x0")
    sigma = levels(path)
    eager = denoiser(pair[0], sigma, Condition(None))

    def call(x: Tensor, sigma: Tensor) -> Tensor:
        return denoiser(x, sigma, Condition(None))

    compiled = torch.compile(call, backend="eager", fullgraph=True)(pair[0], sigma)
    assert torch.allclose(compiled, eager, rtol=1e-5)
