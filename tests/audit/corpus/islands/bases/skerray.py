# skerray: caseops sp8192 (byte fallback) + original-byte sidecar | 11L, loop 3-5, parallel residuals from 7
# muon + qk-gain | int6 gptq w/ sdclip, int8 emb, brotli | lora ttt per document, score-first
# train: torchrun --standalone --nproc_per_node=8 train_gpt.py      data: python train_gpt.py prep
import collections, copy, glob, io, json, lzma, math, os, random, re, sys, time, uuid
from pathlib import Path
import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import brotli
except ImportError:
    brotli = None

E = os.environ.get


class Hyperparameters:
    run_id = E("RUN_ID", str(uuid.uuid4()))
    seed = int(E("SEED", 1337))
    # data
    data = E("DATA_PATH", "./data/datasets/fineweb10B_sp8192_caseops")
    tok = E("TOKENIZER_PATH", "./data/tokenizers/fineweb_8192_caseops.model")
    docs = E("DOCS_PATH", "./data/docs_selected.jsonl")
    tr_glob = os.path.join(data, E("TRAIN_GLOB", "fineweb_train_*.bin"))
    va_glob = os.path.join(data, E("VAL_GLOB", "fineweb_val_[0-9]*.bin"))
    vb_glob = os.path.join(data, E("VAL_BYTES_GLOB", "fineweb_val_bytes_*.bin"))
    val_docs = int(E("VAL_DOCS", 50000))
    shard_tokens = int(E("SHARD_TOKENS", 100_000_000))
    # model
    vocab = int(E("VOCAB_SIZE", 8192))
    n_layer = int(E("NUM_LAYERS", 11))
    dim = int(E("MODEL_DIM", 512))
    n_head = int(E("NUM_HEADS", 8))
    n_kv = int(E("NUM_KV_HEADS", 4))
    mlp_mult = float(E("MLP_MULT", 4.0))
    rope_base = float(E("ROPE_BASE", 10000.0))
    rope_dims = int(E("ROPE_DIMS", 16))
    softcap = float(E("LOGIT_SOFTCAP", 30.0))
    qk_gain = float(E("QK_GAIN_INIT", 5.25))
    xsa_last = int(E("XSA_LAST_N", 11))
    skip_gates = bool(int(E("SKIP_GATES", "1")))
    smear_w = int(E("SMEAR_WIDTH", 12))
    emb_std = float(E("TIED_EMBED_INIT_STD", 0.005))
    par_start = int(E("PARALLEL_START", 7))
    loop_lo = int(E("LOOP_START", 3))
    loop_hi = int(E("LOOP_END", 5))
    loop_n = int(E("NUM_LOOPS", 2))
    loop_at = float(E("LOOP_AT", 0.35))
    # train
    iters = int(E("ITERATIONS", 20000))
    warm_down = float(E("WARMDOWN_FRAC", 0.72))
    min_lr = float(E("MIN_LR", 0.0))
    warm_compile = int(E("WARMUP_STEPS", 20))
    batch = int(E("TRAIN_BATCH_TOKENS", 786432))
    seq = int(E("TRAIN_SEQ_LEN", 2048))
    wall = float(E("MAX_WALLCLOCK_SECONDS", 600.0))
    reserve = float(E("GPTQ_RESERVE_SECONDS", 40.0))
    log_every = int(E("TRAIN_LOG_EVERY", 500))
    val_every = int(E("VAL_LOSS_EVERY", 4000))
    # optim
    lr_mat = float(E("MATRIX_LR", 0.022))
    lr_emb = float(E("TIED_EMBED_LR", 0.03))
    lr_sc = float(E("SCALAR_LR", 0.02))
    mom = float(E("MUON_MOMENTUM", 0.97))
    mom0 = float(E("MUON_MOMENTUM_START", 0.92))
    mom_steps = int(E("MUON_MOMENTUM_WARMUP", 1500))
    ns_steps = int(E("MUON_STEPS", 5))
    row_norm = bool(int(E("MUON_ROW_NORM", "1")))
    wd_mat = float(E("MUON_WD", 0.095))
    wd_emb = float(E("EMBED_WD", 0.085))
    b1 = float(E("BETA1", 0.9))
    b2 = float(E("BETA2", 0.95))
    eps = float(E("ADAM_EPS", 1e-8))
    clip = float(E("GRAD_CLIP", 0.3))
    ema = float(E("EMA_DECAY", 0.9965))
    # quant
    bits = int(E("MATRIX_BITS", 6))
    bits_emb = int(E("EMBED_BITS", 8))
    sd_k = float(E("SDCLIP_K", 12.85))
    sd_k_emb = float(E("SDCLIP_K_EMBED", 20.0))
    cal_n = int(E("GPTQ_BATCHES", 64))
    cal_seqs = int(E("GPTQ_BATCH_SEQS", 8))
    damp = float(E("GPTQ_DAMP", 0.01))
    blk = int(E("GPTQ_BLOCK", 128))
    comp = E("COMPRESSOR", "brotli")
    limit = int(E("SIZE_LIMIT", 16_000_000))
    # eval
    ev_seq = int(E("EVAL_SEQ_LEN", 2048))
    ev_stride = int(E("EVAL_STRIDE", 64))
    ev_bs = int(E("EVAL_BATCH_SEQS", 32))
    slide = bool(int(E("SLIDING_WINDOW_ENABLED", "0")))
    ttt = bool(int(E("TTT_ENABLED", "1")))
    tt_rank = int(E("TTT_LORA_RANK", 96))
    tt_alpha = float(E("TTT_LORA_ALPHA", 144.0))
    tt_lr = float(E("TTT_LORA_LR", 1e-4))
    tt_wd = float(E("TTT_WEIGHT_DECAY", 0.5))
    tt_b1 = float(E("TTT_BETA1", 0.0))
    tt_b2 = float(E("TTT_BETA2", 0.999))
    tt_chunk = int(E("TTT_CHUNK", 48))
    tt_seq = int(E("TTT_EVAL_SEQ_LEN", 2048))
    tt_bs = int(E("TTT_BATCH_DOCS", 64))
    ev_cap = float(E("EVAL_CAP_SECONDS", 570.0))
    # files
    out = E("MODEL_OUT", "final_model.int6.ptz")
    logf = os.path.join(E("LOG_DIR", "logs"), f"{run_id}.txt")


