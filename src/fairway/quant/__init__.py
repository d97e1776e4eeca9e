"""Weights -> integers: grids, Hessians, rounding, pruning, and training that sees the grid."""

from fairway.quant.fake import FakeQuant, FakeSpec, soft_round, straight_through
from fairway.quant.grid import LowRank, Quantized, Tensors, entropy, largest, nearest_codes
from fairway.quant.observe import Hessians, gather, read_hessians, write_hessians
from fairway.quant.plan import GridSpec, Override, QuantSpec, plan
from fairway.quant.pruning import PruneSpec, ones, rankable, selective
from fairway.quant.quantize import dequantized, factored, objective, observed, quantize, quantize_tensor
from fairway.quant.repair import RepairSpec, repaired
from fairway.quant.scales import ScaleSpec, row_scales

__all__ = [
    "FakeQuant",
    "FakeSpec",
    "GridSpec",
    "Hessians",
    "LowRank",
    "Override",
    "PruneSpec",
    "QuantSpec",
    "Quantized",
    "RepairSpec",
    "ScaleSpec",
    "Tensors",
    "dequantized",
    "entropy",
    "factored",
    "gather",
    "largest",
    "nearest_codes",
    "objective",
    "observed",
    "ones",
    "plan",
    "quantize",
    "quantize_tensor",
    "rankable",
    "read_hessians",
    "repaired",
    "row_scales",
    "selective",
    "soft_round",
    "straight_through",
    "write_hessians",
]
