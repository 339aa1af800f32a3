"""Which layers to factorise, and how: by size, FLOPs, measured latency and error.

Candidates for a layer are shapes with a small left or right factor, low rank, and sums of the two.
Their errors come from spectra of small Gram matrices, without computing factors; with calibration
data, the leading candidates are fitted in a few steps. A multiple-choice knapsack picks one
candidate per layer. Only picked candidates are timed; the others count with a lower bound of their
time. Finally the planned module is built and measured.
"""

from kron_kernels.plan.planner import plan
from kron_kernels.plan.result import LayerPlan, Plan

__all__ = ["LayerPlan", "Plan", "plan"]
