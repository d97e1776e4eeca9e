"""Scores by the length of an actual code: a binary arithmetic model over the bits of the token's index, numpy only."""
from __future__ import annotations

import argparse
import gzip
import math
import os
import struct
from typing import Iterator

import numpy as np
import sentencepiece

BITS = 10  # 1,024 tokens


class Tree:
    """For each context a binary tree over the token's bits; a node holds P(1) as logits of three orders, mixed online."""

    def __init__(self, size: int, seed: np.ndarray | None = None) -> None:
        self.size = size
        self.state = np.zeros((3, size), np.float32)
        if seed is not None:
            self.state[0, : len(seed)] = seed
        self.mix = np.full((1 << BITS, 3), 0.4, np.float32)

    def places(self, past: tuple[int, int, int], node: int) -> tuple[int, int, int]:
        a, b, c = past
        return (
            (a * 1024 + node) % self.size,
            (a * 92821 + b * 1024 + node * 31) % self.size,
            (a * 92821 + b * 68917 + c * 1024 + node * 57) % self.size,
        )

    def predict(self, past: tuple[int, int, int], node: int) -> tuple[float, np.ndarray, tuple[int, int, int]]:
        where = self.places(past, node)
        x = np.array([self.state[k, w] for k, w in enumerate(where)])
        return float(1 / (1 + np.exp(-np.clip(self.mix[node] @ x, -12, 12)))), x, where

    def update(self, node: int, p: float, x: np.ndarray, where: tuple[int, int, int], bit: int) -> None:
        error = bit - p
        self.mix[node] += 0.002 * error * x
        for k, w in enumerate(where):
            q = 1 / (1 + math.exp(-self.state[k, w]))
            self.state[k, w] += 0.4 * (bit - q)


def cost(tree: Tree, past: tuple[int, int, int], token: int) -> float:
    """Nats of the token; the tree learns each bit after it is paid."""
    node, nats = 1, 0.0
    for i in reversed(range(BITS)):
        bit = token >> i & 1
        p, x, where = tree.predict(past, node)
        nats -= math.log(p if bit else 1 - p)
        tree.update(node, p, x, where, bit)
        node = node << 1 | bit
    return nats


def stream(folder: str, prefix: str) -> Iterator[int]:
    for name in sorted(os.listdir(folder)):
        if name.startswith(prefix):
            with open(os.path.join(folder, name), "rb") as f:
                count = struct.unpack("<256i", f.read(1024))[2]
                yield from np.frombuffer(f.read(2 * count), "<u2").tolist()


def prior(folder: str, limit: int) -> np.ndarray:
    """Order-1 logits from training tokens."""
    ones, all_ = np.zeros(1 << 20), np.zeros(1 << 20)
    last = 1
    for n, token in enumerate(stream(folder, "fineweb_train_")):
        if n >= limit:
            break
        node = 1
        for i in reversed(range(BITS)):
            bit = token >> i & 1
            at = (last * 1024 + node) % (1 << 20)
            ones[at] += bit
            all_[at] += 1
            node = node << 1 | bit
        last = token
    p = (ones + 0.4) / (all_ + 0.8)
    return np.log(p / (1 - p))


class Octets:
    def __init__(self, model: str) -> None:
        s = sentencepiece.SentencePieceProcessor(model_file=model)
        self.silent = {i for i in range(1024) if s.is_control(i) or s.is_unknown(i) or s.is_unused(i)}
        self.text = {}
        for i in set(range(1024)) - self.silent:
            self.text[i] = b"?" if s.is_byte(i) else s.id_to_piece(i).replace("\u2581", " ").encode()

    def of(self, before: int, token: int) -> int:
        if token in self.silent:
            return 0
        t = self.text[token]
        return len(t) - (t[:1] == b" " and before in self.silent)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="data")
    parser.add_argument("--tokenizer", default="tok.model")
    parser.add_argument("--limit", type=int, default=40_000_000)
    parser.add_argument("--stop", type=int, default=0, help="score this many tokens only, to try it out")
    a = parser.parse_args()
    table = np.clip(np.round(prior(a.data, a.limit) * 10), -127, 127).astype(np.int8)
    with gzip.open("prior.gz", "wb", compresslevel=9) as f:
        f.write(table.tobytes())
    with gzip.open("prior.gz", "rb") as f:
        tree = Tree(1 << 22, np.frombuffer(f.read(), np.int8).astype(np.float32) / 10)
    octets, ledger = Octets(a.tokenizer), [0.0, 0, 0]
    past = (1, 1, 1)
    for token in stream(a.data, "fineweb_val_"):
        if a.stop and ledger[1] >= a.stop:
            break
        ledger[0] += cost(tree, past, token)
        ledger[1] += 1
        ledger[2] += octets.of(past[0], token)
        past = (token, past[0], past[1])
    nats, tokens, count = ledger
    size = os.path.getsize("prior.gz") + os.path.getsize(__file__)
    print(f"size={size} tokens={tokens} loss={nats / tokens:.5f} bpb={nats / math.log(2) / count:.5f}")


if __name__ == "__main__":
    main()
