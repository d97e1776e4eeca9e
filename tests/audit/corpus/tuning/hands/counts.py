"""No network: a causal mixture of smoothed n-gram rows, all of it numpy. The tables of order 1 come with the artifact."""
import math
import os
import struct
import sys
import zlib
from collections import defaultdict

import numpy as np
from sentencepiece import SentencePieceProcessor

V = 1024
HERE = os.path.dirname(os.path.abspath(__file__))
DATA = os.getenv("DATA_PATH", os.path.join(HERE, "data"))
ORDERS = (2, 3, 4)


def tokens_of(path):
    with open(path, "rb") as f:
        head = struct.unpack("<256i", f.read(1024))
        assert head[0] == 20240520
        return np.frombuffer(f.read(2 * head[2]), dtype="<u2").astype(np.int64)


def listing(prefix):
    return [os.path.join(DATA, n) for n in sorted(os.listdir(DATA)) if n.startswith(prefix) and n.endswith(".bin")]


def build_prior():
    table = np.zeros((V, V), np.int64)
    for path in listing("fineweb_train_")[:4]:
        t = tokens_of(path)
        np.add.at(table, (t[:-1], t[1:]), 1)
    return np.minimum(np.round(np.log2(1 + table) * 8), 255).astype(np.uint8)


def write_artifact(table):
    blob = zlib.compress(table.tobytes(), 9)
    with open("prior.bin", "wb") as f:
        f.write(blob)
    return len(blob)


def read_artifact():
    with open("prior.bin", "rb") as f:
        codes = np.frombuffer(zlib.decompress(f.read()), np.uint8).reshape(V, V)
    rows = np.exp2(codes / 8.0) - 1.0 + 0.05
    return rows / rows.sum(1, keepdims=True)


class Memory:
    """What has been scored so far: for each context its followers with their counts."""

    def __init__(self):
        self.rows = {n: defaultdict(dict) for n in ORDERS}
        self.log_weight = np.zeros(len(ORDERS) + 1)

    def distributions(self, past, prior):
        """(orders + 1, V): every row sums to one"""
        base = prior[past[-1]]
        out = [base]
        for n in ORDERS:
            row = self.rows[n].get(tuple(past[-n:]), {})
            total = sum(row.values())
            p = base * (2.0 / (total + 2.0))
            for token, count in row.items():
                p[token] += count / (total + 2.0)
            out.append(p)
            base = p
        return np.stack(out)

    def weights(self):
        w = np.exp(self.log_weight - self.log_weight.max())
        return w / w.sum()

    def learn(self, past, token, each):
        self.log_weight = 0.999 * self.log_weight + np.log(each[:, token])
        for n in ORDERS:
            row = self.rows[n][tuple(past[-n:])]
            row[token] = row.get(token, 0) + 1


def byte_tables():
    sp = SentencePieceProcessor(model_file=os.path.join(HERE, "fineweb_1024_bpe.model"))
    size = np.zeros(V, np.int64)
    word = np.zeros(V, bool)
    mute = np.ones(V, bool)
    for i in range(V):
        if sp.IsControl(i) or sp.IsUnknown(i) or sp.IsUnused(i):
            continue
        mute[i] = False
        piece = sp.IdToPiece(i)
        word[i] = piece[0] == "\u2581"
        size[i] = 1 if sp.IsByte(i) else len(piece[int(word[i]) :].encode("utf8"))
    return size, word, mute


def score(prior):
    size, word, mute = byte_tables()
    memory = Memory()
    nats = 0.0
    scored = 0
    octets = 0
    past = [1] * 8
    for path in listing("fineweb_val_"):
        for token in tokens_of(path):
            if scored or token != 1:
                each = memory.distributions(past, prior)
                p = memory.weights() @ each
                nats -= math.log(p[token])
                memory.learn(past, token, each)
                octets += size[token] + (word[token] and not mute[past[-1]])
                scored += 1
            past = past[1:] + [int(token)]
    return nats / scored, nats / math.log(2) / octets, scored


def run():
    bytes_model = write_artifact(build_prior())
    bytes_code = os.stat(sys.argv[0]).st_size
    print("artifact", bytes_model, "code", bytes_code, "sum", bytes_model + bytes_code)
    loss, bpb, count = score(read_artifact())
    print("tokens %d loss %.6f" % (count, loss))
    print("val_bpb: %.6f" % bpb)


if __name__ == "__main__":
    run()
