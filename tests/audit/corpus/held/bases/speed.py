import os
import sys

with open(sys.argv[0]) as f:
    code = f.read()
import copy
import glob
import math
import pickle
import time
import uuid
import zlib
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
import numpy as np
import torch

torch.empty(1, device="cuda", requires_grad=True).backward()
import torch.distributed as dist
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn
from torch.func import functional_call


# --------------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    train_files = os.getenv("TRAIN_FILES", "data/sp1024/fineweb_train_*.bin")
    val_files = os.getenv("VAL_FILES", "data/sp1024/fineweb_val_*.bin")
    spm = os.getenv("SPM", "data/fineweb_1024_bpe.model")
    vocab = 1024
    dim = 512
    layers = 12
    heads = 8
    seq = 1024
    eval_context = 1024
    eval_step = 128
    batch_seqs = 512
    minutes = float(os.getenv("MINUTES", 10))
    calib_seconds = float(os.getenv("CALIB_SECONDS", 10))
    muon_lr = 0.03
    adam_lr = 0.004
    cooldown = 0.45
    ema = 0.996
    bits = 6
    adapt_lr = float(os.getenv("ADAPT_LR", 3e-4))
    adapt_epochs = int(os.getenv("ADAPT_EPOCHS", 2))
    adapt_block = int(os.getenv("ADAPT_BLOCK", 65536))
    adapt = os.getenv("ADAPT", "scales")
    cache = os.getenv("CACHE", "1") == "1"
    cache_weight = 0.08
    probe = os.getenv("PROBE", "0") == "1"


args = Args()
rank = int(os.environ.get("RANK", 0))
world = int(os.environ.get("WORLD_SIZE", 1))
device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
torch.cuda.set_device(device)
if world > 1:
    dist.init_process_group("nccl", device_id=device)
master = rank == 0
run_id = uuid.uuid4()
os.makedirs("logs", exist_ok=True)


def print0(s, console=True):
    if master:
        with open(f"logs/{run_id}.txt", "a") as f:
            if console:
                print(s)
            print(s, file=f)


print0(code, console=False)
torch.manual_seed(int(os.getenv("SEED", 1)))


# --------------------------------------------------------------------------------------------------------------------
def zeropower(G: Tensor) -> Tensor:
    X = G.bfloat16()
    if G.size(-2) > G.size(-1):
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012)):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if G.size(-2) > G.size(-1) else X


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr):
        groups = {}
        for p in params:
            groups.setdefault(p.numel(), []).append(p)
        super().__init__([dict(params=ps) for ps in groups.values()], dict(lr=lr, momentum=0.95))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                if i % world == rank:
                    s = self.state[p]
                    m = s["m"] if "m" in s else s.setdefault("m", torch.zeros_like(p))
                    m.lerp_(p.grad, 1 - group["momentum"])
                    p.add_(zeropower(p.grad.lerp(m, group["momentum"])).to(p.dtype), alpha=-group["lr"])
            if world > 1:
                for i, p in enumerate(group["params"]):
                    dist.broadcast(p.data, i % world)


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


