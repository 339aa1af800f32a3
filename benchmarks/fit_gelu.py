"""The coefficients of GELU in csrc/cpu/activation.h: minimax by reweighted least squares.

- ``2^f`` for ``|f| <= 1/2``: a polynomial with ``P(0) = 1``, by relative error.
- The normal distribution ``Φ(-a) = e^(-a²/2) P(a) / Q(a)`` for ``0 <= a <= 8``: a quotient with
  ``Q(0) = 1``, by relative error where Φ(-a) > 0.1, and by a fifth of it where Φ(-a) is small.

Needs mpmath, a dependency of torch.
"""

import mpmath
import numpy as np

LONGEST, POINTS, ROUNDS = 8.0, 600, 1500
NODES = np.cos(np.pi * (np.arange(POINTS) + 0.5) / POINTS)


def run() -> None:
    mpmath.mp.dps = 40
    fit_power()
    fit_tail()


def fit_power(degree: int = 5) -> None:
    f = NODES / 2
    powers = np.vander(f, degree + 1, increasing=True)[:, 1:] / np.exp2(f)[:, None]
    coefficients, error = minimax(lambda _: (powers, 1 - np.exp2(-f)), np.zeros(degree))
    show("2^f", error, {"f, f², …": coefficients})


def fit_tail(above: int = 3, below: int = 4) -> None:
    unit = (NODES + 1) / 2
    a = unit * LONGEST
    tail = [mpmath.erfc(t / mpmath.sqrt(2)) / 2 for t in map(mpmath.mpf, a)]
    smooth = np.array(
        [float(p * mpmath.exp(mpmath.mpf(t) ** 2 / 2)) for p, t in zip(tail, a, strict=True)]
    )
    weight = np.maximum(2 * np.array(tail, dtype=float), 0.2)
    p = np.vander(unit, above + 1, increasing=True) / smooth[:, None]
    q = np.vander(unit, below + 1, increasing=True)[:, 1:]

    # P / smooth - Q = 0 is linear in the coefficients; the last round's Q scales it to P/Q - 1.
    def linear(last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scale = weight / (1 + q @ last[above + 1 :])
        return np.hstack([p, -q]) * scale[:, None], scale

    coefficients, error = minimax(linear, np.zeros(above + 1 + below))
    coefficients = coefficients / LONGEST ** np.r_[0 : above + 1, 1 : below + 1]
    parts = {"P: 1, a, …": coefficients[: above + 1], "Q: a, a², …": coefficients[above + 1 :]}
    show("Φ(-a)", error, parts)


def minimax(linear, start: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficients of the smallest maximal residual met, and that residual."""
    weights, last, best = np.ones(POINTS), start, (start, np.inf)
    for _ in range(ROUNDS):
        rows, right = linear(last)
        root = np.sqrt(weights)
        last = np.linalg.lstsq(rows * root[:, None], right * root, rcond=None)[0]
        rows, right = linear(last)
        error = np.abs(rows @ last - right)
        if error.max() < best[1]:
            best = last, error.max()
        weights = np.maximum(weights * error / (weights @ error), 1e-300)
    return best


def show(title: str, error: float, parts: dict[str, np.ndarray]) -> None:
    print(f"{title}: largest weighted error {error:.2g}")
    for name, coefficients in parts.items():
        print(f"  {name}")
        print("\n".join(f"    {c:.9g}" for c in coefficients))
