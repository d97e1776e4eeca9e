"""Integers on their way from quantising to packing: a safetensors file in the run folder, never scored.

Of a quantised tensor: `<name>.codes` int8 and `<name>.scales` float16, its bits in the metadata; of a low-rank addend
its four arrays `<name>.repair.…`, its group in the metadata; the rest as it is.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from fairway.base import files
from fairway.base.errors import ContractError, DataError
from fairway.quant.grid import LowRank, Quantized, Tensors

REPAIR = ("left", "left_scale", "right", "right_scales")


def write_integers(path: Path, tensors: Tensors) -> None:
    """Writes all tensors, whole or not at all."""
    from safetensors.numpy import save

    flat: dict[str, np.ndarray[Any, Any]] = {}
    bits: dict[str, int] = {}
    groups: dict[str, int] = {}
    for name, value in tensors.items():
        if isinstance(value, Quantized):
            flat[f"{name}.codes"], flat[f"{name}.scales"] = value.codes, value.scales
            bits[name] = value.bits
            if value.repair is not None:
                flat |= {f"{name}.repair.{part}": getattr(value.repair, part) for part in REPAIR}
                groups[name] = value.repair.group
        else:
            flat[name] = value
    told = {"order": list(tensors), "bits": bits, **({"repair": groups} if groups else {})}
    about = json.dumps(told)  # one entry: safetensors writes several in any order
    flat = {name: np.array(value, order="C") for name, value in flat.items()}
    files.write(path, save(flat, metadata={"integers": about}))


def read_integers(path: Path) -> Tensors:
    """Reads them back, equal in every number and in the same order. DataError where the file is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            about = json.loads(file.metadata()["integers"])
            bits, groups = about["bits"], about.get("repair", {})
            return {
                name: _quantized(file, name, bits[name], groups.get(name)) if name in bits else file.get_tensor(name)
                for name in about["order"]
            }
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, ContractError) as error:
        raise DataError(f"{path}: not the integers of a run ({error}); quantise again") from error


def _quantized(file: Any, name: str, bits: int, group: int | None) -> Quantized:
    addend = None
    if group is not None:
        addend = LowRank(**{part: file.get_tensor(f"{name}.repair.{part}") for part in REPAIR}, group=group)
    return Quantized(file.get_tensor(f"{name}.codes"), file.get_tensor(f"{name}.scales"), bits, addend)
