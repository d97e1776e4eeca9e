"""octet: no tokenizer. The text is bytes; a byte is nine yes/no questions: does the document end, then its bits from the top.

Shards hold byte ids (`byte260`: 0..3 are pad, bos, eos, unk; 4 + b is the byte b). A GRU over bytes asks the questions along a
tree, so that the probabilities of the 257 answers sum to one. While it is scored, a table of order-2 counts per lane joins in:
the two are mixed in the logistic domain with a weight per node, and weights and counts move after the answer is known.
"""

import glob
import lzma
import math
import os
import pickle
import sys
import time

import numpy as np
import torch
from torch import nn

V = {
    "data": "data/datasets/fineweb10B_byte260",
    "seed": "7",
    "width": "1024",
    "layers": "2",
    "lanes": "512",
    "span": "256",
    "minutes": "10",
    "spare": "0.4",
    "lr": "0.0015",
    "mix_lr": "0.02",
    "online": "1",
}
V.update({k: os.environ[k.upper()] for k in V if k.upper() in os.environ})
WIDTH, LAYERS, LANES, SPAN = (int(V[k]) for k in ("width", "layers", "lanes", "span"))
DEVICE = "cuda"
BITS = 8
NODES = 1 << BITS  # node 0: the end of the document; node 1: the top bit; then down the tree
WEIGHTS = torch.tensor([1 << b for b in range(BITS - 1, -1, -1)], device=DEVICE)
torch.manual_seed(int(V["seed"]))


def read(path):
    """The bytes of a shard as 0..255, and 256 where a document begins; pad, eos and unk do not occur."""
    head = np.fromfile(path, dtype="<i4", count=256)
    ids = np.fromfile(path, dtype="<u2", count=int(head[2]), offset=1024).astype(np.int16)
    assert ids.size == head[2]
    return np.where(ids == 1, 256, ids - 4)


def shards(kind):
    names = sorted(glob.glob(f"{V['data']}/fineweb_{kind}_*.bin"))
    if not names:
        sys.exit(f"{V['data']}: no {kind} shards")
    return names