class Half(nn.Module):
    def __init__(self, head_dim, length):
        super().__init__()
        f = (1 / 1024) ** torch.linspace(0, 1, head_dim // 4)
        f = torch.cat([f, f.new_zeros(head_dim // 4)])
        theta = torch.outer(torch.arange(length), f)
        self.register_buffer("c", theta.cos(), persistent=False)
        self.register_buffer("s", theta.sin(), persistent=False)

    def forward(self, x):
        c, s = self.c[None, : x.size(1), None], self.s[None, : x.size(1), None]
        a, b = x.float().chunk(2, -1)
        return torch.cat((a * c + b * s, b * c - a * s), -1).type_as(x)


class Attn(nn.Module):
    def __init__(self):
        super().__init__()
        d, h = args.dim, args.heads
        self.h = h
        self.qkv = nn.Parameter(torch.empty(3, d, d).uniform_(-0.5 * d**-0.5, 0.5 * d**-0.5))
        self.o = nn.Parameter(torch.zeros(d, d))
        self.rot = Half(d // h, args.seq)
        self.lam = nn.Parameter(torch.tensor([0.5, 0.5]))

    def forward(self, x, v1):
        B, T, D = x.shape
        q, k, v = F.linear(x, self.qkv.flatten(0, 1).type_as(x)).view(B, T, 3 * self.h, -1).chunk(3, 2)
        v1 = v if v1 is None else v1
        v = self.lam[0] * v + self.lam[1] * v1
        q, k = self.rot(norm(q)), self.rot(norm(k))
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2).type_as(q), is_causal=True, scale=0.12)
        return F.linear(y.transpose(1, 2).reshape(B, T, D), self.o.type_as(y)), v1


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        d = args.dim
        self.attn = Attn()
        self.fc = nn.Parameter(torch.empty(3 * d, d).uniform_(-0.5 * d**-0.5, 0.5 * d**-0.5))
        self.pr = nn.Parameter(torch.zeros(3 * d, d))
        self.scale_a = nn.Parameter(torch.ones(d))
        self.scale_m = nn.Parameter(torch.ones(d))
        self.mix = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, x, x0, v1):
        x = self.mix[0] * x + self.mix[1] * x0
        y, v1 = self.attn(norm(x), v1)
        x = x + self.scale_a * y
        x = x + self.scale_m * F.linear(F.relu(F.linear(norm(x), self.fc.type_as(x))).square(), self.pr.T.type_as(x))
        return x, v1


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(args.vocab, args.dim)
        self.blocks = nn.ModuleList(Block() for _ in range(args.layers))
        self.head = nn.Parameter(torch.zeros(args.vocab, args.dim))

    def forward(self, idx):
        x = x0 = norm(self.wte(idx))
        v1 = None
        for b in self.blocks:
            x, v1 = b(x, x0, v1)
        z = F.linear(norm(x), self.head.type_as(x)).float()
        return 15 * z * torch.rsqrt(z.square() + 225)


# --------------------------------------------------------------------------------------------------------------------
def _load(file: Path):
    header = torch.from_file(str(file), False, 256, dtype=torch.int32)
    assert header[0] == 20240520 and header[1] == 1
    n = int(header[2])
    with file.open("rb", buffering=0) as f:
        tokens = torch.empty(n, dtype=torch.uint16)
        f.seek(256 * 4)
        assert f.readinto(tokens.numpy()) == 2 * n
    return tokens


def batches(pattern, batch, seq):
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    assert files
    it = iter(files * 64)
    tokens, pos = _load(next(it)), 0
    mine = batch // world
    while True:
        if pos + batch * seq + 1 >= len(tokens):
            tokens, pos = _load(next(it)), 0
        buf = tokens[pos + rank * mine * seq :][: mine * seq + 1]
        yield buf[:-1].view(mine, seq).to(device, torch.int64), buf[1:].view(mine, seq).to(device, torch.int64)
        pos += batch * seq


@lru_cache(1)
def piece_lengths():
    sp = SentencePieceProcessor(args.spm)
    n, sp_, skip = [], [], []
    for i in range(args.vocab):
        special = sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)
        piece = "" if special else sp.id_to_piece(i)
        n.append(0 if special else 1 if sp.is_byte(i) else len(piece.encode()) - 3 * piece.startswith("\u2581"))
        sp_.append(piece.startswith("\u2581"))
        skip.append(special)
    return torch.tensor(n, device=device), torch.tensor(sp_, device=device), torch.tensor(skip, device=device)


def nbytes(prev, cur):
    n, sp_, skip = piece_lengths()
    return (n[cur] + (sp_[cur] & ~skip[prev])).sum().item()


# --------------------------------------------------------------------------------------------------------------------
model = Net().to(device)
model.wte.bfloat16()
matrices = [p for n, p in model.blocks.named_parameters() if p.ndim >= 2]
rest = [p for n, p in model.named_parameters() if p.ndim < 2 or n in ("head", "wte.weight")]
opts = [Muon(matrices, args.muon_lr), torch.optim.Adam(rest, lr=args.adam_lr, betas=(0.8, 0.95), fused=True)]
for o in opts:
    for g in o.param_groups:
        g["lr0"] = g["lr"]
fast = torch.compile(model, dynamic=False)
feed = batches(args.train_files, args.batch_seqs, args.seq)

init = copy.deepcopy((model.state_dict(), [o.state_dict() for o in opts]))
for _ in range(8):
    x, y = next(feed)
    F.cross_entropy(fast(x).flatten(0, 1), y.flatten()).backward()
    [o.step() for o in opts]
    model.zero_grad(set_to_none=True)
model.load_state_dict(init[0])
[o.load_state_dict(s) for o, s in zip(opts, init[1])]
del init

feed = batches(args.train_files, args.batch_seqs, args.seq)
ema = {k: v.detach().float().clone() for k, v in model.state_dict().items()}
limit = 60 * args.minutes - args.calib_seconds
torch.cuda.synchronize()
t0 = time.perf_counter()
step = 0
while (elapsed := time.perf_counter() - t0) < limit:
    x, y = next(feed)
    loss = F.cross_entropy(fast(x).flatten(0, 1), y.flatten())
    loss.backward()
    if world > 1:
        for p in model.parameters():
            dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)
    w = min((1 - elapsed / limit) / args.cooldown, 1.0)
    for o in opts:
        for g in o.param_groups:
            g["lr"] = g["lr0"] * w
        o.step()
    model.zero_grad(set_to_none=True)
    for k, v in model.state_dict().items():
        ema[k].lerp_(v.float(), 1 - args.ema)
    step += 1
    if world > 1 and step % 50 == 0:
        stop = torch.tensor(time.perf_counter() - t0, device=device)
        dist.broadcast(stop, 0)
    if step % 200 == 0:
        print0(f"step:{step} loss:{loss.item():.4f} time:{time.perf_counter() - t0:.1f}s avg:{1000 * (time.perf_counter() - t0) / step:.2f}ms")
