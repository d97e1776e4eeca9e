# dart: 12 x 448, GQA 7/1 heads of 64, value embeddings, U-net skips, long/short attention, Polar-Muon, EMA, GPTQ int6 + lzma.
# Score: every document alone, a rank-16 adapter per document that learns a piece only after the piece is on the books.
import os, sys

src = open(sys.argv[0]).read()
import copy, glob, io, itertools, json, lzma, math, time, types, uuid

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------------- settings
DEFAULTS = dict(
    data="./data/datasets/fineweb10B_sp1024",
    tokenizer="./data/tokenizers/fineweb_1024_bpe.model",
    seed=1337,
    vocab=1024,
    bos=1,
    dim=448,
    depth=12,
    heads=7,
    kv=1,
    hd=64,
    mlp=3,
    ve=3,
    rot=32,
    base=10000.0,
    short=384,
    cap=15.0,
    seconds=600.0,
    keep_back=12.0,
    iters=30000,
    warm=12,
    batch=524288,
    seq=1024,
    cool=0.55,
    floor=0.05,
    lr_mat=0.023,
    lr_emb=0.045,
    lr_small=0.012,
    mom=0.95,
    wd=0.06,
    clip=0.5,
    ema=0.9975,
    val_every=2500,
    log_every=250,
    bits=6,
    calib=24,
    damp=0.01,
    sigmas=11.0,
    stride=64,
    eval_rows=48,
    temp=1.0,
    lora=1,
    lora_rank=16,
    lora_lr=0.0006,
    lora_steps=1,
    piece=256,
    ctx=1024,
    group=32,
    probe=0,
)
c = types.SimpleNamespace(**{k: type(v)(os.environ.get(k.upper(), v)) for k, v in DEFAULTS.items()})
rank, world = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))
dev = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
torch.cuda.set_device(dev)
if multi := world > 1:
    dist.init_process_group("nccl", device_id=dev)
torch.backends.cuda.matmul.allow_tf32 = True
torch.manual_seed(c.seed)
np.random.seed(c.seed)
run = os.environ.get("RUN_ID", uuid.uuid4().hex)
os.makedirs("logs", exist_ok=True)


def say(s, screen=True):
    if rank:
        return
    with open(f"logs/{run}.txt", "a") as f:
        f.write(s + "\n")
    screen and print(s, flush=True)


