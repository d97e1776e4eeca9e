"""Bits are API: files written by an earlier fairway open to the same integers and say the same.

A new format version or coder adds files here and keeps the old ones. To write those that are missing:
    .venv/bin/python tests/artifact/test_golden.py
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fairway.artifact import Artifact, open_artifact
from fairway.quant import Quantized

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FILES = sorted(GOLDEN.glob("artifact-v*.fw"))


def facts(artifact: Artifact) -> dict[str, Any]:
    """What must never change about a file."""
    digest = hashlib.sha256()
    for name in sorted(artifact.tensors):
        value = artifact.tensors[name]
        digest.update(f"{name} {value.shape}\n".encode())
        if isinstance(value, Quantized):
            digest.update(bytes([value.bits]) + value.codes.tobytes() + value.scales.astype("<f2").tobytes())
        else:
            digest.update(value.astype("<f2").tobytes())
    model = artifact.model()
    with torch.no_grad():
        logits = model.logits(model(torch.arange(40, 52)[None])[0])[0, -1, ::60]
    return {
        "file": artifact.sha256,
        "integers": digest.hexdigest(),
        "tokenizer": artifact.tokenizer.sha256,
        "decoder": artifact.decoder,
        "logits": [round(value, 4) for value in logits.tolist()],
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_of_an_earlier_day_opens_to_the_same_integers(path: Path) -> None:
    expected = json.loads((GOLDEN / "artifacts.json").read_text())[path.name]
    found = facts(open_artifact(path))
    assert found.pop("logits") == pytest.approx(expected.pop("logits"), abs=2e-4)
    assert found == expected


def test_there_is_a_golden_file_for_every_coder() -> None:
    from fairway.base import slots

    assert {path.stem.removeprefix("artifact-v1-") for path in FILES} >= set(slots.kinds("fairway.artifact.coder"))


def write() -> None:
    """Writes the golden files that are missing, and their facts."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from artifact import conftest
    from fairway.artifact import PackSpec, seal
    from fairway.artifact.container import VERSION
    from fairway.base import slots, specs

    spec, tokenizer = conftest.tiny_spec(), conftest.tiny_tokenizer()
    known = json.loads(path.read_text()) if (path := GOLDEN / "artifacts.json").exists() else {}
    for coder in slots.kinds("fairway.artifact.coder"):
        file = GOLDEN / f"artifact-v{VERSION}-{coder}.fw"
        if file.exists():
            continue  # what was written once stays as it is
        tensors = conftest.integers(spec, tokenizer.size)
        packing = specs.build(PackSpec, {"coder": coder})
        seal(file, tensors, spec, tokenizer.size, tokenizer, conftest.DECODER, packing)
        known[file.name] = facts(open_artifact(file))
    path.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    write()
