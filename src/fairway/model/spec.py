"""What a model is: shapes, parts and their constants. Formulas stand beside the parts."""

from dataclasses import dataclass, field
from typing import Any, Literal

from fairway.base.specs import choice, choices


@dataclass(frozen=True)
class RotarySpec:
    """See model/rotary.py."""

    dims: int = 16  # rotated dimensions of each head, even; 0: no rotation
    base: float = 10000.0
    reference_context: int = 1024  # tokens; the NTK rule raises the base above it; 0: never

    def __post_init__(self) -> None:
        if self.dims < 0 or self.dims % 2:
            raise ValueError(f"dims = {self.dims}: an even number is needed, rotation works on pairs")


@dataclass(frozen=True)
class ValueEmbeddingSpec:
    """See model/value.py."""

    width: int = 128  # of the shared table; 0: no value embedding
    layers: tuple[int, ...] = ()  # where it is added to v


@dataclass(frozen=True)
class ModelSpec:
    """A transformer of the U-Net family (#549's lineage)."""

    width: int = 512  # d
    layers: int = 11
    heads: int = 8  # query heads
    kv_heads: int = 8  # key and value heads; fewer than heads: grouped queries
    hidden: int = 1792  # of the MLP
    context: int = 2048  # tokens of a training window; fixes the rotary base
    bos: int = 1  # the token that begins a document
    apart: bool = False  # documents: no position sees what stands before its own document's BOS (model/apart.py)
    attention: Any = choice("fairway.model.attention", "exclusive")
    mlp: Any = choice("fairway.model.mlp", "relu2")
    embed: Any = choices("fairway.model.embed", ("bigram_hash", "smear"))
    rotary: RotarySpec = field(default_factory=RotarySpec)
    value_embedding: ValueEmbeddingSpec = field(default_factory=ValueEmbeddingSpec)
    value_residual: Literal["none", "additive", "gated"] = "none"
    skips: Literal["none", "additive", "gated"] = "additive"  # from the first half of the stack to the second
    residual_mix: bool = True  # each block begins from a learned mix of the stream and the embedding
    layer_scale: bool = True  # the norm's output in layer i is scaled by 1/sqrt(i+1) (#315)
    qk_gain: float = 1.5  # initial factor on normalised queries, one per head
    softcap: float = 30.0  # logits = c·tanh(z/c)
    embedding_std: float = 0.005  # of the tied embedding at the start
    init: Literal["orthogonal", "uniform"] = "orthogonal"  # of the matrices

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "kv_heads", "hidden", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: at least 1 is needed")
        if self.width % self.heads:
            raise ValueError(f"heads = {self.heads} does not divide width = {self.width}; choose a divisor")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads = {self.kv_heads} does not divide heads = {self.heads}; choose a divisor")
        if self.rotary.dims > self.head:
            raise ValueError(f"rotary.dims = {self.rotary.dims} is more than a head's {self.head} dimensions")
        if self.softcap <= 0:
            raise ValueError(f"softcap = {self.softcap}: a positive number is needed")
        outside = [layer for layer in self.value_embedding.layers if not 0 <= layer < self.layers]
        if outside:
            raise ValueError(f"value_embedding.layers = {outside[0]}: layers go from 0 to {self.layers - 1}")

    def matrices(self, vocab: int) -> int:
        """Numbers in the blocks' matrices and the embedding, without building them: nearly the whole model."""
        narrow = self.kv_heads * self.head
        block = 2 * self.width * self.width + 2 * self.width * narrow + 2 * self.width * self.hidden
        return self.layers * block + vocab * self.width

    @property
    def head(self) -> int:
        """Dimensions of one head."""
        return self.width // self.heads
