"""LyCORIS's kernels, composed and laid out as its own tuner would by our bound."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from lycoris.functional import lokr as lycoris_functional
from lycoris.kernels import tuner as lycoris_tuner
from lycoris.kernels.plans import lokr as lycoris_plans
from lycoris.kernels.plans.device import Device as PlanDevice
from lycoris.kernels.triton.lokr import apply, bypass, gemm, grad
from lycoris.kernels.tuner import model
from simulator import SimulationError
from torch import Tensor
from triton.runtime.errors import OutOfResources

from benchmarks.gpu.devices import DEVICES
from benchmarks.gpu.side_by_side.costs import microseconds
from benchmarks.gpu.side_by_side.mill import GPUS
from benchmarks.gpu.side_by_side.triton import checked, lycoris_device, run, weigh
from benchmarks.gpu.side_by_side.works import TOKENS, Call, Case


def published(arch: int) -> model.Throughput:
    """What its planner would measure: the rates published, and its own latency of DRAM."""
    device = DEVICES[GPUS[arch]]
    dram, hertz = device.dram_gb_s * 1e9, device.clock_ghz * 1e9
    in_flight = [1024.0 * 2**i for i in range(7)]
    curve = [(x, min(dram, device.sms * x / model._DRAM_LATENCY_S)) for x in in_flight]
    return model.Throughput(
        dram_bps=dram,
        l2_bps=device.l2_bytes_per_clock * hertz,
        inflight_curve=tuple(curve),
        mma_flops=device.tensor_tflops * 1e12,
        fma_flops=2 * device.fp32_lanes * device.sms * hertz,
    )


class Lycoris:
    """Its call of one case, composed and laid out as its own tuner would by our bound."""

    def __init__(self, case: Case, arch: int):
        self.case, self.arch, self.dev = case, arch, lycoris_device(arch)
        self.chosen: dict[str, Any] = {}  # configurations by the tuner's name of a kernel
        self.refused: dict[str, str] = {}
        self.small = bypass.kron_factors_supported(*case.sides)
        self.tiled = gemm.in_scope(*case.sides)

    @contextmanager
    def choices(self) -> Iterator[None]:
        """Its launches take what is chosen here, and a failure is not replaced by PyTorch."""

        def select(dev: Any, key: tuple, plan: Any, measure: Any) -> Any:
            return self.chosen[key[0]]

        def tuned(name: str, *_: Any) -> Any:
            return self.chosen[name]

        def guarded(dev: Any, key: Any, config: Any, launch: Any, too_big: Any) -> Any:
            return launch(config)

        with ExitStack() as stack:
            for module in (apply, gemm, grad):
                stack.enter_context(patch.object(module, "select", select))
                stack.enter_context(patch.object(module, "guarded", guarded))
            stack.enter_context(patch.object(bypass.tune, "tuned", tuned))
            stack.enter_context(patch.object(model, "throughput", lambda _: published(self.arch)))
            yield

    def weigh(self, call: Call, name: str, config: Any) -> float:
        """The bound with one configuration, infinite where it does not run."""
        self.chosen[name] = config
        try:
            return microseconds(weigh(call, self.case, self.arch)[0])
        except (OutOfResources, ValueError, RuntimeError, SimulationError) as error:
            self.refused[f"{name} {config}"] = f"{type(error).__name__}: {error}"[:200]
            return math.inf

    def tune(self, name: str, ranked: list[Any], call: Call) -> float:
        """Choose: its shortlists of tiles and launch settings, judged by our bound."""
        if ranked and not isinstance(ranked[0], dict):  # the older planner ranks plans
            seconds = {plan: self.weigh(call, name, plan) for plan in ranked}
        else:
            seconds = {}
            tiles = [c for c in ranked if "impl" not in c]
            if not tiles:
                self.chosen[name] = lycoris_tuner.TORCH
                return math.inf

            def measure(configs: list[dict]) -> list[float]:
                bounds = [self.weigh(call, name, c) for c in configs]
                seconds.update({tuple(c.items()): s for c, s in zip(configs, bounds, strict=True)})
                return bounds

            lycoris_tuner.Tuner()._tune_key(self.dev, (name, (str(self.case),), ()), tiles, measure)
        best = min(seconds, key=seconds.__getitem__)
        self.chosen[name] = dict(best) if isinstance(best, tuple) else best
        return seconds[best]

    def older_plans(self) -> list[Any]:
        """The shortlist of the register-only kernels."""
        device, info = DEVICES[GPUS[self.arch]], self.dev
        dev = PlanDevice(
            name=info.name,
            sms=info.units,
            regs_per_sm=info.regs_sm,
            smem_per_cta=info.smem,
            smem_per_sm=info.smem_sm,
            max_threads_per_sm=info.max_threads_sm,
            l2_bytes=info.l2_bytes,
            cc_major=self.arch // 10,
            cc_minor=self.arch % 10,
            mma_peak=device.tensor_tflops,
            dram_bw=device.dram_gb_s,
        )
        return lycoris_plans.topk_apply(TOKENS, *self.case.sides, 2, dev)

    def forward(self, dy: Tensor, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor]:
        return (apply.lokr_bypass_fwd(x, a, b),)

    def backward(self, dy: Tensor, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.lokr_bypass_bwd(dy, x, a, b))

    def tune_forward(self) -> dict[str, dict[str, Any]]:
        """The choices of every composition that has a kernel."""
        found = {}
        name = "lokr.bypass_fwd"
        self.tune(name, apply._plan(self.dev, TOKENS, *self.case.sides, 2, False, []), self.forward)
        found["tiled"] = {name: self.chosen[name]}
        if self.tiled:
            self.chosen[name] = gemm.GEMM
            ranked = gemm._plan_fwd(self.dev, TOKENS, 1, *self.case.sides, 2, False)
            self.tune("lokr.gemm_fwd", ranked, self.forward)
            found["gemm"] = dict(self.chosen)
        if self.small:
            self.chosen[name] = apply.ATOMIC
            self.tune("triton.lokr.bypass_fwd", self.older_plans(), self.forward)
            found["atomic"] = dict(self.chosen)
        return found

    def tune_backward(self) -> dict[str, dict[str, Any]]:
        """The same of the backward, compositions that DRAM alone rules out not tuned."""
        a, b, c, d = self.case.sides
        found, best = {}, math.inf
        name = "lokr.bypass_bwd"
        if self.tiled:
            ranked = gemm._plan_dx(self.dev, TOKENS, 1, a, b, c, d, 2)
            best = self.tune(
                "lokr.gemm_dx",
                ranked,
                lambda dy, x, w1, w2: gemm.lokr_gemm_dx(dy[None], x, w1[None], w2[None], (1.0,)),
            )
            best += self.tune(
                "lokr.gemm_gw2",
                gemm._plan_gw2(self.dev, TOKENS, 1, a, b, c, d, 2),
                lambda dy, x, w1, w2: gemm.lokr_gemm_gw2(dy[None], x, w1[None], c, d, (1.0,)),
            )
            self.chosen[name] = gemm.GEMM
            found["gemm"] = dict(self.chosen)
        if self.small:
            self.chosen[name] = grad.ATOMIC
            bound = self.tune("triton.lokr.bypass_bwd", self.older_plans(), self.backward)
            best = min(best, bound)
            found["atomic"] = dict(self.chosen)

        planned = {
            "lokr.bypass_dxn": grad._plan_dxn(self.dev, TOKENS, a, b, c, d, 2),
            "lokr.bypass_dx": apply._plan(self.dev, TOKENS, b, a, d, c, 2, False, []),
            "lokr.grad_w1": grad._plan_gw1(self.dev, TOKENS, a, b, c, 2),
        }
        calls: dict[str, Call] = {
            "lokr.bypass_dxn": lambda dy, x, w1, w2: grad._dxn(dy, w1, w2, 1.0, x.dtype),
            "lokr.bypass_dx": lambda dy, x, w1, w2: apply._apply(
                "lokr.bypass_dx", dy, w1.t(), w2.t(), 1.0, None, x.dtype, []
            ),
            "lokr.grad_w1": lambda dy, x, w1, w2: grad._grad_w1(dy, x, w1, w2, 1.0),
        }
        for kind, first in (("dxn", "lokr.bypass_dxn"), ("apply", "lokr.bypass_dx")):
            for kernel in (first, "lokr.grad_w1"):
                self.chosen[kernel] = next(iter(planned[kernel]), lycoris_tuner.TORCH)
            self.chosen[name] = {"impl": kind}
            least = self.dram_alone()
            if least > best:
                self.refused[kind] = f"DRAM alone would take {least:.1f} µs"
                continue
            for kernel in (first, "lokr.grad_w1"):
                self.tune(kernel, planned[kernel], calls[kernel])
            found[kind] = dict(self.chosen)
        return found

    def dram_alone(self) -> float:
        """The least time of the backward that is chosen, from a dry run."""
        mill, _ = run(self.backward, self.case, self.arch, TOKENS)
        return sum(p.bytes for p in mill.parts) / (DEVICES[GPUS[self.arch]].dram_gb_s * 1e3)


def public_call(case: Case) -> str:
    """What the public function does with such factors."""
    w1, w2 = torch.empty(case.m1, case.n1), torch.empty(case.m2, case.n2)
    if lycoris_functional._apply_supported(w1, None, None, w2, None, None, None):
        return "kron_bypass takes it"
    cap = lycoris_functional._apply_factor_cap()
    return f"kron_bypass refuses it: a factor has a side over {cap}; it runs torch.compile"


def their_half(case: Case, arch: int, direction: str) -> dict[str, Any]:
    """What LyCORIS's best composition costs, and the others."""
    lycoris = Lycoris(case, arch)
    alternatives, best = {}, None
    with lycoris.choices():
        call = lycoris.forward if direction == "forward" else lycoris.backward
        tune = lycoris.tune_forward if direction == "forward" else lycoris.tune_backward
        for kind, chosen in tune().items():
            lycoris.chosen = chosen
            try:
                theirs = checked(call, case, arch, direction)
            except (OutOfResources, ValueError, RuntimeError, AssertionError) as error:
                lycoris.refused[kind] = f"{type(error).__name__}: {error}"[:200]
                continue
            theirs["composition"] = kind
            theirs["choices"] = {name: str(config) for name, config in chosen.items()}
            alternatives[kind] = theirs["microseconds"]
            if not theirs["kernels"]:
                lycoris.refused[kind] = "PyTorch throughout"
            elif best is None or theirs["microseconds"] < best["microseconds"]:
                best = theirs
    fixed = [us for kind, us in alternatives.items() if kind != "atomic"]
    return {
        "theirs": best,
        "their_alternatives": alternatives,
        "their_refusals": lycoris.refused,
        "their_deterministic_microseconds": min(fixed, default=None),
        "their_public_call": public_call(case),
    }
