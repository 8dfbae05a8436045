"""The arc between two noises: exact ends, unit variance, the formula in float64."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from darkroom.blend import slerp
from darkroom.errors import InputError
from darkroom.rng import image_noise
from tests.closeness import assert_parity


def by_formula(a: Tensor, b: Tensor, t: float) -> Tensor:
    x, y = a.double().numpy().ravel(), b.double().numpy().ravel()
    angle = math.acos(np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y))
    mixed = (math.sin((1 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle)
    return torch.from_numpy(mixed).reshape(a.shape).float()


A, B = image_noise([1, 2], (4, 32, 32), "start"), image_noise([3, 4], (4, 32, 32), "start")


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_noise_stays_noise(t):
    mixed = slerp(A, B, t)
    for k in range(2):
        assert_parity(mixed[k], by_formula(A[k], B[k], t))
        assert mixed[k].std().item() == pytest.approx(1, abs=0.04)
    assert torch.lerp(A, B, 0.5).std() < 0.75  # which a mean does not


def test_the_ends_are_exact():
    for dtype in (torch.float32, torch.bfloat16):
        a, b = A.to(dtype), B.to(dtype)
        assert torch.equal(slerp(a, b, 0.0), a)
        assert torch.equal(slerp(a, b, 1.0), b)
        assert slerp(a, b, 0.3).dtype == dtype


def test_a_picture_does_not_depend_on_the_others():
    assert torch.allclose(slerp(A, B, 0.3)[1:], slerp(A[1:], B[1:], 0.3), atol=1e-6)
    each = slerp(A, B, torch.tensor([0.2, 0.7]))
    assert torch.allclose(each[:1], slerp(A[:1], B[:1], 0.2), atol=1e-6)
    assert torch.allclose(each[1:], slerp(A[1:], B[1:], 0.7), atol=1e-6)


def test_along_a_dimension():
    mixed = slerp(A, B, 0.4, dim=-1)
    assert_parity(mixed[1, 2, 3], by_formula(A[1, 2, 3], B[1, 2, 3], 0.4))
    quarter = slerp(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), 0.5)
    assert quarter.tolist() == [pytest.approx([math.sqrt(0.5)] * 2)]


@pytest.mark.parametrize(
    ("b", "half"), [([2.0, 0.0], [1.5, 0.0]), ([-1.0, 0.0], [0.0, 0.0]), ([0.0, 0.0], [0.5, 0.0])]
)
def test_without_an_angle_it_is_the_line(b, half):
    assert slerp(torch.tensor([[1.0, 0.0]]), torch.tensor([b]), 0.5).tolist() == [half]


def test_shapes_must_be_one():
    with pytest.raises(InputError, match=r"shapes \(2, 4, 32, 32\) and \(1, 4, 32, 32\) differ"):
        slerp(A, B[:1], 0.5)
