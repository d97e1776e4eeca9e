"""What all tests share: one thread (small tensors are slower on several), and the data folder where there is one."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Real text and tokenizers for development: $FAIRWAY_DATA, or ../shared/data beside the checkout."""
    folder = Path(os.environ.get("FAIRWAY_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}; set FAIRWAY_DATA")
    return folder
