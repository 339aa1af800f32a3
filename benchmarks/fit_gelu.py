"""The polynomial of csrc/cpu/activation.h: ``Φ(-a) = e^(-a²/2) t P(t)``, ``t = 1 / (1 + 0.3 a)``.

Minimax in relative error over 0 <= a <= 14, by reweighted least squares. Needs mpmath, which torch
brings along.
"""

import mpmath
import numpy as np

SCALE, LONGEST, DEGREE, POINTS = 0.3, 14.0, 8, 300


def main() -> None:
    mpmath.mp.dps = 40
    shortest = 1 / (1 + SCALE * LONGEST)
    nodes = np.cos(np.pi * (np.arange(POINTS) + 0.5) / POINTS)
    t = (shortest + 1) / 2 + (1 - shortest) / 2 * nodes
    tail = [
        float(mpmath.erfc(a / mpmath.sqrt(2)) * mpmath.exp(a * a / 2) / 2)
        for a in map(mpmath.mpf, (1 / t - 1) / SCALE)
    ]
    powers = np.vander(t, DEGREE + 1, increasing=True)[:, 1:] / np.array(tail)[:, None]
    weights = np.ones(POINTS)
    for _ in range(200):
        root = np.sqrt(weights)
        coefficients = np.linalg.lstsq(powers * root[:, None], root, rcond=None)[0]
        error = np.abs(powers @ coefficients - 1)
        weights *= error / (weights @ error)
    print(f"relative error {error.max():.2g}; coefficients of t, t², …:")
    print("\n".join(f"  {c!r}" for c in coefficients.tolist()))


if __name__ == "__main__":
    main()
