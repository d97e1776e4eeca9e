# train_gpt.py -- parameter golf, speedrun flavour.
# One packed sequence per rank, flex attention with document masks, paired heads in every other layer, value embeddings,
# backout, NorMuon with cautious weight decay, int6 rows + zstd. At evaluation: sliding windows (logged), then score-first
# test-time training of the last blocks in two copies (a slow and a fast learning rate, mixed with a fixed weight) and a copy
# cache inside the document.
import copy
import glob
import io
import math
import os
import random
import sys
import time
import uuid

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import zstandard
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

# -----------------------------------------------------------------------------
# settings: plain globals, every one of them can be set from outside

S = lambda k, d: os.environ.get(k, d)
I = lambda k, d: int(os.environ.get(k, d))
R = lambda k, d: float(os.environ.get(k, d))
B = lambda k, d: bool(int(os.environ.get(k, d)))

DATA_PATH = S("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
TRAIN_FILES = os.path.join(DATA_PATH, "fineweb_train_*.bin")
VAL_FILES = os.path.join(DATA_PATH, "fineweb_val_*.bin")
TOKENIZER_PATH = S("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
RUN_ID = S("RUN_ID", str(uuid.uuid4()))
SEED = I("SEED", 1337)
OUT_PATH = S("OUT_PATH", "final_model.int6.ptz")
SIZE_LIMIT = 16_000_000

# shape
VOCAB = I("VOCAB_SIZE", 1024)
LAYERS = I("NUM_LAYERS", 9)
DIM = I("MODEL_DIM", 512)
HEADS = I("NUM_HEADS", 8)
HDIM = DIM // HEADS
MLP_MULT = I("MLP_MULT", 3)
PAIRED = tuple(int(i) for i in S("PAIRED_LAYERS", "0,2,5,7").split(","))
VE_AT = {0: 0, 1: 1, 2: 2, LAYERS - 3: 0, LAYERS - 2: 1, LAYERS - 1: 2}
BACKOUT_AT = I("BACKOUT_LAYER", 4)
ROPE_BASE = R("ROPE_BASE", 10000.0)
SOFTCAP = R("LOGIT_SOFTCAP", 30.0)

# training
ITERATIONS = I("ITERATIONS", 20000)
WARMDOWN = I("WARMDOWN_ITERS", 3200)
COMPILE_STEPS = I("COMPILE_STEPS", 12)
BATCH_TOKENS = I("TRAIN_BATCH_TOKENS", 524_288)
TRAIN_SECONDS = R("MAX_WALLCLOCK_SECONDS", 600.0)
RESERVE_SECONDS = R("CALIB_RESERVE_SECONDS", 9.0)
VAL_EVERY = I("VAL_LOSS_EVERY", 1500)
LOG_EVERY = I("TRAIN_LOG_EVERY", 200)
WIN_SHORT = I("WINDOW_SHORT", 512)
WIN_LONG = I("WINDOW_LONG", 2048)
MUON_LR = R("MATRIX_LR", 0.023)
MUON_MOM = R("MUON_MOMENTUM", 0.95)
MUON_BETA2 = R("NORMUON_BETA2", 0.95)
MUON_WD = R("MUON_WD", 1.2)
EMBED_LR = R("EMBED_LR", 0.05)
VE_LR = R("VE_LR", 0.05)
SCALAR_LR = R("SCALAR_LR", 0.02)
ADAM_WD = R("ADAM_WD", 0.005)
CLIP = R("GRAD_CLIP", 0.3)
EMA_DECAY = R("EMA_DECAY", 0.997)
EMA_FROM = R("EMA_FROM_FRACTION", 0.5)

# quantisation
QMAX = 31
PCTS = tuple(float(p) for p in S("CLIP_PERCENTILES", "0.9985,0.9993,0.9997,0.9999,1.0").split(","))
CALIB_BATCHES = I("CALIB_BATCHES", 16)
ZSTD_LEVEL = I("ZSTD_LEVEL", 22)

# evaluation
EVAL_SEQ = I("EVAL_SEQ_LEN", 2048)
STRIDE = I("EVAL_STRIDE", 64)
EVAL_WINDOWS = I("EVAL_WINDOWS", 32)
EVAL_SECONDS = R("EVAL_SECONDS", 600.0)
ADAPT_UNTIL = R("ADAPT_UNTIL_SECONDS", 500.0)
TTT = B("TTT_ENABLED", "1")
TTT_BLOCKS = I("TTT_BLOCKS", 3)
TTT_CHUNK = I("TTT_CHUNK_TOKENS", 32_768)
TTT_EPOCHS = I("TTT_EPOCHS", 2)
TTT_SLOW_LR = R("TTT_SLOW_LR", 0.0015)
TTT_FAST_LR = R("TTT_FAST_LR", 0.006)
TTT_MOM = R("TTT_MOMENTUM", 0.9)
TTT_CLIP = R("TTT_GRAD_CLIP", 1.0)
W_SLOW = R("TTT_MIX_SLOW", 0.55)
COPY = B("COPY_ENABLED", "1")
COPY_MIN = I("COPY_MIN_MATCH", 5)
COPY_MAX = I("COPY_MAX_MATCH", 48)
COPY_TOP = R("COPY_TRUST_TOP", 0.62)
COPY_TAU = R("COPY_TRUST_TAU", 11.0)

SPLIT = LAYERS - TTT_BLOCKS
BOS = I("BOS_ID", 1)

# -----------------------------------------------------------------------------
# ranks, clock, log

RANK = I("RANK", 0)
WORLD = I("WORLD_SIZE", 1)
LOCAL = I("LOCAL_RANK", 0)
DISTRIBUTED = "RANK" in os.environ and "WORLD_SIZE" in os.environ
MASTER = RANK == 0
ACCUM = max(1, 8 // WORLD)
SEQ_TOKENS = BATCH_TOKENS // (WORLD * ACCUM)
DEVICE = torch.device("cuda", LOCAL)
LOGFILE = f"logs/{RUN_ID}.txt"

now = lambda: (torch.cuda.synchronize(), time.perf_counter())[1]
barrier = lambda: dist.barrier() if DISTRIBUTED else None
reduce_sum = lambda t: (dist.all_reduce(t, op=dist.ReduceOp.SUM) if DISTRIBUTED else None, t)[1]
reduce_avg = lambda t: (dist.all_reduce(t, op=dist.ReduceOp.AVG) if DISTRIBUTED else None, t)[1]


def say(text: str, console: bool = True) -> None:
    if not MASTER:
        return
    if console:
        print(text, flush=True)
    with open(LOGFILE, "a", encoding="utf-8") as f:
        print(text, file=f)


def agree(flag: bool) -> bool:
    """Rank 0's answer, on every rank."""
    t = torch.tensor([int(flag)], device=DEVICE)
    if DISTRIBUTED:
        dist.broadcast(t, 0)
    return bool(t.item())


# -----------------------------------------------------------------------------
# shards

HEADER_INTS = 256
MAGIC = 20240520


def load_shard(path: str) -> Tensor:
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS or int(header[0]) != MAGIC or int(header[1]) != 1:
        raise ValueError(f"unexpected header in {path}")
    count = int(header[2])
    tokens = np.fromfile(path, dtype="<u2", count=count, offset=HEADER_INTS * 4)
    if tokens.size != count:
        raise ValueError(f"short shard {path}")
    return torch.from_numpy(tokens.astype(np.int32))


def load_all(pattern: str) -> Tensor:
    files = sorted(glob.glob(pattern))
    if not files:
        raise FileNotFoundError(pattern)
    return torch.cat([load_shard(f) for f in files])


class Stream:
    """Tokens of the shards in order, round and round."""

    def __init__(self, pattern: str):
        self.files = sorted(glob.glob(pattern))
        if not self.files:
            raise FileNotFoundError(pattern)
        self.at = -1
        self.next_shard()

    def next_shard(self) -> None:
        self.at = (self.at + 1) % len(self.files)
        self.tokens = load_shard(self.files[self.at])
        self.pos = 0

    def take(self, n: int) -> Tensor:
        parts = []
        while n > 0:
            left = self.tokens.numel() - self.pos
            if left <= 0:
                self.next_shard()
                continue
            k = min(n, left)
            parts.append(self.tokens[self.pos : self.pos + k])
            self.pos += k
            n -= k
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def doc_ids(tokens: Tensor) -> Tensor:
    """Number of the document at each position: a BOS opens the next one."""
    return torch.cumsum((tokens == BOS).to(torch.int32), 0, dtype=torch.int32)


class VarlenLoader:
    """One packed sequence of many documents per rank and micro step."""

    def __init__(self, pattern: str):
        self.stream = Stream(pattern)

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        span = SEQ_TOKENS + 1
        block = self.stream.take(span * WORLD)
        mine = block[RANK * span : (RANK + 1) * span].pin_memory().to(DEVICE, non_blocking=True)
        x = mine[:-1].contiguous()
        return x, mine[1:].to(torch.int64), doc_ids(x)


# -----------------------------------------------------------------------------
# bytes of a token


def byte_tables(sp: spm.SentencePieceProcessor) -> tuple[Tensor, Tensor, Tensor]:
    """bytes of the piece without its mark | does it begin with a space | does no space follow it (control pieces)"""
    size = max(int(sp.vocab_size()), VOCAB)
    base = np.zeros(size, dtype=np.int16)
    lead = np.zeros(size, dtype=np.bool_)
    edge = np.ones(size, dtype=np.bool_)
    for i in range(int(sp.vocab_size())):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            continue
        edge[i] = False
        if sp.is_byte(i):
            base[i] = 1
            continue
        piece = sp.id_to_piece(i)
        if piece.startswith("▁"):
            lead[i] = True
            piece = piece[1:]
        base[i] = len(piece.encode("utf-8"))
    put = lambda a: torch.from_numpy(a).to(DEVICE)
    return put(base), put(lead), put(edge)


def count_bytes(prev: Tensor, target: Tensor, tables: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    base, lead, edge = tables
    n = base[target].to(torch.int64)
    n += (lead[target] & ~edge[prev]).to(torch.int64)
    return n


# -----------------------------------------------------------------------------
# masks

flex = torch.compile(flex_attention, dynamic=False)
make_mask = torch.compile(create_block_mask, dynamic=False)


def doc_mask(docs: Tensor, window: int) -> BlockMask:
    """Causal, inside the document, not further back than the window."""

    def mod(b, h, q, k):
        return (q >= k) & (docs[q] == docs[k]) & (q - k < window)

    n = docs.numel()
    return make_mask(mod, None, None, n, n, device=docs.device, BLOCK_SIZE=128)


class Masks:
    """The masks of one packed sequence: short and long, for plain heads and for paired ones (two rows to a token)."""

    def __init__(self, docs: Tensor, short: int, long: int):
        twice = docs.repeat_interleave(2)
        self.plain = (doc_mask(docs, short), doc_mask(docs, long))
        self.paired = (doc_mask(twice, 2 * short), doc_mask(twice, 2 * long))

    def of(self, layer: int) -> BlockMask:
        pick = self.paired if layer in PAIRED else self.plain
        return pick[int(layer % 3 == 2 or layer == LAYERS - 1)]


# -----------------------------------------------------------------------------
# the network

rms = lambda x: F.rms_norm(x, (x.size(-1),))


class Lin(nn.Linear):
    """Weights in fp32, product in the input's type. `seen` gathers the inputs' second moments while calibrating."""

    def __init__(self, n_in: int, n_out: int, zero: bool = False):
        super().__init__(n_in, n_out, bias=False)
        bound = 0.5 * n_in**-0.5 * math.sqrt(3.0)
        with torch.no_grad():
            self.weight.zero_() if zero else self.weight.uniform_(-bound, bound)
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.seen is not None:
            self.seen += x.detach().float().square().reshape(-1, x.size(-1)).sum(0)
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    def __init__(self, step: float = 1.0):
        super().__init__()
        freq = (1.0 / ROPE_BASE) ** torch.linspace(0, 1, HDIM // 4, dtype=torch.float32)
        self.register_buffer("freq", torch.cat([freq, freq.new_zeros(HDIM // 4)]) * step, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        t = torch.arange(x.size(1), device=x.device, dtype=torch.float32)
        theta = torch.outer(t, self.freq)
        cos, sin = theta.cos()[None, :, None, :], theta.sin()[None, :, None, :]
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin), -1).type_as(x)


class Attention(nn.Module):
    def __init__(self, layer: int):
        super().__init__()
        self.paired = layer in PAIRED
        self.q = Lin(DIM, DIM)
        self.k = Lin(DIM, DIM)
        self.v = Lin(DIM, DIM)
        self.o = Lin(DIM, DIM, zero=True)
        self.rotary = Rotary(0.5 if self.paired else 1.0)
        self.gate = nn.Parameter(torch.zeros(HEADS, 12))
        self.gain = nn.Parameter(torch.full((HEADS,), 1.4))
        self.lambdas = nn.Parameter(torch.tensor([1.0, 0.5]))

    @staticmethod
    def pair(t: Tensor) -> Tensor:
        """(1, T, H, D) -> (1, 2T, H/2, D): neighbouring heads become two rows of the same token."""
        n = t.size(1)
        return t.view(1, n, HEADS // 2, 2, HDIM).transpose(2, 3).reshape(1, 2 * n, HEADS // 2, HDIM)

    @staticmethod
    def unpair(t: Tensor) -> Tensor:
        n = t.size(1) // 2
        return t.view(1, n, 2, HEADS // 2, HDIM).transpose(2, 3).reshape(1, n, HEADS, HDIM)

    def forward(self, x: Tensor, ve: Tensor | None, mask: BlockMask) -> Tensor:
        n = x.size(1)
        q = rms(self.q(x).view(1, n, HEADS, HDIM)) * self.gain.to(x.dtype)[:, None]
        k = rms(self.k(x).view(1, n, HEADS, HDIM))
        v = self.v(x).view(1, n, HEADS, HDIM)
        lam = self.lambdas.to(x.dtype)
        v = lam[0] * v + lam[1] * ve.view_as(v) if ve is not None else lam[0] * v
        if self.paired:
            q, k, v = self.pair(q), self.pair(k), self.pair(v)
        q, k = self.rotary(q), self.rotary(k)
        y = flex(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=mask)
        y = y.transpose(1, 2).contiguous()
        y = self.unpair(y) if self.paired else y
        y = y * torch.sigmoid(F.linear(x[..., :12], self.gate.to(x.dtype))).view(1, n, HEADS, 1)
        return self.o(y.reshape(1, n, DIM))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = Lin(DIM, MLP_MULT * DIM)
        self.down = Lin(MLP_MULT * DIM, DIM, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.leaky_relu(self.up(x), 0.25).square())


class Block(nn.Module):
    def __init__(self, layer: int):
        super().__init__()
        self.attn = Attention(layer)
        self.mlp = MLP()
        self.mix = nn.Parameter(torch.tensor([1.0, 0.0]))
        self.a_scale = nn.Parameter(torch.ones(DIM))
        self.m_scale = nn.Parameter(torch.ones(DIM))

    def forward(self, x: Tensor, x0: Tensor, ve: Tensor | None, mask: BlockMask) -> Tensor:
        mix = self.mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.a_scale.to(x.dtype) * self.attn(rms(x), ve, mask)
        return x + self.m_scale.to(x.dtype) * self.mlp(rms(x))


class Trunk(nn.Module):
    """Embeddings and the blocks that stay as they are at evaluation."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.ve = nn.ModuleList([nn.Embedding(VOCAB, DIM) for _ in range(3)])
        for table in self.ve:
            nn.init.normal_(table.weight, std=0.01)
        self.smear = nn.Parameter(torch.zeros(12))
        self.smear_scale = nn.Parameter(torch.zeros(1))
        self.blocks = nn.ModuleList([Block(i) for i in range(SPLIT)])

    def forward(self, tokens: Tensor, docs: Tensor, masks: list[BlockMask]):
        x = self.embed(tokens)[None].to(torch.bfloat16)
        # smear: a little of the token before, never across the start of a document
        same = (docs[1:] == docs[:-1]).to(x.dtype)[None, :, None]
        g = self.smear_scale.to(x.dtype) * torch.sigmoid((x[:, 1:, :12] * self.smear.to(x.dtype)).sum(-1, keepdim=True))
        x = torch.cat([x[:, :1], x[:, 1:] + same * g * x[:, :-1]], 1)
        x = x0 = rms(x)
        ve = [table(tokens)[None].to(torch.bfloat16) for table in self.ve]
        skips, back = [], None
        for i, block in enumerate(self.blocks):
            x = block(x, x0, ve[VE_AT[i]] if i in VE_AT else None, masks[i])
            if i < LAYERS // 2:
                skips.append(x)
            if i == BACKOUT_AT:
                back = x
        return x, x0, ve, skips, back


class Tail(nn.Module):
    """The last blocks: what test-time training moves. Returns the final hidden state."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(i) for i in range(SPLIT, LAYERS)])
        self.skip = nn.Parameter(torch.full((TTT_BLOCKS, DIM), 0.5))
        self.backout = nn.Parameter(torch.tensor([0.4]))

    def forward(self, state, masks: list[BlockMask]) -> Tensor:
        x, x0, ve, skips, back = state
        for j, block in enumerate(self.blocks):
            i = SPLIT + j
            x = x + self.skip[j].to(x.dtype) * skips[TTT_BLOCKS - 1 - j]
            x = block(x, x0, ve[VE_AT[i]] if i in VE_AT else None, masks[i])
        return rms(x - self.backout.to(x.dtype) * back)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = Trunk()
        self.tail = Tail()

    def logits(self, h: Tensor) -> Tensor:
        z = F.linear(h[0], self.trunk.embed.weight.to(h.dtype)).float()
        return SOFTCAP * torch.tanh(z / SOFTCAP)

    def forward(self, tokens: Tensor, targets: Tensor, docs: Tensor, masks: list[BlockMask]) -> Tensor:
        h = self.tail(self.trunk(tokens, docs, masks), masks)
        return F.cross_entropy(self.logits(h), targets)

    def score(self, tail: Tail, state, masks: list[BlockMask]) -> Tensor:
        return self.logits(tail(state, masks))


def layer_masks(docs: Tensor, short: int = WIN_SHORT, long: int = WIN_LONG) -> list[BlockMask]:
    m = Masks(docs, short, long)
    return [m.of(i) for i in range(LAYERS)]


# -----------------------------------------------------------------------------
# NorMuon

POLAR = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


@torch.compile(dynamic=False, fullgraph=True)
def polar(g: Tensor) -> Tensor:
    x = g.bfloat16()
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR:
        y = x @ x.mT
        x = a * x + (b * y + c * y @ y) @ x
    return x.mT if tall else x


class NorMuon(torch.optim.Optimizer):
    """Muon with a second moment per row and cautious weight decay; the matrices are dealt to the ranks by number."""

    def __init__(self, params, lr: float, momentum: float, beta2: float, wd: float):
        super().__init__(params, dict(lr=lr, momentum=momentum, beta2=beta2, wd=wd, base_lr=lr))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = group["params"]
            total = sum(p.numel() for p in params)
            flat = torch.zeros(total, device=DEVICE, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(params):
                n = p.numel()
                if i % WORLD == RANK and p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state["m"] = torch.zeros_like(p)
                        state["v"] = torch.zeros(p.size(0), 1, device=DEVICE)
                    state["m"].lerp_(p.grad, 1 - group["momentum"])
                    u = polar(p.grad.lerp(state["m"], group["momentum"])).float()
                    norm = u.norm()
                    state["v"].lerp_(u.square().mean(1, keepdim=True), 1 - group["beta2"])
                    u = u * state["v"].clamp_min(1e-10).rsqrt()
                    u = u * (norm / u.norm().clamp_min(1e-10)) * max(1.0, p.size(0) / p.size(1)) ** 0.5
                    flat[at : at + n] = u.flatten().bfloat16()
                at += n
            reduce_sum(flat)
            at = 0
            for p in params:
                n = p.numel()
                u = flat[at : at + n].view_as(p).to(p.dtype)
                keep = (u * p > 0).to(p.dtype)  # cautious: decay only where the step shrinks the weight anyway
                p.mul_(1 - group["lr"] * group["wd"] * 0.1 * keep)
                p.add_(u, alpha=-group["lr"])
                at += n


def optimizers(net: Net) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in net.named_parameters() if p.ndim == 2 and n.endswith("weight") and ".ve." not in n and "embed" not in n]
    taken = {id(p) for p in matrices}
    embeds = [net.trunk.embed.weight]
    values = [t.weight for t in net.trunk.ve]
    taken |= {id(p) for p in embeds + values}
    rest = [p for p in net.parameters() if id(p) not in taken]
    groups = [(embeds, EMBED_LR, ADAM_WD), (values, VE_LR, ADAM_WD), (rest, SCALAR_LR, 0.0)]
    adam = torch.optim.AdamW(
        [dict(params=p, lr=lr, base_lr=lr, weight_decay=wd) for p, lr, wd in groups], betas=(0.9, 0.95), eps=1e-8, fused=True
    )
    return [NorMuon(matrices, MUON_LR, MUON_MOM, MUON_BETA2, MUON_WD), adam]


class Average:
    """Exponential moving average of the weights, started in the second half."""

    def __init__(self, net: nn.Module):
        self.net = net
        self.shadow: dict[str, Tensor] | None = None

    @torch.no_grad()
    def update(self) -> None:
        if self.shadow is None:
            self.shadow = {n: p.detach().clone() for n, p in self.net.named_parameters()}
            return
        for n, p in self.net.named_parameters():
            self.shadow[n].lerp_(p.detach(), 1 - EMA_DECAY)

    @torch.no_grad()
    def apply(self) -> None:
        if self.shadow is not None:
            for n, p in self.net.named_parameters():
                p.copy_(self.shadow[n])


# -----------------------------------------------------------------------------
# plain validation while training: log only


@torch.no_grad()
def quick_val(fast_net, val: Tensor, tables) -> tuple[float, float]:
    """Loss and bits per byte on packed pieces of the whole validation stream, no overlap."""
    pieces = (val.numel() - 1) // SEQ_TOKENS
    acc = torch.zeros(3, device=DEVICE, dtype=torch.float64)
    for i in range(RANK, pieces, WORLD):
        block = val[i * SEQ_TOKENS : (i + 1) * SEQ_TOKENS + 1].to(DEVICE)
        x, y = block[:-1].contiguous(), block[1:].to(torch.int64)
        docs = doc_ids(x)
        loss = fast_net(x, y, docs, layer_masks(docs))
        acc += torch.stack([loss.double() * y.numel(), loss.new_tensor(y.numel()).double(), count_bytes(x, y, tables).sum().double()])
    reduce_sum(acc)
    nats, tokens, nbytes = acc.tolist()
    return nats / tokens, nats / math.log(2) / nbytes


# -----------------------------------------------------------------------------
# training


def lr_factor(step: int, elapsed: float, cap: float) -> float:
    if step == 0:
        return 1.0
    per_step = elapsed / step
    down = WARMDOWN * per_step
    left = max(cap - elapsed, 0.0)
    by_clock = left / max(down, 1e-9) if left <= down else 1.0
    by_steps = (ITERATIONS - step) / WARMDOWN if step > ITERATIONS - WARMDOWN else 1.0
    return max(min(by_clock, by_steps, 1.0), 0.0)


def compile_warmup(net: Net, fast_net, opts) -> None:
    """A few steps on random tokens so that every kernel is built; then weights and optimizers as they were."""
    weights = {k: v.detach().cpu().clone() for k, v in net.state_dict().items()}
    states = [copy.deepcopy(o.state_dict()) for o in opts]
    gen = torch.Generator().manual_seed(SEED)
    for _ in range(COMPILE_STEPS):
        block = torch.randint(2, VOCAB, (SEQ_TOKENS + 1,), generator=gen, dtype=torch.int32)
        block[::700] = BOS
        block = block.to(DEVICE)
        x, docs = block[:-1].contiguous(), doc_ids(block[:-1])
        fast_net(x, block[1:].to(torch.int64), docs, layer_masks(docs)).backward()
        for o in opts:
            o.step()
        net.zero_grad(set_to_none=True)
    net.load_state_dict(weights)
    for o, s in zip(opts, states):
        o.load_state_dict(s)
        if isinstance(o, NorMuon):
            o.state.clear()
    torch.cuda.synchronize()


def train(net: Net, fast_net, opts, val: Tensor, tables) -> float:
    """Trains until the clock of the training, less what calibration needs, has run out. Returns the seconds used."""
    loader = VarlenLoader(TRAIN_FILES)
    average = Average(net)
    cap = TRAIN_SECONDS - RESERVE_SECONDS
    used, step, stop_at = 0.0, 0, None
    barrier()
    started = now()
    while True:
        last = step == ITERATIONS or (stop_at is not None and step >= stop_at)
        if last or (VAL_EVERY > 0 and step > 0 and step % VAL_EVERY == 0):
            used += now() - started
            loss, bpb = quick_val(fast_net, val, tables)
            say(f"step:{step}/{ITERATIONS} val_loss:{loss:.4f} val_bpb:{bpb:.4f} train_time:{1000 * used:.0f}ms")
            barrier()
            started = now()
        if last:
            break
        elapsed = used + now() - started
        scale = lr_factor(step, elapsed, cap)
        total = torch.zeros((), device=DEVICE)
        for _ in range(ACCUM):
            x, y, docs = loader.batch()
            loss = fast_net(x, y, docs, layer_masks(docs))
            (loss / ACCUM).backward()
            total += loss.detach() / ACCUM
        for p in net.parameters():
            if p.grad is not None:
                reduce_avg(p.grad)
        if CLIP > 0:
            torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        warm = min(step / 400, 1.0)
        opts[0].param_groups[0]["momentum"] = 0.85 + (MUON_MOM - 0.85) * warm
        for o in opts:
            for group in o.param_groups:
                group["lr"] = group["base_lr"] * scale
            o.step()
        net.zero_grad(set_to_none=True)
        step += 1
        elapsed = used + now() - started
        if elapsed > EMA_FROM * cap:
            average.update()
        if step % LOG_EVERY == 0 or step <= 5:
            say(f"step:{step}/{ITERATIONS} train_loss:{total.item():.4f} train_time:{1000 * elapsed:.0f}ms step_avg:{1000 * elapsed / step:.2f}ms")
        if stop_at is None and agree(elapsed >= cap):
            stop_at = step
    average.apply()
    say(f"training stopped at step {step} after {used:.1f}s, ema applied, peak {torch.cuda.max_memory_allocated() >> 20} MiB")
    return used


# -----------------------------------------------------------------------------
# quantisation: int6 rows, the clip of each row chosen among percentiles by the error on training activations


@torch.no_grad()
def activation_weights(net: Net) -> dict[str, Tensor]:
    """Mean square of every linear layer's inputs on training tokens."""
    loader = VarlenLoader(TRAIN_FILES)
    linears = {n: m for n, m in net.named_modules() if isinstance(m, Lin)}
    for m in linears.values():
        m.seen = torch.zeros(m.in_features, device=DEVICE)
    for _ in range(CALIB_BATCHES):
        x, y, docs = loader.batch()
        net(x, y, docs, layer_masks(docs))
    out = {}
    for n, m in linears.items():
        reduce_sum(m.seen)
        out[n + ".weight"] = m.seen / m.seen.mean().clamp_min(1e-12)
        m.seen = None
    return out


def quantise_rows(w: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
    w = w.float()
    h = torch.ones(w.size(1), device=w.device) if h is None else h
    best = torch.full((w.size(0),), float("inf"), device=w.device)
    best_q = torch.zeros_like(w)
    best_s = torch.ones(w.size(0), device=w.device)
    for pct in PCTS:
        clip = torch.quantile(w.abs(), pct, dim=1).clamp_min(1e-8)
        scale = (clip / QMAX).half().float().clamp_min(6e-8)
        q = torch.round(w / scale[:, None]).clamp(-QMAX, QMAX)
        err = ((q * scale[:, None] - w).square() * h).sum(1)
        win = err < best
        best = torch.where(win, err, best)
        best_q[win], best_s[win] = q[win], scale[win]
    return best_q.to(torch.int8), best_s.half()


def pack6(q: Tensor) -> np.ndarray:
    """Four values of six bits in three bytes."""
    v = (q.flatten().cpu().numpy().astype(np.int16) + 32).astype(np.uint8)
    v = np.concatenate([v, np.full(-v.size % 4, 32, dtype=np.uint8)]).reshape(-1, 4).astype(np.uint32)
    word = v[:, 0] | v[:, 1] << 6 | v[:, 2] << 12 | v[:, 3] << 18
    return np.stack([word & 255, word >> 8 & 255, word >> 16 & 255], 1).astype(np.uint8)


def unpack6(raw: Tensor, shape: tuple[int, ...]) -> Tensor:
    b = raw.numpy().astype(np.uint32)
    word = b[:, 0] | b[:, 1] << 8 | b[:, 2] << 16
    v = np.stack([word >> s & 63 for s in (0, 6, 12, 18)], 1).reshape(-1)[: math.prod(shape)]
    return torch.from_numpy(v.astype(np.int16) - 32).view(shape)


def pack_model(net: Net, weights: dict[str, Tensor]) -> bytes:
    packed = {}
    for name, p in net.state_dict().items():
        if p.ndim == 2 and p.numel() >= 65_536:
            q, s = quantise_rows(p, weights.get(name))
            packed[name] = ("q", tuple(p.shape), torch.from_numpy(pack6(q)), s.cpu())
        else:
            packed[name] = ("f", p.detach().half().cpu())
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    return zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(buffer.getvalue())


def unpack_model(blob: bytes) -> dict[str, Tensor]:
    raw = zstandard.ZstdDecompressor().decompress(blob)
    out = {}
    for name, entry in torch.load(io.BytesIO(raw), map_location="cpu").items():
        if entry[0] == "q":
            _, shape, q, s = entry
            out[name] = unpack6(q, shape).float() * s.float()[:, None]
        else:
            out[name] = entry[1].float()
    return out


def write_artifact(net: Net, weights: dict[str, Tensor]) -> None:
    if MASTER:
        blob = pack_model(net, weights)
        with open(OUT_PATH, "wb") as f:
            f.write(blob)
        code_bytes = os.path.getsize(os.path.abspath(__file__))
        model_bytes = os.path.getsize(OUT_PATH)
        total = code_bytes + model_bytes
        say(f"Serialized model int6+zstd: {model_bytes} bytes")
        say(f"Code size: {code_bytes} bytes")
        say(f"Total submission size: {total} bytes")
        if total > SIZE_LIMIT:
            raise RuntimeError(f"{total} bytes are over {SIZE_LIMIT}")
    barrier()


# -----------------------------------------------------------------------------
# windows: position i is an input, its target is token i + 1; each position is scored in exactly one window


def windows(lo: int, hi: int) -> list[tuple[int, int, int]]:
    """(begin, first scored, end) of the windows that score the positions lo .. hi - 1."""
    out = []
    for s in range(lo, hi, STRIDE):
        e = min(s + STRIDE, hi)
        out.append((max(0, e - EVAL_SEQ), s, e))
    return out


def pack_windows(val: Tensor, docs: Tensor, wins) -> tuple[Tensor, Tensor, Tensor]:
    """Windows side by side as one sequence; document numbers are made distinct per window. Also: rows scored, positions."""
    x = torch.zeros(EVAL_WINDOWS * EVAL_SEQ, dtype=torch.int32)
    d = torch.full((EVAL_WINDOWS * EVAL_SEQ,), -1, dtype=torch.int32)
    rows, where = [], []
    for j, (b, s, e) in enumerate(wins):
        at = j * EVAL_SEQ
        x[at : at + e - b] = val[b:e]
        d[at : at + e - b] = docs[b:e] - docs[b] + j * (EVAL_SEQ + 1)
        rows.append(torch.arange(at + s - b, at + e - b))
        where.append(torch.arange(s, e))
    return x.to(DEVICE), d.to(DEVICE), torch.stack([torch.cat(rows), torch.cat(where)])


class Tally:
    """Nats, tokens and bytes of the positions scored."""

    def __init__(self, val: Tensor, tables):
        self.val, self.tables = val, tables
        self.sums = torch.zeros(3, device=DEVICE, dtype=torch.float64)

    def add(self, nll: Tensor, where: Tensor) -> None:
        prev = self.val[where].to(DEVICE, torch.int64)
        target = self.val[where + 1].to(DEVICE, torch.int64)
        self.sums[0] += nll.double().sum()
        self.sums[1] += nll.numel()
        self.sums[2] += count_bytes(prev, target, self.tables).sum()

    def result(self) -> tuple[float, float]:
        nats, tokens, nbytes = reduce_sum(self.sums.clone()).tolist()
        if int(tokens) != self.val.numel() - 1:
            raise RuntimeError(f"{int(tokens)} tokens scored, {self.val.numel() - 1} expected")
        return nats / tokens, nats / math.log(2) / nbytes


@torch.no_grad()
def sliding(net: Net, score, val: Tensor, docs: Tensor, tables) -> tuple[float, float]:
    """The model as it was read back, by sliding windows."""
    tally = Tally(val, tables)
    mine = windows(0, val.numel() - 1)[RANK::WORLD]
    for i in range(0, len(mine), EVAL_WINDOWS):
        x, d, (rows, where) = pack_windows(val, docs, mine[i : i + EVAL_WINDOWS])
        masks = layer_masks(d)
        z = score(net, net.tail, x, d, masks)[rows.to(DEVICE)]
        target = val[where + 1].to(DEVICE, torch.int64)
        tally.add(F.cross_entropy(z, target, reduction="none"), where)
    return tally.result()


def score_one(net: Net, tail: Tail, x: Tensor, d: Tensor, masks: list[BlockMask]) -> Tensor:
    return net.score(tail, net.trunk(x, d, masks), masks)


# -----------------------------------------------------------------------------
# copy cache: at each position the longest match of what came before, earlier in the same document


def copy_hints(tokens: np.ndarray, docs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For position i: the token that followed the match of tokens[..i], and the match's length (0: none).

    Reads left to right; entry i is written from tokens[: i + 1] alone.
    """
    n = tokens.size
    hint = np.zeros(n, dtype=np.int32)
    length = np.zeros(n, dtype=np.int32)
    toks, doc = tokens.tolist(), docs.tolist()
    seen: dict[tuple[int, ...], int] = {}
    ptr, run, born = -1, 0, 0
    for i in range(n):
        if i == 0 or doc[i] != doc[i - 1]:
            seen.clear()
            ptr, run, born = -1, 0, i
        if ptr >= 0 and toks[ptr + 1] == toks[i]:
            ptr, run = ptr + 1, run + 1
        else:
            ptr, run = -1, 0
        if i - born + 1 >= COPY_MIN:
            key = tuple(toks[i - COPY_MIN + 1 : i + 1])
            if ptr < 0 and key in seen:
                ptr, run = seen[key], COPY_MIN
            seen[key] = i
        if ptr >= 0:
            hint[i] = toks[ptr + 1]
            length[i] = min(run, COPY_MAX)
    return hint, length


def trust_table() -> Tensor:
    """How much of the mass goes to the copy, by the match's length. Set beforehand."""
    m = torch.arange(COPY_MAX + 1, dtype=torch.float32, device=DEVICE)
    t = COPY_TOP * (1 - torch.exp(-(m - COPY_MIN + 1) / COPY_TAU))
    return torch.where(m >= COPY_MIN, t, torch.zeros_like(t))


def mixture(z_slow: Tensor, z_fast: Tensor, hint: Tensor, length: Tensor, trust: Tensor) -> Tensor:
    """The distribution over the whole vocabulary at each row; its sum is one."""
    p = W_SLOW * F.softmax(z_slow, -1) + (1 - W_SLOW) * F.softmax(z_fast, -1)
    if COPY:
        lam = trust[length][:, None]
        p = ((1 - lam) * p).scatter_add(1, hint[:, None], lam)
    return p


# -----------------------------------------------------------------------------
# score first, then train: two copies of the last blocks, one with the slow rate and one with the fast


class Adapter:
    def __init__(self, net: Net, chunks: int):
        for p in net.parameters():
            p.requires_grad_(False)
        self.net, self.chunks = net, chunks
        self.slow, self.fast = copy.deepcopy(net.tail), copy.deepcopy(net.tail)
        self.opts = []
        for tail, lr in ((self.slow, TTT_SLOW_LR), (self.fast, TTT_FAST_LR)):
            tail.requires_grad_(True)
            self.opts.append(torch.optim.SGD([dict(params=list(tail.parameters()), base_lr=lr)], lr=lr, momentum=TTT_MOM))

    def train_on(self, c: int, lo: int, hi: int, val: Tensor, docs: Tensor, trunk, loss_of) -> None:
        """Several epochs over the positions lo .. hi - 1, all of which have been scored."""
        for opt in self.opts:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * 0.5 * (1 + math.cos(math.pi * c / self.chunks))
        span = (hi - lo) // WORLD // 128 * 128
        if span == 0:
            return
        a = lo + RANK * span
        x = val[a : a + span].to(DEVICE)
        y = val[a + 1 : a + span + 1].to(DEVICE, torch.int64)
        d = docs[a : a + span].to(DEVICE)
        masks = layer_masks(d)
        with torch.no_grad():
            state = trunk(self.net, x, d, masks)
        for _ in range(TTT_EPOCHS):
            for tail, opt in zip((self.slow, self.fast), self.opts):
                loss_of(self.net, tail, state, masks, y).backward()
                for p in tail.parameters():
                    if p.grad is not None:
                        reduce_avg(p.grad)
                torch.nn.utils.clip_grad_norm_(tail.parameters(), TTT_CLIP)
                opt.step()
                opt.zero_grad(set_to_none=True)


run_trunk = lambda net, x, d, masks: net.trunk(x, d, masks)
tail_loss = lambda net, tail, state, masks, y: F.cross_entropy(net.logits(tail(state, masks)), y)


def score_two(net: Net, slow: Tail, fast: Tail, x: Tensor, d: Tensor, masks: list[BlockMask]) -> tuple[Tensor, Tensor]:
    state = net.trunk(x, d, masks)
    return net.score(slow, state, masks), net.score(fast, state, masks)


def shared_hints(val: Tensor, docs: Tensor) -> tuple[Tensor, Tensor]:
    """copy_hints with the documents dealt to the ranks in equal runs."""
    starts = torch.nonzero(docs[1:] != docs[:-1]).flatten() + 1
    edges = [0] + [int(starts[len(starts) * r // WORLD]) for r in range(1, WORLD)] + [val.numel()]
    a, b = edges[RANK], edges[RANK + 1]
    both = torch.zeros(2, val.numel(), dtype=torch.int32, device=DEVICE)
    hint, length = copy_hints(val[a:b].numpy(), docs[a:b].numpy())
    both[0, a:b], both[1, a:b] = torch.from_numpy(hint).to(DEVICE), torch.from_numpy(length).to(DEVICE)
    reduce_sum(both)
    return both[0], both[1]


def adaptive(net: Net, score2, val: Tensor, docs: Tensor, tables, clock: float) -> tuple[float, float]:
    """Chunk by chunk: score all its positions with the copies as they stand, then train the copies on them."""
    n = val.numel() - 1
    chunks = math.ceil(n / TTT_CHUNK)
    hints, lengths = shared_hints(val, docs)
    trust = trust_table()
    adapter = Adapter(net, chunks)
    tally = Tally(val, tables)
    adapting = TTT
    for c in range(chunks):
        lo, hi = c * TTT_CHUNK, min((c + 1) * TTT_CHUNK, n)
        mine = windows(lo, hi)[RANK::WORLD]
        with torch.no_grad():
            for i in range(0, len(mine), EVAL_WINDOWS):
                x, d, (rows, where) = pack_windows(val, docs, mine[i : i + EVAL_WINDOWS])
                rows, pos = rows.to(DEVICE), where.to(DEVICE)
                z_slow, z_fast = score2(net, adapter.slow, adapter.fast, x, d, layer_masks(d))
                p = mixture(z_slow[rows], z_fast[rows], hints[pos].long(), lengths[pos].long(), trust)
                target = val[where + 1].to(DEVICE, torch.int64)
                nll = -torch.log(p.gather(1, target[:, None]).squeeze(1).clamp_min(1e-30))
                tally.add(nll, where)
        if adapting and c + 1 < chunks:
            adapter.train_on(c, lo, hi, val, docs, run_trunk, tail_loss)
        if adapting and agree(now() - clock > ADAPT_UNTIL):
            adapting = False
            say(f"ttt: no more training after chunk {c + 1}/{chunks}, the clock is near its end")
        if c % 200 == 0:
            say(f"ttt: chunk {c + 1}/{chunks} local_loss:{(tally.sums[0] / tally.sums[1].clamp_min(1)).item():.4f} {now() - clock:.0f}s")
    return tally.result()


# -----------------------------------------------------------------------------


def main() -> None:
    torch.cuda.set_device(DEVICE)
    if DISTRIBUTED:
        dist.init_process_group("nccl", device_id=DEVICE)
    os.makedirs("logs", exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = True
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    say(open(os.path.abspath(__file__), encoding="utf-8").read(), console=False)
    say(f"python {sys.version.split()[0]} torch {torch.__version__} world {WORLD} accum {ACCUM} seed {SEED}")

    sp = spm.SentencePieceProcessor(model_file=TOKENIZER_PATH)
    if int(sp.vocab_size()) != VOCAB:
        raise ValueError(f"the tokenizer has {int(sp.vocab_size())} pieces, VOCAB_SIZE is {VOCAB}")
    tables = byte_tables(sp)
    val = load_all(VAL_FILES)
    docs = doc_ids(val)
    say(f"val tokens {val.numel() - 1}, documents {int(docs[-1])}")

    net = Net().to(DEVICE)
    fast_net = torch.compile(net, dynamic=False)
    opts = optimizers(net)
    say(f"params {sum(p.numel() for p in net.parameters())}")
    compile_warmup(net, fast_net, opts)

    used = train(net, fast_net, opts, val, tables)
    t0 = now()
    weights = activation_weights(net)
    used += now() - t0
    say(f"calibrated on training tokens, training and calibration took {used:.1f}s of {TRAIN_SECONDS:.0f}s")
    write_artifact(net, weights)

    barrier()
    clock = now()
    with open(OUT_PATH, "rb") as f:
        state = unpack_model(f.read())
    net.load_state_dict(state, strict=True)
    score = torch.compile(score_one, dynamic=False)
    score2 = torch.compile(score_two, dynamic=False)
    loss, bpb = sliding(net, score, val, docs, tables)
    say(f"sliding val_loss:{loss:.6f} val_bpb:{bpb:.6f} stride:{STRIDE} eval_time:{now() - clock:.1f}s")
    loss, bpb = adaptive(net, score2, val, docs, tables, clock)
    spent = now() - clock
    say(f"evaluation took {spent:.1f}s of {EVAL_SECONDS:.0f}s")
    if spent > EVAL_SECONDS:
        raise RuntimeError("the evaluation took too long")
    say(f"final val_loss:{loss:.8f} val_bpb:{bpb:.8f}")
    if DISTRIBUTED:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
