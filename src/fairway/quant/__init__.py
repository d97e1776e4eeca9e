"""Weights -> integers: grids, Hessians, rounding, pruning, and training that sees the grid."""

from fairway.quant.fake import FakeQuant, FakeSpec, soft_round, straight_through
from fairway.quant.grid import Quantized, Tensors, entropy, largest, nearest_codes
from fairway.quant.observe import Hessians, gather, read_hessians, write_hessians
from fairway.quant.plan import GridSpec, Override, QuantSpec, plan
from fairway.quant.pruning import PruneSpec
from fairway.quant.quantize import calibrate, dequantized, objective, quantize, quantize_tensor
from fairway.quant.scales import ScaleSpec, row_scales

__all__ = [
    "FakeQuant",
    "FakeSpec",
    "GridSpec",
    "Hessians",
    "Override",
    "PruneSpec",
    "QuantSpec",
    "Quantized",
    "ScaleSpec",
    "Tensors",
    "calibrate",
    "dequantized",
    "entropy",
    "gather",
    "largest",
    "nearest_codes",
    "objective",
    "plan",
    "quantize",
    "quantize_tensor",
    "read_hessians",
    "row_scales",
    "soft_round",
    "straight_through",
    "write_hessians",
]
