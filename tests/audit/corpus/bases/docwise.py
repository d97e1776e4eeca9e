# Banked 11L/512 with layer reuse, varlen attention, CaseOps tokens with an original-byte sidecar.
# Evaluation: document by document, batched LoRA learns from chunks already scored; once a prefix of documents is
# scored, the base weights take one SGD epoch over exactly those documents; a token-only n-gram hint tilts the logits.
import collections
import contextlib
import ctypes
import datetime
import glob
import io
import json
import math
import os
import queue
import random
import sys
import threading
import time

import brotli
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

try:
    from flash_attn_interface import flash_attn_varlen_func
except Exception:
    flash_attn_varlen_func = None
try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def _env(name, default):
    raw = os.environ.get(name)
    if raw is None:
        return default
    if isinstance(default, bool):
        return raw not in ("0", "false", "False", "")
    return type(default)(raw)


class H:
    data_dir = _env("DATA_DIR", "./data/fineweb_caseops_sp8192")
    train_glob = os.path.join(data_dir, "fineweb_train_*.bin")
    val_glob = os.path.join(data_dir, "fineweb_val_[0-9]*.bin")
    val_bytes_glob = os.path.join(data_dir, "fineweb_val_bytes_*.bin")
    run_id = _env("RUN_ID", "docwise")
    seed = _env("SEED", 42)
    vocab_size = _env("VOCAB_SIZE", 8192)
    bos_id = _env("BOS_ID", 1)
    model_dim = _env("MODEL_DIM", 512)
    num_layers = _env("NUM_LAYERS", 11)
    num_heads = _env("NUM_HEADS", 8)
    num_kv_heads = _env("NUM_KV_HEADS", 4)
    mlp_hidden = _env("MLP_HIDDEN", 2048)
    loop_start = _env("LOOP_START", 3)
    loop_end = _env("LOOP_END", 5)
    num_loops = _env("NUM_LOOPS", 2)
    loop_from_frac = _env("LOOP_FROM_FRAC", 0.35)
    rope_dims = _env("ROPE_DIMS", 16)
    rope_base = _env("ROPE_BASE", 10000.0)
    softcap = _env("SOFTCAP", 30.0)
    qk_gain = _env("QK_GAIN", 5.0)
    smear_dims = _env("SMEAR_DIMS", 12)
    iterations = _env("ITERATIONS", 20000)
    wallclock = _env("MAX_WALLCLOCK_SECONDS", 600.0)
    reserve = _env("GPTQ_RESERVE_SECONDS", 8.0)
    batch_tokens = _env("TRAIN_BATCH_TOKENS", 786432)
    seq_len = _env("TRAIN_SEQ_LEN", 2048)
    warmdown_frac = _env("WARMDOWN_FRAC", 0.85)
    min_lr = _env("MIN_LR", 0.1)
    matrix_lr = _env("MATRIX_LR", 0.026)
    embed_lr = _env("EMBED_LR", 0.03)
    scalar_lr = _env("SCALAR_LR", 0.02)
    muon_wd = _env("MUON_WD", 0.095)
    grad_clip = _env("GRAD_CLIP", 0.3)
    ema_decay = _env("EMA_DECAY", 0.9965)
    warmup_steps = _env("WARMUP_STEPS", 20)
    calib_batches = _env("GPTQ_CALIB_BATCHES", 16)
    matrix_bits = _env("MATRIX_BITS", 6)
    matrix_clip = _env("MATRIX_CLIP_SIGMAS", 12.85)
    embed_bits = _env("EMBED_BITS", 7)
    embed_clip = _env("EMBED_CLIP_SIGMAS", 15.0)
    # evaluation
    ttt_enabled = _env("TTT_ENABLED", True)
    ttt_rank = _env("TTT_LORA_RANK", 80)
    ttt_alpha = _env("TTT_LORA_ALPHA", 144.0)
    ttt_lr = _env("TTT_LORA_LR", 1e-4)
    ttt_wd = _env("TTT_WEIGHT_DECAY", 0.5)
    ttt_beta2 = _env("TTT_BETA2", 0.99)
    ttt_batch = _env("TTT_BATCH_DOCS", 64)
    ttt_chunk = _env("TTT_CHUNK_SIZE", 48)
    ttt_context = _env("TTT_EVAL_SEQ_LEN", 2048)
    phase_docs = _env("PHASED_TTT_PREFIX_DOCS", 2000)
    phase_lr = _env("GLOBAL_TTT_LR", 0.001)
    phase_chunk = _env("GLOBAL_TTT_CHUNK", 32768)
    tilt_enabled = _env("TILT_ENABLED", True)
    tilt_order = _env("TILT_ORDER", 16)
    tilt_beta = _env("TILT_BETA", 2.625)
    tilt_threshold = _env("TILT_THRESHOLD", 0.8)
    tilt_min_count = _env("TILT_MIN_COUNT", 2)
    rescore_after_phase = _env("RESCORE_AFTER_PHASE", False)  # ablation of an older version, never used for results


