"""An opened file: all that scoring may know of a model."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fairway.artifact.header import skeleton
from fairway.base.errors import ContractError
from fairway.data.tokenizer import Tokenizer
from fairway.model import GPT, ModelSpec
from fairway.quant.grid import Quantized, Tensors


@dataclass(frozen=True, eq=False)
class Artifact:
    """What `open_artifact` found.

    bytes: the file's length; sha256: of the whole file; sections: bytes by name, in sum `bytes`; tensors: by parameter
    name, exactly those of the model; decoder: the plain tables that `seal` was given.
    """

    path: Path
    model_spec: ModelSpec
    vocab: int
    tokenizer: Tokenizer
    decoder: dict[str, Any]
    tensors: Tensors
    sha256: str
    bytes: int
    sections: dict[str, int] = field(default_factory=dict)

    def model(self, device: torch.device | str | None = None) -> GPT:
        """A fresh model with the file's weights, float32, in eval mode."""
        model = skeleton(self.model_spec, self.vocab)
        state = {
            name: torch.from_numpy(value.dequantize() if isinstance(value, Quantized) else value.astype(np.float32))
            for name, value in self.tensors.items()
        }
        model.load_state_dict(state, strict=True, assign=True)
        if list(model.buffers()):
            raise ContractError("model: a buffer is not in the file; models hold parameters and constants alone")
        return model.to(device).eval()


@dataclass(frozen=True)
class Sealed:
    """A written file: its length, its sha256, and its sections' bytes, in sum the file's."""

    path: Path
    bytes: int
    sha256: str
    sections: dict[str, int]
