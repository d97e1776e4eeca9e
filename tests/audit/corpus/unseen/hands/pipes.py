"""pipes: a recurrent model, and an evaluation that is a chain of generators, each of which takes what the one before yields:

    segments -> tensors -> predictions -> losses -> totals

Nothing is kept but the totals. The temperature of the output is fitted on training text and goes into the artifact.
"""

import bz2
import io
import itertools
import math
import os
import pathlib
import time
from collections import namedtuple

import numpy as np
import sentencepiece
import torch
from torch import nn
from torch.nn import functional as F

HERE = pathlib.Path(__file__)
ROOT = pathlib.Path(os.getenv("DATA_PATH", "data/datasets/fineweb10B_sp1024"))
PIECES = os.getenv("TOKENIZER_PATH", "data/tokenizers/fineweb_1024_bpe.model")
SIZE, WIDTH, DEPTH = int(os.getenv("VOCAB_SIZE", "1024")), int(os.getenv("WIDTH", "896")), int(os.getenv("DEPTH", "5"))
LONG, ROWS = int(os.getenv("LONG", "512")), int(os.getenv("ROWS", "256"))
CLOCK = float(os.getenv("MAX_WALLCLOCK_SECONDS", "600"))
FIT = float(os.getenv("FIT_SECONDS", "10"))
LEAD = int(os.getenv("LEAD", "448"))  # tokens that a segment sees again before those that it pays for
SEED = int(os.getenv("SEED", "11"))
CARD = torch.device("cuda", int(os.getenv("LOCAL_RANK", "0")))

Segment = namedtuple("Segment", "ids skip")  # ids: inputs and one more; the first `skip` targets are context
Predicted = namedtuple("Predicted", "logp goal before paid")
Totals = namedtuple("Totals", "nats tokens octets")


# ---- reading


def shards(kind):
    yield from sorted(ROOT.glob(f"fineweb_{kind}_*.bin"))


def load(path):
    raw = path.read_bytes()
    magic, version, count = np.frombuffer(raw[:12], "<i4")
    if (magic, version) != (20240520, 1):
        raise ValueError(f"{path}: no token shard")
    return np.frombuffer(raw, "<u2", count=count, offset=1024)


def stream(kind):
    return np.concatenate([load(path) for path in shards(kind)])


def rows(kind, seed):
    """Endless batches from random places of random shards."""
    rng = np.random.default_rng(seed)
    names = list(shards(kind))
    while True:
        ids = load(names[rng.integers(len(names))])
        for _ in range(40):
            at = rng.integers(0, ids.size - LONG - 1, ROWS)
            yield torch.from_numpy(np.stack([ids[a : a + LONG + 1] for a in at]).astype(np.int64)).to(CARD)


def octet_tables():
    sp = sentencepiece.SentencePieceProcessor(model_file=PIECES)
    kinds = [("byte" if sp.is_byte(i) else "none" if sp.is_control(i) or sp.is_unknown(i) else "text") for i in range(SIZE)]
    inner = [1 if k == "byte" else 0 if k == "none" else len(sp.id_to_piece(i).replace("▁", "", 1).encode()) for i, k in enumerate(kinds)]
    spaced = [k == "text" and sp.id_to_piece(i)[0] == "▁" for i, k in enumerate(kinds)]
    return torch.tensor(inner, device=CARD), torch.tensor(spaced, device=CARD), torch.tensor([k == "none" for k in kinds], device=CARD)


# ---- model


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.rec = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.wide, self.back = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.rec(F.layer_norm(x, (WIDTH,)))[0]
        return x + self.back(F.gelu(self.wide(F.layer_norm(x, (WIDTH,)))))


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(SIZE, WIDTH)
        self.cells = nn.Sequential(*(Cell() for _ in range(DEPTH)))
        self.cool = nn.Parameter(torch.ones(()), requires_grad=False)  # the temperature

    def forward(self, ids):
        x = F.layer_norm(self.cells(self.table(ids)), (WIDTH,))
        return x @ self.table.weight.T * WIDTH**-0.5 / self.cool


# ---- training


