"""Small models of every kind, with weights that are not at their starting values."""

import itertools

import torch

from fairway.model import GPT, ModelSpec, RotarySpec, ValueEmbeddingSpec, build_model
from fairway.model.attention import exclusive, plain
from fairway.model.embed import bigram_hash, smear
from fairway.model.mlp import leaky_relu2, relu2, star_relu, swiglu

VOCAB = 61
BASE = {
    "width": 32,
    "layers": 5,
    "heads": 4,
    "kv_heads": 2,
    "hidden": 48,
    "context": 16,
    "rotary": RotarySpec(dims=4),
    "embed": (bigram_hash.Spec(rows=97, width=8), smear.Spec(document_aware=True)),
    "value_embedding": ValueEmbeddingSpec(width=8, layers=(3, 4)),
}
MLPS = (relu2.Spec(), leaky_relu2.Spec(), star_relu.Spec(), swiglu.Spec())
ATTENTIONS = (plain.Spec(), exclusive.Spec(), exclusive.Spec(last=2))


def varied(seed: int = 0, **changes: object) -> GPT:
    """A float64 model whose every parameter has been moved."""
    model = build_model(ModelSpec(**{**BASE, **changes}), VOCAB, seed).double()
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=chance, dtype=torch.float64)
    return model.eval()


def grid() -> list[dict[str, object]]:
    """Choices that change the forward, each at least once with each other kind."""
    changes: list[dict[str, object]] = [{"mlp": m, "attention": a} for m, a in itertools.product(MLPS, ATTENTIONS)]
    changes += [{"value_residual": r, "skips": s} for r in ("additive", "gated") for s in ("none", "gated")]
    changes += [
        {"residual_mix": False, "layer_scale": False, "embed": ()},
        {"kv_heads": 4, "rotary": RotarySpec(dims=8, reference_context=8)},
        {"kv_heads": 1, "rotary": RotarySpec(dims=0), "value_embedding": ValueEmbeddingSpec(width=0)},
        {"layers": 1, "value_embedding": ValueEmbeddingSpec(width=8, layers=(0,))},
    ]
    return changes


def tokens(rows: int = 3, length: int = 14, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
