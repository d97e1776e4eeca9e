"""Text to tokens, every byte counted: sources, tokenizer, the byte account, deterministic batches."""

from fairway.data.batches import Batches, batches
from fairway.data.corpus import Corpus, DataSpec, build_tokenizer, open_corpus
from fairway.data.splits import Split
from fairway.data.tokenizer import Tokenizer, TokenizerSpec
from fairway.data.tokens import Tokens, check_bytes, count_bytes, tokenize

__all__ = [
    "Batches",
    "Corpus",
    "DataSpec",
    "Split",
    "Tokenizer",
    "TokenizerSpec",
    "Tokens",
    "batches",
    "build_tokenizer",
    "check_bytes",
    "count_bytes",
    "open_corpus",
    "tokenize",
]