# ---------------------------------------------------------------- shards


def read_shard(path):
    head = np.fromfile(path, dtype="<i4", count=256)
    assert head[0] == 20240520 and head[1] == 1, path
    return np.fromfile(path, dtype="<u2", count=int(head[2]), offset=1024)


def read_all(pattern):
    paths = sorted(glob.glob(pattern))
    if not paths:
        raise FileNotFoundError(pattern)
    return torch.from_numpy(np.concatenate([read_shard(p) for p in paths]).astype(np.int32))


class PackedLoader:
    """Flat buffers of local tokens with cu_seqlens at document starts and at every seq_len; two batches are prefetched."""

    def __init__(self, pattern, rank, world, device, seed):
        self.paths = sorted(glob.glob(pattern))[rank::world] or sorted(glob.glob(pattern))
        self.device, self.rng = device, random.Random(seed + rank)
        self.tokens = H.batch_tokens // world
        self.pending = queue.Queue(maxsize=2)
        self.alive = True
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self):
        while self.alive:
            for path in self.rng.sample(self.paths, len(self.paths)):
                data = torch.from_numpy(read_shard(path).astype(np.int32))
                phase = self.rng.randrange(H.seq_len)
                for at in range(phase, data.numel() - self.tokens - 1, self.tokens):
                    part = data[at : at + self.tokens + 1]
                    self.pending.put((part[:-1], part[1:], self._cuts(part[:-1])))
                    if not self.alive:
                        return

    @staticmethod
    def _cuts(inputs):
        starts = torch.nonzero(inputs == H.bos_id).flatten().tolist()
        cuts, last = [0], 0
        for s in starts + [inputs.numel()]:
            while s - last > H.seq_len:
                last += H.seq_len
                cuts.append(last)
            if s > last:
                cuts.append(s)
                last = s
        return torch.tensor(cuts, dtype=torch.int32)

    def next(self):
        x, y, cuts = self.pending.get()
        move = lambda t: t.pin_memory().to(self.device, non_blocking=True)
        return move(x.long()), move(y.long()), move(cuts)

    def close(self):
        self.alive = False
        with contextlib.suppress(queue.Empty):
            while True:
                self.pending.get_nowait()


# ---------------------------------------------------------------- model


if triton is not None:

    @triton.jit
    def _leaky_square_kernel(src, dst, n, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        keep = at < n
        v = tl.load(src + at, mask=keep, other=0.0).to(tl.float32)
        v = tl.where(v > 0, v, 0.5 * v)
        tl.store(dst + at, (v * v).to(dst.dtype.element_ty), mask=keep)


class LeakySquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p):
        ctx.save_for_backward(p)
        if triton is None or not p.is_cuda:
            return F.leaky_relu(p, 0.5).square()
        out = torch.empty_like(p)
        n = p.numel()
        _leaky_square_kernel[(triton.cdiv(n, 1024),)](p, out, n, BLOCK=1024)
        return out

    @staticmethod
    def backward(ctx, g):
        (p,) = ctx.saved_tensors
        return g * torch.where(p > 0, 2 * p, 0.5 * p)


def rms(x):
    return F.rms_norm(x, (x.size(-1),))


def rope_tables(length, device):
    inv = H.rope_base ** (-torch.arange(0, H.rope_dims, 2, device=device, dtype=torch.float32) / H.rope_dims)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), inv)
    return angle.cos(), angle.sin()