model.load_state_dict(ema)

# --------------------------------------------------------------------------------------------------------------------
energy = {}


def listen(name, mod, inp):
    energy[name] = energy.get(name, 0) + inp[0].detach().float().square().mean((0, 1))


hooks = [b.attn.register_forward_pre_hook(partial(listen, f"blocks.{i}.attn.qkv")) for i, b in enumerate(model.blocks)]
with torch.no_grad():
    for _ in range(8):
        x, y = next(feed)
        model(x)
[h.remove() for h in hooks]
print0(f"training and calibration: {time.perf_counter() - t0:.1f}s")
assert time.perf_counter() - t0 < 60 * args.minutes


def squash(name, w):
    if w.ndim < 2:
        return w.half().cpu()
    top = 2 ** (args.bits - 1) - 1
    best = None
    flat = w.float().flatten(0, -2)
    weight = energy.get(name, torch.ones(flat.size(1), device=flat.device))
    for k in (2.2, 2.6, 3.0, 3.5, 4.0):
        s = (k * flat.std(1, keepdim=True) / top).half().float()
        q = (flat / s).round().clamp(-top - 1, top)
        err = ((q * s - flat).square() * weight).sum().item()
        if best is None or err < best[0]:
            best = (err, q.to(torch.int8), s.half())
    return best[1].view(w.shape).cpu(), best[2].view(*w.shape[:-1], 1).cpu()


if master:
    blob = zlib.compress(pickle.dumps({k: squash(k, v) for k, v in model.state_dict().items()}), 9)
    Path("model.bin").write_bytes(blob)
    print0(f"model {len(blob)} code {len(code.encode())} total {len(blob) + len(code.encode())}")
    assert len(blob) + len(code.encode()) < 16 * 10**6
