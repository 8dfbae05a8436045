"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

# One thread keeps results byte-stable and lets several workers share a small machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference cases and pictures beside the checkout; tests that need it skip without it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("the shared reference folder is not beside this checkout")
    return folder


def relative_error(value, reference) -> float:
    """The error of a tensor against its reference, relative to the reference's norm, in float64."""
    value, reference = value.double(), reference.double()
    return float((value - reference).norm() / reference.norm())