def questions(symbols):
    """(.., 9) nodes, (.., 9) answers, (.., 9) asked: an end of document has only the first."""
    ends = symbols == 256
    byte = symbols.clamp_max(255)
    bits = (byte[..., None] & WEIGHTS) != 0
    prefix = torch.ones_like(byte)
    nodes, asked = [torch.zeros_like(byte)], [torch.ones_like(ends)]
    for b in range(BITS):
        nodes.append(prefix)
        asked.append(~ends)
        prefix = 2 * prefix + bits[..., b].long()
    return torch.stack(nodes, -1), torch.cat((ends[..., None], bits), -1).float(), torch.stack(asked, -1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.read = nn.Embedding(257, WIDTH)
        self.turn = nn.GRU(WIDTH, WIDTH, LAYERS, batch_first=True)
        self.ask = nn.Linear(WIDTH, NODES)

    def forward(self, symbols, state=None):
        h, state = self.turn(self.read(symbols), state)
        return self.ask(h), state  # (lanes, span, nodes): a logit for every node


def cost(logits, answers, asked):
    """Nats of each question, zero where it is not asked."""
    return nn.functional.binary_cross_entropy_with_logits(logits, answers, reduction="none") * asked


def lanes_of(stream):
    """The stream in LANES parallel pieces; the last lane is padded, `valid` says with what."""
    n = stream.size - 1
    each = -(-n // LANES)
    pad = each * LANES - n
    x = np.pad(stream[:-1], (0, pad)).reshape(LANES, each)
    y = np.pad(stream[1:], (0, pad)).reshape(LANES, each)
    valid = (np.arange(each * LANES) < n).reshape(LANES, each)
    return tuple(torch.from_numpy(np.ascontiguousarray(t)) for t in (x.astype(np.int64), y.astype(np.int64), valid))


def train(net, deadline):
    opt = torch.optim.AdamW(net.parameters(), lr=float(V["lr"]), betas=(0.9, 0.98), weight_decay=0.01)
    begun, step = time.time(), 0
    while True:
        for name in shards("train"):
            x, y, _ = lanes_of(read(name))
            state = None
            for a in range(0, x.size(1) - SPAN, SPAN):
                part = x[:, a : a + SPAN].to(DEVICE)
                nodes, answers, asked = questions(y[:, a : a + SPAN].to(DEVICE))
                logits, state = net(part, state)
                loss = cost(logits.gather(-1, nodes), answers, asked).sum(-1).mean()
                opt.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                done = (time.time() - begun) / deadline
                for g in opt.param_groups:
                    g["lr"] = float(V["lr"]) * min(1.0, 2 * (1 - min(done, 1.0)) + 0.02)
                opt.step()
                state = state.detach()
                step += 1
                if step % 200 == 0:
                    print(f"step {step} train {loss.item() / math.log(2):.4f} bits/byte {time.time() - begun:.0f}s", flush=True)
                if time.time() - begun > deadline:
                    return step


class Counts:
    """For each lane and the byte before: how often each node was answered yes and no. Half a yes and half a no to begin with."""

    def __init__(self):
        self.yes = torch.full((LANES, 257, NODES), 0.5, dtype=torch.float16, device=DEVICE)
        self.all = torch.ones((LANES, 257, NODES), dtype=torch.float16, device=DEVICE)
        self.lane = torch.arange(LANES, device=DEVICE)[:, None]

    def logits(self, before, nodes):
        yes, both = (t[self.lane, before[:, None], nodes].float() for t in (self.yes, self.all))
        p = (yes / both).clamp(1e-3, 1 - 1e-3)
        return torch.log(p / (1 - p))

    def learn(self, before, nodes, answers, asked):
        spot = (self.lane.expand_as(nodes), before[:, None].expand_as(nodes), nodes)
        self.yes.index_put_(spot, (answers * asked).half(), accumulate=True)
        self.all.index_put_(spot, asked.half(), accumulate=True)


@torch.no_grad()
def score(net, stream, online):
    """Every symbol once, in order within its lane. Bits per byte: ends of documents cost, but are no bytes."""
    x, y, valid = lanes_of(stream)
    counts, state = Counts(), None
    share = torch.zeros(LANES, NODES, device=DEVICE)  # each lane's weight of the counts at each node, none at the start
    nats, size = torch.zeros((), dtype=torch.float64, device=DEVICE), 0
    for a in range(0, x.size(1), SPAN):
        part, goal, ok = (t[:, a : a + SPAN].to(DEVICE) for t in (x, y, valid))
        logits, state = net(part, state)
        nodes, answers, asked = questions(goal)
        asked = asked & ok[..., None]
        for t in range(part.size(1)):
            own = logits[:, t].gather(-1, nodes[:, t])
            if online:
                other = counts.logits(part[:, t], nodes[:, t])
                mixed = own + share.gather(1, nodes[:, t]) * other
            else:
                mixed = own
            nats += cost(mixed, answers[:, t], asked[:, t]).double().sum()
            if online:
                counts.learn(part[:, t], nodes[:, t], answers[:, t], asked[:, t])
                slope = (answers[:, t] - mixed.sigmoid()) * other * asked[:, t]
                share.scatter_add_(1, nodes[:, t], float(V["mix_lr"]) * slope)
        size += int(((goal < 256) & ok).sum())
    return nats.item() / math.log(2) / size, nats.item() / int(valid.sum())


def pack(net):
    box = {}
    for name, w in net.state_dict().items():
        w = w.float().cpu().numpy()
        step = np.abs(w).max(axis=-1, keepdims=True) / 31 + 1e-12
        box[name] = (np.round(w / step).astype(np.int8), step.astype(np.float16))
    return lzma.compress(pickle.dumps(box), preset=9)


def unpack(blob, net):
    box = pickle.loads(lzma.decompress(blob))
    net.load_state_dict({k: torch.from_numpy(q.astype(np.float32) * s.astype(np.float32)) for k, (q, s) in box.items()})
    return net


def main():
    net = Net().to(DEVICE)
    seconds = 60 * (float(V["minutes"]) - float(V["spare"]))
    steps = train(net, seconds)
    blob = pack(net)
    with open("octet.xz", "wb") as f:
        f.write(blob)
    code = os.path.getsize(__file__)
    print(f"{steps} steps; model {len(blob)} bytes, code {code} bytes, total {len(blob) + code} bytes")
    assert len(blob) + code <= 16_000_000
    with open("octet.xz", "rb") as f:
        net = unpack(f.read(), Net().to(DEVICE))
    stream = np.concatenate([read(name) for name in shards("val")])
    t = time.time()
    bpb, loss = score(net, stream, online=V["online"] == "1")
    print(f"eval took {time.time() - t:.0f}s")
    print(f"final exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")


if __name__ == "__main__":
    main()
