"""A small trained model in a file: what the scoring of files is tested on."""

import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fairway.artifact import PackSpec, open_artifact, seal, write_weights
from fairway.base.specs import build, to_plain
from fairway.data import Corpus, Tokenizer, tokenize
from fairway.data.learning import train
from fairway.data.tokenizer import TokenizerSpec
from fairway.model import ModelSpec, build_model
from fairway.score import ScoreSpec


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Tiny products are slower on two threads, and equal shapes must repeat bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


ADAPT = {"kind": "ttt", "chunk": 256, "epochs": 2, "batch": 4, "micro_batch": 2, "lr": 0.003}


def text_of(seed: int, count: int) -> bytes:
    """Text with words to learn: the source of a standard library module, from a place of its own."""
    source = inspect.getsource(inspect).encode()
    return source[seed : seed + count]


@pytest.fixture(scope="session")
def spec() -> ScoreSpec:
    return build(ScoreSpec, {"result": "adapted", "windows": {"kind": "sliding", "stride": 16}, "adapt": ADAPT})


@pytest.fixture(scope="session")
def files(tmp_path_factory, spec):
    """(weights.safetensors, artifact.fw): 60 steps on one part of a text, float32 and float16."""
    folder = tmp_path_factory.mktemp("files")
    tokenizer = Tokenizer.from_bytes(train([text_of(0, 60_000)], TokenizerSpec(vocab=320)))
    table = {"width": 32, "layers": 3, "heads": 2, "kv_heads": 1, "hidden": 64, "context": 64}
    table |= {"embed": [{"kind": "bigram_hash", "rows": 97, "width": 8}, "smear"], "rotary": {"dims": 8}}
    model_spec = build(ModelSpec, table | {"value_embedding": {"width": 8, "layers": [1, 2]}, "bos": tokenizer.bos})
    model = build_model(model_spec, tokenizer.size, seed=1)
    tokens = torch.from_numpy(tokenizer.encode(text_of(0, 60_000)).astype(np.int64))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    drawn = torch.Generator().manual_seed(0)
    for _ in range(60):
        start = torch.randint(0, len(tokens) - 65, (16, 1), generator=drawn)
        batch = tokens[start + torch.arange(65)]
        optimizer.zero_grad()
        hidden, _ = model(batch[:, :-1])
        F.cross_entropy(model.logits(hidden).flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
    decoder = {"score": to_plain(spec)}
    weights, artifact = folder / "weights.safetensors", folder / "artifact.fw"
    write_weights(weights, model, tokenizer, decoder)
    halves = {name: p.detach().to(torch.float16).numpy() for name, p in model.named_parameters()}
    seal(artifact, halves, model_spec, tokenizer.size, tokenizer, decoder, PackSpec())
    return weights, artifact


@pytest.fixture(scope="session")
def held_out(files):
    """About 1,000 targets in two documents."""
    documents = (text_of(70_000, 1_000), text_of(80_000, 900))
    return tokenize(Corpus("valid", documents), open_artifact(files[1]).tokenizer)
