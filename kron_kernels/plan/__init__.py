"""Which layers to factorise, and how: by size, FLOPs, measured latency and error.

For each layer, candidates are shapes with a small left or right factor, low rank, and sums of the
two; their errors come from the spectra of small Gram matrices, without making the factors. With
calibration, those that lead are fitted, in a few steps. A multiple-choice knapsack takes one of
each layer. Layers are timed only once they are chosen: until then an optimistic bound stands for
their time. What is planned is then built and measured.
"""

from kron_kernels.plan.planner import plan
from kron_kernels.plan.result import LayerPlan, Plan

__all__ = ["LayerPlan", "Plan", "plan"]