say(src, screen=False)
say(json.dumps(vars(c)), screen=False)
say(f"python {sys.version.split()[0]} torch {torch.__version__} world_size:{world} seed:{c.seed}")
now = lambda: (torch.cuda.synchronize(), time.perf_counter())[1]
summed = lambda t: (dist.all_reduce(t), t)[1] if multi else t
amp = lambda: torch.autocast("cuda", torch.bfloat16)
rms = lambda x: F.rms_norm(x, (x.size(-1),))
ceil = lambda a, b: -(-a // b)


# ------------------------------------------------------------------------------------------------------------- bytes
def byte_tables(path):
    sp = sentencepiece.SentencePieceProcessor(model_file=path)
    assert sp.vocab_size() == c.vocab, f"{path} has {sp.vocab_size()} pieces"
    size, lead, edge = np.zeros(c.vocab, np.int64), np.zeros(c.vocab, bool), np.zeros(c.vocab, bool)
    for i in range(c.vocab):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            edge[i] = True
            continue
        if sp.is_byte(i):
            size[i] = 1
            continue
        lead[i] = (p := sp.id_to_piece(i)).startswith("▁")
        size[i] = len(p.removeprefix("▁").encode())
    return tuple(torch.from_numpy(t).to(dev) for t in (size, lead, edge))


SIZE, LEAD, EDGE = byte_tables(c.tokenizer)
octets = lambda prev, goal: SIZE[goal] + (LEAD[goal] & ~EDGE[prev])


# -------------------------------------------------------------------------------------------------------------- data
def shard(path):
    head = np.fromfile(path, "<i4", 256)
    assert head[0] == 20240520 and head[1] == 1, f"{path}: not a token shard"
    body = np.fromfile(path, "<u2", offset=1024)
    assert body.size == head[2], f"{path}: {body.size} tokens, header says {head[2]}"
    return torch.from_numpy(body.astype(np.int32))


def found(kind):
    names = sorted(glob.glob(os.path.join(c.data, f"fineweb_{kind}_*.bin")))
    assert names, f"no fineweb_{kind}_*.bin in {c.data}"
    return names


def feed(kind, rows, length, skip=0):
    """Endless (x, y) of this rank, rows x length, off the shards in order."""
    need, rest = rows * length * world, torch.empty(0, dtype=torch.int32)
    for path in itertools.islice(itertools.cycle(found(kind)), skip, None):
        rest = torch.cat((rest, shard(path)))
        while rest.numel() > need:
            part, rest = rest[: need + 1], rest[need:]
            mine = part[rank * rows * length : (rank + 1) * rows * length + 1].to(dev, torch.int64)
            yield mine[:-1].view(rows, length), mine[1:].view(rows, length)


whole = lambda kind: torch.cat([shard(p) for p in found(kind)])


# ------------------------------------------------------------------------------------------------------------- model
class Lin(nn.Linear):
    def __init__(self, i, o, zero=False):
        super().__init__(i, o, bias=False)
        nn.init.zeros_(self.weight) if zero else nn.init.orthogonal_(self.weight)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


def rotate(x, cs):
    r, keep = x[..., : c.rot], x[..., c.rot :]
    a, b = r.chunk(2, -1)
    co, si = cs
    return torch.cat((a * co - b * si, a * si + b * co, keep), -1)


@torch.compiler.disable
def angles(T):
    f = c.base ** (-torch.arange(0, c.rot, 2, device=dev) / c.rot)
    t = torch.outer(torch.arange(T, device=dev, dtype=torch.float32), f)
    return t.cos().bfloat16()[None, None], t.sin().bfloat16()[None, None]


def fence(ids, reach):
    """Who may look at whom: back only, in the same document, not further than `reach`."""
    doc, at = (ids == c.bos).cumsum(1), torch.arange(ids.size(1), device=ids.device)
    near = (at[:, None] >= at[None]) & (at[:, None] - at[None] < reach)
    return ((doc[:, :, None] == doc[:, None]) & near)[:, None]


class Layer(nn.Module):
    def __init__(self, i):
        super().__init__()
        self.i, self.reach = i, c.ctx if i % 4 == 3 or i == c.depth - 1 else c.short
        self.q, self.k, self.v = Lin(c.dim, c.heads * c.hd), Lin(c.dim, c.kv * c.hd), Lin(c.dim, c.kv * c.hd)
        self.o, self.up, self.down = Lin(c.heads * c.hd, c.dim, True), Lin(c.dim, c.mlp * c.dim), Lin(c.mlp * c.dim, c.dim, True)
        self.gain, self.mix = nn.Parameter(torch.full((c.heads, 1, 1), 1.6)), nn.Parameter(torch.tensor([1.0, 0.0]))
        self.vmix = nn.Parameter(torch.tensor([1.0, 0.4]))
        self.ls = nn.Parameter(torch.ones(2, c.dim))

    def forward(self, x, x0, ve, cs, walls, lora):
        B, T, _ = x.shape
        x = self.mix[0].to(x.dtype) * x + self.mix[1].to(x.dtype) * x0
        n = rms(x) / math.sqrt(self.i + 1)
        q, k, v = self.q(n), self.k(n), self.v(n)
        if lora is not None:
            q, v = q + lora(self.i, "q", n), v + lora(self.i, "v", n)
        q, k, v = (t.view(B, T, -1, c.hd).transpose(1, 2) for t in (q, k, v))
        if ve is not None:
            v = self.vmix[0].to(v.dtype) * v + self.vmix[1].to(v.dtype) * ve.view(B, T, -1, c.hd).transpose(1, 2)
        q, k = rotate(rms(q), cs) * self.gain.to(q.dtype), rotate(rms(k), cs)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=walls[self.reach], enable_gqa=True)
        x = x + self.ls[0].to(x.dtype) * self.o(a.transpose(1, 2).reshape(B, T, -1))
        h = F.relu(self.up(rms(x) / math.sqrt(self.i + 1))).square()
        return x + self.ls[1].to(x.dtype) * self.down(h)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(c.vocab, c.dim)
        self.ves = nn.ModuleList(nn.Embedding(c.vocab, c.kv * c.hd) for _ in range(c.ve))
        self.layers = nn.ModuleList(Layer(i) for i in range(c.depth))
        self.skip = nn.Parameter(torch.full((c.depth // 2, c.dim), 0.5))
        nn.init.normal_(self.emb.weight, std=0.006)
        for e in self.ves:
            nn.init.normal_(e.weight, std=0.02)

    def forward(self, ids, lora=None):
        cs, walls = angles(ids.size(1)), {r: fence(ids, r) for r in {l.reach for l in self.layers}}
        x = x0 = rms(self.emb(ids).bfloat16())
        ve = [e(ids).bfloat16() for e in self.ves]
        ve = ve + [None] * (c.depth - 2 * c.ve) + ve
        stack, half = [], c.depth // 2
        for i, l in enumerate(self.layers):
            if i >= half:
                x = x + self.skip[i - half].to(x.dtype) * stack.pop()
            x = l(x, x0, ve[i], cs, walls, lora)
            if i < half:
                stack.append(x)
        h = rms(x)
        z = F.linear(h, self.emb.weight.to(h.dtype))
        if lora is not None:
            z = z + lora("out", "z", h)
        return c.cap * torch.tanh(z.float() / c.cap)


def nll(net, x, y, lora=None, temp=1.0):
    z = net(x, lora) / temp
    return F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)


class Lora(nn.Module):
    """One low-rank correction per document of the group, on q, v and the head; the second factor starts at zero."""

    def __init__(self, n):
        super().__init__()
        outs = {f"{i}q": c.heads * c.hd for i in range(c.depth)} | {f"{i}v": c.kv * c.hd for i in range(c.depth)}
        outs["outz"] = c.vocab
        self.a = nn.ParameterDict({k: nn.Parameter(torch.randn(n, c.dim, c.lora_rank, device=dev) / c.dim**0.5) for k in outs})
        self.b = nn.ParameterDict({k: nn.Parameter(torch.zeros(n, c.lora_rank, o, device=dev)) for k, o in outs.items()})

    def forward(self, i, kind, x):
        k = f"{i}{kind}"
        return (x @ self.a[k].to(x.dtype)) @ self.b[k].to(x.dtype)


# -------------------------------------------------------------------------------------------------------- optimisers
POLAR = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012))


