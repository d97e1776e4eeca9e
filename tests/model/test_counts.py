"""Exact parameter counts of known models: what proves that a shape is the shape."""

import pytest
import torch

from fairway.model import GPT, ModelSpec, ValueEmbeddingSpec, parameter_count, tags
from fairway.model.attention import plain
from fairway.model.embed import bigram_hash, smear

LATE_VALUES = ValueEmbeddingSpec(width=128, layers=(9, 10))


def count(**shape: object) -> int:
    with torch.device("meta"):
        return parameter_count(GPT(ModelSpec(**shape), vocab=1024))


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("b", {"embed": (bigram_hash.Spec(8192), smear.Spec()), "value_embedding": LATE_VALUES}, 33_580_124),
        ("b6", {"embed": (bigram_hash.Spec(6144), smear.Spec()), "value_embedding": LATE_VALUES}, 33_317_980),
        (
            "#549",
            {
                "kv_heads": 4,
                "hidden": 1536,
                "embed": (bigram_hash.Spec(1536), smear.Spec()),
                "value_embedding": LATE_VALUES,
            },
            26_928_220,
        ),
        (
            "baseline",
            {"layers": 9, "kv_heads": 4, "hidden": 1024, "attention": plain.Spec(), "embed": ()},
            17_059_912,
        ),
    ],
)
def test_a_known_model_has_exactly_its_published_parameters(name: str, shape: dict, expected: int) -> None:
    assert count(**shape) == expected


def test_the_count_follows_the_closed_formula() -> None:
    d, layers, heads, groups, hidden, vocab, rows, width = 512, 11, 8, 8, 1792, 1024, 8192, 128
    head = d // heads
    matrices = layers * (2 * d * d + 2 * d * groups * head + 2 * d * hidden)
    tables = vocab * d + (rows * width + width * d) + (vocab * width + width * groups * head)
    small = 4 * d * layers + heads * layers + 5 * d + d + 4
    shape = {"embed": (bigram_hash.Spec(rows, width), smear.Spec()), "value_embedding": LATE_VALUES}
    assert count(**shape) == matrices + tables + small


def test_the_estimate_before_building_is_within_a_tenth() -> None:
    spec = ModelSpec(embed=(bigram_hash.Spec(8192), smear.Spec()), value_embedding=LATE_VALUES)
    assert spec.matrices(1024) == 31_719_424 + 1024 * 512
    assert 0.9 < spec.matrices(1024) / 33_580_124 < 1


def test_every_parameter_has_a_role() -> None:
    with torch.device("meta"):
        model = GPT(ModelSpec(value_residual="gated", skips="gated", value_embedding=LATE_VALUES), vocab=64)
    found = tags(model)
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert {tag.role for tag in found.values()} == {"matrix", "table", "gain", "scalar"}
    assert all(p.ndim == 2 for n, p in model.named_parameters() if found[n].role in ("matrix", "table"))
    assert all(p.ndim == 0 for n, p in model.named_parameters() if found[n].role == "scalar")