def turn(x, cos, sin):
    r, rest = x[..., : H.rope_dims], x[..., H.rope_dims :]
    a, b = r.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def attention(q, k, v, cuts, longest):
    """q (B, T, H, D). With cuts (B = 1) no position looks into another document."""
    if cuts is not None and flash_attn_varlen_func is not None:
        out = flash_attn_varlen_func(q[0], k[0], v[0], cuts, cuts, longest, longest, causal=True)
        return out[None]
    mask = None
    if cuts is not None:
        t = q.size(1)
        doc = torch.bucketize(torch.arange(t, device=q.device), cuts[1:].long(), right=True)
        mask = (doc[:, None] == doc[None, :]) & torch.ones(t, t, dtype=torch.bool, device=q.device).tril()
    out = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return out.transpose(1, 2)


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        L, d, g = H.num_layers, H.model_dim, H.num_kv_heads * (H.model_dim // H.num_heads)
        self.tok_emb = nn.Embedding(H.vocab_size, d)
        self.qo_bank = nn.Parameter(torch.empty(2 * L, d, d))
        self.kv_bank = nn.Parameter(torch.empty(2 * L, g, d))
        self.up_bank = nn.Parameter(torch.empty(L, H.mlp_hidden, d))
        self.down_bank = nn.Parameter(torch.zeros(L, d, H.mlp_hidden))
        self.q_gain = nn.Parameter(torch.full((L, H.num_heads), H.qk_gain))
        self.attn_scale = nn.Parameter(torch.ones(L, d))
        self.mlp_scale = nn.Parameter(torch.ones(L, d))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(L, d), torch.zeros(L, d)), dim=1))
        self.smear_w = nn.Parameter(torch.zeros(H.smear_dims))
        self.smear_lambda = nn.Parameter(torch.zeros(()))
        self.looped = False
        enc, dec = self.order(True)
        self.skip_w = nn.Parameter(torch.ones(len(enc), d))
        self.skip_gate = nn.Parameter(torch.zeros(len(enc), d))
        nn.init.normal_(self.tok_emb.weight, std=0.005)
        for bank in (self.qo_bank, self.kv_bank, self.up_bank):
            for m in bank.data:
                nn.init.orthogonal_(m)
        self.qo_bank.data[L:].zero_()

    def order(self, looped):
        layers = list(range(H.num_layers))
        if looped:
            again = list(range(H.loop_start, H.loop_end + 1)) * H.num_loops
            layers = layers[: H.loop_end + 1] + again + layers[H.loop_end + 1 :]
        half = len(layers) // 2
        return layers[:half], layers[half:]

    def smear(self, e, ids):
        gate = self.smear_lambda * torch.sigmoid(e[..., : H.smear_dims].float() @ self.smear_w)
        prev = F.pad(e[:, :-1], (0, 0, 1, 0))
        keep = (ids != H.bos_id).to(e.dtype)  # a document's first token takes nothing from the one before
        return e + (gate.to(e.dtype) * keep)[..., None] * prev

    def layer(self, i, x, x0, rope, cuts, longest, lora, site):
        L, hd = H.num_layers, H.model_dim // H.num_heads
        mix = self.resid_mix[i].to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        n = rms(x) * (1.0 / math.sqrt(i + 1))
        w = lambda bank, j: bank[j].to(n.dtype)
        q, k, v = F.linear(n, w(self.qo_bank, i)), F.linear(n, w(self.kv_bank, i)), F.linear(n, w(self.kv_bank, L + i))
        if lora is not None:
            q, k, v = q + lora.at("q", site, n), k + lora.at("k", site, n), v + lora.at("v", site, n)
        B, T, _ = q.shape
        q, k, v = q.view(B, T, -1, hd), k.view(B, T, -1, hd), v.view(B, T, -1, hd)
        q, k = turn(rms(q), *rope), turn(rms(k), *rope)
        q = q * self.q_gain[i].to(q.dtype)[:, None]
        y = attention(q, k, v, cuts, longest)
        vg = F.normalize(v, dim=-1)[:, :, :, None]
        yg = y.view(B, T, H.num_kv_heads, -1, hd)
        y = (yg - (yg * vg).sum(-1, keepdim=True) * vg).reshape(B, T, -1)
        out = F.linear(y, w(self.qo_bank, L + i))
        if lora is not None:
            out = out + lora.at("o", site, n)
        x = x + self.attn_scale[i].to(x.dtype) * out
        m = rms(x) * (1.0 / math.sqrt(i + 1))
        hidden = LeakySquare.apply(F.linear(m, w(self.up_bank, i)))
        up = F.linear(hidden, w(self.down_bank, i))
        if lora is not None:
            up = up + lora.at("m", site, m)
        return x + self.mlp_scale[i].to(x.dtype) * up

    def body(self, ids, cuts=None, longest=0, lora=None):
        e = self.tok_emb(ids)
        x = x0 = rms(self.smear(e, ids))
        positions = torch.arange(ids.size(1), device=ids.device)
        if cuts is not None:
            starts = cuts.long()[:-1]
            positions = positions - starts[torch.bucketize(positions, cuts[1:].long(), right=True)]
        cos, sin = rope_tables(max(ids.size(1), longest), ids.device)
        rope = (cos[positions][None, :, None], sin[positions][None, :, None])
        enc, dec = self.order(self.looped)
        skips, site = [], 0
        for i in enc:
            x = self.layer(i, x, x0, rope, cuts, longest, lora, site)
            skips.append(x)
            site += 1
        for j, i in enumerate(dec):
            if skips:
                g = torch.sigmoid(self.skip_gate[j]).to(x.dtype)
                x = (1 - g) * (self.skip_w[j].to(x.dtype) * skips.pop()) + g * x
            x = self.layer(i, x, x0, rope, cuts, longest, lora, site)
            site += 1
        return rms(x)

    def logits(self, ids, cuts=None, longest=0, lora=None):
        h = self.body(ids, cuts, longest, lora)
        z = F.linear(h, self.tok_emb.weight.to(h.dtype))
        if lora is not None:
            z = z + lora.at("head", 0, h)
        return H.softcap * torch.tanh(z.float() / H.softcap)

    def forward(self, ids, goal, cuts=None, longest=0):
        z = self.logits(ids, cuts, longest)
        return F.cross_entropy(z.flatten(0, 1), goal.flatten())


