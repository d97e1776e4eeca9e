"""Parameters are a dictionary, everything else is a function: state goes in, state comes out."""

import functools
import itertools
import json
import math
import os
import pickle
import sys
import time
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sentencepiece as spm
from jax import lax, nn, random

FOLDER = os.environ.get("DATA", "data")
VOCAB, WIDTH, DEPTH, SPAN = 1024, 512, 8, 1024
BUDGET_S = 580.0


class Ledger(NamedTuple):
    nats: float
    tokens: int
    octets: int


def init(key):
    ks = iter(random.split(key, 4 * DEPTH + 1))
    dense = lambda a, b: random.normal(next(ks), (a, b)) / math.sqrt(a)
    return {
        "emb": random.normal(next(ks), (VOCAB, WIDTH)) * 0.02,
        "layers": [
            {"qkv": dense(WIDTH, 3 * WIDTH), "o": jnp.zeros((WIDTH, WIDTH)), "up": dense(WIDTH, 3 * WIDTH), "down": jnp.zeros((3 * WIDTH, WIDTH))}
            for _ in range(DEPTH)
        ],
    }


def norm(x):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def attend(layer, x, heads=8):
    B, T, D = x.shape
    q, k, v = (t.reshape(B, T, heads, D // heads) for t in jnp.split(x @ layer["qkv"], 3, -1))
    w = jnp.einsum("bqhd,bkhd->bhqk", norm(q), norm(k)) * 8.0 / math.sqrt(D // heads)
    w = jnp.where(jnp.tril(jnp.ones((T, T), bool)), w, -1e9)
    return jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(w, -1), v).reshape(B, T, D) @ layer["o"]


def logits(params, ids):
    x = norm(params["emb"][ids])
    for layer in params["layers"]:
        x = x + attend(layer, norm(x))
        x = x + jnp.square(nn.relu(norm(x) @ layer["up"])) @ layer["down"]
    return 30.0 * jnp.tanh(norm(x) @ params["emb"].T / 30.0)


def surprise(params, ids):
    """(B, T+1) -> (B, T) nats"""
    lp = nn.log_softmax(logits(params, ids[:, :-1]))
    return -jnp.take_along_axis(lp, ids[:, 1:, None], -1)[..., 0]


def mean_surprise(params, ids):
    return surprise(params, ids).mean()


def shards(kind):
    names = sorted(n for n in os.listdir(FOLDER) if n.startswith(f"fineweb_{kind}_"))
    return [np.memmap(os.path.join(FOLDER, n), "<u2", "r", offset=1024) for n in names]


def rows(kind, batch, forever):
    source = itertools.cycle(shards(kind)) if forever else iter(shards(kind))
    for shard in source:
        n = batch * SPAN
        for at in range(0, len(shard) - n - 1, n):
            body = np.asarray(shard[at : at + n + 1], np.int32)
            yield np.stack([body[i * SPAN : (i + 1) * SPAN + 1] for i in range(batch)])


def octet_tables(model_file):
    sp = spm.SentencePieceProcessor(model_file=model_file)
    special = np.array([sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in range(VOCAB)])
    pieces = [sp.id_to_piece(i) for i in range(VOCAB)]
    spaced = np.array([p[:1] == "▁" for p in pieces]) & ~special
    size = np.array([0 if special[i] else 1 if sp.is_byte(i) else len(p[p[:1] == "▁" :].encode()) for i, p in enumerate(pieces)])
    return size, spaced, special


def octets(tables, prev, nxt):
    size, spaced, special = tables
    return int(size[nxt].sum() + np.count_nonzero(spaced[nxt] & ~special[prev]))


def make_step(optimiser):
    @jax.jit
    def step(carry, ids):
        params, memory = carry
        value, grads = jax.value_and_grad(mean_surprise)(params, ids)
        delta, memory = optimiser.update(grads, memory, params)
        return (optax.apply_updates(params, delta), memory), value

    return step


def train(params):
    began = time.monotonic()
    optimiser = optax.adamw(optax.cosine_decay_schedule(1e-3, 9000), weight_decay=0.1)
    step, carry = make_step(optimiser), (params, optimiser.init(params))
    for i, ids in enumerate(rows("train", 64, forever=True)):
        if time.monotonic() - began > BUDGET_S:
            break
        carry, value = step(carry, ids)
        if i % 100 == 0:
            print(json.dumps({"i": i, "loss": float(value)}))
    return carry[0]


def pack(params):
    half = jax.tree_util.tree_map(lambda a: np.asarray(a, np.float16), params)
    return zlib.compress(pickle.dumps(half), 9)


def unpack(blob):
    return jax.tree_util.tree_map(lambda a: jnp.asarray(a, jnp.float32), pickle.loads(zlib.decompress(blob)))


def validation_pieces(stream, piece=SPAN * 16):
    total = (len(stream) - 1) // SPAN * SPAN
    for lo in range(0, total, piece):
        hi = min(lo + piece, total)
        body = np.asarray(stream[lo : hi + 1], np.int32)
        yield body, np.stack([body[i : i + SPAN + 1] for i in range(0, hi - lo, SPAN)])


def evaluate(params, tables):
    price = jax.jit(surprise)
    optimiser = optax.sgd(2e-3, momentum=0.9)
    learn = make_step(optimiser)

    def visit(state, item):
        (carry, ledger), (flat, ids) = state, item
        nats = price(carry[0], ids)
        ledger = Ledger(ledger.nats + float(nats.sum()), ledger.tokens + nats.size, ledger.octets + octets(tables, flat[:-1], flat[1:]))
        carry, _ = learn(carry, ids)
        return carry, ledger

    stream = np.concatenate(shards("val"))
    first = ((params, optimiser.init(params)), Ledger(0.0, 0, 0))
    _, ledger = functools.reduce(visit, validation_pieces(stream), first)
    return ledger


def cli():
    blob = pack(train(init(random.PRNGKey(int(os.environ.get("SEED", 0))))))
    with open("weights.z", "wb") as f:
        f.write(blob)
    code = os.path.getsize(sys.argv[0])
    print(json.dumps({"model_bytes": len(blob), "code_bytes": code, "total": len(blob) + code}))
    with open("weights.z", "rb") as f:
        params = unpack(f.read())
    ledger = evaluate(params, octet_tables(os.environ.get("SPM", "fineweb_1024_bpe.model")))
    print(json.dumps({"val_loss": ledger.nats / ledger.tokens, "val_bpb": ledger.nats / math.log(2) / ledger.octets}))


if __name__ == "__main__":
    cli()