@torch.compile
def polar(g):
    x = g.bfloat16()
    x = x.mT if (tall := g.size(-2) > g.size(-1)) else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    for a, b, d in POLAR:
        s = x @ x.mT
        x = a * x + (b * s + d * s @ s) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Matrices of one shape are stacked; each rank turns its share, all gather the turned ones."""

    def __init__(self, ps, **kw):
        shapes = sorted({tuple(p.shape) for p in ps})
        super().__init__([dict(params=[p for p in ps if tuple(p.shape) == s]) for s in shapes], kw)

    @torch.no_grad()
    def step(self):
        for g in self.param_groups:
            ps, turned = g["params"], []
            for i in range(0, len(ps), world):
                p = ps[min(i + rank, len(ps) - 1)]
                buf = self.state[p].setdefault("m", torch.zeros_like(p))
                buf.lerp_(p.grad, 1 - g["mom"])
                u = polar(p.grad.lerp(buf, g["mom"])).contiguous()
                every = [torch.empty_like(u) for _ in range(world)] if multi else [u]
                multi and dist.all_gather(every, u)
                turned += every
            for p, u in zip(ps, turned):
                p.mul_(1 - g["lr"] * g["wd"]).add_(u, alpha=-g["lr"] * max(1, p.size(0) / p.size(1)) ** 0.5)


def optimisers(net):
    mats = [p for p in net.layers.parameters() if p.ndim == 2 and min(p.shape) > 8]
    small = [p for n, p in net.named_parameters() if n.startswith("skip") or (n.startswith("layers") and not any(p is m for m in mats))]
    tables = [net.emb.weight, *(e.weight for e in net.ves)]
    muon = Muon(mats, lr=c.lr_mat, mom=c.mom, wd=c.wd)
    adam = torch.optim.AdamW([dict(params=tables, lr=c.lr_emb), dict(params=small, lr=c.lr_small)], betas=(0.85, 0.96), weight_decay=0.004, fused=True)
    for g in (gs := muon.param_groups + adam.param_groups):
        g["top"] = g["lr"]
    return (muon, adam), gs


# ------------------------------------------------------------------------------------------------------------- score
def tally(losses, x, y, keep):
    """(nats, tokens, bytes) of the kept positions, in double."""
    return torch.stack((losses[keep].double().sum(), keep.sum().double(), octets(x, y)[keep].double().sum()))


def verdict(t):
    nats, tokens, size = summed(t).tolist()
    return nats / tokens, nats / math.log(2) / size, int(tokens)


@torch.inference_mode()
def flat(net, val):
    """Rows of `seq` side by side, the last one short; every target once."""
    book, total = torch.zeros(3, dtype=torch.float64, device=dev), val.numel() - 1
    for a in range(rank * c.seq * 64, total, world * c.seq * 64):
        part = val[a : min(a + c.seq * 64, total) + 1].to(dev, torch.int64)
        n = part.numel() - 1
        x, y = (F.pad(t, (0, -n % c.seq)).view(-1, c.seq) for t in (part[:-1], part[1:]))
        keep = (torch.arange(x.numel(), device=dev) < n).view_as(x)
        with amp():
            book += tally(nll(net, x, y), x, y, keep)
    return verdict(book)


@torch.inference_mode()
def slide(net, val):
    """Window k scores the targets [k stride, (k+1) stride) with up to ctx tokens before them: `starts` counts targets."""
    total, book = val.numel() - 1, torch.zeros(3, dtype=torch.float64, device=dev)
    starts = range(0, total, c.stride)
    for at in range(rank * c.eval_rows, len(starts), world * c.eval_rows):
        x = torch.zeros(c.eval_rows, c.ctx, dtype=torch.int64, device=dev)
        y, keep = torch.zeros_like(x), torch.zeros_like(x, dtype=torch.bool)
        for r, s in enumerate(starts[at : at + c.eval_rows]):
            z = min(s + c.stride, total)
            a = max(0, z - c.ctx)
            x[r, : z - a], y[r, : z - a], keep[r, s - a : z - a] = val[a:z], val[a + 1 : z + 1], True
        with amp():
            book += tally(nll(net, x, y, temp=c.temp), x, y, keep)
    return verdict(book)


def lay(val, group, k):
    """Piece k of each document, as (ids, targets, the positions that are new): up to ctx tokens, ending with the piece."""
    x = torch.full((len(group), c.ctx), c.bos, dtype=torch.int64)
    y, new = torch.zeros_like(x), torch.zeros_like(x, dtype=torch.bool)
    for r, (a, z) in enumerate(group):
        lo, hi = a + k * c.piece, min(a + (k + 1) * c.piece, z)
        if lo >= z:
            continue
        left = max(a, hi - c.ctx)
        x[r, : hi - left], y[r, : hi - left], new[r, lo - left : hi - left] = val[left:hi], val[left + 1 : hi + 1], True
    return x.to(dev), y.to(dev), new.to(dev)


def docs(val):
    """(first input, one past the last): the target of a document's last input is the next one's BOS."""
    heads = (val == c.bos).nonzero().flatten().tolist()
    heads = heads if heads and heads[0] == 0 else [0, *heads]
    return [(a, z) for a, z in zip(heads, heads[1:] + [val.numel() - 1]) if z > a]


def adaptive(net, val):
    """Documents in their order, dealt out in groups; a piece is booked, and only then learnt by its document's adapter."""
    for p in net.parameters():
        p.requires_grad_(False)
    every, book = docs(val), torch.zeros(3, dtype=torch.float64, device=dev)
    for n, at in enumerate(range(rank * c.group, len(every), world * c.group)):
        group = every[at : at + c.group]
        lora = Lora(len(group))
        opt = torch.optim.AdamW(lora.parameters(), lr=c.lora_lr, betas=(0.8, 0.95), weight_decay=0.0)
        last = torch.tensor([ceil(z - a, c.piece) - 1 for a, z in group], device=dev)
        for k in range(int(last.max()) + 1):
            x, y, new = lay(val, group, k)
            with torch.no_grad(), amp():
                book += tally(nll(net, x, y, lora), x, y, new)
            learn = new & (k < last)[:, None]
            for _ in range(c.lora_steps if learn.any() else 0):
                with amp():
                    each = (nll(net, x, y, lora) * learn).sum(1) / learn.sum(1).clamp_min(1)
                opt.zero_grad(set_to_none=True)
                each.sum().backward()
                opt.step()
        n % 50 == 0 and say(f"  group {n} nats/token {(book[0] / book[1]).item():.5f}", screen=False)
    return verdict(book)


