"""Integers on their way from quantising to packing: a safetensors file in the run folder, never scored.

Of a quantised tensor: `<name>.codes` int8 and `<name>.scales` float16, its bits and its form in the metadata; of a
low-rank addend its four arrays `<name>.repair.…`, its group in the metadata; the rest as it is.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from fairway.base import files, slots
from fairway.base.errors import ContractError, DataError
from fairway.quant.grid import Quantized, Tensors, has


def write_integers(path: Path, tensors: Tensors) -> None:
    """Writes all tensors, whole or not at all."""
    from safetensors.numpy import save

    flat: dict[str, np.ndarray[Any, Any]] = {}
    bits: dict[str, int] = {}
    told: dict[str, Any] = {"order": list(tensors), "bits": bits}
    for name, value in tensors.items():
        if isinstance(value, Quantized):
            flat[f"{name}.codes"], flat[f"{name}.scales"] = value.codes, value.scales
            bits[name] = value.bits
        else:
            flat[name] = value
    if has(tensors, "form"):
        told["forms"] = slots.optional("fairway.quant.forms").listed(tensors)
    if has(tensors, "repair"):
        addends, told["repair"] = slots.optional("fairway.artifact.repair").to_arrays(tensors)
        flat |= addends
    about = json.dumps(told)  # one entry: safetensors writes several in any order
    flat = {name: np.array(value, order="C") for name, value in flat.items()}
    files.write(path, save(flat, metadata={"integers": about}))


def read_integers(path: Path) -> Tensors:
    """Reads them back, equal in every number and in the same order. DataError where the file is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            get, about = file.get_tensor, json.loads(file.metadata()["integers"])
            bits = about["bits"]
            tensors: Tensors = {
                name: Quantized(get(f"{name}.codes"), get(f"{name}.scales"), bits[name]) if name in bits else get(name)
                for name in about["order"]
            }
            if "forms" in about:
                tensors |= slots.optional("fairway.quant.forms").applied(about["forms"], tensors)
            if "repair" in about:
                tensors |= slots.optional("fairway.artifact.repair").from_arrays(get, about["repair"], tensors)
            return tensors
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, ContractError) as error:
        raise DataError(f"{path}: not the integers of a run ({error}); quantise again") from error
