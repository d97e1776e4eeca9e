"""Coroutines: a source sends pieces, a judge prices them, a pupil learns; the conductor decides who speaks when."""

import json
import math
import os
import pathlib
import time
import zlib
from dataclasses import dataclass

import numpy as np
import sentencepiece as sp_
import torch
from torch import nn
from torch.nn.functional import cross_entropy as xent

ROOT = pathlib.Path(os.environ.get("GOLF_DATA", "data"))
PIECE = 2048


@dataclass
class Piece:
    ids: torch.Tensor
    goal: torch.Tensor
    number: int


@dataclass
class Priced:
    piece: Piece
    nats: torch.Tensor


@dataclass
class End:
    pass


class Wave(nn.Module):
    """A gated linear recurrence; small on purpose."""

    def __init__(self, v=1024, d=640, n=6):
        super().__init__()
        self.e = nn.Embedding(v, d)
        self.gates = nn.ModuleList(nn.Linear(d, 3 * d) for _ in range(n))
        self.outs = nn.ModuleList(nn.Linear(d, d) for _ in range(n))

    def forward(self, ids):
        x = self.e(ids)
        for g, o in zip(self.gates, self.outs):
            f, i, c = g(nn.functional.layer_norm(x, x.shape[-1:])).chunk(3, -1)
            decay = torch.cumsum(nn.functional.logsigmoid(f.float() + 3), 0)
            h = torch.exp(decay) * torch.cumsum(torch.exp(-decay.clamp_min(-30)) * (torch.sigmoid(i) * c).float(), 0)
            x = x + o(torch.tanh(h).to(x.dtype))
        return nn.functional.linear(x, self.e.weight)


def read(kind):
    for name in sorted(ROOT.glob(f"fineweb_{kind}_*.bin")):
        yield torch.from_numpy(np.fromfile(name, "<u2", offset=1024).astype(np.int64))


def source(kind, device):
    number = 0
    left = torch.empty(0, dtype=torch.int64)
    for shard in read(kind):
        left = torch.cat((left, shard))
        while len(left) > PIECE:
            part = left[: PIECE + 1].to(device)
            yield Piece(part[:-1], part[1:], number)
            left = left[PIECE:]
            number += 1
    if len(left) > 1:
        part = left.to(device)
        yield Piece(part[:-1], part[1:], number)
    yield End()


def judge(net):
    reply = None
    while True:
        piece = yield reply
        with torch.no_grad():
            reply = Priced(piece, xent(net(piece.ids).float(), piece.goal, reduction="none"))


def pupil(net, rate):
    opt = torch.optim.SGD(net.parameters(), lr=rate)
    while True:
        piece = yield
        opt.zero_grad()
        xent(net(piece.ids).float(), piece.goal).backward()
        opt.step()


def scribe(tables):
    nats = octets = tokens = 0
    own, spaced, mute = tables
    while True:
        match (yield nats, tokens, octets):
            case Priced(piece=p, nats=n):
                nats += n.double().sum().item()
                tokens += n.numel()
                octets += int((own[p.goal] + (spaced[p.goal] & ~mute[p.ids])).sum())
            case other:
                raise TypeError(other)


def start(routine):
    next(routine)
    return routine


def tables(path, device, v=1024):
    sp = sp_.SentencePieceProcessor(model_file=path)
    rows = []
    for i in range(v):
        match (sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i), sp.is_byte(i), sp.id_to_piece(i)):
            case (True, _, _):
                rows.append((0, False, True))
            case (_, True, _):
                rows.append((1, False, False))
            case (_, _, str(s)) if s.startswith("▁"):
                rows.append((len(s[1:].encode()), True, False))
            case (_, _, s):
                rows.append((len(s.encode()), False, False))
    return [torch.tensor(c, device=device) for c in zip(*rows)]


def train(net, device, seconds):
    begun = time.monotonic()
    opt = torch.optim.AdamW(net.parameters(), lr=1e-3)
    while True:
        for piece in source("train", device):
            match piece:
                case End():
                    break
                case Piece(ids, goal, number):
                    if time.monotonic() - begun > seconds:
                        return
                    opt.zero_grad()
                    xent(net(ids).float(), goal).backward()
                    opt.step()


def conduct(net, device, rate):
    price, learn, write = start(judge(net)), start(pupil(net, rate)), start(scribe(tables(os.environ["SPM"], device)))
    result = (0, 0, 0)
    for piece in source("val", device):
        match piece:
            case End():
                break
            case Piece():
                result = write.send(price.send(piece))
                learn.send(piece)
    return result


if __name__ == "__main__":
    dev = torch.device("cuda")
    torch.manual_seed(0)
    net = Wave().to(dev)
    train(net, dev, 590.0)
    blob = zlib.compress(b"".join(p.detach().half().cpu().numpy().tobytes() for p in net.parameters()), 9)
    pathlib.Path("net.z").write_bytes(blob)
    at, raw = 0, zlib.decompress(pathlib.Path("net.z").read_bytes())
    for p in net.parameters():
        n = p.numel() * 2
        p.data.copy_(torch.from_numpy(np.frombuffer(raw[at : at + n], np.float16).astype(np.float32)).view_as(p))
        at += n
    nats, tokens, octets = conduct(net, dev, 0.003)
    own = len(pathlib.Path(__file__).read_bytes())
    print(json.dumps({"bytes": len(blob) + own, "val_loss": nats / tokens, "val_bpb": nats / math.log(2) / octets}))