# ----------------------------------------------------------------------------------------------------------- squeeze
def second_moments(net):
    """X'X of what enters each big matrix, over fresh training rows."""
    sums, hooks = {}, []
    look = lambda name: lambda m, i, o: sums.__setitem__(name, sums.get(name, 0) + ((f := i[0].flatten(0, -2)).T @ f).float())
    for name, m in net.named_modules():
        isinstance(m, Lin) and hooks.append(m.register_forward_hook(look(name + ".weight")))
    source = feed("train", 32, c.seq, skip=3)
    with torch.no_grad(), amp():
        for x, _ in itertools.islice(source, c.calib):
            net(x)
    [h.remove() for h in hooks]
    return {k: summed(v) for k, v in sums.items()}


def gptq(w, h):
    w, h, top = w.float().clone(), h.clone(), 2 ** (c.bits - 1) - 1
    h.diagonal().add_(c.damp * h.diagonal().mean() + 1e-6)
    order = h.diagonal().argsort(descending=True)
    w, h = w[:, order], h[order][:, order]
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    s = (c.sigmas * w.std(1) / top).clamp_min(1e-9).half().float()
    q = torch.zeros_like(w)
    for a in range(0, w.size(1), 128):
        e = torch.zeros_like(w[:, (cols := range(a, min(a + 128, w.size(1)))).start : cols.stop])
        for j in cols:
            q[:, j] = (w[:, j] / s).round().clamp(-top, top)
            e[:, j - a] = (w[:, j] - q[:, j] * s) / u[j, j]
            w[:, j : cols.stop] -= e[:, j - a, None] * u[j, j : cols.stop]
        w[:, cols.stop :] -= e @ u[a : cols.stop, cols.stop :]
    return q[:, order.argsort()].to(torch.int8), s.half()


