"""What is published about the challenge's data, and the check of a folder against it.

A tokenizer is recognised by the sha256 of its file, never by its name. Facts (TECHNIQUES: data format and byte
accounting; RULES: the scored split): the held-out text is the first 50,000 documents; sp1024 scores 62,021,632 tokens
once the tail beyond a multiple of 2,048 is dropped; sp8192 counts 151,080,891 bytes; a training shard holds 10^8
tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fairway.base.errors import RecipeError
from fairway.base.journal import Run
from fairway.data.corpus import Corpus
from fairway.data.shardsets import ShardSet
from fairway.data.tokenizer import Tokenizer
from fairway.data.tokens import count_bytes, tokenize

WINDOW = 2048  # tokens: the scored text is cut to a multiple of it
SHARD_TOKENS = 100_000_000  # of a training shard, but for the last

Verdict = Literal["same", "DIFFERS", "not published"]


@dataclass(frozen=True)
class Published:
    """What is known of one tokenizer's shards; None where nothing is published. bytes_per_token: as many digits as
    were published."""

    name: str
    scored_tokens: int | None = None
    bytes: int | None = None
    bytes_per_token: str | None = None
    documents: int = 50_000


KNOWN = {
    "4f5e8adb109c66b4886963bc75a7befd73bda36d27fd7102df8e9e66503b0e2a": Published("sp1024", 62_021_632, None, "2.436"),
    "d76de35070ed9feb76afe3a7efc3a1a0e91e9aa4978360ecdc7fbc22a9725512": Published("sp4096", None, None, "3.32"),
    "4e979c92754cc9d7bdebd9dfe5edf3fc0b41b38714b394e4297fa851e3afd516": Published("sp8192", None, 151_080_891, "3.727"),
}


@dataclass(frozen=True)
class Check:
    """One fact: what is published, what the folder holds."""

    fact: str
    published: str
    found: str
    verdict: Verdict


def published_for(tokenizer: Tokenizer) -> Published:
    """The facts of a tokenizer. RecipeError where none are known."""
    if tokenizer.sha256 not in KNOWN:
        known = ", ".join(f"{one.name} ({sha256[:12]}…)" for sha256, one in KNOWN.items())
        raise RecipeError(
            f"{tokenizer.name}: nothing is published for the tokenizer {tokenizer.sha256[:12]}…; known: {known}; "
            "fairway data inspect shows what the shards hold"
        )
    return KNOWN[tokenizer.sha256]


def check(
    held_out: ShardSet, train: ShardSet | None, tokenizer: Tokenizer, facts: Published, run: Run | None = None
) -> list[Check]:
    """Every fact beside what the shards hold. The bytes are those that the tokens decode to, counted and compared with
    the piece table by `tokenize`. DataError where a token is foreign, or the table miscounts."""
    text = tokenize(Corpus("valid", shards=held_out.shards), tokenizer, run=run)
    tokens = text.tokens
    scored = (len(tokens) - 1) // WINDOW * WINDOW
    scored_bytes = count_bytes(tokens[: scored + 1], tokenizer)
    documents = int((tokens == tokenizer.bos).sum())
    per_token = scored_bytes / scored if scored else 0.0
    rows = [
        _same("held-out documents", facts.documents, documents),
        _same(f"scored tokens, a multiple of {WINDOW:,}", facts.scored_tokens, scored),
        _bytes(facts.bytes, text.text_bytes, scored_bytes),
        _rounded("bytes per token", facts.bytes_per_token, per_token),
    ]
    return rows + _training(train)


def differing(checks: Sequence[Check]) -> list[str]:
    """The facts that are not as published."""
    return [row.fact for row in checks if row.verdict == "DIFFERS"]


def _same(fact: str, published: int | None, found: int) -> Check:
    if published is None:
        return Check(fact, "", f"{found:,}", "not published")
    return Check(fact, f"{published:,}", f"{found:,}", "same" if found == published else "DIFFERS")


def _bytes(published: int | None, whole: int, scored: int) -> Check:
    """The published count may be of the whole stream or of its scored part: either will do, and it is said which."""
    found = f"{whole:,}; scored {scored:,}"
    if published is None:
        return Check("bytes", "", found, "not published")
    return Check("bytes", f"{published:,}", found, "same" if published in (whole, scored) else "DIFFERS")


def _rounded(fact: str, published: str | None, found: float) -> Check:
    if published is None:
        return Check(fact, "", f"{found:.4f}", "not published")
    digits = len(published.partition(".")[2])
    return Check(fact, published, f"{found:.4f}", "same" if f"{found:.{digits}f}" == published else "DIFFERS")


def _training(train: ShardSet | None) -> list[Check]:
    if train is None:
        return []
    sizes = [len(shard.tokens) for shard in train.shards]
    whole = sum(size == SHARD_TOKENS for size in sizes)
    good = all(size == SHARD_TOKENS for size in sizes[:-1]) and sizes[-1] <= SHARD_TOKENS
    found = f"{whole:,} of {len(sizes):,}" + ("" if whole == len(sizes) else f"; the last has {sizes[-1]:,}")
    return [
        Check(f"training shards of {SHARD_TOKENS:,} tokens", "all but the last", found, "same" if good else "DIFFERS")
    ]
