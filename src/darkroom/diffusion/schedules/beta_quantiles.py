"""Quantiles of the beta distribution, in float64 on the host."""

import math

import numpy as np
from numpy.typing import NDArray

TERMS = 60  # of the continued fraction, which converges in about the root of the larger shape
HALVINGS = 80  # also small quantiles are then exact to the last digits


def beta_quantiles(shares: NDArray[np.float64], alpha: float, beta: float) -> NDArray[np.float64]:
    """Where the distribution with these shapes has a share (N,) of its mass below, by bisection."""
    low, high = np.zeros_like(shares), np.ones_like(shares)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        below = _mass_below(middle, alpha, beta) < shares
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    quantiles = (low + high) / 2
    return np.where(shares <= 0, 0.0, np.where(shares >= 1, 1.0, quantiles))


def _mass_below(x: NDArray[np.float64], alpha: float, beta: float) -> NDArray[np.float64]:
    """The regularised incomplete beta function, by its continued fraction (DLMF 8.17.22) on the side of the
    mean where that converges fast.
    """
    turned = x > (alpha + 1) / (alpha + beta + 2)
    a, b = np.where(turned, beta, alpha), np.where(turned, alpha, beta)
    y = np.where(turned, 1 - x, x)
    fraction = np.ones_like(x)
    for m in range(TERMS // 2, 0, -1):
        fraction = 1 + m * (b - m) * y / ((a + 2 * m - 1) * (a + 2 * m)) / fraction
        k = m - 1
        fraction = 1 - (a + k) * (a + b + k) * y / ((a + 2 * k) * (a + 2 * k + 1)) / fraction
    log_beta = math.lgamma(alpha) + math.lgamma(beta) - math.lgamma(alpha + beta)
    mass = y**a * (1 - y) ** b / (a * math.exp(log_beta) * fraction)
    return np.where(turned, 1 - mass, mass)