# ---- dist / log

RK = int(E("RANK", "0"))
WS = int(E("WORLD_SIZE", "1"))
LR = int(E("LOCAL_RANK", "0"))
MAIN = RK == 0


def say(s, h=None, con=True):
    if not MAIN:
        return
    if con:
        print(s, flush=True)
    f = (h or Hyperparameters).logf
    os.makedirs(os.path.dirname(f) or ".", exist_ok=True)
    with open(f, "a", encoding="utf-8") as o:
        print(s, file=o)


def bar():
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def asum(t):
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(t, op=dist.ReduceOp.SUM)
    return t


def amax(v, dv):
    t = torch.tensor(float(v), device=dv)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
    return t.item()


# ---- case operators: lossless. C1 = next ascii letter is a capital, CW = the whole ascii word is, ES = next char is literal

C1, CW, ES = "\ue001", "\ue002", "\ue003"
OPS = (C1, CW, ES)
_WORD = re.compile("[A-Za-z]+|[\ue001\ue002\ue003]")
BOS = 1


def _op(m):
    w = m.group(0)
    if w in OPS:
        return ES + w
    if len(w) > 1 and w.isupper():
        return CW + w.lower()
    return "".join(C1 + c.lower() if c.isupper() else c for c in w)


def co_enc(s):
    return _WORD.sub(_op, s)


def co_dec(t):
    o, i, n = [], 0, len(t)
    while i < n:
        c = t[i]
        if c == ES:
            o.append(t[i + 1])
            i += 2
        elif c == C1:
            o.append(t[i + 1].upper())
            i += 2
        elif c == CW:
            j = i + 1
            while j < n and "a" <= t[j] <= "z":
                j += 1
            o.append(t[i + 1 : j].upper())
            i = j
        else:
            o.append(c)
            i += 1
    return "".join(o)


def char_cost(t):
    # original utf-8 bytes behind every char of the transformed text: operators are free, escaped chars are not
    c = np.zeros(len(t) + 1, np.int64)
    lit = False
    for i, ch in enumerate(t):
        if ch in OPS and not lit:
            lit = ch == ES
            continue
        c[i + 1] = len(ch.encode("utf-8"))
        lit = False
    return np.cumsum(c)


def doc_ids(sp, s):
    # ids and original bytes per id; checked to be a bijection on this document
    t = co_enc(s)
    cc = char_cost(t)
    ids, nb = [], []
    for p in sp.encode(t, out_type="immutable_proto").pieces:
        ids.append(p.id)
        nb.append(int(cc[p.end] - cc[p.begin]))
    assert co_dec(sp.decode(ids)) == s, "caseops round trip"
    assert sum(nb) == len(s.encode("utf-8")), "sidecar bytes"
    return ids, nb


MAGIC, VER, HDR = 20240520, 1, 256


def w_shard(path, a):
    hd = np.zeros(HDR, np.int32)
    hd[:3] = MAGIC, VER, len(a)
    with open(path, "wb") as f:
        f.write(hd.tobytes())
        f.write(np.asarray(a, dtype=np.uint16).tobytes())


def prep(h):
    # docs_selected.jsonl: the first val_docs documents are the fixed validation split, the rest is training
    sp = spm.SentencePieceProcessor(model_file=h.tok)
    os.makedirs(h.data, exist_ok=True)
    vi, vb, ti, ns, nd = [], [], [], 0, 0
    with open(h.docs, encoding="utf-8") as f:
        for ln in f:
            ids, nb = doc_ids(sp, json.loads(ln)["text"])
            if nd < h.val_docs:
                vi += [BOS] + ids
                vb += [0] + nb
            else:
                ti += [BOS] + ids
            nd += 1
            if nd == h.val_docs:
                w_shard(os.path.join(h.data, "fineweb_val_000000.bin"), vi)
                w_shard(os.path.join(h.data, "fineweb_val_bytes_000000.bin"), vb)
                print(f"val docs:{nd} tokens:{len(vi)} bytes:{sum(vb)}")
            while len(ti) >= h.shard_tokens:
                w_shard(os.path.join(h.data, f"fineweb_train_{ns:06d}.bin"), ti[: h.shard_tokens])
                ti, ns = ti[h.shard_tokens :], ns + 1
    if ti:
        w_shard(os.path.join(h.data, f"fineweb_train_{ns:06d}.bin"), ti)
    print(f"docs:{nd} train shards:{ns + bool(ti)}")


# ---- shards


def r_shard(path):
    hd = np.fromfile(path, dtype="<i4", count=HDR)
    if hd.size != HDR or int(hd[0]) != MAGIC or int(hd[1]) != VER:
        raise ValueError(f"bad header: {path}")
    n = int(hd[2])
    if os.path.getsize(path) != HDR * 4 + n * 2:
        raise ValueError(f"bad size: {path}")
    a = np.fromfile(path, dtype="<u2", count=n, offset=HDR * 4)
    return torch.from_numpy(a.astype(np.uint16, copy=False))


class Shards:
    # endless stream over a glob of shards
    def __init__(self, g):
        self.fs = sorted(glob.glob(g))
        if not self.fs:
            raise FileNotFoundError(g)
        self.i, self.p = 0, 0
        self.t = r_shard(self.fs[0])

    def _next(self):
        self.i = (self.i + 1) % len(self.fs)
        self.t = r_shard(self.fs[self.i])
        self.p = 0

    def take(self, n):
        o = []
        while n > 0:
            k = min(n, self.t.numel() - self.p)
            if k <= 0:
                self._next()
                continue
            o.append(self.t[self.p : self.p + k])
            self.p += k
            n -= k
        return o[0] if len(o) == 1 else torch.cat(o)