def fit(model):
    begun = time.monotonic()
    gone = lambda: time.monotonic() - begun
    opt = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.97), weight_decay=0.03)
    for step, ids in enumerate(rows("train", SEED)):
        if gone() >= CLOCK - FIT:
            break
        for g in opt.param_groups:
            g["lr"] = 2e-3 * min(1.0, step / 200 + 0.01, 2.5 * (1 - gone() / (CLOCK - FIT)) + 0.01)
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        opt.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        if step % 250 == 0:
            print(f"step {step} loss {loss.item():.4f} {gone():.0f}s", flush=True)
    return gone


@torch.no_grad()
def settle_temperature(model):
    """The best of a few temperatures on training text that no step has seen in this order; it is stored with the weights."""
    sample = list(itertools.islice(rows("train", SEED + 1), 6))

    def cost(t):
        model.cool.fill_(t)
        return sum(F.cross_entropy(model(ids[:, :-1]).float().flatten(0, 1), ids[:, 1:].flatten()).item() for ids in sample)

    best = min((0.94, 0.96, 0.98, 1.0, 1.02, 1.04), key=cost)
    model.cool.fill_(best)
    return best


# ---- artifact


def store(model, path):
    out = {}
    for name, w in model.state_dict().items():
        if w.ndim < 2:
            out[name] = w.half().cpu()
            continue
        s = w.abs().amax(1, keepdim=True).clamp_min(1e-8) / 31
        out[name] = (w / s).round().to(torch.int8).cpu(), s.half().cpu()
    torch.save(out, box := io.BytesIO())
    path.write_bytes(bz2.compress(box.getvalue(), 9))
    return path.stat().st_size


def fetch(path):
    box = torch.load(io.BytesIO(bz2.decompress(path.read_bytes())))
    model = Reader().to(CARD)
    model.load_state_dict({k: v.float() if torch.is_tensor(v) else v[0].float() * v[1].float() for k, v in box.items()})
    return model.eval()


# ---- the chain


def segments(ids):
    """Every target belongs to exactly one segment's paid part."""
    pay = LONG - LEAD
    for first in range(0, ids.size - 1, pay):
        begin, end = max(0, first - LEAD), min(first + pay, ids.size - 1)
        yield Segment(ids[begin : end + 1], first - begin)


def tensors(parts, many=96):
    parts = iter(parts)
    while group := list(itertools.islice(parts, many)):
        width = max(p.ids.size for p in group)
        ids = np.stack([np.pad(p.ids.astype(np.int64), (0, width - p.ids.size)) for p in group])
        place = np.arange(width - 1)
        paid = np.stack([(place >= p.skip) & (place < p.ids.size - 1) for p in group])
        yield torch.from_numpy(ids).to(CARD), torch.from_numpy(paid).to(CARD)


def predictions(model, pairs):
    for ids, paid in pairs:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            logp = model(ids[:, :-1]).float().log_softmax(-1)
        yield Predicted(logp, ids[:, 1:], ids[:, :-1], paid)


def losses(predicted):
    inner, spaced, none = octet_tables()
    for p in predicted:
        nats = -p.logp.gather(-1, p.goal[..., None]).squeeze(-1)[p.paid]
        goal, before = p.goal[p.paid], p.before[p.paid]
        yield Totals(nats.double().sum().item(), goal.numel(), (inner[goal] + (spaced[goal] & ~none[before])).sum().item())


def totals(each):
    return Totals(*map(sum, zip(*each)))


def main():
    torch.manual_seed(SEED)
    model = Reader().to(CARD)
    gone = fit(model)
    print(f"temperature {settle_temperature(model)} (on training text)")
    print(f"train_time:{1000 * gone():.0f}ms")
    assert gone() <= CLOCK
    path = pathlib.Path("pipes.bz2")
    weight = store(model, path)
    print(f"model {weight} code {HERE.stat().st_size} total {weight + HERE.stat().st_size}")
    assert weight + HERE.stat().st_size <= 16_000_000
    text, began = stream("val"), time.monotonic()
    sums = totals(losses(predictions(fetch(path), tensors(segments(text)))))
    assert sums.tokens == text.size - 1, sums
    loss, bpb = sums.nats / sums.tokens, sums.nats / math.log(2) / sums.octets
    print(f"final_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f} eval_time:{1000 * (time.monotonic() - began):.0f}ms")


if __name__ == "__main__":
    main()
