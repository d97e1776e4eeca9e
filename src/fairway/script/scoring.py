"""The entry of `score.py`: the decoder's side alone. An artifact and a text -> bits per byte.

TEXT is a file, scored as one document; without one the recipe's held-out text is, which lies in --data, in DATA_PATH,
or where the recipe said. What is scored is compared with its tokens by `score_opened`: nothing is checked twice here.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fairway.artifact import Artifact, open_artifact
from fairway.base import slots
from fairway.base.devices import choose
from fairway.base.errors import RecipeError, one_line_errors
from fairway.base.files import read
from fairway.base.journal import Run
from fairway.base.ranks import Ranks
from fairway.base.specs import build
from fairway.data.tokens import Tokens
from fairway.score.evaluate import score_opened
from fairway.score.spec import spec_of
from fairway.script import Arguments, unpacked

DECODED = "score_decoded"


def main(script: str, table: dict[str, Any], sources: dict[str, str]) -> None:
    """table: the recipe's `source`, `path` and `lossy` of its data; exit codes as those of `fairway`."""
    with one_line_errors():
        if unpacked(sources):
            return
        asked = Arguments()
        asked.add_argument("artifact", type=Path)
        asked.add_argument("text", type=Path, nargs="?")
        for name in ("data", "stage", "device"):
            asked.add_argument(f"--{name}")
        asked.add_argument("--json", action="store_true")
        said = asked.parse_args()
        device = said.device or "auto"
        ranks = Ranks.start(cuda=device != "cpu" and torch.cuda.is_available())
        try:
            artifact = open_artifact(said.artifact)
            spec = spec_of(artifact)
            stage = said.stage or spec.result
            if stage not in spec.stages[1:]:
                raise RecipeError(f"--stage {stage}: choices: {', '.join(spec.stages[1:])}")
            table["path"] = said.data or os.environ.get("DATA_PATH") or table["path"]
            text = _text(artifact, [read(said.text)], DECODED) if said.text else _held_out(artifact, table)
            found = score_opened(artifact, text, spec, Run(ranks=ranks), stage, choose(device, ranks.local_rank))
            if ranks.first:
                line = f"val_bpb:{found.bits_per_byte:.8f} ({found.stage}, {found.text_bytes:,} bytes of text)"
                print(json.dumps(asdict(found)) if said.json else line)
        finally:
            ranks.stop()


def _held_out(artifact: Artifact, table: dict[str, Any]) -> Tokens:
    """The recipe's held-out text. RecipeError where that was a part of the training text (dev)."""
    if table["held_out"] != "valid":
        raise RecipeError(f"data.held_out = {table['held_out']!r}: cut from the training text; name a TEXT")
    kind, said = table["source"]["kind"], {key: value for key, value in table["source"].items() if key != "kind"}
    source = slots.technique("fairway.data.sources", kind)
    parts = source.load(build(source.Spec, said, "data.source"), table["path"])
    if not parts.valid_shards:
        return _text(artifact, parts.valid, table["lossy"])
    shards = tuple(shard.tokens for shard in parts.valid_shards)
    text = artifact.tokenizer.decode(np.concatenate(shards)[1:], previous=int(shards[0][0]))
    return Tokens(shards, "valid", lambda: text, decoded=True)


def _text(artifact: Artifact, documents: Sequence[bytes], lossy: str) -> Tokens:
    """BOS + tokens of each document; their bytes, or where these may be lost those that the tokens decode to."""
    tokenizer, bos = artifact.tokenizer, np.array([artifact.tokenizer.bos], dtype=np.uint16)
    tokens = np.concatenate([part for found in tokenizer.encode_documents(documents) for part in (bos, found)])
    text = b"".join(documents)
    if lossy == DECODED and text != (read_back := tokenizer.decode(tokens[1:], previous=int(bos[0]))):
        return Tokens.of(tokens, "valid", read_back, decoded=True)
    return Tokens.of(tokens, "valid", text)