class Loader:
    def __init__(self, g, dv):
        self.s, self.dv = Shards(g), dv

    def next(self, tokens, seq, accum):
        n = tokens // (WS * accum) + 1
        c = self.s.take(n * WS)
        c = c[RK * n : RK * n + n].to(torch.int64)
        x, y = c[:-1].view(-1, seq), c[1:].view(-1, seq)
        return x.pin_memory().to(self.dv, non_blocking=True), y.pin_memory().to(self.dv, non_blocking=True)


def load_val(h):
    fs = sorted(glob.glob(h.va_glob))
    if not fs:
        raise FileNotFoundError(h.va_glob)
    return torch.cat([r_shard(f) for f in fs]).to(torch.int64)


# ---- bytes


def op_ids(sp):
    return [sp.piece_to_id(c) for c in OPS]


def tables(sp, vocab, dv):
    # nb: bytes of a piece without its leading space, ls: it has one, bd: no text before it (bos, control, unknown)
    nb = np.zeros(vocab, np.int16)
    ls = np.zeros(vocab, np.bool_)
    bd = np.ones(vocab, np.bool_)
    ops = set(op_ids(sp))
    for i in range(min(vocab, sp.vocab_size())):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            continue
        bd[i] = False
        if i in ops:
            continue
        if sp.is_byte(i):
            nb[i] = 1
            continue
        p = sp.id_to_piece(i)
        if p.startswith("\u2581"):
            ls[i] = True
            p = p[1:]
        nb[i] = len(p.replace("\u2581", " ").encode("utf-8"))
    f = lambda a, t: torch.tensor(a, dtype=t, device=dv)
    return f(nb, torch.int16), f(ls, torch.bool), f(bd, torch.bool)


def val_bytes(h, sp, vt):
    # original utf-8 bytes of every validation token: the sidecar, or (a stream without one) counted from the pieces
    fs = sorted(glob.glob(h.vb_glob)) if h.vb_glob else []
    if fs:
        vb = torch.cat([r_shard(f) for f in fs]).to(torch.int32)
        src = "sidecar"
    else:
        nb, ls, bd = tables(sp, h.vocab, "cpu")
        pv = torch.cat([vt.new_full((1,), BOS), vt[:-1]])
        vb = nb[vt].to(torch.int32) + (ls[vt] & ~bd[pv]).to(torch.int32)
        c1, cw, es = op_ids(sp)
        lit = (pv == es) & ((vt == c1) | (vt == cw) | (vt == es))
        vb = torch.where(lit, torch.full_like(vb, 3), vb)
        src = "pieces"
    if vb.numel() != vt.numel():
        raise ValueError(f"sidecar {vb.numel()} != tokens {vt.numel()}")
    say(f"val bytes:{int(vb.sum())} from {src}, {vb.sum().item() / vt.numel():.4f} per token")
    return vb


def bpb(ls, n, by):
    # ls: summed nats, n: tokens, by: original bytes
    return (ls / n).item(), (ls / math.log(2.0) / by).item()


# ---- model


def rms(x):
    return F.rms_norm(x, (x.size(-1),))


class Lin(nn.Linear):
    # fp32 master, computes in the input's dtype
    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None)


class Rope(nn.Module):
    def __init__(self, d, base):
        super().__init__()
        self.register_buffer("f", base ** (-torch.arange(0, d, 2, dtype=torch.float32) / d), persistent=False)
        self.n, self.c, self.s = 0, None, None

    def forward(self, n, dv, dt):
        if self.c is None or self.n != n or self.c.device != dv:
            t = torch.outer(torch.arange(n, device=dv, dtype=torch.float32), self.f.to(dv))
            self.c, self.s, self.n = t.cos()[None, :, None, :], t.sin()[None, :, None, :], n
        return self.c.to(dt), self.s.to(dt)


def rot(x, c, s, d):
    a, b, r = x[..., : d // 2], x[..., d // 2 : d], x[..., d:]
    return torch.cat((a * c + b * s, b * c - a * s, r), dim=-1)


class Attn(nn.Module):
    def __init__(self, h, xsa):
        super().__init__()
        self.nh, self.nk, self.hd, self.rd, self.xsa = h.n_head, h.n_kv, h.dim // h.n_head, h.rope_dims, xsa
        kv = self.nk * self.hd
        self.q = Lin(h.dim, h.dim, bias=False)
        self.k = Lin(h.dim, kv, bias=False)
        self.v = Lin(h.dim, kv, bias=False)
        self.o = Lin(h.dim, h.dim, bias=False)
        self.o.zero = True
        self.gain = nn.Parameter(torch.full((self.nh,), h.qk_gain))
        self.rope = Rope(self.rd, h.rope_base)

    def ortho(self, y, v):
        # xsa: the part of the output along the token's own value is taken out
        b, t, n, d = y.shape
        g = n // self.nk
        yg = y.reshape(b, t, self.nk, g, d)
        u = F.normalize(v, dim=-1).unsqueeze(-2)
        return (yg - (yg * u).sum(-1, keepdim=True) * u).reshape(b, t, n, d)

    def forward(self, x, lo=None):
        b, t, d = x.shape
        q, k, v = self.q(x), self.k(x), self.v(x)
        if lo is not None:
            q, k, v = q + lo[0](x), k + lo[1](x), v + lo[2](x)
        q = rms(q.view(b, t, self.nh, self.hd))
        k = rms(k.view(b, t, self.nk, self.hd))
        v = v.view(b, t, self.nk, self.hd)
        c, s = self.rope(t, x.device, x.dtype)
        q, k = rot(q, c, s, self.rd), rot(k, c, s, self.rd)
        q = q * self.gain.to(q.dtype)[None, None, :, None]
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=self.nh != self.nk
        ).transpose(1, 2)
        if self.xsa:
            y = self.ortho(y, v)
        y = y.reshape(b, t, d)
        z = self.o(y)
        return z + lo[3](y) if lo is not None else z


