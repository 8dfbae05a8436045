"""How near our networks must come to their references."""

from torch import Tensor


def assert_parity(value: Tensor, reference: Tensor) -> None:
    """At most 1e-5 of the reference's norm apart, and the reference is not about nothing."""
    assert reference.norm() > 0.1
    assert ((value - reference).double().norm() / reference.double().norm()).item() <= 1e-5
