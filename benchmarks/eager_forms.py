"""The eager backend's choice against every form PyTorch offers for (A ⊗ B) x, and against dense.

    python benchmarks/eager_forms.py --threads 1 --json eager_forms.json

A row is a shape and a number of tokens. ``kron_matmul`` is what a user calls, checks included; the
forms are the bare products that others use. Regret is the time of kron_matmul over that of the best
form of the row (its own four forms included), and that of every fixed form over the same best.
"""

import argparse
import json
import math
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kron_kernels import KronShape, kron_matmul
from kron_kernels.backends import eager
from kron_kernels.reference import materialize
from kron_kernels.testing import assert_close
from kron_kernels.timing import interleaved

SHAPES = {
    "8x attention": KronShape(384, 384, 2, 2),
    "8x W1": KronShape(8, 2, 384, 384),
    "8x W2": KronShape(2, 8, 384, 384),
    "21x attention": KronShape(384, 48, 2, 16),
    "21x W1": KronShape(16, 2, 192, 384),
    "21x W2": KronShape(2, 16, 384, 192),
    "8x attention, width 384": KronShape(192, 192, 2, 2),
    "21x attention, width 384": KronShape(192, 24, 2, 16),
    "small factor left": KronShape(2, 2, 384, 384),
    "balanced": KronShape(32, 32, 24, 24),
    "balanced, narrow": KronShape(96, 96, 8, 8),
    "balanced, up": KronShape(64, 32, 48, 24),
    "balanced, down": KronShape(32, 64, 24, 48),
    "skinny": KronShape(48, 384, 64, 2),
    "skinny, mirrored": KronShape(384, 48, 2, 64),
    "5x attention, 4 terms": KronShape(384, 48, 2, 16, 4),
    "5x W1, 4 terms": KronShape(384, 384, 8, 2, 4),
}
TOKENS = (1, 16, 128, 1024, 8192)


def others(x: Tensor, a: Tensor, b: Tensor) -> dict[str, Callable[[], Tensor]]:
    """What users and peers write for one term: x (T, n), a (m1, n1), b (m2, n2)."""
    (m1, n1), (m2, n2) = a.shape, b.shape
    t = x.shape[0]
    x3 = x.view(t, n1, n2)

    def transposed_b_first() -> Tensor:
        z = (x.view(t * n1, n2) @ b.T).view(t, n1, m2).transpose(1, 2).reshape(t * m2, n1)
        return (z @ a.T).view(t, m2, m1).transpose(1, 2).reshape(t, -1)

    def transposed_a_first() -> Tensor:
        z = x3.transpose(1, 2).reshape(t * n2, n1) @ a.T
        return (z.view(t, n2, m1).transpose(1, 2).reshape(t * m1, n2) @ b.T).view(t, -1)

    def slices() -> Tensor:  # of a tiny left factor
        z = x.view(t * n1, n2) @ b.T
        rows = z.view(t, n1, m2).unbind(1)
        y = x.new_empty(t, m1, m2)
        for i, out in enumerate(y.unbind(1)):
            torch.mul(rows[0], a[i, 0], out=out)
            for j in range(1, n1):
                out.addcmul_(rows[j], a[i, j])
        return y.view(t, -1)

    forms = {
        "a @ (x @ bᵀ)": lambda: (a @ (x3 @ b.T)).view(t, -1),
        "(a @ x) @ bᵀ": lambda: ((a @ x3) @ b.T).reshape(t, -1),
        "einsum": lambda: torch.einsum("tjq,ij,pq->tip", x3, a, b).reshape(t, -1),
        "transposed, b first": transposed_b_first,
        "transposed, a first": transposed_a_first,
        "kron, then linear": lambda: x @ torch.kron(a, b).T,
    }
    if m1 * n1 <= 64:
        forms["slices of a"] = slices
    return forms


@torch.inference_mode()
def bench(s: KronShape, tokens: int, seconds: float) -> dict[str, float]:
    """Median milliseconds by form; every form is checked against the oracle first."""
    x = torch.randn(tokens, s.in_features)
    a = torch.randn(s.rank, s.m1, s.n1) / s.n1**0.5
    b = torch.randn(s.rank, s.m2, s.n2) / (s.rank * s.n2) ** 0.5
    weight = materialize(a, b)  # formed outside the timing: a dense layer would own it
    calls = {"kron_matmul": lambda: kron_matmul(x, a, b)}
    for form in eager.FORMS:
        calls["-".join(form)] = lambda form=form: eager.kron_matmul(x, (a, b), form=form)
    if s.rank == 1:
        calls |= others(x, a[0], b[0])
    calls["dense"] = lambda: x @ weight.T
    sample = slice(0, 64)
    expected = x[sample].double() @ materialize(a.double(), b.double()).T
    for name, call in calls.items():
        assert_close(name, call()[sample], expected, s.rank * (s.n1 + s.n2) + s.in_features)
    return {name: t.median for name, t in interleaved(calls, seconds).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--seconds", type=float, default=1.5, help="per row")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    rows = []
    print(
        f"{'shape':26}{'tokens':>7}{'dense ms':>10}{'ours ms':>10}{'x dense':>9}{'GF/s':>6}"
        "  best form"
    )
    for name, s in SHAPES.items():
        for tokens in args.tokens:
            ms = bench(s, tokens, args.seconds)
            forms = {k: v for k, v in ms.items() if k not in ("kron_matmul", "dense")}
            best = min(forms, key=forms.get)
            rows.append({"shape": name, "sides": s, "tokens": tokens, "ms": ms, "best": best})
            ours = ms["kron_matmul"]
            print(
                f"{name:26}{tokens:7}{ms['dense']:10.3f}{ours:10.3f}{ms['dense'] / ours:9.2f}"
                f"{tokens * s.flops / ours / 1e6:6.0f}  {best}, {ours / forms[best]:.2f}x its time",
                flush=True,
            )
    print("\nregret, geometric mean (worst) over the rows that have the form")
    for name in sorted({k for row in rows for k in row["ms"]}):
        ratios = [
            r["ms"][name]
            / min(r["ms"][r["best"]], r["ms"]["dense"] if name == "dense" else math.inf)
            for r in rows
            if name in r["ms"]
        ]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        print(f"  {name:24}{mean:7.2f} ({max(ratios):.1f})  of {len(ratios)} rows")
    if args.json:
        setting = {
            "threads": args.threads,
            "torch": torch.__version__,
            "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        }
        args.json.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