class Mlp(nn.Module):
    def __init__(self, h):
        super().__init__()
        m = int(h.dim * h.mlp_mult)
        self.up = Lin(h.dim, m, bias=False)
        self.dn = Lin(m, h.dim, bias=False)
        self.dn.zero = True

    def forward(self, x, lo=None):
        u = F.leaky_relu(self.up(x), 0.5).square()
        y = self.dn(u)
        return y + lo[4](x) if lo is not None else y


class Block(nn.Module):
    def __init__(self, h, i):
        super().__init__()
        self.at = Attn(h, i >= h.n_layer - h.xsa_last)
        self.ml = Mlp(h)
        self.par = i >= h.par_start
        self.sa = nn.Parameter(torch.ones(h.dim))
        self.sm = nn.Parameter(torch.ones(h.dim))
        self.mix = nn.Parameter(torch.stack((torch.ones(h.dim), torch.zeros(h.dim))))
        self.ns = 1.0 / math.sqrt(i + 1)

    def forward(self, x, x0, lo=None):
        m = self.mix.to(x.dtype)
        x = m[0] * x + m[1] * x0
        n = rms(x) * self.ns
        a = self.sa.to(x.dtype) * self.at(n, lo)
        if self.par:
            return x + a + self.sm.to(x.dtype) * self.ml(n, lo)
        x = x + a
        return x + self.sm.to(x.dtype) * self.ml(rms(x) * self.ns, lo)