def rows8(w):
    s = (w.float().abs().amax(1).clamp_min(1e-8) / 127).half()
    return (w.float() / s.float()[:, None]).round().clamp(-127, 127).to(torch.int8), s


def pack(q, bits):
    """int8 codes to a dense bit stream: `bits` planes of one bit per code, plane by plane (planes squeeze better)."""
    u = (q.cpu().numpy().astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8).ravel()
    return torch.from_numpy(np.concatenate([np.packbits((u >> b) & 1) for b in range(bits)]))


def unpack(stream, shape, bits):
    n, s = math.prod(shape), stream.numpy()
    planes = s.reshape(bits, -1)
    u = sum(np.unpackbits(planes[b])[:n].astype(np.int16) << b for b in range(bits))
    return torch.from_numpy((u - 2 ** (bits - 1)).reshape(shape).astype(np.int8))


def squeeze(net, moments):
    out = {}
    for k, p in net.state_dict().items():
        out[k] = gptq(p, moments[k]) if k in moments else rows8(p) if p.ndim == 2 and p.numel() > 4096 else p.half()
    width = lambda k: c.bits if k in moments else 8
    move = lambda k, v: (pack(v[0], width(k)), tuple(v[0].shape), width(k), v[1].cpu()) if isinstance(v, tuple) else v.cpu()
    torch.save({k: move(k, v) for k, v in out.items()}, buf := io.BytesIO())
    return lzma.compress(buf.getvalue(), preset=9 | lzma.PRESET_EXTREME)


def unsqueeze(blob):
    box = torch.load(io.BytesIO(lzma.decompress(blob)), map_location="cpu")
    net = Net().to(dev)
    wide = lambda v: unpack(*v[:3]).float() * v[3].float()[:, None] if isinstance(v, tuple) else v.float()
    net.load_state_dict({k: wide(v) for k, v in box.items()})
    return net


@torch.no_grad()
def probe(net):
    """On training rows: no position may feel a later token, and the probabilities sum to one. A slow check, off in records."""
    x, _ = next(feed("train", 2, c.ctx))
    other, at = x.clone(), c.ctx // 2
    other[:, at:] = (other[:, at:] + 7) % c.vocab
    with amp():
        a, b = net(x), net(other)
    felt = (a[:, :at] - b[:, :at]).abs().max().item()
    mass = (a.softmax(-1).sum(-1) - 1).abs().max().item()
    say(f"probe: earlier logits moved by {felt:.2e}, masses are off by {mass:.2e}")
    assert felt < 1e-3 and mass < 1e-4


