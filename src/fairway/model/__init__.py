"""Tokens -> a distribution. A model knows integers, not text."""

from fairway.model.gpt import GPT, Past, build_model
from fairway.model.linear import Linear, Table
from fairway.model.roles import Tag, parameter_count, projections, tags
from fairway.model.spec import ModelSpec, RotarySpec, ValueEmbeddingSpec

__all__ = [
    "GPT",
    "Linear",
    "ModelSpec",
    "Past",
    "RotarySpec",
    "Table",
    "Tag",
    "ValueEmbeddingSpec",
    "build_model",
    "parameter_count",
    "projections",
    "tags",
]