class GPT(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.cap, self.sw = h.softcap, h.smear_w
        self.emb = nn.Embedding(h.vocab, h.dim)
        self.bl = nn.ModuleList(Block(h, i) for i in range(h.n_layer))
        self.sg = Lin(h.smear_w, 1, bias=False)
        self.sg.zero = True
        self.sl = nn.Parameter(torch.zeros(1))
        L, seg = h.n_layer, list(range(h.loop_lo, h.loop_hi + 1))
        full = list(range(h.loop_lo)) + seg * (h.loop_n + 1) + list(range(h.loop_hi + 1, L))
        k = len(full) // 2
        self.plan = {False: (list(range(L // 2)), list(range(L // 2, L))), True: (full[:k], full[k:])}
        self.loop = False
        ns = max(min(len(a), len(b)) for a, b in self.plan.values())
        self.sk = nn.Parameter(torch.ones(ns, h.dim))
        self.sgt = nn.Parameter(torch.zeros(ns, h.dim)) if h.skip_gates else None
        nn.init.normal_(self.emb.weight, std=h.emb_std)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                if getattr(m, "zero", False):
                    nn.init.zeros_(m.weight)
                elif min(m.weight.shape) >= 64:
                    nn.init.orthogonal_(m.weight)

    def smear(self, x, ids):
        # the previous token's embedding, gated; nothing crosses the start of a document
        g = self.sl.to(x.dtype) * torch.sigmoid(self.sg(x[:, 1:, : self.sw]))
        g = g * (ids[:, 1:] != BOS).unsqueeze(-1).to(x.dtype)
        return torch.cat((x[:, :1], x[:, 1:] + g * x[:, :-1]), dim=1)

    def hid(self, ids, lo=None):
        x = self.emb(ids)
        x = rms(self.smear(x.to(torch.bfloat16) if x.is_cuda else x, ids))
        x0, st = x, []
        en, de = self.plan[self.loop]
        for i in en:
            x = self.bl[i](x, x0, lo.at(i) if lo is not None else None)
            st.append(x)
        for j, i in enumerate(de):
            if st and j < self.sk.size(0):
                s = self.sk[j].to(x.dtype) * st.pop()
                if self.sgt is not None:
                    g = torch.sigmoid(self.sgt[j].to(x.dtype))
                    x = torch.lerp(s, x, g)
                else:
                    x = x + s
            x = self.bl[i](x, x0, lo.at(i) if lo is not None else None)
        return rms(x)

    def head(self, x, lo=None):
        z = F.linear(x, self.emb.weight.to(x.dtype))
        if lo is not None:
            z = z + lo.hd(x)
        return self.cap * torch.tanh(z.float() / self.cap)

    def logits(self, ids, lo=None):
        return self.head(self.hid(ids, lo), lo)

    def nll(self, ids, y, lo=None):
        z = self.logits(ids, lo)
        return F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)

    def forward(self, ids, y):
        z = self.logits(ids)
        return F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="mean")


# ---- lora: one adapter per document of the batch


class BLin(nn.Module):
    def __init__(self, n, i, o, r, a):
        super().__init__()
        self.k = a / r
        self.A = nn.Parameter(torch.empty(n, r, i))
        self.B = nn.Parameter(torch.zeros(n, o, r))
        self.reset()

    @torch.no_grad()
    def reset(self):
        b = 1.0 / math.sqrt(self.A.shape[-1])
        self.A.uniform_(-b, b)
        self.B.zero_()

    def forward(self, x):
        return self.k * ((x @ self.A.to(x.dtype).transpose(1, 2)) @ self.B.to(x.dtype).transpose(1, 2))


class Lora(nn.Module):
    def __init__(self, n, h):
        super().__init__()
        d, kv, r, a = h.dim, h.n_kv * h.dim // h.n_head, h.tt_rank, h.tt_alpha
        self.hd = BLin(n, d, h.vocab, r, a)
        self.ly = nn.ModuleList(
            nn.ModuleList(BLin(n, d, o, r, a) for o in (d, kv, kv, d, d)) for _ in range(h.n_layer)
        )

    def at(self, i):
        return self.ly[i]

    def reset(self):
        for m in self.modules():
            if isinstance(m, BLin):
                m.reset()


# ---- optimizers


@torch.compile
def ns5(g, steps):
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    x = x / (x.norm() + 1e-7)
    tr = g.size(0) > g.size(1)
    x = x.T if tr else x
    for _ in range(steps):
        m = x @ x.T
        x = a * x + (b * m + c * m @ m) @ x
    return x.T if tr else x


class Muon(torch.optim.Optimizer):
    # every rank orthogonalises its share, one all-reduce brings the updates together
    def __init__(self, ps, lr, mom, steps, wd, rown):
        super().__init__(ps, dict(lr=lr, mom=mom, steps=steps, wd=wd, rown=rown))

    @torch.no_grad()
    def step(self):
        for gr in self.param_groups:
            ps, lr, mu = gr["params"], gr["lr"], gr["mom"]
            u = torch.zeros(sum(p.numel() for p in ps), device=ps[0].device, dtype=torch.bfloat16)
            o = 0
            for i, p in enumerate(ps):
                if i % WS == RK and p.grad is not None:
                    g, st = p.grad, self.state[p]
                    if "m" not in st:
                        st["m"] = torch.zeros_like(g)
                    st["m"].mul_(mu).add_(g)
                    g = g.add(st["m"], alpha=mu)
                    if gr["rown"]:
                        g = g / (g.norm(dim=-1, keepdim=True) + 1e-7)
                    g = ns5(g, gr["steps"])
                    g = g * max(1.0, g.size(0) / g.size(1)) ** 0.5
                    u[o : o + p.numel()] = g.reshape(-1)
                o += p.numel()
            asum(u)
            o = 0
            for p in ps:
                p.mul_(1.0 - lr * gr["wd"])
                p.add_(u[o : o + p.numel()].view_as(p).to(p.dtype), alpha=-lr)
                o += p.numel()


class Opts:
    def __init__(self, h, net):
        mat, sc = [], []
        for n, p in net.named_parameters():
            if n == "emb.weight":
                continue
            big = p.ndim == 2 and n.startswith("bl.") and n.endswith("weight")
            (mat if big else sc).append(p)
        ad = dict(betas=(h.b1, h.b2), eps=h.eps, fused=True)
        self.mu = Muon(mat, h.lr_mat, h.mom0, h.ns_steps, h.wd_mat, h.row_norm)
        self.em = torch.optim.AdamW([net.emb.weight], lr=h.lr_emb, weight_decay=h.wd_emb, **ad)
        self.sc = torch.optim.AdamW(sc, lr=h.lr_sc, weight_decay=0.02, **ad)
        self.all = [self.mu, self.em, self.sc]
        self.rest = [net.emb.weight] + sc
        for o in self.all:
            for g in o.param_groups:
                g["lr0"] = g["lr"]

    def zero(self):
        for o in self.all:
            o.zero_grad(set_to_none=True)

    def step(self, h, scale, it):
        f = min(it / h.mom_steps, 1.0) if h.mom_steps else 1.0
        for g in self.mu.param_groups:
            g["mom"] = (1 - f) * h.mom0 + f * h.mom
        for o in self.all:
            for g in o.param_groups:
                g["lr"] = g["lr0"] * scale
            o.step()
        self.zero()


# ---- averaging


class Ema:
    # fp32 running mean of the weights
    def __init__(self, net, d):
        self.d = d
        self.s = {k: v.detach().float().clone() for k, v in net.state_dict().items()}

    @torch.no_grad()
    def up(self, net):
        for k, v in net.state_dict().items():
            self.s[k].mul_(self.d).add_(v.detach().float(), alpha=1.0 - self.d)

    @torch.no_grad()
    def put(self, net):
        cur = net.state_dict()
        net.load_state_dict({k: v.to(cur[k].dtype) for k, v in self.s.items()}, strict=True)


# ---- int6 gptq, sdclip


def hessians(h, net, ld, dv):
    # x^T x of every matrix's input over train batches; for the tied embedding the input of the head
    hs, hk = {}, []

    def add(k, x):
        x = x.detach().flatten(0, -2).float()
        if k not in hs:
            hs[k] = torch.zeros(x.size(1), x.size(1), device=dv)
        hs[k].addmm_(x.T, x)

    for n, m in net.named_modules():
        if isinstance(m, Lin) and n.startswith("bl."):
            hk.append(m.register_forward_pre_hook(lambda mod, a, k=n + ".weight": add(k, a[0])))
    net.eval()
    with torch.no_grad():
        for _ in range(h.cal_n):
            x, _ = ld.next(h.cal_seqs * h.seq * WS, h.seq, 1)
            add("emb.weight", net.hid(x))
    for k in hk:
        k.remove()
    net.train()
    for v in hs.values():
        asum(v)
        v.div_(h.cal_n * WS)
    return hs


def sd_scale(w, bits, k):
    # clip at k deviations of the row, not at its maximum
    q = 2 ** (bits - 1) - 1
    return (k * w.std(dim=1) / q).clamp_min(1e-8).half()


def gptq(w, H, bits, k, damp, blk):
    w = w.detach().float().clone()
    q = 2 ** (bits - 1) - 1
    s = sd_scale(w, bits, k)
    sf = s.float()
    H = H.clone()
    dd = torch.diagonal(H)
    dead = dd == 0
    dd[dead] = 1.0
    w[:, dead] = 0.0
    pm = torch.argsort(dd, descending=True)
    w, H = w[:, pm], H[pm][:, pm]
    H.diagonal().add_(damp * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    Q = torch.zeros_like(w, dtype=torch.int8)
    n = w.size(1)
    for a in range(0, n, blk):
        e = min(a + blk, n)
        wb, er = w[:, a:e].clone(), torch.zeros(w.size(0), e - a, device=w.device)
        for j in range(e - a):
            c, d = wb[:, j], U[a + j, a + j]
            r = (c / sf).round().clamp(-q, q)
            Q[:, a + j] = r.to(torch.int8)
            er[:, j] = (c - r * sf) / d
            wb[:, j:] -= er[:, j : j + 1] * U[a + j, a + j : e][None, :]
        w[:, e:] -= er @ U[a:e, e:]
    return Q[:, torch.argsort(pm)].contiguous(), s


def quant(h, sd, hs):
    o, info = {}, collections.Counter()
    for k, t in sd.items():
        t = t.detach()
        if k in hs and t.ndim == 2:
            em = k == "emb.weight"
            b, c = (h.bits_emb, h.sd_k_emb) if em else (h.bits, h.sd_k)
            Q, s = gptq(t, hs[k].to(t.device), b, c, h.damp, h.blk)
            o[k + ".q"], o[k + ".s"] = Q.cpu(), s.cpu()
            info[f"gptq int{b}"] += t.numel()
        else:
            o[k] = t.half().cpu() if t.is_floating_point() else t.cpu()
            info["half"] += t.numel()
    say("quant: " + " ".join(f"{k}:{v}" for k, v in sorted(info.items())))
    return o


def dequant(o, like):
    sd = {}
    for k, t in like.items():
        if k + ".q" in o:
            sd[k] = (o[k + ".q"].float() * o[k + ".s"].float()[:, None]).to(t.dtype)
        else:
            sd[k] = o[k].to(t.dtype)
    return sd


# ---- pack


def shuf(b, n=2):
    a = np.frombuffer(b, np.uint8)
    k = len(a) // n * n
    return np.concatenate((a[:k].reshape(-1, n).T.reshape(-1), a[k:])).tobytes()


def unshuf(b, n=2):
    a = np.frombuffer(b, np.uint8)
    k = len(a) // n * n
    return np.concatenate((a[:k].reshape(n, -1).T.reshape(-1), a[k:])).tobytes()


def squeeze(b, how):
    b = shuf(b)
    if how == "brotli" and brotli is not None:
        return b"B" + brotli.compress(b, quality=9, lgwin=24)
    return b"L" + lzma.compress(b, preset=9)


def unsqueeze(b):
    f = brotli.decompress if b[:1] == b"B" else lzma.decompress
    return unshuf(f(b[1:]))


def save(h, sd, hs):
    # every rank quantises the same weights, rank 0 writes
    o = quant(h, sd, hs)
    code = len(Path(__file__).read_bytes())
    if MAIN:
        f = io.BytesIO()
        torch.save(o, f)
        bl = squeeze(f.getvalue(), h.comp)
        Path(h.out).write_bytes(bl)
        tot = code + len(bl)
        say(f"code bytes: {code}")
        say(f"model bytes ({h.comp}): {len(bl)}")
        say(f"total bytes: {tot} limit: {h.limit} left: {h.limit - tot}")
        if tot > h.limit:
            raise SystemExit("too large")
    bar()


def load(h, dv):
    net = GPT(h).to(dv)
    o = torch.load(io.BytesIO(unsqueeze(Path(h.out).read_bytes())), map_location="cpu", weights_only=True)
    net.load_state_dict(dequant(o, net.state_dict()), strict=True)
    net.loop = h.loop_n > 0
    return net.eval().requires_grad_(False)


# ---- eval


def eval_plain(h, dv, net, vt, vb):
    # disjoint windows; log only
    S = h.ev_seq
    n = (vt.numel() - 1) // S
    a, e = n * RK // WS, n * (RK + 1) // WS
    acc = torch.zeros(3, dtype=torch.float64, device=dv)
    was = net.training
    net.eval()
    with torch.no_grad():
        for i in range(a, e, h.ev_bs):
            j = min(i + h.ev_bs, e)
            c = vt[i * S : j * S + 1].to(dv)
            x, y = c[:-1].view(-1, S), c[1:].view(-1, S)
            l = net.nll(x, y)
            acc[0] += l.double().sum()
            acc[1] += y.numel()
            acc[2] += vb[i * S + 1 : j * S + 1].sum().to(dv)
    net.train(was)
    asum(acc)
    return bpb(*acc)


def eval_slide(h, dv, net, vt, vb):
    # stride-s windows; every target once: the first window counts whole, later ones their last s
    S, st = h.ev_seq, h.ev_stride
    T = vt.numel() - 1
    ws = [0] + list(range(st, T - S + st, st)) if T > S else [0]
    mine = ws[len(ws) * RK // WS : len(ws) * (RK + 1) // WS]
    acc = torch.zeros(3, dtype=torch.float64, device=dv)
    lg = torch.compile(net.logits, dynamic=False, fullgraph=True)
    with torch.no_grad():
        for i in range(0, len(mine), h.ev_bs):
            b = mine[i : i + h.ev_bs]
            x = torch.full((h.ev_bs, S), BOS, dtype=torch.int64)
            y = torch.full((h.ev_bs, S), BOS, dtype=torch.int64)
            w = torch.zeros((h.ev_bs, S), dtype=torch.float64)
            nb = torch.zeros((h.ev_bs, S), dtype=torch.float64)
            for r, a in enumerate(b):
                e = min(a + S, T)
                n = e - a
                x[r, :n], y[r, :n] = vt[a:e], vt[a + 1 : e + 1]
                nb[r, :n] = vb[a + 1 : e + 1].double()
                w[r, (0 if a == 0 else S - st) : n] = 1.0
            x, y, w, nb = x.to(dv), y.to(dv), w.to(dv), nb.to(dv)
            z = lg(x)
            l = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
            acc[0] += (l.double() * w).sum()
            acc[1] += w.sum()
            acc[2] += (nb * w).sum()
    asum(acc)
    if int(acc[1].item()) != T:
        raise RuntimeError(f"slide: {int(acc[1].item())} of {T} tokens")
    return bpb(*acc)


# ---- ttt: lora per document, scored chunk by chunk, then trained on the chunk just scored


def find_docs(vt):
    # (start, targets): a document's targets run to the next bos inclusive, so that every token but the first is one
    b = (vt == BOS).nonzero().flatten().tolist()
    if not b or b[0] != 0:
        b = [0] + b
    e = b[1:] + [vt.numel() - 1]
    return [(s, t - s) for s, t in zip(b, e) if t > s]


def tt_batches(h, docs):
    # sorted by length, so that the documents of a batch are about equally long; long ones first, dealt out in turn
    o = sorted(docs, key=lambda d: (-d[1], d[0]))
    bs = [o[i : i + h.tt_bs] for i in range(0, len(o), h.tt_bs)]
    return bs[RK::WS]


def tt_opt(h, lo):
    return torch.optim.AdamW(
        lo.parameters(), lr=h.tt_lr, betas=(h.tt_b1, h.tt_b2), eps=1e-10, weight_decay=h.tt_wd, fused=True
    )


def tt_zero(opt):
    for st in opt.state.values():
        for v in st.values():
            if torch.is_tensor(v):
                v.zero_()


def fill(b, vt, vb, dv):
    # left-aligned, padded with bos; row r holds the tokens and bytes of document b[r]
    P = max(n for _, n in b)
    tk = torch.full((len(b), P + 1), BOS, dtype=torch.int64)
    by = torch.zeros((len(b), P + 1), dtype=torch.int32)
    for r, (s, n) in enumerate(b):
        tk[r, : n + 1] = vt[s : s + n + 1]
        by[r, : n + 1] = vb[s : s + n + 1]
    ln = torch.tensor([n for _, n in b])
    return tk.to(dv), by.to(dv), ln.to(dv), P


def ttt_docs(h, dv, net, f, lo, opt, b, vt, vb, acc, live):
    # one batch of documents; their adapters and optimizer states are disjoint slices of lo
    C, S = h.tt_chunk, h.tt_seq
    tk, by, ln, P = fill(b, vt, vb, dv)
    pos = torch.arange(P, device=dv)
    lo.reset()
    tt_zero(opt)
    nc = (P + C - 1) // C
    for ci in range(nc):
        a, e = ci * C, min(ci * C + C, P)
        w = max(0, e - S)
        x, y = tk[:, w:e], tk[:, w + 1 : e + 1]
        m = (pos[a:e][None, :] < ln[:, None]).double()
        up = live and ci < nc - 1
        with torch.set_grad_enabled(up), torch.autocast("cuda", torch.bfloat16):
            l = f(x, y, lo)
        c = l[:, a - w :]
        # score
        acc[0] += (c.detach().double() * m).sum()
        acc[1] += m.sum()
        acc[2] += (by[:, a + 1 : e + 1].double() * m).sum()
        # then train
        if up:
            g = (c * m.to(c.dtype)).sum(1) / m.sum(1).clamp_min(1.0).to(c.dtype)
            opt.zero_grad(set_to_none=True)
            g.sum().backward()
            opt.step()


def tt_warm(h, dv, net, f):
    # compiles both forms on random ids
    lo = Lora(h.tt_bs, h).to(dv)
    opt = tt_opt(h, lo)
    for n in (h.tt_chunk, 4 * h.tt_chunk, h.tt_seq):
        x = torch.randint(0, h.vocab, (h.tt_bs, n), device=dv)
        y = torch.randint(0, h.vocab, (h.tt_bs, n), device=dv)
        with torch.autocast("cuda", torch.bfloat16):
            f(x, y, lo)[:, -h.tt_chunk :].mean().backward()
        opt.step()
        opt.zero_grad(set_to_none=True)
    del lo, opt
    torch.cuda.empty_cache()


def eval_ttt(h, dv, net, vt, vb, t0):
    f = torch.compile(net.nll, dynamic=True)
    tt_warm(h, dv, net, f)
    docs = find_docs(vt)
    mine = tt_batches(h, docs)
    acc = torch.zeros(3, dtype=torch.float64, device=dv)
    lo, opt, cold = None, None, 0
    for i, b in enumerate(mine):
        if lo is None or lo.hd.A.size(0) != len(b):
            lo = Lora(len(b), h).to(dv)
            opt = tt_opt(h, lo)
        # out of time: the rest is scored without adapting
        live = time.perf_counter() - t0 < h.ev_cap - 0.15 * (len(mine) - i)
        cold += 0 if live else len(b)
        ttt_docs(h, dv, net, f, lo, opt, b, vt, vb, acc, live)
        if MAIN and i % 16 == 0:
            s = time.perf_counter() - t0
            say(f"ttt: batch {i + 1}/{len(mine)} len:{b[0][1]} nll:{(acc[0] / acc[1]).item():.5f} t:{s:.1f}s")
    asum(acc)
    n = int(round(acc[1].item()))
    if n != vt.numel() - 1:
        raise RuntimeError(f"ttt: {n} of {vt.numel() - 1} tokens")
    say(f"ttt: docs:{len(docs)} tokens:{n} bytes:{int(acc[2].item())} cold:{cold}")
    return bpb(*acc)


# ---- train


def lr_at(h, fr):
    if fr < 1.0 - h.warm_down:
        return 1.0
    return max((1.0 - fr) / max(h.warm_down, 1e-9), h.min_lr)


def micro(h, m, ld, accum):
    t = torch.zeros((), device="cuda")
    for k in range(accum):
        if hasattr(m, "require_backward_grad_sync"):
            m.require_backward_grad_sync = k == accum - 1
        x, y = ld.next(h.batch, h.seq, accum)
        with torch.autocast("cuda", torch.bfloat16):
            l = m(x, y)
        t += l.detach() / accum
        (l / accum).backward()
    return t


def warm_up(h, net, m, op, dv, accum):
    # compiles both plans on the real shapes, then everything is put back
    sd = {k: v.detach().cpu().clone() for k, v in net.state_dict().items()}
    os_ = [copy.deepcopy(o.state_dict()) for o in op.all]
    ld = Loader(h.tr_glob, dv)
    for lp in (False, True) if h.loop_n > 0 else (False,):
        net.loop = lp
        for _ in range(h.warm_compile // 2):
            micro(h, m, ld, accum)
            op.step(h, 1.0, 0)
    net.loop = False
    net.load_state_dict(sd, strict=True)
    for o, s in zip(op.all, os_):
        o.load_state_dict(s)
    for p in op.mu.param_groups[0]["params"]:
        op.mu.state.pop(p, None)
    op.zero()


def train(h, dv, vt, vb):
    accum = max(1, 8 // WS)
    net = GPT(h).to(dv)
    cn = torch.compile(net, dynamic=False, fullgraph=True)
    m = nn.parallel.DistributedDataParallel(cn, device_ids=[LR], broadcast_buffers=False) if WS > 1 else cn
    op = Opts(h, net)
    say(f"params:{sum(p.numel() for p in net.parameters())} world:{WS} accum:{accum} seed:{h.seed}")
    say(f"plan:{net.plan[h.loop_n > 0]} par:{h.par_start}+ qk_gain:{h.qk_gain}")
    if h.warm_compile:
        warm_up(h, net, m, op, dv, accum)
    ld = Loader(h.tr_glob, dv)
    em = Ema(net, h.ema)
    cap = h.wall - h.reserve
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    it, last = 0, None
    while True:
        el = time.perf_counter() - t0
        done = it >= h.iters or (last is not None and it >= last)
        if done or (h.val_every > 0 and it > 0 and it % h.val_every == 0):
            vl, vp = eval_plain(h, dv, net, vt, vb)
            say(f"step:{it}/{h.iters} val_loss:{vl:.4f} val_bpb:{vp:.4f} train_time:{1000 * el:.0f}ms")
        if done:
            break
        fr = max(el / cap, it / h.iters)
        if not net.loop and h.loop_n > 0 and fr >= h.loop_at:
            net.loop = True
            say(f"loop on at step {it}")
        tl = micro(h, m, ld, accum)
        if h.clip > 0:
            nn.utils.clip_grad_norm_(op.rest, h.clip)
        op.step(h, lr_at(h, fr), it)
        em.up(net)
        it += 1
        if it <= 5 or it % h.log_every == 0:
            el = time.perf_counter() - t0
            say(f"step:{it}/{h.iters} train_loss:{tl.item():.4f} t:{el:.1f}s avg:{1000 * el / it:.2f}ms")
        if last is None and it % 4 == 0 and amax(time.perf_counter() - t0, dv) >= cap:
            last = it
            say(f"stop at step {it}: cap {cap:.1f}s")
    em.put(net)
    hs = hessians(h, net, ld, dv)
    save(h, net.state_dict(), hs)
    tt = amax(time.perf_counter() - t0, dv)
    say(f"train + hessians + gptq + pack: {tt:.1f}s of {h.wall:.0f}s")
    if tt > h.wall:
        say("WARNING: over the training budget")
    say(f"peak mem: {torch.cuda.max_memory_allocated() // 1024 ** 2} MiB")
    return tt


# ---- main


def main():
    h = Hyperparameters()
    if sys.argv[1:] == ["prep"]:
        return prep(h)
    dv = torch.device("cuda", LR)
    torch.cuda.set_device(dv)
    if WS > 1:
        dist.init_process_group("nccl", device_id=dv)
        bar()
    random.seed(h.seed)
    np.random.seed(h.seed)
    torch.manual_seed(h.seed)
    torch.cuda.manual_seed_all(h.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.cache_size_limit = 64
    say(Path(__file__).read_text(encoding="utf-8"), h, con=False)
    say(f"python {sys.version.split()[0]} torch {torch.__version__} gpus {WS}")
    for k in sorted(a for a in dir(h) if not a.startswith("_")):
        say(f"  {k}: {getattr(h, k)}")
    sp = spm.SentencePieceProcessor(model_file=h.tok)
    if sp.vocab_size() != h.vocab:
        raise ValueError(f"vocab {h.vocab} != tokenizer {sp.vocab_size()}")
    vt = load_val(h)
    vb = val_bytes(h, sp, vt)
    nd = int((vt == BOS).sum())
    say(f"val tokens:{vt.numel() - 1} docs:{nd} train shards:{len(glob.glob(h.tr_glob))}")
    if nd != h.val_docs:
        raise ValueError(f"{nd} validation documents, not {h.val_docs}")
    train(h, dv, vt, vb)
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    bar()

    t0 = time.perf_counter()
    net = load(h, dv)
    vl, vp = eval_plain(h, dv, net, vt, vb)
    say(f"quantized val_loss:{vl:.6f} val_bpb:{vp:.6f} t:{time.perf_counter() - t0:.1f}s")
    if h.slide or not h.ttt:
        vl, vp = eval_slide(h, dv, net, vt, vb)
        say(f"sliding val_loss:{vl:.6f} val_bpb:{vp:.6f} stride:{h.ev_stride} t:{time.perf_counter() - t0:.1f}s")
    if h.ttt:
        vl, vp = eval_ttt(h, dv, net, vt, vb, t0)
        say(f"ttt val_loss:{vl:.6f} val_bpb:{vp:.6f} t:{time.perf_counter() - t0:.1f}s")
    say(f"eval: {amax(time.perf_counter() - t0, dv):.1f}s")
    say(f"final val_loss:{vl:.8f} val_bpb:{vp:.8f}")
    if WS > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