# ------------------------------------------------------------------------------------------------------------- train
def train(val):
    net = Net().to(dev)
    if multi:
        for p in net.parameters():
            dist.broadcast(p.data, 0)
    say(f"model_params:{sum(p.numel() for p in net.parameters())}")
    census(net)
    fast, (opts, groups) = torch.compile(net, dynamic=False), optimisers(net)
    sizes = [c.seq // 2, c.seq]  # half-length rows for the first third of the clock: same tokens, cheaper attention
    rows = {n: c.batch // (world * n) for n in sizes}

    def step(x, y):
        with amp():
            loss = nll(fast, x, y).mean()
        loss.backward()
        for p in net.parameters():
            multi and dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)
        nn.utils.clip_grad_norm_(net.parameters(), c.clip)
        for o in opts:
            o.step()
            o.zero_grad(set_to_none=True)
        return loss.detach()

    # kernels are compiled on a few steps that are then undone, data included
    before = copy.deepcopy(net.state_dict()), [copy.deepcopy(o.state_dict()) for o in opts]
    for n in sizes:
        for x, y in itertools.islice(feed("train", rows[n], n), c.warm):
            step(x, y)
    net.load_state_dict(before[0])
    for o, s in zip(opts, before[1]):
        o.load_state_dict(s)

    slow, limit = {k: v.float().clone() for k, v in net.state_dict().items()}, c.seconds - c.keep_back
    data = {n: feed("train", rows[n], n, skip=0 if n < c.seq else 20) for n in sizes}
    spent, t0 = 0.0, now()
    for i in range(c.iters + 1):
        used = spent + now() - t0
        over = torch.tensor(float(used >= limit or i == c.iters), device=dev)
        done = bool(summed(over).item())
        if done or (c.val_every and i % c.val_every == 0):
            spent = used
            loss, bpb, _ = flat(fast, val)
            say(f"step:{i}/{c.iters} val_loss:{loss:.4f} val_bpb:{bpb:.4f} train_time:{1e3 * spent:.0f}ms step_avg:{1e3 * spent / max(i, 1):.2f}ms")
            t0 = now()
        if done:
            break
        frac = used / limit
        for g in groups:
            g["lr"] = g["top"] * (1.0 if frac < 1 - c.cool else max(c.floor, (1 - frac) / c.cool))
        loss = step(*next(data[sizes[frac > 0.33]]))
        torch._foreach_lerp_(list(slow.values()), [v.float() for v in net.state_dict().values()], 1 - c.ema)
        if i % c.log_every == 0:
            say(f"step:{i}/{c.iters} train_loss:{loss.item():.4f} train_time:{1e3 * (spent + now() - t0):.0f}ms")
    net.load_state_dict(slow)
    return net, spent


def census(net):
    """Parameters by kind, for the log."""
    kinds = {}
    for n, p in net.named_parameters():
        kind = ".".join(q for q in n.split(".") if not q.isdigit())
        kinds[kind] = kinds.get(kind, 0) + p.numel()
    for kind, n in sorted(kinds.items(), key=lambda kn: -kn[1]):
        say(f"  {kind:<28}{n:>12,}", screen=False)


def cards():
    """What the run ran on, into the log only."""
    p = torch.cuda.get_device_properties(dev)
    say(f"card:{p.name} memory:{p.total_memory >> 20} MiB sms:{p.multi_processor_count}", screen=False)
    say(f"cuda:{torch.version.cuda} nccl:{torch.cuda.nccl.version() if multi else 'none'}", screen=False)


def main():
    cards()
    val = whole("val")
    say(f"val tokens:{val.numel() - 1} shards:{len(found('val'))}")
    net, spent = train(val)
    t0 = now()
    moments = second_moments(net)
    say(f"calibration on training rows: {1e3 * (now() - t0):.0f}ms, training and calibration {1e3 * (spent + now() - t0):.0f}ms")
    assert spent + now() - t0 <= c.seconds, "calibration must end within the training time"
    blob = squeeze(net, moments)
    if not rank:
        with open("final_model.xz", "wb") as f:
            f.write(blob)
        total = len(blob) + len(src.encode())
        say(f"Serialized model int{c.bits}+lzma: {len(blob)} bytes")
        say(f"Code size: {len(src.encode())} bytes")
        say(f"Total submission size: {total} bytes")
        assert total <= 16_000_000, f"{total} bytes are too many"
    multi and dist.barrier()
    with open("final_model.xz", "rb") as f:
        net = unsqueeze(f.read())
    c.probe and probe(net)
    t0 = now()
    loss, bpb, n = flat(net, val)
    say(f"quantized val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:{1e3 * (now() - t0):.0f}ms")
    t0 = now()
    loss, bpb, n = slide(net, val)
    say(f"quantized_sliding val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:{1e3 * (now() - t0):.0f}ms")
    if c.lora:
        t0 = now()
        loss, bpb, n = adaptive(net, val)
        say(f"quantized_lora val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:{1e3 * (now() - t0):.0f}ms")
    assert n == val.numel() - 1, f"{n} targets scored of {val.numel() - 1}"
    say(f"final_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")
    multi and dist.destroy_process_group()


if __name__ == "__main__":
    main()