if world > 1:
    dist.barrier()
state = pickle.loads(zlib.decompress(Path("model.bin").read_bytes()))
model.load_state_dict({k: (v[0].float() * v[1].float() if isinstance(v, tuple) else v.float()) for k, v in state.items()})
model.eval()

# --------------------------------------------------------------------------------------------------------------------
val = torch.cat([_load(Path(p)) for p in sorted(glob.glob(args.val_files))]).to(torch.int64)
N = len(val) - 1


class RecentWords:
    """Follower counts of the two last tokens, of what has been scored; a row over the vocabulary, mixed into p."""

    def __init__(self):
        self.rows = {}

    def row(self, a, b):
        r = self.rows.get((a, b))
        return None if r is None else r / r.sum()

    def add(self, a, b, c):
        r = self.rows.get((a, b))
        if r is None:
            r = self.rows[(a, b)] = torch.full((args.vocab,), 0.02, device=device)
        r[c] += 1


recent = RecentWords()


def spans(lo, hi):
    """Windows whose scored targets partition [lo, hi): (start of context, first scored, end)"""
    at = lo
    while at < hi:
        end = min(at + args.eval_step, hi)
        yield max(0, end - args.eval_context), at, end
        at = end


def nll_of(params, lo, hi):
    out = torch.zeros(hi - lo, device=device, dtype=torch.float64)
    with torch.no_grad():
        for a, first, end in spans(lo, hi):
            ids = val[a : end + 1].to(device)
            z = functional_call(model, params, (ids[None, :-1],))[0, first - a :]
            p = z.softmax(-1)
            if args.cache:
                for j, t in enumerate(range(first, end)):
                    if t > 0 and (r := recent.row(int(val[t - 1]), int(val[t]))) is not None:
                        p[j] = (1 - args.cache_weight) * p[j] + args.cache_weight * r
                    if t > 0:
                        recent.add(int(val[t - 1]), int(val[t]), int(val[t + 1]))
            out[first - lo : end - lo] = -p.gather(-1, ids[first - a + 1 :, None])[:, 0].double().log()
    return out


def tuned(params, names, lo, hi):
    """The parameters after `adapt_epochs` passes of Adam over targets lo .. hi"""
    leaf = {n: params[n].detach().clone().requires_grad_() for n in names}
    opt = torch.optim.Adam(leaf.values(), lr=args.adapt_lr)
    for _ in range(args.adapt_epochs):
        for a in range(lo, hi - args.seq, args.seq):
            ids = val[a : a + args.seq + 1].to(device)
            z = functional_call(model, {**params, **leaf}, (ids[None, :-1],))
            opt.zero_grad()
            F.cross_entropy(z[0], ids[1:]).backward()
            opt.step()
    return {**params, **{n: p.detach() for n, p in leaf.items()}}


params = {n: p.detach() for n, p in model.named_parameters()}
chosen = [n for n in params if "scale" in n or n.endswith("mix")] if args.adapt == "scales" else list(params)
te = time.perf_counter()
nats = octets = 0.0
done = 0
for lo in range(0, N, args.adapt_block):
    hi = min(lo + args.adapt_block, N)
    got = nll_of(params, lo, hi)
    nats += got.sum().item()
    octets += nbytes(val[lo:hi].to(device), val[lo + 1 : hi + 1].to(device))
    done += hi - lo
    if args.adapt_epochs and hi < N:
        params = tuned(params, chosen, lo, hi)
    if args.probe:
        print0(f"block at {lo}: {got.mean().item():.4f}, learnt: {nll_of(params, lo, hi).mean().item():.4f}")
assert done == N
print0(f"val_loss:{nats / N:.6f} val_bpb:{nats / math.log(2) / octets:.6f} eval:{time.perf_counter() - te:.1f}s")
if world > 1:
    dist.destroy_process_group()