class BatchedLoRA(nn.Module):
    """One small adapter per document of the batch; B starts at zero, so that the first chunk is scored by the base."""

    def __init__(self, docs, sites, device):
        super().__init__()
        d, g, r = H.model_dim, H.num_kv_heads * (H.model_dim // H.num_heads), H.ttt_rank
        self.scale = H.ttt_alpha / r
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        for kind, width in (("q", d), ("k", g), ("v", g), ("o", d), ("m", d)):
            for s in range(sites):
                self._add(f"{kind}{s}", docs, d, r, width, device)
        self._add("head0", docs, d, r, H.vocab_size, device)

    def _add(self, key, docs, d, r, width, device):
        bound = 1.0 / math.sqrt(d)
        self.A[key] = nn.Parameter(torch.empty(docs, r, d, device=device).uniform_(-bound, bound))
        self.B[key] = nn.Parameter(torch.zeros(docs, width, r, device=device))

    def at(self, kind, site, x):
        key = f"{kind}{site}"
        a, b = self.A[key].to(x.dtype), self.B[key].to(x.dtype)
        return self.scale * torch.bmm(torch.bmm(x, a.transpose(1, 2)), b.transpose(1, 2))

    @torch.no_grad()
    def reset(self):
        for p in self.A.values():
            bound = 1.0 / math.sqrt(H.model_dim)
            p.uniform_(-bound, bound)
        for p in self.B.values():
            p.zero_()


# ---------------------------------------------------------------- optimisers

NS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar(u):
    x = u.bfloat16()
    flip = x.size(-2) > x.size(-1)
    x = x.mT if flip else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-7)
    for a, b, c in NS:
        s = x @ x.mT
        x = a * x + (b * s + c * (s @ s)) @ x
    return x.mT if flip else x


class BankMuon(torch.optim.Optimizer):
    def __init__(self, banks, lr, momentum=0.97, wd=0.0):
        super().__init__(banks, dict(lr=lr, momentum=momentum, wd=wd))

    @torch.no_grad()
    def step(self):
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        for group in self.param_groups:
            for bank in group["params"]:
                g = bank.grad
                pad = -g.size(0) % world
                g = torch.cat((g, g.new_zeros(pad, *g.shape[1:]))).bfloat16() if pad else g.bfloat16()
                share = g.size(0) // world
                mine = torch.empty(share, *g.shape[1:], device=g.device, dtype=g.dtype)
                if world > 1:
                    dist.reduce_scatter_tensor(mine, g.contiguous(), op=dist.ReduceOp.AVG)
                else:
                    mine.copy_(g)
                state = self.state[bank]
                buf = state.setdefault("buf", torch.zeros_like(mine))
                buf.mul_(group["momentum"]).add_(mine)
                u = mine.add(buf, alpha=group["momentum"])
                u = u / u.norm(dim=-1, keepdim=True).clamp_min(1e-7)
                u = polar(u) * max(1.0, bank.size(-2) / bank.size(-1)) ** 0.5
                full = torch.empty_like(g)
                if world > 1:
                    dist.all_gather_into_tensor(full, u.contiguous())
                else:
                    full.copy_(u)
                bank.mul_(1 - group["lr"] * group["wd"]).add_(full[: bank.size(0)].to(bank.dtype), alpha=-group["lr"])


def average_grads(params, world):
    if world == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in params])
    dist.all_reduce(flat, op=dist.ReduceOp.AVG)
    at = 0
    for p in params:
        p.grad.copy_(flat[at : at + p.numel()].view_as(p))
        at += p.numel()


