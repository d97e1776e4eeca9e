"""Float weights pass through the same reader as an artifact."""

from pathlib import Path

import numpy as np
import pytest
import torch

from artifact.conftest import DECODER
from fairway.artifact import open_artifact, write_weights
from fairway.base.errors import ArtifactError, RecipeError
from fairway.data.tokenizer import Tokenizer
from fairway.model import GPT, ModelSpec, build_model


@pytest.fixture
def model(spec: ModelSpec, tokenizer: Tokenizer) -> GPT:
    return build_model(spec, tokenizer.size, seed=3)


def test_float_weights_open_to_the_bit(tmp_path: Path, model: GPT, spec: ModelSpec, tokenizer: Tokenizer) -> None:
    written = write_weights(tmp_path / "weights.safetensors", model, tokenizer, DECODER)
    opened = open_artifact(written.path)
    assert opened.model_spec == spec
    assert opened.decoder == DECODER
    assert opened.tokenizer.model == tokenizer.model
    assert opened.sha256 == written.sha256
    assert opened.bytes == written.bytes == sum(written.sections.values())
    for (name, one), (other_name, other) in zip(
        model.named_parameters(), opened.model().named_parameters(), strict=True
    ):
        assert name == other_name
        assert torch.equal(one, other)


def test_another_library_reads_them(tmp_path: Path, model: GPT, tokenizer: Tokenizer) -> None:
    from safetensors import safe_open

    path = write_weights(tmp_path / "weights.safetensors", model, tokenizer, DECODER).path
    with safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_tensor("embedding.weight"), model.embedding.weight)


def test_altered_and_cut_weights_are_refused(tmp_path: Path, model: GPT, tokenizer: Tokenizer) -> None:
    path = write_weights(tmp_path / "weights.safetensors", model, tokenizer, DECODER).path
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    chance = np.random.default_rng(0)
    places = {*range(0, 8), start, len(content) - 1, *chance.integers(start, len(content), 150).tolist()}
    for place in sorted(places):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        with pytest.raises(ArtifactError, match="section "):
            open_artifact(path)
    for length in (0, 7, 8, 100, start, start + 5, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ArtifactError):
            open_artifact(path)


def test_safetensors_of_others_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "other.safetensors"
    save_file({"a": np.zeros(3, np.float32)}, path)
    with pytest.raises(ArtifactError, match="not fairway's weights"):
        open_artifact(path)


def test_another_name_is_refused(tmp_path: Path, model: GPT, tokenizer: Tokenizer) -> None:
    with pytest.raises(RecipeError, match=r"\.safetensors"):
        write_weights(tmp_path / "weights.pt", model, tokenizer, DECODER)
