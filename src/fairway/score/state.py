"""Hashes of what a predictor is: unequal where one bit of it differs."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def state_hash(model: torch.nn.Module) -> str:
    """sha256 over all parameters and buffers."""
    return tensors_hash(model.state_dict())


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over named tensors: names and bits, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