# ---------------------------------------------------------------- training


class Clock:
    def __init__(self, limit):
        self.limit, self.begun = limit, time.perf_counter()

    def spent(self):
        torch.cuda.synchronize()
        return time.perf_counter() - self.begun

    def fraction(self):
        return (time.perf_counter() - self.begun) / self.limit


def learning_rate(frac):
    if frac < 1 - H.warmdown_frac:
        return 1.0
    return max((1 - frac) / H.warmdown_frac, H.min_lr)


def snapshot(model, optimisers):
    weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
    return weights, [json.loads(json.dumps({"lr": o.param_groups[0]["lr"]})) for o in optimisers]


def train(model, rank, world, device, log):
    banks = [model.qo_bank, model.kv_bank, model.up_bank, model.down_bank]
    small = [p for n, p in model.named_parameters() if "bank" not in n and "tok_emb" not in n]
    muon = BankMuon(banks, H.matrix_lr, wd=H.muon_wd)
    adam = torch.optim.AdamW(
        [
            {"params": [model.tok_emb.weight], "lr": H.embed_lr, "weight_decay": 0.085},
            {"params": small, "lr": H.scalar_lr, "weight_decay": 0.02},
        ],
        betas=(0.9, 0.99),
        fused=True,
    )
    for o in (muon, adam):
        for g in o.param_groups:
            g["base"] = g["lr"]
    compiled = torch.compile(model, dynamic=False)
    loader = PackedLoader(H.train_glob, rank, world, device, H.seed)

    # compile both graphs on real steps, then put everything back
    weights, _ = snapshot(model, (muon, adam))
    for looped in (False, True):
        model.looped = looped
        for _ in range(H.warmup_steps // 2):
            x, y, cuts = loader.next()
            compiled(x[None], y[None], cuts, H.seq_len).backward()
            average_grads(small + [model.tok_emb.weight], world)
            muon.step()
            adam.step()
            model.zero_grad(set_to_none=True)
    model.load_state_dict(weights)
    muon.state.clear()
    adam.state.clear()
    model.looped = False
    loader.close()
    loader = PackedLoader(H.train_glob, rank, world, device, H.seed)

    ema = {k: v.detach().float().clone() for k, v in model.state_dict().items()}
    clock = Clock(H.wallclock - H.reserve)
    step = 0
    while step < H.iterations:
        frac = clock.fraction()
        stop = torch.tensor(float(frac >= 1.0), device=device)
        if world > 1:
            dist.all_reduce(stop, op=dist.ReduceOp.MAX)
        if stop.item():
            break
        model.looped = frac >= H.loop_from_frac
        x, y, cuts = loader.next()
        with torch.autocast("cuda", torch.bfloat16):
            loss = compiled(x[None], y[None], cuts, H.seq_len)
        loss.backward()
        average_grads(small + [model.tok_emb.weight], world)
        nn.utils.clip_grad_norm_(model.parameters(), H.grad_clip)
        scale = learning_rate(frac)
        for o in (muon, adam):
            for g in o.param_groups:
                g["lr"] = g["base"] * scale
            o.step()
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for k, v in model.state_dict().items():
                ema[k].lerp_(v.float(), 1 - H.ema_decay)
        step += 1
        if step % 500 == 0:
            log(f"step:{step} train_loss:{loss.item():.4f} train_time:{clock.spent():.1f}s")
    loader.close()
    log(f"stopping: step:{step} train_time:{1000 * clock.spent():.0f}ms step_avg:{1000 * clock.spent() / max(step, 1):.2f}ms")
    model.load_state_dict({k: v.to(model.state_dict()[k].dtype) for k, v in ema.items()})
    model.looped = True
    return clock


# ---------------------------------------------------------------- quantisation


def hessians(model, rank, world, device):
    """Second moments of what enters each matrix, over training batches; taken within the reserve of the clock."""
    sums = collections.defaultdict(float)
    original = F.linear

    def spying(x, w, b=None):
        key = names.get(w.data_ptr())
        if key is not None:
            flat = x.detach().reshape(-1, x.size(-1)).float()
            sums[key] = sums[key] + flat.T @ flat
        return original(x, w, b)

    names = {}
    for bank in ("qo_bank", "kv_bank", "up_bank", "down_bank"):
        for i, m in enumerate(getattr(model, bank)):
            names[m.data_ptr()] = f"{bank}.{i}"
    names[model.tok_emb.weight.data_ptr()] = "tok_emb.weight"
    loader = PackedLoader(H.train_glob, rank, world, device, H.seed + 1)
    F.linear = spying
    try:
        with torch.no_grad():
            for _ in range(H.calib_batches):
                x, _y, cuts = loader.next()
                model.logits(x[None], cuts, H.seq_len)
    finally:
        F.linear = original
        loader.close()
    return dict(sums)


def solve(w, h, bits, sigmas):
    w, h = w.float().clone(), h.float().clone()
    top = 2 ** (bits - 1) - 1
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    w[:, dead] = 0
    perm = h.diagonal().argsort(descending=True)
    w, h = w[:, perm], h[perm][:, perm]
    h.diagonal().add_(0.01 * h.diagonal().mean())
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    s = (sigmas * w.std(dim=1, keepdim=True) / top).clamp_min(1e-10).half().float()
    codes = torch.empty_like(w)
    for a in range(0, w.size(1), 128):
        z = min(a + 128, w.size(1))
        err = torch.zeros_like(w[:, a:z])
        for j in range(a, z):
            codes[:, j] = (w[:, j : j + 1] / s).round().clamp(-top, top)[:, 0]
            err[:, j - a] = (w[:, j] - codes[:, j] * s[:, 0]) / u[j, j]
            w[:, j + 1 : z] -= err[:, j - a, None] * u[j, j + 1 : z]
        w[:, z:] -= err @ u[a:z, z:]
    return codes[:, perm.argsort()].to(torch.int8), s[:, 0].half()


def quantise(model, moments):
    out = {}
    for name, p in model.state_dict().items():
        if p.ndim == 3:
            pairs = [solve(m, moments[f"{name}.{i}"], H.matrix_bits, H.matrix_clip) for i, m in enumerate(p)]
            out[name] = (torch.stack([c for c, _ in pairs]).cpu(), torch.stack([s for _, s in pairs]).cpu())
        elif name == "tok_emb.weight":
            codes, s = solve(p, moments[name], H.embed_bits, H.embed_clip)
            out[name] = (codes.cpu(), s.cpu())
        else:
            out[name] = p.half().cpu()
    return out


def restore(box):
    return {k: (v[0].float() * v[1].float()[..., None] if isinstance(v, tuple) else v.float()) for k, v in box.items()}


def shuffled(raw, stride=2):
    return b"".join(raw[i::stride] for i in range(stride))


def unshuffled(raw, stride=2):
    out = bytearray(len(raw))
    at = 0
    for i in range(stride):
        n = len(range(i, len(raw), stride))
        out[i::stride] = raw[at : at + n]
        at += n
    return bytes(out)


def save_artifact(box, path):
    buf = io.BytesIO()
    torch.save(box, buf)
    blob = brotli.compress(shuffled(buf.getvalue()), quality=11, lgwin=24)
    with open(path, "wb") as f:
        f.write(blob)
    return len(blob)


def load_artifact(path):
    with open(path, "rb") as f:
        return torch.load(io.BytesIO(unshuffled(brotli.decompress(f.read()))), weights_only=True)


# ---------------------------------------------------------------- evaluation


def find_documents(tokens):
    """[(start, length)]: inputs start .. start + length - 1; the target of the last one is the next document's BOS."""
    starts = torch.nonzero(tokens == H.bos_id).flatten().tolist()
    ends = starts[1:] + [tokens.numel() - 1]
    return [(s, e - s) for s, e in zip(starts, ends) if e > s]


def causal_hints(tokens):
    """For each target t: the token that most often followed the same `tilt_order` tokens earlier, or -1. One walk, in
    which the table is read for t before t is put in: a hint knows nothing of its own target or of what follows."""
    ids = tokens.tolist()
    hint = np.full(len(ids), -1, dtype=np.int32)
    best, count, total, seen = {}, {}, {}, {}
    mask = (1 << 64) - 1
    window = collections.deque(maxlen=H.tilt_order)
    for t, token in enumerate(ids):
        if len(window) == H.tilt_order:
            key = hash(tuple(window)) & mask
            n = total.get(key, 0)
            if n >= H.tilt_min_count and count[key] / n >= H.tilt_threshold:
                hint[t] = best[key]
            total[key] = n + 1
            c = seen.get((key, token), 0) + 1
            seen[(key, token)] = c
            if c >= count.get(key, 0):
                best[key], count[key] = token, c
        window.append(token)
    return torch.from_numpy(hint)


def tilted(log_probs, goal, hint):
    """-ln p'(goal), p'(y) = p(y) exp(beta [y = hint]) / (1 + p(hint)(exp(beta) - 1)): sums to one for any hint."""
    nll = -log_probs.gather(-1, goal.unsqueeze(-1)).squeeze(-1)
    has = hint >= 0
    p_hint = log_probs.gather(-1, hint.clamp_min(0).unsqueeze(-1)).squeeze(-1).exp()
    change = torch.log1p(p_hint * math.expm1(H.tilt_beta)) - H.tilt_beta * (hint == goal).float()
    return nll + torch.where(has, change, torch.zeros_like(change))


def chunk_window(doc_len, ci, chunk, context):
    """Where chunk ci of a document is seen: window start and end, and the chunk's offset in it."""
    lo, hi = ci * chunk, min((ci + 1) * chunk, doc_len)
    begin = max(0, hi - context)
    return begin, hi, lo - begin, hi - lo


class Sums:
    def __init__(self, device):
        self.nats = torch.zeros((), dtype=torch.float64, device=device)
        self.octets = torch.zeros((), dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.float64, device=device)

    def reduce(self):
        if dist.is_initialized():
            for t in (self.nats, self.octets, self.count):
                dist.all_reduce(t)

    def result(self):
        loss = (self.nats / self.count).item()
        return loss, loss / math.log(2.0) * (self.count / self.octets).item()


def adapt_docs(model, docs, tokens, hints, sidecar, sums, lora, device):
    """One batch of documents, chunk by chunk: score all, then one step for those that go on."""
    opt = torch.optim.AdamW(lora.parameters(), lr=H.ttt_lr, betas=(0.0, H.ttt_beta2), eps=1e-10, weight_decay=H.ttt_wd)
    chunks = [(n + H.ttt_chunk - 1) // H.ttt_chunk for _, n in docs]
    for ci in range(max(chunks)):
        active = [ci < c for c in chunks]
        views = [chunk_window(n, min(ci, c - 1), H.ttt_chunk, H.ttt_context) for (_, n), c in zip(docs, chunks)]
        width = max(end - begin for begin, end, _, _ in views)
        x = torch.full((len(docs), width), H.bos_id, dtype=torch.long)
        y = torch.zeros(len(docs), width, dtype=torch.long)
        h = torch.full((len(docs), width), -1, dtype=torch.long)
        own = torch.zeros(len(docs), width, dtype=torch.bool)
        size = torch.zeros(len(docs), width, dtype=torch.float64)
        for i, ((start, _), (begin, end, off, n)) in enumerate(zip(docs, views)):
            a, z = start + begin, start + end
            x[i, : z - a] = tokens[a:z]
            y[i, : z - a] = tokens[a + 1 : z + 1]
            h[i, : z - a] = hints[a + 1 : z + 1]
            size[i, : z - a] = sidecar[a + 1 : z + 1]
            own[i, off : off + n] = active[i]
        x, y, h, own, size = (t.to(device) for t in (x, y, h, own, size))
        goes_on = torch.tensor([ci < c - 1 for c in chunks], device=device)
        with torch.autocast("cuda", torch.bfloat16):
            logits = model.logits(x, lora=lora)
        log_probs = logits.float().log_softmax(-1)
        plain = -log_probs.gather(-1, y[..., None])[..., 0]
        with torch.no_grad():
            paid = tilted(log_probs.detach(), y, h) if H.tilt_enabled else plain.detach()
            sums.nats += paid[own].double().sum()
            sums.octets += size[own].sum()
            sums.count += own.sum()
        if goes_on.any():
            mask = own & goes_on[:, None]
            per_doc = (plain * mask).sum(1) / mask.sum(1).clamp_min(1)
            opt.zero_grad(set_to_none=True)
            per_doc.sum().backward()
            opt.step()


def learn_prefix(model, docs, tokens, rank, world, device, log):
    """One epoch of SGD over documents whose scores are booked, cut into chunks; the last part is left out."""
    stream = torch.cat([tokens[s : s + n + 1] for s, n in docs])
    params = [p for p in model.parameters()]
    for p in params:
        p.requires_grad_(True)
    opt = torch.optim.SGD(params, lr=H.phase_lr, momentum=0.9)
    pieces = (stream.numel() - 1) // H.phase_chunk
    for ci in range(pieces):
        part = stream[ci * H.phase_chunk : (ci + 1) * H.phase_chunk + 1].long()
        share = H.phase_chunk // world
        mine = part[rank * share : (rank + 1) * share + 1].to(device)
        cuts = PackedLoader._cuts(mine[:-1]).to(device)
        for g in opt.param_groups:
            g["lr"] = H.phase_lr * 0.5 * (1 + math.cos(math.pi * ci / max(pieces - 1, 1)))
        opt.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            model(mine[None, :-1], mine[None, 1:], cuts, H.seq_len).backward()
        average_grads([p for p in params if p.grad is not None], world)
        nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
    for p in params:
        p.requires_grad_(False)
    log(f"phase: learnt from {len(docs)} scored documents, {stream.numel()} tokens")


def evaluate(model, tokens, sidecar, rank, world, device, log):
    clock = Clock(600.0)
    docs = find_documents(tokens)
    hints = causal_hints(tokens) if H.tilt_enabled else torch.full((tokens.numel(),), -1)
    log(f"eval: {len(docs)} documents, hints at {(hints >= 0).float().mean().item():.3%} after {clock.spent():.1f}s")
    for p in model.parameters():
        p.requires_grad_(False)
    enc, dec = model.order(model.looped)
    sites = len(enc) + len(dec)
    sums = Sums(device)

    def walk(some):
        mine = some[rank::world]
        for at in range(0, len(mine), H.ttt_batch):
            group = mine[at : at + H.ttt_batch]
            lora = BatchedLoRA(len(group), sites, device)
            adapt_docs(model, group, tokens, hints, sidecar, sums, lora, device)

    prefix, rest = docs[: H.phase_docs], docs[H.phase_docs :]
    walk(prefix)
    if dist.is_initialized():
        dist.barrier()
    if prefix and rest:
        learn_prefix(model, prefix, tokens, rank, world, device, log)
        if H.rescore_after_phase:
            sums = Sums(device)
            walk(prefix)
    walk(rest)
    sums.reduce()
    loss, bpb = sums.result()
    expected = sum(n for _, n in docs)
    assert int(sums.count.item()) == expected, (sums.count.item(), expected)
    return loss, bpb, clock.spent()


def evaluate_plain(model, tokens, sidecar, rank, world, device):
    sums = Sums(device)
    total = tokens.numel() - 1
    with torch.inference_mode():
        for k, at in enumerate(range(0, total, H.seq_len * 8)):
            if k % world != rank:
                continue
            part = tokens[at : min(at + H.seq_len * 8, total) + 1].long().to(device)
            cuts = PackedLoader._cuts(part[:-1]).to(device)
            with torch.autocast("cuda", torch.bfloat16):
                z = model.logits(part[None, :-1], cuts, H.seq_len)
            sums.nats += F.cross_entropy(z[0].float(), part[1:], reduction="sum").double()
            sums.octets += sidecar[at + 1 : at + part.numel()].double().sum().to(device)
            sums.count += part.numel() - 1
    sums.reduce()
    return sums.result()


# ---------------------------------------------------------------- run


def main():
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl", device_id=device, timeout=datetime.timedelta(minutes=20))
    os.makedirs("logs", exist_ok=True)

    def log(text):
        if rank == 0:
            print(text, flush=True)
            with open(f"logs/{H.run_id}.txt", "a") as f:
                f.write(text + "\n")

    random.seed(H.seed)
    np.random.seed(H.seed)
    torch.manual_seed(H.seed)
    torch.set_float32_matmul_precision("high")
    with open(__file__, "rb") as f:
        source = f.read()
    log(json.dumps({k: v for k, v in vars(H).items() if not k.startswith("_")}))

    model = GPT().to(device)
    clock = train(model, rank, world, device, log)
    moments = hessians(model, rank, world, device)
    spent = clock.spent()
    log(f"train+gptq calibration: {spent:.1f}s of {H.wallclock:.0f}s")
    assert spent <= H.wallclock, "calibration ran past the training clock"
    if rank == 0:
        size = save_artifact(quantise(model, moments), "model.br")
        log(f"Serialized model: {size} bytes, code: {len(source)} bytes, total: {size + len(source)} bytes")
        assert size + len(source) <= 16_000_000
    if world > 1:
        dist.barrier()

    tokens = read_all(H.val_glob)
    sidecar = read_all(H.val_bytes_glob)
    assert tokens.numel() == sidecar.numel(), "the byte sidecar belongs to other tokens"
    scored = GPT().to(device)
    scored.load_state_dict(restore(load_artifact("model.br")))
    scored.looped = True
    loss, bpb = evaluate_plain(scored, tokens, sidecar, rank, world, device)
    log(f"quantized val_loss:{loss:.6f} val_bpb:{bpb:.6f}")
    if H.ttt_enabled:
        loss, bpb, seconds = evaluate(scored, tokens, sidecar, rank, world, device, log)
        log(f"quantized_ttt val_loss:{loss:.8f} val_bpb:{bpb:.8f} eval_time:{1000 * seconds:.0f}ms")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
